"""Engines and the weights they load: `blip/` writes captions, `clip/` scores them.

In: a local folder or a hub repository, then pixels and texts. Out: tokens, captions, embeddings. Knows no
stage, no record and no corpus; `training/` reads published weights through the same loaders.
"""
