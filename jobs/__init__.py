"""What a person starts: the command line, runs and their two executors, trainings, benchmarks, the demo."""

import logging

# transformers imports torchao wherever it is installed, and torch 2.15 warns of two of its classes each time.
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
