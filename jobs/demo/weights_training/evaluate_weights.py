"""Judge the demo's weights by the world's own truth, on pictures that no training saw.

    python -m jobs.demo.weights_training.evaluate_weights --num-images 500

The pipeline's own engines caption and score each picture, and the selection keeps the best two; what is counted is
how many of the texts are entirely true.

Legend: N images, C channels, H height, W width.
"""

import argparse
import json
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from jobs.demo.weights_training.models import CAPTIONER_DIR, RANKER_DIR
from jobs.demo.world.alt_texts import AltKind, alt_text
from jobs.demo.world.pictures import demo_images
from jobs.demo.world.responses import ALT_KINDS
from jobs.demo.world.scenes import Scene, true_share
from pipeline.candidates import Candidate
from pipeline.models.blip.captioner import BlipCaptioner
from pipeline.models.clip.ranker import ClipRanker
from pipeline.models.weights import captioner_weights, ranker_weights
from pipeline.stages.selection import select
from pipeline.text import clean_caption
from schemas.config import CaptionConfig, SelectConfig

EVALUATION_SEED = 3
BATCH_SIZE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutImages:
    """Pictures that no training saw, what they show, and what the web says of them."""

    scenes: list[Scene]
    pixels_NCHW: Tensor
    alt_kinds: list[AltKind]
    alt_texts: list[str]

    def true_share(self, texts: Iterable[Iterable[str]], alt_kind: AltKind | None = None) -> float:
        """Return the share of entirely true texts among those of all images, or of those with one kind of alt text."""
        rows = zip(self.scenes, self.alt_kinds, texts, strict=True)
        return true_share(
            (text, scene) for scene, kind, row in rows if alt_kind in (None, kind) for text in row
        )


def held_out_images(num_images: int, seed: int = EVALUATION_SEED) -> HeldOutImages:
    """Make pictures and their alt texts; sets of different seeds share none."""
    pictures = demo_images(num_images, seed)
    rng = random.Random(seed)
    kinds = rng.choices(tuple(ALT_KINDS), tuple(ALT_KINDS.values()), k=num_images)
    return HeldOutImages(
        scenes=pictures.scenes,
        pixels_NCHW=torch.from_numpy(pictures.pixels_NHWC).permute(0, 3, 1, 2).contiguous(),
        alt_kinds=kinds,
        alt_texts=[
            clean_caption(alt_text(scene, kind, rng))
            for scene, kind in zip(pictures.scenes, kinds, strict=True)
        ],
    )


def caption_config(folder: Path, **values: object) -> CaptionConfig:
    """Return the captioner's settings: the world's captions have three words or more, as the demo's recipe says."""
    return CaptionConfig.model_validate(
        {"model": str(folder), "batch_size": BATCH_SIZE, "min_length": 3, **values}
    )


def sample_captions(captioner: BlipCaptioner, images: HeldOutImages) -> list[list[str]]:
    """Sample ten captions of each image."""
    uids = [str(index) for index in range(len(images.scenes))]
    captions: list[list[str]] = []
    for start in range(0, len(uids), BATCH_SIZE):
        part = slice(start, start + BATCH_SIZE)
        tokens = captioner.generate(captioner.load(list(images.pixels_NCHW[part]), uids[part]))
        captions += [
            [clean_caption(caption.text) for caption in row] for row in captioner.decode_text(tokens)
        ]
    return captions


def score_candidates(
    ranker: ClipRanker, images: HeldOutImages, captions: Sequence[Sequence[str]]
) -> list[list[Candidate]]:
    """Return each image's captions and its alt text with their scores."""
    candidates: list[list[Candidate]] = []
    for start in range(0, len(captions), BATCH_SIZE):
        part = slice(start, start + BATCH_SIZE)
        texts = [[*row, alt] for row, alt in zip(captions[part], images.alt_texts[part], strict=True)]
        for row, scores in zip(texts, ranker.score_pixels(images.pixels_NCHW[part], texts), strict=True):
            synthetic = [
                Candidate(origin="synthetic", candidate=index, text=text, score=score.similarity)
                for index, (text, score) in enumerate(zip(row[:-1], scores[:-1], strict=True))
            ]
            web = Candidate(origin="web", candidate=0, text=row[-1], score=scores[-1].similarity)
            candidates.append([*synthetic, web])
    return candidates


def top_two(candidates: Sequence[Candidate]) -> list[str]:
    """Return the texts that the selection keeps of one image's candidates, best first."""
    return [candidate.text for candidate in select(candidates, SelectConfig()).kept]


def evaluate_weights(
    num_images: int = 500,
    seed: int = EVALUATION_SEED,
    captioner_dir: Path = CAPTIONER_DIR,
    ranker_dir: Path = RANKER_DIR,
) -> dict[str, float]:
    """Caption, rank and select held-out pictures; return the shares of entirely true texts, and the seconds taken."""
    images = held_out_images(num_images, seed)
    config = caption_config(captioner_dir)
    captioner = BlipCaptioner(config, captioner_weights(config), seed)
    ranker = ClipRanker(ranker_weights(f"local-dir:{ranker_dir}", ""), "auto", BATCH_SIZE)
    started = time.monotonic()
    captions = sample_captions(captioner, images)
    captioned = time.monotonic()
    kept = [top_two(candidates) for candidates in score_candidates(ranker, images, captions)]
    finished = time.monotonic()
    return {
        "web_true_share": images.true_share([alt] for alt in images.alt_texts),
        "sampled_true_share": images.true_share(captions),
        "top_two_true_share": images.true_share(kept),
        **{f"top_two_true_share_{kind}": images.true_share(kept, kind) for kind in ALT_KINDS},
        "caption_s": captioned - started,
        "rank_s": finished - captioned,
    }


def main() -> None:
    """Print the evaluation as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-images", type=int, default=500)
    parser.add_argument("--captioner", type=Path, default=CAPTIONER_DIR)
    parser.add_argument("--ranker", type=Path, default=RANKER_DIR)
    args = parser.parse_args()
    evaluation = evaluate_weights(args.num_images, captioner_dir=args.captioner, ranker_dir=args.ranker)
    print(json.dumps(evaluation, indent=2))


if __name__ == "__main__":
    main()
