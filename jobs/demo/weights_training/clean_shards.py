"""The captioned pictures that a filter of the demo's size is trained on: WebDataset shards, with true captions alone.

Each sample is as a crawled shard has it, with five captions, as people write them. A shard has every scene of one
background and five colours once, so that the other texts of a training step say nearly the same as an image's own, and
are hardly ever true of it. Among 32 scenes drawn at random one text in 40 is wrong in the size alone.
"""

import io
import itertools
import json
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path

from jobs.demo.world.pictures import Encoding, published, stored
from jobs.demo.world.scenes import (
    BACKGROUND_WORDS,
    COLOUR_WORDS,
    SHAPE_WORDS,
    SIZE_WORDS,
    Scene,
    write_caption,
)

# The pictures of the other trainings and of the evaluations have other seeds.
SEED = 14
CLEAN_CAPTIONS = 5
_COLOURS = 5


def write_clean_shards(folder: Path, num_shards: int) -> None:
    """Write so many shards; those that are there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_shards):
        shard = folder / f"{number:05}.tar"
        if shard.exists():
            continue
        unfinished = shard.with_suffix(".unfinished")
        with tarfile.open(unfinished, "w") as tar:
            for name, data in _members(random.Random(f"{SEED}/{number}")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        unfinished.replace(shard)


def _members(rng: random.Random) -> Iterator[tuple[str, bytes]]:
    for index, scene in enumerate(_scenes(rng)):
        image = stored(published(scene, Encoding.random(rng), rng.getrandbits(32)))
        captions = [write_caption(scene, rng) for _ in range(CLEAN_CAPTIONS)]
        yield f"{index:05}.jpg", image
        yield f"{index:05}.json", json.dumps(captions).encode()


def _scenes(rng: random.Random) -> list[Scene]:
    background = rng.choice(tuple(BACKGROUND_WORDS))
    colours = rng.sample(tuple(COLOUR_WORDS), _COLOURS)
    return [
        Scene(colour=colour, shape=shape, size=size, background=background)
        for colour, shape, size in itertools.product(colours, SHAPE_WORDS, SIZE_WORDS)
    ]
