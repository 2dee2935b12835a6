"""BLIP-2's two stages: their models, training steps and micro-batches.

In: a config, the frozen models and batches. Out: losses and gradients. Knows no checkpoint, corpus or evaluation.
"""
