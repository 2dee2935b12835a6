"""The training loader beside a plain WebDataset loop with LAVIS's transforms, on the same curated shards.

Each has a process of its own and one decoding thread. capfilt's also checks every shard against its record, and its
pixels stay uint8 until they are on the device; the plain loop normalises on the CPU, as LAVIS does.
"""

import json
import random
from collections.abc import Callable, Generator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from jobs.bench.fixtures.corpus import curated_corpus
from jobs.bench.fixtures.machine import Cost, Stopwatch, cost_ratio, cost_summary, costs_by_variant
from jobs.bench.fixtures.pictures import jpegs, mean_bytes
from pipeline.storage.scratch import temporary_folder

_SIZE_PX = (512, 512)
_QUALITY = 85
_ROUNDS = 3
_SHARDS = 4
_BATCH_SIZE = 64


def measure_loader(images: int) -> dict[str, Any]:
    """Load about ``images`` images a round with each loader in turn: whole batches, whole shards."""
    pictures = jpegs(_SIZE_PX, quality=_QUALITY)
    batches = max(1, images // _BATCH_SIZE)
    with temporary_folder() as folder:
        corpus, _ = curated_corpus(folder, _SHARDS, -(-batches * _BATCH_SIZE // _SHARDS), pictures)
        path = corpus.config.corpus.path
        costs = costs_by_variant(
            {"capfilt": partial(_load, _our_batches), "webdataset": partial(_load, _plain_batches)},
            [(path, batches)] * (_ROUNDS + 1),
        )
    capfilt, reference = costs["capfilt"], costs["webdataset"]
    return {
        "images": batches * _BATCH_SIZE,
        "rounds": _ROUNDS,
        "size": "x".join(map(str, _SIZE_PX)),
        "bytes_per_picture": mean_bytes(pictures),
        **{name: cost_summary(rounds) for name, rounds in costs.items()},
        "rate_ratio": cost_ratio("seconds", reference, capfilt),
        "cpu_ratio": cost_ratio("cpu_s", reference, capfilt),
    }


def _load(make_batches: Callable[[str], Generator[int, None, None]], corpus: str, batches: int) -> Cost:
    """Load some batches of an endless loader that has begun; runs in a process of its own."""
    import torch

    torch.set_num_threads(1)
    endless = make_batches(corpus)
    next(endless)
    with Stopwatch() as watch:
        images = sum(islice(endless, batches))
    endless.close()
    return watch.cost(images)


def _our_batches(corpus: str) -> Generator[int, None, None]:
    from schemas.pretrain import PretrainConfig
    from training.data.loader import TrainingData
    from training.data.snapshot import take_snapshot

    config = PretrainConfig.model_validate(
        {
            "run": {"name": "bench", "stage": 1},
            # One shard at a time: each is closed after its last image, and checked anew when it comes again.
            "data": {"corpus": [{"path": corpus}], "workers": 1, "shuffle_shards": 1, "read_ahead": 1},
            "optim": {"batch_size": _BATCH_SIZE},
        }
    )
    for batch in TrainingData(config, take_snapshot(config.data)):
        yield len(batch.pixels_BCHW)


def _plain_batches(corpus: str) -> Generator[int, None, None]:
    """Load as LAVIS's LaionDataset does with blip2_image_train and blip_caption."""
    import webdataset
    from torch.utils.data import DataLoader
    from torchvision import transforms

    from training.data.transforms import blip_caption

    image_train = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                224, scale=(0.5, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
            ),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ]
    )
    # Our own files, by plain paths: webdataset runs a shell for URLs that ask for it.
    tars = sorted(str(path) for path in Path(corpus, "curated").rglob("*.tar"))
    samples = (
        webdataset.WebDataset(tars, shardshuffle=False)
        .repeat()
        .shuffle(1000, initial=1000)
        .decode("pilrgb", only=["jpg"])
        .to_tuple("jpg", "json")
        .map_tuple(image_train, lambda texts: blip_caption(random.choice(json.loads(texts)[:2])))
    )
    for pixels_BCHW, _ in DataLoader(samples, batch_size=_BATCH_SIZE):
        yield len(pixels_BCHW)
