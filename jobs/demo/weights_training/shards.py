"""The pictures and texts that the demo's BLIP is trained on: WebDataset shards as another program would have them.

`web` shards hold scenes at random with the web's texts, half of them wrong, vague or spam. `clean` ones hold five true
captions of each picture, as people write them; such a shard has every scene of one background and five colours once, so
that the other texts of a training step say nearly the same as an image's own, and are hardly ever true of it. Among 32
scenes drawn at random one text in 40 is wrong in the size alone.
"""

import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from jobs.demo.world.alt_texts import alt_text
from jobs.demo.world.pictures import Encoding, published, stored
from jobs.demo.world.responses import ALT_KINDS
from jobs.demo.world.scenes import (
    BACKGROUND_WORDS,
    COLOUR_WORDS,
    SHAPE_WORDS,
    SIZE_WORDS,
    Scene,
    write_caption,
)
from pipeline.shards.shard_files import write_tar
from pipeline.storage.local_files import moved_when_whole
from pipeline.text import clean_caption

# The pictures of the other trainings and of the evaluations have other seeds.
SEED = 14
CLEAN_CAPTIONS = 5
_COLOURS = 5
_IMAGES_OF_WEB_SHARD = 150

# A picture's scene and its texts.
_Described = tuple[Scene, list[str]]


def write_clean_shards(folder: Path, num_shards: int) -> None:
    """Write so many shards of true captions; those that are there are kept."""
    _write_shards(folder, num_shards, _clean)


def write_web_shards(folder: Path, num_shards: int) -> None:
    """Write so many shards of the web's texts; those that are there are kept."""
    _write_shards(folder, num_shards, _web)


def _clean(rng: random.Random) -> Iterator[_Described]:
    background = rng.choice(tuple(BACKGROUND_WORDS))
    colours = rng.sample(tuple(COLOUR_WORDS), _COLOURS)
    for colour, shape, size in itertools.product(colours, SHAPE_WORDS, SIZE_WORDS):
        scene = Scene(colour=colour, shape=shape, size=size, background=background)
        yield scene, [write_caption(scene, rng) for _ in range(CLEAN_CAPTIONS)]


def _web(rng: random.Random) -> Iterator[_Described]:
    for kind in rng.choices(tuple(ALT_KINDS), tuple(ALT_KINDS.values()), k=_IMAGES_OF_WEB_SHARD):
        scene = Scene.random(rng)
        yield scene, [clean_caption(alt_text(scene, kind, rng))]


def _write_shards(
    folder: Path, num_shards: int, describe: Callable[[random.Random], Iterator[_Described]]
) -> None:
    for number in range(num_shards):
        shard = folder / f"{number:05}.tar"
        if shard.exists():
            continue
        rng = random.Random(f"{SEED}/{number}")
        with moved_when_whole(shard) as unfinished:
            write_tar(unfinished, _samples(describe(rng), rng))


def _samples(described: Iterable[_Described], rng: random.Random) -> Iterator[tuple[str, dict[str, bytes]]]:
    for index, (scene, texts) in enumerate(described):
        image = stored(published(scene, Encoding.random(rng), rng.getrandbits(32)))
        yield f"{index:05}", {"jpg": image, "json": json.dumps(texts).encode()}
