"""Lists of image-text pairs in every format: CSV, TSV, JSON, JSON lines, Parquet, plain text, compressed or not.

In: the paths and globs of a config. Out: batches of the columns that the config asks for, each row with its number.
"""
