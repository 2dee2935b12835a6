"""What happens to one shard: crawl, caption, rank, select; and the plan of which shards need it.

In: a shard's committed inputs. Out: its outputs and one record. Stages do not import each other; each runs in
a plain function call, without Ray.
"""
