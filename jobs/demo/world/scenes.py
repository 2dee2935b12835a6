"""The demo world: scenes, and captions whose truth can be checked.

One scene is one object (colour, shape, size) on one background. The grammar
below both writes captions and reads them, so `is_true` decides about any text
without a model: it must parse as a whole, name colour and shape, and every
claim in it must hold.
"""

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields

COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("red", "scarlet"),
    "orange": ("orange",),
    "yellow": ("yellow", "golden"),
    "green": ("green",),
    "blue": ("blue",),
    "purple": ("purple", "violet"),
    "pink": ("pink",),
    "brown": ("brown",),
    "black": ("black",),
    "white": ("white",),
}
SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "heart": ("heart",),
    "cross": ("cross", "plus"),
    "crescent": ("crescent", "moon"),
    "ring": ("ring", "hoop"),
    "diamond": ("diamond", "rhombus"),
    "arrow": ("arrow",),
}
SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium", "average"),
    "large": ("large", "big", "huge"),
}
BACKGROUND_WORDS: dict[str, tuple[str, ...]] = {
    "grass": ("on grass", "on the lawn", "in the meadow"),
    "sand": ("on sand", "on the beach", "in the desert"),
    "snow": ("on snow", "in snow", "in the snow"),
    "water": ("on water", "in the sea", "on the lake"),
    "brick": ("on bricks", "on the brick wall", "against bricks"),
    "wood": ("on wood", "on wooden boards", "on the wooden floor"),
    "night": ("under stars", "at night", "in the night sky"),
    "tiles": ("on tiles", "on the tiled floor", "on checkered tiles"),
}
WORDS_BY_SLOT = {
    "colour": COLOUR_WORDS,
    "shape": SHAPE_WORDS,
    "size": SIZE_WORDS,
    "background": BACKGROUND_WORDS,
}

# No word but "a" comes twice in a caption: BLIP's repetition penalty of 1.1
# would otherwise push the sampler off a true sentence.
TEMPLATES: dict[str, int] = {
    "a {size} {colour} {shape} {background}": 6,
    "a {colour} {shape} {background}": 3,
    "a {size} {colour} {shape}": 2,
    "a {colour} {shape}": 1,
    "one {size} {colour} {shape} {background}": 1,
    "a {size} {colour} {shape} seen {background}": 1,
    "a {size} {shape} painted {colour} {background}": 1,
    "a {shape} that is {colour} and {size} {background}": 2,
    "{background} there is a {size} {colour} {shape}": 2,
    "a picture of a {size} {colour} {shape} {background}": 1,
    "a picture of a {colour} {shape} {background}": 1,
    "a photo of a {size} {colour} {shape}": 1,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One object on one background: all that a caption may speak of."""

    colour: str
    shape: str
    size: str
    background: str

    @staticmethod
    def random(rng: random.Random) -> "Scene":
        """Draw every attribute uniformly."""
        return Scene(**{slot: rng.choice(tuple(words)) for slot, words in WORDS_BY_SLOT.items()})


ATTRIBUTES: tuple[str, ...] = tuple(field.name for field in fields(Scene))


def write_caption(scene: Scene, rng: random.Random, template: str | None = None) -> str:
    """Write a caption that claims of `scene` what the (drawn) template asks for."""
    template = template or rng.choices(tuple(TEMPLATES), tuple(TEMPLATES.values()))[0]
    words = {slot: rng.choice(table[getattr(scene, slot)]) for slot, table in WORDS_BY_SLOT.items()}
    return re.sub(r"\ba(?= [aeiou])", "an", template.format(**words))


def _pattern(template: str) -> re.Pattern[str]:
    slots = {
        slot: f"(?P<{slot}>{'|'.join(word for words in table.values() for word in words)})"
        for slot, table in WORDS_BY_SLOT.items()
    }
    return re.compile(re.sub(r"\ba\b", "an?", template).format(**slots))


_PATTERNS = tuple(_pattern(template) for template in TEMPLATES)
_VALUE_BY_WORD = {
    slot: {word: value for value, words in table.items() for word in words}
    for slot, table in WORDS_BY_SLOT.items()
}


def normalise(text: str) -> str:
    """Lower the case, drop a final full stop, collapse white space."""
    return " ".join(text.lower().split()).removesuffix(".").strip()


def parse(text: str) -> dict[str, str] | None:
    """Read a caption's claims as {attribute: value}; None if the whole text does not parse."""
    plain = normalise(text)
    for pattern in _PATTERNS:
        if match := pattern.fullmatch(plain):
            return {slot: _VALUE_BY_WORD[slot][word] for slot, word in match.groupdict().items()}
    return None


def is_true(text: str, scene: Scene) -> bool:
    """Say whether the whole text parses and every claim holds of `scene`.

    Every template names colour and shape, so vague text and spam are never true.
    """
    claims = parse(text)
    return claims is not None and all(getattr(scene, slot) == value for slot, value in claims.items())


def true_share(described: Iterable[tuple[str, Scene]]) -> float:
    """Return the share of entirely true ones among texts that speak of scenes; 0 of none."""
    verdicts = [is_true(text, scene) for text, scene in described]
    return sum(verdicts) / max(1, len(verdicts))


def vocabulary() -> list[str]:
    """List every word of the grammar, sorted."""
    texts = [re.sub(r"\{\w+\}", " ", template) for template in TEMPLATES]
    texts += [word for table in WORDS_BY_SLOT.values() for words in table.values() for word in words]
    return sorted({word for text in texts for word in text.split()} | {"an"})
