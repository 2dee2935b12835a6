"""Captions as BLIP-2 trains on them: LAVIS's ``blip_caption`` clean-up, and which caption of an image is drawn."""

from collections.abc import Sequence

# The marks that LAVIS replaces with a space; the question mark, commas and apostrophes stay.
_MARKS = str.maketrans(dict.fromkeys('.!"()*#:;~', " "))


class NoCaptionError(Exception):
    """Say that a sample has no caption with a word in it."""


def blip_caption(text: str, max_words: int = 50) -> str:
    """Return the text in lower case, without the marks above, its first words joined by single spaces.

    LAVIS leaves a lone tab or line break inside a caption; here all white space is one space.
    """
    return " ".join(text.lower().translate(_MARKS).split()[:max_words])


def usable_captions(captions: Sequence[str], first: int | None, max_words: int) -> list[str]:
    """Return the cleaned captions that say something, best first. Raises NoCaptionError where none does.

    Args:
        first: consider so many of them (web sources keep the best ones first); None: all, as for the several
            captions that people wrote.
    """
    cleaned = (blip_caption(caption, max_words) for caption in captions[:first])
    if usable := [caption for caption in cleaned if caption]:
        return usable
    raise NoCaptionError("no caption has a word in it")
