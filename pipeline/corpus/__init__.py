"""A corpus as files: storage, shards, records, and the commit that makes a shard's outputs visible.

In: a corpus's path (local, S3, GCS). Out: committed records and the rows and images they commit, checked.
"""
