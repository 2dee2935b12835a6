"""What float8 in the vision towers changes, beside float32 and bfloat16.

It is measured on the demo's world, whose models are small but trained: scores, captions, and what is kept. A CPU
rounds as a GPU does (``pipeline.models.fp8.quantise``); a GPU may sum in a little less than float32. What float8 saves
is measured on a GPU by ``capfilt bench shard --precision fp8``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean, pstdev
from typing import Any

from jobs.bench.fixtures.compute import one_thread
from jobs.demo.weights_training.evaluate_weights import (
    BATCH_SIZE,
    HeldOutImages,
    caption_config,
    held_out_images,
    sample_captions,
    score_candidates,
    top_two,
)
from jobs.demo.weights_training.models import CAPTIONER_DIR, RANKER_DIR
from pipeline.candidates import Candidate
from pipeline.models.blip.captioner import BlipCaptioner
from pipeline.models.clip.ranker import ClipRanker
from pipeline.models.clip.towers import ImageTower
from pipeline.models.device import device_name, worker_device
from pipeline.models.fp8 import quantise, require_fp8, require_torchao
from pipeline.models.weights import captioner_weights, ranker_weights
from schemas.config import InferencePrecision


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """What one precision gives for the demo's images.

    ``scored`` are the candidates of float32 with this precision's scores, ``own`` its own candidates.
    """

    captions: list[list[str]]
    scored: list[list[Candidate]]
    own: list[list[Candidate]]


def measure_fp8(images: int = 500) -> dict[str, Any]:
    """Caption, rank and select the demo's pictures in each precision.

    Raises:
        CapfiltError: torchao is missing, or there is a GPU that does not multiply float8.
    """
    device = worker_device()
    require_torchao("bench fp8")
    on_gpu = device.type == "cuda"
    if on_gpu:
        require_fp8("caption", device)
    held_out = held_out_images(images)
    with one_thread(device):
        fp32 = _results(held_out, "fp32")
        bf16, fp8 = (_results(held_out, precision, fp32) for precision in ("bf16", "fp8"))
    by_precision = {"fp32": fp32, "bf16": bf16, "fp8": fp8}
    return {
        "device": device_name(device),
        "is_emulated": not on_gpu,
        "images": images,
        "captions": sum(map(len, fp32.captions)),
        "score_spread": fmean(pstdev(_scores([row])) for row in fp32.own),
        "sampled_true": {
            name: held_out.true_share(results.captions) for name, results in by_precision.items()
        },
        "kept_true": {
            name: held_out.true_share(map(top_two, results.own)) for name, results in by_precision.items()
        },
        "bf16_from_fp32": changes(bf16, fp32),
        "fp8_from_fp32": changes(fp8, fp32),
        "fp8_from_bf16": changes(fp8, bf16),
    }


def changes(new: Results, old: Results) -> dict[str, float]:
    """Return how far scores are apart, and the shares of images or captions with another outcome.

    ``top_two``: images of which others of the same candidates are kept; ``captions``: of all sampled;
    ``own_top_two``: images of which other texts are kept, each precision having sampled its own.
    """
    differences = [
        abs(after - before) for after, before in zip(_scores(new.scored), _scores(old.scored), strict=True)
    ]
    return {
        "score_mean": fmean(differences),
        "score_max": max(differences),
        "top_two": _share_differing(_kept(new.scored), _kept(old.scored)),
        "captions": _share_differing([*chain(*new.captions)], [*chain(*old.captions)]),
        "own_top_two": _share_differing(_kept(new.own), _kept(old.own)),
    }


def _models(precision: InferencePrecision) -> tuple[BlipCaptioner, ClipRanker]:
    """Load both models; on a CPU, where no run may compute float8, round the towers of bfloat16 models."""
    is_emulated = precision == "fp8" and worker_device().type == "cpu"
    loaded: InferencePrecision = "bf16" if is_emulated else precision
    config = caption_config(CAPTIONER_DIR, precision=loaded)
    captioner = BlipCaptioner(config, captioner_weights(config), seed=0)
    ranker = ClipRanker(ranker_weights(f"local-dir:{RANKER_DIR}", ""), loaded, BATCH_SIZE)
    if is_emulated:
        assert isinstance(ranker.encode_image, ImageTower)
        quantise(captioner.vision.blocks)
        quantise(ranker.encode_image.blocks)
    return captioner, ranker


def _results(images: HeldOutImages, precision: InferencePrecision, fp32: Results | None = None) -> Results:
    """Caption and rank in one precision; ``fp32`` are float32's results, None while these are computed."""
    captioner, ranker = _models(precision)
    captions = sample_captions(captioner, images)
    own = score_candidates(ranker, images, captions)
    scored = score_candidates(ranker, images, fp32.captions) if fp32 else own
    return Results(captions=captions, own=own, scored=scored)


def _scores(rows: Sequence[Sequence[Candidate]]) -> list[float]:
    return [candidate.score for candidate in chain(*rows) if candidate.score is not None]


def _kept(rows: Sequence[Sequence[Candidate]]) -> list[set[str]]:
    return [set(top_two(row)) for row in rows]


def _share_differing(new: Sequence[Any], old: Sequence[Any]) -> float:
    return fmean(after != before for after, before in zip(new, old, strict=True))
