"""Weights from and for other programs: LAVIS's and Hugging Face's BLIP-2 formats, and capfilt's exports.

In: a path to weights. Out: tensors under LAVIS's names, a model ready for evaluation, or a folder that others load.
"""
