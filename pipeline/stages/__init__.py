"""The stages of one shard: their workers, the runner that retries and quarantines, the plan of what is to be done.

In: a shard's committed inputs. Out: its outputs and one record. Stages do not import each other; each runs in
a plain function call, without Ray.
"""
