"""Training of BLIP and BLIP-2 on curated shards, and what is done with the trained models.

In: a config, curated shards, published weights. Out: checkpoints, metrics, exported models.

Packages import downwards only: losses, distributed, checkpoint; data | models; blip | blip2; build; convert; evaluate;
trainer. No package runs a pipeline stage: corpora are read, and only records of runs and checkpoints are added to them.
"""
