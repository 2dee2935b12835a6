"""Scenes that no crawl and no training saw, as a benchmark on disk: ``capfilt evaluate`` reads it like any other."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from jobs.demo.world.pictures import demo_images
from jobs.demo.world.scenes import TEMPLATES, WORDS_BY_SLOT, Scene, write_caption
from training.data.held_out import HeldOut

# The site's pictures have seeds of their own kind, and the models' training had 1 and 2.
SEED = 3
# A caption of these fits one scene only, so that one picture is right.
_FULL = [template for template in TEMPLATES if all(f"{{{slot}}}" in template for slot in WORDS_BY_SLOT)]
ANNOTATIONS = "captions.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutScenes:
    """Different scenes, their pictures, and one true caption each, which names all that can be named."""

    scenes: list[Scene]
    samples: list[HeldOut]


def held_out_scenes(count: int, seed: int = SEED) -> HeldOutScenes:
    """Draw scenes without repetition; equal arguments give equal pictures and captions."""
    pictures = demo_images(count * 5 // 4, seed)
    rng = random.Random(seed)
    samples: dict[Scene, HeldOut] = {}
    for scene, pixels_HWC in zip(pictures.scenes, pictures.pixels_NHWC, strict=True):
        if scene not in samples:
            caption = write_caption(scene, rng, rng.choice(_FULL))
            pixels_CHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1).contiguous()
            samples[scene] = HeldOut(pixels_CHW, [caption], f"{len(samples):04}")
    assert len(samples) >= count, "draw more pictures: too many scenes came twice"
    return HeldOutScenes(scenes=list(samples)[:count], samples=list(samples.values())[:count])


def write_benchmark(held_out: HeldOutScenes, folder: Path) -> None:
    """Write the pictures as PNG and their captions in LAVIS's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    for sample in held_out.samples:
        Image.fromarray(sample.pixels_CHW.permute(1, 2, 0).numpy()).save(folder / f"{sample.uid}.png")
    rows = [{"image": f"{sample.uid}.png", "caption": sample.captions} for sample in held_out.samples]
    (folder / ANNOTATIONS).write_text(json.dumps(rows, indent=1) + "\n")
