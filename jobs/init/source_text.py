"""A ``[[source]]`` of a config that is being written: its keys with their comments, and the sentences about it."""

from dataclasses import dataclass
from typing import Any

# Its name, its value, and a comment or none.
Key = tuple[str, Any, str]


HUMAN: Key = ("kind", "human", "keep its captions as they are; none is sampled")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceText:
    """One ``[[source]]``: its keys, each with a comment or none, what it asks of ``[crawl]``, and how it was found.

    Attributes:
        keys: those of the section, in order.
        hints: keys below them, commented out.
        crawl: keys of [crawl] that this source needs.
        crawl_hints: keys of [crawl], commented out.
        is_fetched: its images come from the web.
        samples: how many rows or images it has; None where that is not known.
        facts: what was seen of it, a sentence each.
        guessed: what was guessed of it, a sentence each.
    """

    keys: tuple[Key, ...]
    hints: tuple[Key, ...] = ()
    crawl: tuple[Key, ...] = ()
    crawl_hints: tuple[Key, ...] = ()
    is_fetched: bool = True
    samples: int | None = None
    facts: tuple[str, ...] = ()
    guessed: tuple[str, ...] = ()
