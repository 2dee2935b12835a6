"""From lists of URLs to url shards: rows are read, merged by URL, numbered for good and committed.

In: the lists that a source names, or folders that img2dataset's command line made. Out: Parquet files of
URLs with their captions, and one intake record each. `lists/` reads the formats.
"""
