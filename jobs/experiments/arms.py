"""What an arm of an experiment keeps of the candidates of each image."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from jobs.demo.world.scenes import Scene, is_true, normalise
from pipeline.candidates import Candidate
from pipeline.stages.selection import select
from schemas.config import SelectConfig

# Of one image's candidates, its scene and a random stream of its own: the texts that are trained on, best first.
Keep = Callable[[Sequence[Candidate], Scene, random.Random], list[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to curate.

    Args:
        what: in a few words, for the table.
        columns: what distinguishes it from the others of its experiment, by column.
    """

    name: str
    what: str
    keep: Keep
    columns: Mapping[str, str | int] | None = None


def web(candidates: Sequence[Candidate], scene: Scene, rng: random.Random) -> list[str]:
    """Keep what the web says."""
    return [candidate.text for candidate in candidates if candidate.origin == "web" and candidate.text][:1]


def first_synthetic(candidates: Sequence[Candidate], scene: Scene, rng: random.Random) -> list[str]:
    """Keep one synthetic caption, unseen: BLIP's captioner without its filter."""
    return _synthetic(candidates, 1)[:1]


def ranked(config: SelectConfig, num_captions: int) -> Keep:
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
