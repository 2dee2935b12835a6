"""A corpus as files: shards, records, and the commit that makes a shard's outputs visible.

In: a corpus's storage, and the files that a stage has built locally. Out: committed records, and the rows and images
they commit, each file checked against its record.

`records` reads and writes the records, `commit` publishes one shard, `fingerprint` tells whether a shard is up to
date. `shard_files` writes and reads tars and Parquet, `tar_samples` finds the samples of anybody's tar;
`shard_reader`, `candidate_rows`, `stored_images` and `checkpoint_files` read what is committed, `garbage_collection`
finds what is not.
"""
