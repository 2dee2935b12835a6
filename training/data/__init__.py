"""Batches of samples from curated shards or WebDataset folders, in an order that depends on the seed alone.

In: the config's corpora. Out: a snapshot of their shards, and for each rank batches of uint8 pixels and captions.
"""
