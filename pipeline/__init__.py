"""What happens to a shard: crawl, caption, rank, select, and its records. Knows neither Ray nor a terminal."""
