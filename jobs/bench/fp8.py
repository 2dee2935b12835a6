"""What float8 in the vision towers changes and what it saves, beside float32 and bfloat16.

What it changes is measured on the demo's world, whose models are small but trained: the scores of the same
captions, which two of them are kept, the captions sampled with the same uniform numbers, and the share of true
ones among what is kept. A CPU rounds as a GPU does (``pipeline.models.fp8.quantise``), so that part needs none; a GPU
may sum in a little less than float32. What it saves is measured on a GPU, at the published sizes.

The legend of the names: N images, C channels, H height, W width.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from jobs.bench.fixtures.compute import one_thread, seconds
from jobs.bench.fixtures.models import blip_large, save_captioner, save_ranker
from jobs.demo.weights_training.evaluate_weights import APPRAISAL_SEED
from jobs.demo.weights_training.models import CAPTIONER_DIR, RANKER_DIR
from jobs.demo.world.alt_texts import alt_text
from jobs.demo.world.pictures import picture_set
from jobs.demo.world.responses import ALT_KINDS
from jobs.demo.world.scenes import Scene, is_true
from pipeline.corpus.scratch import temporary_folder
from pipeline.images.preprocess import Preprocess, normalise
from pipeline.models.blip.captioner import Captioner
from pipeline.models.clip.ranker import Ranker
from pipeline.models.device import device_name, worker_device
from pipeline.models.fp8 import quantise, require_fp8, require_torchao
from pipeline.models.weights import captioner_weights, ranker_weights
from pipeline.stages.selection import Candidate, select
from pipeline.text import clean_caption
from schemas.config import CaptionConfig, InferencePrecision, SelectConfig

M = TypeVar("M", Captioner, Ranker)

_PRECISIONS: tuple[InferencePrecision, ...] = ("fp32", "bf16", "fp8")
_BATCH = 32
# As many as fill a GPU at the published sizes.
_SPEED_BATCH, _SPEED_ROUNDS = 256, 9
_NO_SPEED = "this machine has no GPU that multiplies float8; on a CPU float8 is a rounding, not a gain"


@dataclass(frozen=True, slots=True, kw_only=True)
class _World:
    """Pictures that no training saw, what they show, and what the web says of them."""

    scenes: list[Scene]
    pixels_NCHW: Tensor
    alt_texts: list[str]


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
    world = _world(images)
    outcomes: dict[str, _Outcome] = {}
    with one_thread(device):
        for precision in _PRECISIONS:
            outcomes[precision] = _outcome(world, precision, outcomes.get("fp32"))
    exact = [[one.score for one in row] for row in outcomes["fp32"].own]
    return {
        "device": device_name(device),
        "is_emulated": not on_gpu,
        "images": images,
        "captions": sum(map(len, outcomes["fp32"].captions)),
        "score_spread": fmean(pstdev(row) for row in exact),
        "sampled_true": {name: _true_share(world, each.captions) for name, each in outcomes.items()},
        "kept_true": {name: _true_share(world, map(_top_two, each.own)) for name, each in outcomes.items()},
        "bf16_from_fp32": _changes(outcomes["bf16"], outcomes["fp32"]),
        "fp8_from_fp32": _changes(outcomes["fp8"], outcomes["fp32"]),
        "fp8_from_bf16": _changes(outcomes["fp8"], outcomes["bf16"]),
        "speed": _full_size_speed() if on_gpu else None,
        "speed_missing": "" if on_gpu else _NO_SPEED,
    }


def measure_speed(captioner: Path, ranker: Path, batch: int, rounds: int) -> dict[str, Any]:
    """Time both vision towers in bfloat16 and float8, in turn; the ratio is the median over the rounds."""
    found: dict[str, Any] = {"batch": batch, "rounds": rounds}
    for name, load, folder in (("blip", _captioner, captioner), ("clip", _ranker, ranker)):
        models = {precision: load(folder, precision, batch) for precision in ("bf16", "fp8")}
        runs = {precision: partial(_see, model, batch) for precision, model in models.items()}
        timed: dict[str, list[float]] = {precision: [] for precision in runs}
        for run in runs.values():
            run()  # compiles
        for _ in range(rounds):
            for precision, run in runs.items():
                timed[precision].append(seconds(run, worker_device()))
        found |= {
            f"{name}_images_per_s_{precision}": batch / median(each) for precision, each in timed.items()
        }
        found[f"{name}_ratio"] = median(
            old / new for old, new in zip(timed["bf16"], timed["fp8"], strict=True)
        )
    return found


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


def _captioner(folder: Path, precision: InferencePrecision, batch: int = _BATCH) -> Captioner:
    # The world's captions have 3 words or more, as the demo's recipe says.
    config = CaptionConfig(model=str(folder), precision=_held(precision), batch_size=batch, min_length=3)
    return _lowered(Captioner(config, captioner_weights(config), seed=0), precision)


def _ranker(folder: Path, precision: InferencePrecision, batch: int = _BATCH) -> Ranker:
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


# -- the demo's world ----------------------------------------------------------------------------------------


def _world(images: int) -> _World:
    pictures = picture_set(images, APPRAISAL_SEED)
    rng = random.Random(APPRAISAL_SEED)
    kinds = rng.choices(tuple(ALT_KINDS), tuple(ALT_KINDS.values()), k=images)
    return _World(
        scenes=pictures.scenes,
        pixels_NCHW=torch.from_numpy(pictures.pixels_NHWC).permute(0, 3, 1, 2).contiguous(),
        alt_texts=[
            clean_caption(alt_text(scene, kind, rng))
            for scene, kind in zip(pictures.scenes, kinds, strict=True)
        ],
    )


def _outcome(world: _World, precision: InferencePrecision, exact: _Outcome | None) -> _Outcome:
    """Caption and rank in one precision; ``exact`` is float32's outcome, None while that is being made."""
    captions = _captions(world, precision)
    ranker = _ranker(RANKER_DIR, precision)
    own = _scored(world, ranker, captions)
    return _Outcome(
        captions=captions, own=own, scored=_scored(world, ranker, exact.captions) if exact else own
    )


def _captions(world: _World, precision: InferencePrecision) -> list[list[str]]:
    captioner = _captioner(CAPTIONER_DIR, precision)
    uids = iter(map(str, range(len(world.scenes))))
    captions = []
    for pixels_NCHW in world.pixels_NCHW.split(_BATCH):
        sampled = captioner.generate(captioner.load(list(pixels_NCHW), list(islice(uids, len(pixels_NCHW)))))
        captions += [[clean_caption(each.text) for each in row] for row in captioner.decode_text(sampled)]
    return captions


def _scored(world: _World, ranker: Ranker, captions: Sequence[Sequence[str]]) -> list[list[Candidate]]:
    """Return each image's captions and alt text with their scores."""
    texts = [[*row, alt] for row, alt in zip(captions, world.alt_texts, strict=True)]
    scored = []
    for start in range(0, len(texts), _BATCH):
        part = slice(start, start + _BATCH)
        scored += ranker.score_pixels(world.pixels_NCHW[part], texts[part])
    return [
        [
            Candidate(
                origin="synthetic" if index < len(row) - 1 else "web",
                candidate=index if index < len(row) - 1 else 0,
                text=text,
                score=score.similarity,
            )
            for index, (text, score) in enumerate(zip(row, scores, strict=True))
        ]
        for row, scores in zip(texts, scored, strict=True)
    ]


# -- what differs --------------------------------------------------------------------------------------------


def _changes(new: _Outcome, old: _Outcome) -> dict[str, float]:
    """Return how far scores are apart, and of what share something else came out.

    ``top_two``: images of which others of the same candidates are kept; ``captions``: of all sampled;
    ``own_top_two``: images of which other texts are kept, each precision having sampled its own.
    """
    differences = [abs(one - other) for one, other in zip(_scores(new), _scores(old), strict=True)]
    return {
        "score_mean": fmean(differences),
        "score_max": max(differences),
        "top_two": _share_differing(map(_top_two, new.scored), map(_top_two, old.scored)),
        "captions": _share_differing(chain(*new.captions), chain(*old.captions)),
        "own_top_two": _share_differing(map(_top_two, new.own), map(_top_two, old.own)),
    }


def _scores(outcome: _Outcome) -> list[float]:
    return [one.score for row in outcome.scored for one in row]


def _top_two(candidates: Sequence[Candidate]) -> set[str]:
    return {one.text for one in select(candidates, SelectConfig()).kept}


def _share_differing(new: Iterable[Any], old: Iterable[Any]) -> float:
    return fmean(one != other for one, other in zip(new, old, strict=True))


def _true_share(world: _World, texts: Iterable[Iterable[str]]) -> float:
    """Return the share of entirely true texts among those of all images."""
    return fmean(is_true(text, scene) for scene, row in zip(world.scenes, texts, strict=True) for text in row)
