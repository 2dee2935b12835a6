"""A training run, from its config to its last checkpoint.

In: a config and this rank's place among all ranks. Out: checkpoints, metrics, and records in the corpora.
"""
