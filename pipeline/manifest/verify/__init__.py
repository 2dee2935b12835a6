"""Verification: a corpus compared with its records, and each difference named.

In: records, committed files, the manifest. Out: differences. Writes nothing into the corpus; which shards are done
is noted in the user's cache.

`corpus` goes through the shards and compares them with one another; `shard_check` reads the files of one shard, and
`sql_checks` holds what must be true between them. `selection` says which shards, `progress` which are done.
"""
