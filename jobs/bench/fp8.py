"""What float8 in the vision towers changes and what it saves, beside float32 and bfloat16.

What it changes is measured on the demo's world, whose models are small but trained: the scores of the same
captions, which two of them are kept, the captions sampled with the same uniform numbers, and the share of true
ones among what is kept. A CPU rounds as a GPU does (``pipeline.models.fp8.quantise``), so that part needs none; a GPU
may sum in a little less than float32. What it saves is measured on a GPU, at the published sizes.

The legend of the names: N images, C channels, H height, W width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from jobs.bench.fixtures.compute import in_turn, one_thread
from jobs.bench.fixtures.models import blip_large, save_captioner, save_ranker
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
from pipeline.corpus.scratch import temporary_folder
from pipeline.images.preprocess import Preprocess, normalise
from pipeline.models.blip.captioner import Captioner
from pipeline.models.clip.ranker import Ranker
from pipeline.models.device import device_name, worker_device
from pipeline.models.fp8 import quantise, require_fp8, require_torchao
from pipeline.models.weights import captioner_weights, ranker_weights
from schemas.config import InferencePrecision

M = TypeVar("M", Captioner, Ranker)

_PRECISIONS: tuple[InferencePrecision, ...] = ("fp32", "bf16", "fp8")
# As many as fill a GPU at the published sizes.
_SPEED_BATCH, _SPEED_ROUNDS = 256, 9
_NO_SPEED = "this machine has no GPU that multiplies float8; on a CPU float8 is a rounding, not a gain"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    """What one precision makes of the world, image by image.

    ``scored`` are the candidates of float32 with this precision's scores, ``own`` its own candidates.
    """

    captions: list[list[str]]
    scored: list[list[Candidate]]
    own: list[list[Candidate]]


def measure_fp8(images: int = 500) -> dict[str, Any]:
    """Caption, rank and select the demo's pictures in each precision; on a GPU, time both towers at full size.

    Raises:
        CapfiltError: torchao is missing, or there is a GPU that does not multiply float8.
    """
    device = worker_device()
    require_torchao("bench fp8")
    on_gpu = device.type == "cuda"
    if on_gpu:
        require_fp8("caption", device)
    held_out = held_out_images(images)
    outcomes: dict[str, _Outcome] = {}
    with one_thread(device):
        for precision in _PRECISIONS:
            outcomes[precision] = _outcome(held_out, precision, outcomes.get("fp32"))
    spreads = [pstdev(map(_score, row)) for row in outcomes["fp32"].own]
    return {
        "device": device_name(device),
        "is_emulated": not on_gpu,
        "images": images,
        "captions": sum(map(len, outcomes["fp32"].captions)),
        "score_spread": fmean(spreads),
        "sampled_true": {name: held_out.true_share(outcome.captions) for name, outcome in outcomes.items()},
        "kept_true": {
            name: held_out.true_share(map(top_two, outcome.own)) for name, outcome in outcomes.items()
        },
        "bf16_from_fp32": _changes(outcomes["bf16"], outcomes["fp32"]),
        "fp8_from_fp32": _changes(outcomes["fp8"], outcomes["fp32"]),
        "fp8_from_bf16": _changes(outcomes["fp8"], outcomes["bf16"]),
        "speed": _full_size_speed() if on_gpu else None,
        "speed_missing": "" if on_gpu else _NO_SPEED,
    }


def measure_speed(captioner: Path, ranker: Path, batch: int, rounds: int) -> dict[str, Any]:
    """Time both vision towers in bfloat16 and float8, in turn; the ratio is the median over the rounds."""
    result: dict[str, Any] = {"batch": batch, "rounds": rounds}
    for name, load, folder in (("blip", _captioner, captioner), ("clip", _ranker, ranker)):
        models = {precision: load(folder, precision, batch) for precision in ("bf16", "fp8")}
        runs = {precision: partial(_see, model, batch) for precision, model in models.items()}
        for run in runs.values():
            run()  # compiles
        timed = in_turn(runs, rounds, worker_device())
        result |= {
            f"{name}_images_per_s_{precision}": batch / median(each) for precision, each in timed.items()
        }
        result[f"{name}_ratio"] = median(
            old / new for old, new in zip(timed["bf16"], timed["fp8"], strict=True)
        )
    return result


def _full_size_speed() -> dict[str, Any]:
    with temporary_folder() as folder:
        captioner = save_captioner(blip_large(torch.device("cpu")), folder / "captioner")
        return measure_speed(captioner, save_ranker(folder / "ranker"), _SPEED_BATCH, _SPEED_ROUNDS)


@torch.inference_mode()
def _see(model: Captioner | Ranker, batch: int) -> Tensor:
    """Encode images that are there already, as levels of noise."""
    pixels_NCHW = _noise(model.preprocess, batch).to(model.device)
    return _tower(model)(normalise(pixels_NCHW, model.preprocess, model.dtype))


def _noise(recipe: Preprocess, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, *recipe.size_px), generator=generator, dtype=torch.uint8)


# -- the models in one precision -----------------------------------------------------------------------------


def _captioner(folder: Path, precision: InferencePrecision, batch: int = BATCH_SIZE) -> Captioner:
    config = caption_config(folder, precision=_held(precision), batch_size=batch)
    return _lowered(Captioner(config, captioner_weights(config), seed=0), precision)


def _ranker(folder: Path, precision: InferencePrecision, batch: int = BATCH_SIZE) -> Ranker:
    return _lowered(Ranker(ranker_weights(f"local-dir:{folder}", ""), _held(precision), batch), precision)


def _held(precision: InferencePrecision) -> InferencePrecision:
    """Return what to ask a model for: no run does float8 on a CPU, which ``_lowered`` makes up for."""
    return "bf16" if precision == "fp8" and worker_device().type == "cpu" else precision


def _lowered(model: M, precision: InferencePrecision) -> M:
    if _held(precision) != precision:
        quantise(_tower(model).blocks)
    return model


def _tower(model: Captioner | Ranker) -> nn.Module:
    return model.vision if isinstance(model, Captioner) else model.encode_image


def _outcome(images: HeldOutImages, precision: InferencePrecision, exact: _Outcome | None) -> _Outcome:
    """Caption and rank in one precision; ``exact`` is float32's outcome, None while that is being made."""
    captions = sample_captions(_captioner(CAPTIONER_DIR, precision), images)
    ranker = _ranker(RANKER_DIR, precision)
    own = score_candidates(ranker, images, captions)
    scored = score_candidates(ranker, images, exact.captions) if exact else own
    return _Outcome(captions=captions, own=own, scored=scored)


# -- what differs --------------------------------------------------------------------------------------------


def _changes(new: _Outcome, old: _Outcome) -> dict[str, float]:
    """Return how far scores are apart, and of what share something else came out.

    ``top_two``: images of which others of the same candidates are kept; ``captions``: of all sampled;
    ``own_top_two``: images of which other texts are kept, each precision having sampled its own.
    """
    differences = [abs(after - before) for after, before in zip(_scores(new), _scores(old), strict=True)]
    return {
        "score_mean": fmean(differences),
        "score_max": max(differences),
        "top_two": _share_differing(map(_top_two, new.scored), map(_top_two, old.scored)),
        "captions": _share_differing(chain(*new.captions), chain(*old.captions)),
        "own_top_two": _share_differing(map(_top_two, new.own), map(_top_two, old.own)),
    }


def _scores(outcome: _Outcome) -> list[float]:
    return [_score(candidate) for row in outcome.scored for candidate in row]


def _score(candidate: Candidate) -> float:
    assert candidate.score is not None, "every candidate of the demo's images has a score"
    return candidate.score


def _top_two(candidates: Sequence[Candidate]) -> set[str]:
    return set(top_two(candidates))


def _share_differing(new: Iterable[Any], old: Iterable[Any]) -> float:
    return fmean(after != before for after, before in zip(new, old, strict=True))
