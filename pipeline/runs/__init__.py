"""What a run does: which shards are to be done, and one of them taken through its stages with retries and quarantine.

In: a config and a corpus's records. Out: a plan, and each shard's outcome. Where workers run is not known here.

`plan` compares fingerprints, `survey` reads the records once for a whole run, `preview` counts another selection
before it is made; `runner` runs one shard, `progress` sums what has been done.
"""
