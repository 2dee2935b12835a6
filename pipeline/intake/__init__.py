"""From lists of URLs to url shards: rows are read, merged by URL, numbered permanently and committed.

In: the lists that a source names, folders that img2dataset's command line made, or the reasons of a retry. Out:
Parquet files of URLs with their captions, and one intake record a batch.

`read_lists` and `retries` make a batch each, `url_shard_writer` writes and commits it; `dedup` merges the
rows of one URL; `img2dataset_folders` finds shards to import; `lists/` reads the formats.
"""
