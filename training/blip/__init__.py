"""BLIP's multimodal mixture of encoder and decoder (MED): its model, its momentum encoders and its training step.

In: a config and batches. Out: losses and gradients. Knows no checkpoint, corpus or evaluation.
"""
