"""A training run: from its config to its last checkpoint, step by step, noted in the manifests."""
