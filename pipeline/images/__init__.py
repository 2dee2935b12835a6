"""Image bytes to pixels: headers checked before decoding, decoding within bounds, resizing for each model.

In: bytes. Out: uint8 arrays and normalised tensors, or an `ImageError` with its reason. Imports no shard and no record.
"""
