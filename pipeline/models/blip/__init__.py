"""BLIP's captioner: the vision tower, the text decoder, and ten sampled captions an image from one pass over it."""
