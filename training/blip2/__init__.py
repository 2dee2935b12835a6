"""BLIP-2's two stages: their models, losses and micro-batches."""
