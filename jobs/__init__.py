"""What a person starts: the command line, runs and their two executors, trainings, benchmarks, the demo.

In: a command or a call. Out: a corpus, checkpoints, figures, and what is printed about them.
"""

import logging

# transformers imports torchao wherever it is installed, and torch 2.15 warns of two of its classes each time.
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
