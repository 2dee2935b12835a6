"""One URL fetched safely: allowed addresses, limits per host and in time, and what a site reserves.

In: a URL. Out: one `Fetch`, with the body or a reason. Imports no shard and no record.
"""
