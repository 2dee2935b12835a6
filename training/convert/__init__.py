"""Weights in and out: LAVIS's and Hugging Face's BLIP-2 layouts, and trained models read back for use."""
