"""Batches of samples from curated shards: which shards, in which order, read, checked, decoded and cropped."""
