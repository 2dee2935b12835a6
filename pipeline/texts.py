"""Captions as text: clean-up, equality, length.

The clean-up makes a caption fit to be scored and trained on without changing what it says: case, punctuation
and language stay (LAVIS and CLIP's tokenizer lower-case on their own). The raw text is kept in a column
beside it.
"""

import html
import re
import unicodedata
from collections.abc import Sequence

# Real tags only: "a < b" and "i <3 you" are prose.
_TAG = re.compile(r"<(?:/?[A-Za-z][^<>]*|!--.*?--|![A-Za-z][^<>]*)>", re.DOTALL)

# Format characters that are part of a word or an emoji: zero-width non-joiner and joiner.
_JOINERS = "\u200c\u200d"


def clean_caption(raw: str, prompt: str = "") -> str:
    """Return the text that is scored and kept; empty where nothing is left.

    In this order: HTML entities are decoded (twice, as CLIP's tokenizer does: ``&amp;quot;`` is common in alt
    texts) and tags removed; control characters become spaces; invisible format characters (byte-order marks,
    zero-width spaces, text direction), surrogates and private-use characters go; NFC; runs of white space
    become one space; the prompt at the start, in any case, is cut off.

    Args:
        raw: what the captioner or the list said.
        prompt: the captioner's prompt, which it repeats at the start of each caption.
    """
    text = html.unescape(html.unescape(raw))
    text = _TAG.sub(" ", text)
    text = unicodedata.normalize("NFC", "".join(map(_visible, text)))
    text = " ".join(text.split())
    start = " ".join(prompt.split()).casefold()
    if start and text[: len(start)].casefold() == start:
        rest = text[len(start) :]
        # "a picture of" is no prompt of "a picture often seen".
        if not rest or not rest[0].isalnum():
            text = rest.strip()
    return text


def _visible(character: str) -> str:
    if character in _JOINERS:
        return character
    match unicodedata.category(character):
        case "Cc" | "Zl" | "Zp" | "Zs":
            return " "
        case "Cf" | "Cs" | "Co":
            return ""
        case _:
            return character


def same_text_key(text: str) -> str:
    """Return what two captions have in common when they are the same caption: the text without its case.

    BLIP's captions are lower case, and LAVIS and CLIP's tokenizer lower-case what they read: "A red car" from
    the web and "a red car" from the captioner would be one caption twice.
    """
    return text.casefold()


def mark_duplicates(texts: Sequence[str]) -> list[int | None]:
    """Return, for each cleaned text, the index of the first earlier one that is the same, or None.

    Sameness is that of ``same_text_key``. Empty texts are nobody's duplicate.
    """
    first: dict[str, int] = {}
    marks: list[int | None] = []
    for index, text in enumerate(texts):
        earlier = first.setdefault(same_text_key(text), index) if text else index
        marks.append(None if earlier == index else earlier)
    return marks


def count_words(text: str) -> int:
    """Return the number of words, as white space divides them."""
    return len(text.split())
