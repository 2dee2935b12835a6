"""The alt texts of the demo's web: true, wrong, vague, or spam."""

import random
from dataclasses import replace
from typing import Literal

from jobs.demo.world.scenes import ATTRIBUTES, WORDS_BY_SLOT, Scene, write_caption

AltKind = Literal["true", "wrong", "vague", "spam"]

_VAGUE = (
    "a nice picture",
    "image",
    "photo",
    "a beautiful {shape}",
    "a {shape}",
    "a {shape} {background}",
    "something {colour}",
    "a {colour} thing {background}",
    "a {size} object",
    "my favourite {shape} of the day",
    "untitled",
    "a picture",
    "look at this",
    "a shape {background}",
    "nice {colour} colours",
    "a {size} {shape} {background}",
    "view {background}",
)
_SPAM = (
    "IMG_{number}.JPG",
    "DSC{number}.jpg",
    "Buy {shape} online | best price ${price}",
    "{colour} {shape} stock photo, royalty free vector #{number}",
    "FREE SHIPPING! {colour} {shape} sticker {price} EUR",
    "{year}-0{digit}-1{digit}",
    "click here for more {shape} wallpapers",
    "thumbnail {number} x {number}",
    "{shape}, {colour}, {size}, hd wallpaper, 4k, download",
    "Top 10 {shape} ideas of {year}",
    "logo_final_v{digit}.png",
    "a {colour} {shape} - {price}% off today only",
    "best {size} {colour} {shape} deals {year}",
    "share on facebook",
)


def wrong_scene(scene: Scene, rng: random.Random, slots: tuple[str, ...] = ATTRIBUTES) -> Scene:
    """Change one of `slots`, and each of the others with one chance in five."""
    certain = rng.choice(slots)
    changed = {
        slot: rng.choice([value for value in WORDS_BY_SLOT[slot] if value != getattr(scene, slot)])
        for slot in slots
        if slot == certain or rng.random() < 0.2
    }
    return replace(scene, **changed)


def wrong_caption(scene: Scene, rng: random.Random) -> str:
    """Write a caption with at least one false claim."""
    # Colour and shape are in every template; size and background are claimed
    # by this one, so a change of any of them shows.
    template = rng.choice(
        (
            "a {size} {colour} {shape} {background}",
            "a {shape} that is {colour} and {size} {background}",
            "{background} there is a {size} {colour} {shape}",
            "a {colour} {shape} {background}",
            "a {size} {colour} {shape}",
            "a {colour} {shape}",
        )
    )
    claimed = tuple(slot for slot in ATTRIBUTES if f"{{{slot}}}" in template)
    return write_caption(wrong_scene(scene, rng, claimed), rng, template)


def _fill(template: str, scene: Scene, rng: random.Random) -> str:
    words = {slot: rng.choice(table[getattr(scene, slot)]) for slot, table in WORDS_BY_SLOT.items()}
    return template.format(
        **words,
        number=rng.randint(1000, 9999),
        price=rng.randint(5, 95),
        year=rng.randint(2009, 2024),
        digit=rng.randint(1, 9),
    )


def alt_text(scene: Scene, kind: AltKind, rng: random.Random) -> str:
    """Write one alt text of the given kind for a picture of `scene`."""
    match kind:
        case "true":
            text = write_caption(scene, rng)
        case "wrong":
            text = wrong_caption(scene, rng)
        case "vague":
            return _fill(rng.choice(_VAGUE), scene, rng)
        case "spam":
            return _fill(rng.choice(_SPAM), scene, rng)
    # People write sentences, with or without a capital and a full stop.
    if rng.random() < 0.4:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.25 else text
