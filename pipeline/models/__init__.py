"""Engines and the weights they load: `blip/` writes captions, `clip/` scores them, `files/` finds their files.

In: a local folder or a hub repository, then pixels and texts. Out: tokens, captions, embeddings, scores. Imports no
stage, no record and no storage; `training/` reads published weights through the same loaders.
"""
