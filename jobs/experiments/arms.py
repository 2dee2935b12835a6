"""What an arm of an experiment keeps of the candidates of each image."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from jobs.demo.world.scenes import Scene, is_true, normalise
from jobs.experiments.judges import Train
from pipeline.candidates import Candidate
from pipeline.stages.selection import select
from schemas.config import SelectConfig

# Of one image's candidates, its scene and a random stream of its own: the texts that are trained on, best first.
Keep = Callable[[Sequence[Candidate], Scene, random.Random], list[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A corpus of the demo world that arms choose from, by how its captions were made.

    Args:
        folder: of the corpus, beside those of the others.
        caption: overrides of ``[caption]``.
        beam_search: in place of nucleus sampling.
    """

    folder: str
    caption: tuple[str, ...] = ()
    beam_search: bool = False


BASE = Variant(folder="corpus")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to curate or to train.

    Args:
        what: in a few words, for the page.
        keep: None where the training makes its own corpus.
        corpus: the one that it chooses from.
        filtered: ``keep`` asks the filter.
        trained: a model is trained on what it keeps, unless ``--arm`` says otherwise.
        train: how, where it is not the experiment's usual way.
        after: the arm whose training with the same seed this one's goes on from.
        columns: what distinguishes it from the others of its experiment, by column.
    """

    name: str
    what: str
    keep: Keep | None = None
    corpus: Variant = BASE
    filtered: bool = False
    trained: bool = True
    train: Train | None = None
    after: str = ""
    columns: Mapping[str, str | int] | None = None


def web(candidates: Sequence[Candidate], scene: Scene, rng: random.Random) -> list[str]:
    """Keep what the web says."""
    return [candidate.text for candidate in candidates if candidate.origin == "web" and candidate.text][:1]


def first_synthetic(candidates: Sequence[Candidate], scene: Scene, rng: random.Random) -> list[str]:
    """Keep one synthetic caption, unseen: BLIP's captioner without its filter."""
    return _synthetic(candidates, 1)[:1]


def all_synthetic(num_captions: int) -> Keep:
    """Return what the captioner writes: its first captions, those that came twice twice."""

    def keep(candidates: Sequence[Candidate], scene: Scene, rng: random.Random) -> list[str]:
        return _synthetic(candidates, num_captions)

    return keep


def selected(config: SelectConfig, num_captions: int) -> Keep:
    """Return what ``[select]`` keeps of the web's text and the first ``num_captions`` synthetic ones."""

    def keep(candidates: Sequence[Candidate], scene: Scene, rng: random.Random) -> list[str]:
        seen = [each for each in candidates if each.origin != "synthetic" or each.candidate < num_captions]
        return [candidate.text for candidate in select(seen, config).kept]

    return keep


def at_random(kept: int, num_captions: int) -> Keep:
    """Return the floor: as many distinct texts as ranking keeps, chosen without looking."""

    def keep(candidates: Sequence[Candidate], scene: Scene, rng: random.Random) -> list[str]:
        texts = _distinct([*web(candidates, scene, rng), *_synthetic(candidates, num_captions)])
        return rng.sample(texts, min(kept, len(texts)))

    return keep


def by_truth(kept: int, num_captions: int) -> Keep:
    """Return the ceiling: of the same texts, those that are entirely true, the ones that say most first."""

    def keep(candidates: Sequence[Candidate], scene: Scene, rng: random.Random) -> list[str]:
        texts = _distinct([*web(candidates, scene, rng), *_synthetic(candidates, num_captions)])
        true = [text for text in texts if is_true(text, scene)]
        return sorted(true, key=lambda text: -len(text.split()))[:kept]

    return keep


def _synthetic(candidates: Iterable[Candidate], num_captions: int) -> list[str]:
    return [
        candidate.text
        for candidate in candidates
        if candidate.origin == "synthetic" and candidate.candidate < num_captions and candidate.text
    ]


def _distinct(texts: Iterable[str]) -> list[str]:
    return list({normalise(text): text for text in reversed([*texts])}.values())[::-1]


# -- those that several experiments have ------------------------------------------------------------------------------

_CLIP, _ITM = SelectConfig(), SelectConfig.model_validate({"by": "itm"})
WEB = Arm(name="web", what="the web's text", keep=web)
RANDOM = Arm(name="random", what="two of the ten and the web's, at random", keep=at_random(2, 10))
RANKED = Arm(name="ranked", what="CLIP's best two of the ten and the web's", keep=selected(_CLIP, 10))
ORACLE = Arm(name="oracle", what="two true ones of the ten and the web's", keep=by_truth(2, 10))
FILTERED = Arm(
    name="filtered", what="the web's text, where the filter says match", keep=selected(_ITM, 0), filtered=True
)
CAPFILT = Arm(
    name="captioned-filtered",
    what="one synthetic caption and the web's, each where the filter says match",
    keep=selected(_ITM, 1),
    filtered=True,
)
