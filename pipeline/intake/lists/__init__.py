"""Lists of image-text pairs in every format: CSV, TSV, JSON, JSON lines, Parquet, plain text, compressed or not.

In: the paths and globs of a config. Out: batches of the columns that the config asks for, each row with its
number.

`files` finds the lists and picks the format; `text_rows`, `json_rows` and `parquet_rows` read one each, over
the bounded `lines`; `columns` says which columns are needed and explains those that are missing.
"""
