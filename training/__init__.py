"""What happens to a model: BLIP-2 pretraining on curated shards."""
