"""Captions as text: clean-up, equality, length; and durations as people read them.

The clean-up makes a caption fit to be scored and trained on without changing what it says: case, punctuation
and language stay (LAVIS and CLIP's tokenizer lower-case on their own). The raw text is kept in a column
beside it.
"""

import html
import re
import unicodedata
from collections.abc import Collection, Sequence

# Far beyond the context of CLIP, BLIP and a Q-Former; bounds the time of the clean-up.
_MAX_CHARACTERS = 20_000
# A comment ends before the next one begins: else a text of many "<!--" would take quadratic time.
_COMMENT = re.compile(r"<!--(?:(?!<!--|-->).)*-->|<[!?][A-Za-z][^<>]*>", re.DOTALL)
# "a < b" and "i <3 you" are prose.
_BRACKETS = re.compile(r"<(/?)([A-Za-z][^<>]*)>")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]*(?::[A-Za-z0-9-]+)?(?=[\s/]|$)")
_CLOSING = re.compile(r"</([A-Za-z][A-Za-z0-9:-]*)")
_HTML = (
    "a abbr acronym address applet area article aside audio b base basefont bdi bdo bgsound big blink blockquote "
    "body br button canvas caption center cite code col colgroup data datalist dd del details dfn "
    "dialog dir div dl dt em embed fieldset figcaption figure font footer form frame frameset h1 h2 h3 h4 "
    "h5 h6 head header hgroup hr html i iframe img input ins isindex kbd keygen label legend li link listing "
    "main map mark marquee math menu menuitem meta meter multicol nav nextid nobr noembed noframes noscript object "
    "ol optgroup option output p param path picture plaintext pre progress q rb rp rt rtc ruby s samp script search "
    "section select slot small source span strike strong style sub summary sup svg table tbody td "
    "template textarea tfoot th thead time title tr track tt u ul var video wbr xmp"
)
_ELEMENTS = frozenset(_HTML.split())

# Format characters that are part of a word or an emoji: zero-width non-joiner and joiner.
_JOINERS = "\u200c\u200d"


def clean_caption(raw: str, prompt: str = "") -> str:
    """Return the text that is scored and kept; empty where nothing is left.

    In this order: a text of more than 20,000 characters is cut; HTML entities are decoded (twice, as CLIP's
    tokenizer does: ``&amp;quot;`` is common in alt texts); HTML tags and comments are removed, while other
    words in angle brackets stay, as CC12M's ``<PERSON>`` does ("person"); control characters become spaces;
    invisible format characters (byte-order marks, zero-width spaces, text direction), surrogates and
    private-use characters go; NFC; runs of white space become one space; the prompt at the start, in any case,
    is cut off.

    Args:
        raw: text of the captioner or of the list.
        prompt: the captioner's prompt, which it repeats at the start of each caption.
    """
    text = html.unescape(html.unescape(raw[:_MAX_CHARACTERS]))
    if "<" in text:
        text = _without_markup(_COMMENT.sub(" ", text))
    text = unicodedata.normalize("NFC", "".join(map(_visible, text)))
    text = " ".join(text.split())
    start = " ".join(prompt.split()).casefold()
    if start and text[: len(start)].casefold() == start:
        rest = text[len(start) :]
        # The prompt "a picture of" does not begin "a picture often seen".
        if not rest or not rest[0].isalnum():
            text = rest.strip()
    return text


def _without_markup(text: str) -> str:
    """Remove tags, and the brackets of whatever else stands in angle brackets."""
    closed = {name.lower() for name in _CLOSING.findall(text)}

    def words(match: re.Match[str]) -> str:
        inside = match[2]
        if match[1] or _is_tag(inside, closed):
            return " "
        # A placeholder is written in capitals, where the captions around it have words.
        word = inside.lower() if inside.isupper() else inside
        before, after = text[max(match.start() - 1, 0) : match.start()], text[match.end() : match.end() + 1]
        return f"{' ' if before.isalnum() else ''}{word}{' ' if after.isalnum() or after == '<' else ''}"

    return _BRACKETS.sub(words, text)


def _is_tag(inside: str, closed: Collection[str]) -> bool:
    """Tell a tag: an HTML element, one with a namespace (Word's ``o:p``) or attributes, or one that is closed."""
    name = _NAME.match(inside)
    if inside.endswith("/") or (name and "=" in inside):
        return True
    return name is not None and (":" in name[0] or name[0].lower() in _ELEMENTS or name[0].lower() in closed)


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

    Sameness is that of ``same_text_key``. An empty text is not a duplicate.
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


def readable_duration(seconds: float) -> str:
    """Return hours and minutes, minutes and seconds, or seconds: ``2h05m``, ``1m20s``, ``9s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
