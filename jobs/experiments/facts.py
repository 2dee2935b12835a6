"""What can be said of an arm's texts without training: the world knows which are true."""

import statistics
from collections.abc import Iterable, Sequence

from jobs.demo.world.scenes import ATTRIBUTES, Scene, normalise, parse, true_share

Facts = dict[str, float | int]


def facts_of(kept: Iterable[tuple[Sequence[str], Scene]]) -> Facts:
    """Judge the texts of each image of which some are kept.

    ``true_share`` is of texts that parse as a whole and make true claims alone; ``distinct_share`` the number of
    distinct texts by that of all; ``an_image`` the mean number of distinct texts of an image; ``colour_true`` and so
    on the share of true claims among the texts that parse and make one (0 where none does).
    """
    images = [(texts, scene) for texts, scene in kept if texts]
    texts = [(text, scene) for of_image, scene in images for text in of_image]
    distinct = [len({normalise(text) for text in of_image}) for of_image, _ in images]
    parsed = [(claims, scene) for text, scene in texts if (claims := parse(text)) is not None]
    return {
        "images": len(images),
        "texts": len(texts),
        "an_image": statistics.fmean(distinct) if distinct else 0.0,
        "true_share": true_share(texts),
        "distinct_share": len({normalise(text) for text, _ in texts}) / max(1, len(texts)),
        "words": sum(len(text.split()) for text, _ in texts) / max(1, len(texts)),
        "parsed_share": len(parsed) / max(1, len(texts)),
        **{
            f"{name}_true": _share(
                claims[name] == getattr(scene, name) for claims, scene in parsed if name in claims
            )
            for name in ATTRIBUTES
        },
    }


def _share(verdicts: Iterable[bool]) -> float:
    given = list(verdicts)
    return sum(given) / max(1, len(given))
