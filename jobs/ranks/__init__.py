"""The ranks of a training: one process each, started on this machine or by torchrun and srun, and started again.

In: a config and the run's id. Out: the outcome of each rank. On a Ray cluster, ``jobs.cluster.train`` places them.
"""
