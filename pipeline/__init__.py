"""What happens to a shard: storage, records, crawl, caption, rank, select, manifest. Knows neither Ray nor a terminal."""
