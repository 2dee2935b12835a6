"""One URL fetched safely: which addresses may be asked, how often, for how long, and what a site forbids.

In: a URL. Out: one outcome, the bytes or a reason. Knows nothing of shards or records.
"""
