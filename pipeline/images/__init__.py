"""Image bytes to pixels: judged before they are decoded, decoded within bounds, resized for each model.

In: bytes. Out: uint8 arrays and normalised tensors. Knows nothing of shards or records.
"""
