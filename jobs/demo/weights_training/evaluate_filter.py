"""Judge a filter of the demo's size by the world's own truth, on pictures that no training saw.

    python -m jobs.demo.weights_training.evaluate_filter FOLDER --num-images 500

The filter sees what it sees in a corpus: of each picture the web's text and ten captions by the demo's captioner. A
text is kept where its match probability reaches ``[select] min_match``.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from jobs.demo.weights_training.evaluate_weights import (
    BATCH_SIZE,
    EVALUATION_SEED,
    HeldOutImages,
    caption_config,
    held_out_images,
    sample_captions,
)
from jobs.demo.weights_training.models import CAPTIONER_DIR
from jobs.demo.world.scenes import is_true
from pipeline.models.blip.captioner import BlipCaptioner
from pipeline.models.blip.matcher import Matcher
from pipeline.models.weights import captioner_weights, filter_weights
from schemas.config import FilterConfig, SelectConfig

FirstToken = Literal["encoder", "cls"]


def match_probabilities(
    folder: Path, images: HeldOutImages, texts: Sequence[Sequence[str]], first_token: FirstToken = "encoder"
) -> list[list[float]]:
    """Return the match probability of every text of every image."""
    config = FilterConfig(model=str(folder), max_tokens=16, batch_size=BATCH_SIZE, first_token=first_token)
    matcher = Matcher(config, filter_weights(config))
    probabilities: list[list[float]] = []
    for start in range(0, len(texts), BATCH_SIZE):
        part = slice(start, start + BATCH_SIZE)
        probabilities += matcher.match(images.pixels_NCHW[part], texts[part])
    return probabilities


def filter_figures(is_true_T: np.ndarray, probability_T: np.ndarray) -> dict[str, float]:
    """Return the share of true texts among the kept ones, the share of true texts that are kept, and the AUC."""
    kept_T = probability_T >= SelectConfig().min_match
    return {
        "true_before": float(is_true_T.mean()),
        "kept": float(kept_T.mean()),
        "true_of_kept": float(is_true_T[kept_T].mean()) if kept_T.any() else 0.0,
        "kept_of_true": float(kept_T[is_true_T].mean()),
        "auc": _auc(is_true_T, probability_T),
    }


def _auc(is_true_T: np.ndarray, probability_T: np.ndarray) -> float:
    """Return the probability that a true text has more than a false one; equal ones count half."""
    false_sorted = np.sort(probability_T[~is_true_T])
    below, up_to = (
        np.searchsorted(false_sorted, probability_T[is_true_T], side) for side in ("left", "right")
    )
    return float((below + up_to).mean() / (2 * len(false_sorted)))


def evaluate_filter(
    folder: Path, num_images: int = 500, seed: int = EVALUATION_SEED, first_token: FirstToken = "encoder"
) -> dict[str, dict[str, float]]:
    """Caption and filter held-out pictures; return the figures of all texts, of the web's and of the captioner's."""
    images = held_out_images(num_images, seed)
    config = caption_config(CAPTIONER_DIR)
    captions = sample_captions(BlipCaptioner(config, captioner_weights(config), seed), images)
    texts = [[alt, *row] for alt, row in zip(images.alt_texts, captions, strict=True)]
    probability_NK = np.array(match_probabilities(folder, images, texts, first_token))
    is_true_NK = np.array(
        [[is_true(text, scene) for text in row] for row, scene in zip(texts, images.scenes, strict=True)]
    )
    columns = {"all": slice(None), "web": slice(0, 1), "captions": slice(1, None)}
    return {
        name: filter_figures(is_true_NK[:, part].ravel(), probability_NK[:, part].ravel())
        for name, part in columns.items()
    }


def main() -> None:
    """Print the evaluation as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a filter as `capfilt export` writes it")
    parser.add_argument("--num-images", type=int, default=500)
    parser.add_argument(
        "--first-token", choices=get_args(FirstToken), default="encoder", help="as filter.first_token"
    )
    args = parser.parse_args()
    figures = evaluate_filter(args.folder, args.num_images, first_token=args.first_token)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
