"""BLIP: `captioner` is the engine; `vision` and `decoder` are its two models, `generation` and `nucleus` the sampling.

In: encoded or prepared images and their uids. Out: ten sampled captions an image. `vision` (image features, and the
keys and values that text layers read of them) also serves models other than the captioner.
"""
