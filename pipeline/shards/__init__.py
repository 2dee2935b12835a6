"""The files of a shard: its tar and its table, who its samples are, and reading both as one.

In: a committed shard's record, or samples to write. Out: samples with their rows. What a record is, `pipeline.corpus`
knows, which this package stands on; only `pipeline.stages`, `lineage` and what reads whole corpora stand above.
"""
