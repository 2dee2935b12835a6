"""A corpus as files: shards, records, and the commit that makes a shard's outputs visible.

In: a corpus's storage, and the files that a stage has built locally. Out: committed records, each file with its digest.

`records` reads and writes the records, `commit` publishes one shard, `fingerprint` tells whether a shard is up to
date. `checkpoint_files` reads what a training has committed, `garbage_collection` finds what nothing has. The files of
a shard are in `pipeline.shards`.
"""
