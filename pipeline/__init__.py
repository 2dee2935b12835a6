"""What happens to a shard: crawl, caption, rank, select, and its records. Knows neither Ray nor a terminal."""

import logging

# transformers imports torchao wherever it is installed, and torch 2.15 warns of two of its classes each time.
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
