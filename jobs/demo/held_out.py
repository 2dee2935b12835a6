"""Scenes that no crawl and no training saw, as a benchmark on disk: ``capfilt evaluate`` reads it like any other."""

import itertools
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from jobs.demo.world.pictures import demo_picture
from jobs.demo.world.scenes import TEMPLATES, WORDS_BY_SLOT, Scene, true_share, write_caption
from training.data.held_out import HeldOut

# The site's pictures have seeds of their own kind, and the models' training had 1 and 2.
SEED = 3
# A caption of these fits one scene only, so that one picture is right.
_FULL = [template for template in TEMPLATES if all(f"{{{slot}}}" in template for slot in WORDS_BY_SLOT)]
ANNOTATIONS = "captions.json"
# Of the world's 2,400: the last ones would take very many pictures to come.
MOST_SCENES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutScenes:
    """Different scenes, their pictures, and one true caption each, which names all that can be named."""

    scenes: list[Scene]
    samples: list[HeldOut]

    @property
    def captions(self) -> list[str]:
        """The caption of each picture."""
        return [sample.captions[0] for sample in self.samples]

    @property
    def pixels_NCHW(self) -> Tensor:
        """All pictures, uint8."""
        return torch.stack([sample.pixels_CHW for sample in self.samples])

    def true_share(self, written: Iterable[str]) -> float:
        """Return the share of entirely true ones among texts, one written of each picture."""
        return true_share(zip(written, self.scenes, strict=True))


def held_out_scenes(
    count: int, seed: int = SEED, draw: Callable[[int, int], tuple[Scene, np.ndarray]] = demo_picture
) -> HeldOutScenes:
    """Draw scenes without repetition; of an equal seed, more begin with the same pictures and captions.

    Args:
        draw: makes the picture of a number and a seed.
    """
    assert count <= MOST_SCENES, f"{count} scenes are too many to draw"
    rng = random.Random(seed)
    samples: dict[Scene, HeldOut] = {}
    indices = itertools.count()
    while len(samples) < count:
        scene, pixels_HWC = draw(next(indices), seed)
        if scene in samples:
            continue
        caption = write_caption(scene, rng, rng.choice(_FULL))
        pixels_CHW = torch.tensor(pixels_HWC).permute(2, 0, 1).contiguous()
        samples[scene] = HeldOut(pixels_CHW, [caption], f"{len(samples):04}")
    return HeldOutScenes(scenes=list(samples), samples=list(samples.values()))


def write_benchmark(held_out: HeldOutScenes, folder: Path) -> None:
    """Write the pictures as PNG and their captions in LAVIS's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    for sample in held_out.samples:
        Image.fromarray(sample.pixels_CHW.permute(1, 2, 0).numpy()).save(folder / f"{sample.uid}.png")
    rows = [{"image": f"{sample.uid}.png", "caption": sample.captions} for sample in held_out.samples]
    (folder / ANNOTATIONS).write_text(json.dumps(rows, indent=1) + "\n")
