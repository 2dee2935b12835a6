"""What happens to a shard: crawl, caption, rank, filter, select, and its records. Knows neither Ray nor a terminal.

In: a config, lists of URLs or folders of images, model weights. Out: a corpus: shards, records and the SQL over them.
"""
