"""A ``[[source]]`` of a config that is being written: its keys with their comments, and the sentences about it."""

from dataclasses import dataclass
from typing import Any

# Its name, its value, and a comment or none.
Key = tuple[str, Any, str]


HUMAN: Key = ("kind", "human", "keep its captions as they are; none is sampled")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceText:
    """One ``[[source]]``: its keys, each with a comment or none, and what it asks of ``[crawl]``.

    Attributes:
        keys: those of the section, in order.
        hints: keys below them, commented out.
        crawl: keys of [crawl] that this source needs.
        crawl_hints: keys of [crawl], commented out.
        is_fetched: its images come from the web.
        samples: how many rows or images it has; None where that is not known.
    """

    keys: tuple[Key, ...]
    hints: tuple[Key, ...] = ()
    crawl: tuple[Key, ...] = ()
    crawl_hints: tuple[Key, ...] = ()
    is_fetched: bool = True
    samples: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribedSource:
    """A source with its facts and its guesses, a sentence each."""

    source: SourceText
    facts: tuple[str, ...]
    guessed: tuple[str, ...]
