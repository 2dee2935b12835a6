"""What a grid shows: filters, order and page, as the query of an address holds them and as SQL.

Every value comes from an address that anyone may write: a name that is not known, or a value that does not fit, is an
error in words, and text enters SQL as a quoted literal.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Self
from urllib.parse import urlencode

from schemas.catalog.sql_text import quote
from schemas.errors import CapfiltError, did_you_mean
from schemas.names import printable

PAGE_CARDS = 60
# What an image is: everything else gave none.
HAS_IMAGE = "status IN ('kept', 'dropped', 'ok')"
_MAX_VALUE, _MAX_PAGE = 300, 100_000
_RANGE = re.compile(r"(-?\d{1,12}(?:\.\d{1,12})?)?\.\.(-?\d{1,12}(?:\.\d{1,12})?)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Filter:
    """One filter: what a form calls it, its condition in SQL, and the values it takes, if only some."""

    label: str
    condition: Callable[[str], str]
    values: tuple[str, ...] = ()


def _equals(column: str) -> Callable[[str], str]:
    return lambda value: f"{column} = {quote(value)}"


def _between(column: str) -> Callable[[str], str]:
    return lambda value: " AND ".join(_limits(column, value))


def _any_caption(table: str, origin: str = "") -> Callable[[str], str]:
    """Return the condition that one of an image's captions has a score in a range."""
    of_origin = f"origin = {quote(origin)} AND " if origin else ""
    return lambda value: (
        f"uid IN (SELECT uid FROM {table} WHERE {of_origin}{' AND '.join(_limits('score', value))})"
    )


def _limits(column: str, value: str) -> list[str]:
    """Return the conditions of ``LOW..HIGH``, the upper limit left out; ``..`` alone asks for any value."""
    match = _RANGE.fullmatch(value)
    if match is None:
        raise CapfiltError(
            f"{value!r} is not a range: LOW..HIGH, either may be left out, as in 0.2..0.3 or 0.2.."
        )
    limits = [
        f"{column} {sign} {limit}" for sign, limit in zip((">=", "<"), match.groups(), strict=True) if limit
    ]
    return limits or [f"{column} IS NOT NULL"]


def _words(texts: str) -> Callable[[str], str]:
    return lambda value: " AND ".join(
        f"contains(lower({texts}), {quote(word.lower())})" for word in value.split()
    )


# A URL that gave nothing has no sha256: what is not known is not marked.
_MARKED = " OR ".join(
    f"coalesce({column}, '') IN (SELECT value FROM marks WHERE undone_at IS NULL AND named_by = '{column}')"
    for column in ("uid", "url", "host", "sha256")
)
_KEPT_TEXT = "array_to_string(captions, ' ')"

FILTERS: dict[str, Filter] = {
    "source": Filter("source", _equals("source")),
    "shard": Filter("shard", _equals("shard")),
    "host": Filter("host", _equals("host")),
    "status": Filter("status", _equals("status")),
    "reason": Filter("reason", _equals("reason")),
    "image": Filter("has an image", lambda value: HAS_IMAGE if value == "yes" else f"NOT {HAS_IMAGE}", ("yes", "no")),
    "origin": Filter("best kept caption is", _equals("origin"), ("synthetic", "web", "human")),
    "words": Filter("words in kept captions", _words(_KEPT_TEXT)),
    "said": Filter(
        "words in any caption",
        lambda value: f"uid IN (SELECT uid FROM candidates WHERE {_words('text')(value)})",
    ),
    "score": Filter("best score", _between("score")),
    "web": Filter("score of a web caption", _any_caption("candidates", "web")),
    "synthetic": Filter("score of a synthetic caption", _any_caption("candidates", "synthetic")),
    "kept": Filter("score of a kept caption", _any_caption("kept_captions")),
    "human": Filter("score of a human caption", _any_caption("candidates", "human")),
    "lead": Filter("web less synthetic", _between("lead")),
    "margin": Filter("margin", _between("margin")),
    "texts": Filter("distinct texts", _between("texts")),
    "length": Filter("words of the best caption", _between("words")),
    "lengths": Filter(
        "words of a synthetic caption",
        lambda value: "uid IN (SELECT uid FROM candidates WHERE origin = 'synthetic' AND "
        + " AND ".join(_limits("length(text) - length(replace(text, ' ', '')) + 1", value))
        + ")",
    ),
    "side": Filter("short side, px", _between("short_side")),
    "sha256": Filter("sha256", _equals("sha256")),
    "marked": Filter("marked", lambda value: f"({_MARKED})" if value == "yes" else f"NOT ({_MARKED})", ("yes", "no")),
    "same": Filter(
        "same bytes as another URL",
        lambda value: f"{HAS_IMAGE} AND sha256 IN "
        f"(SELECT sha256 FROM cards WHERE {HAS_IMAGE} GROUP BY sha256 HAVING count(*) > 1)",
        ("yes",),
    ),
}  # fmt: skip

# Name -> (label, SQL). A minus sign before the name turns it round.
SORTS: dict[str, tuple[str, str]] = {
    "uid": ("uid", "uid"),
    "random": ("at random", ""),
    "score": ("best score", "score"),
    "lead": ("web less synthetic", "lead"),
    "margin": ("margin", "margin"),
    "texts": ("distinct texts", "texts"),
    "length": ("length", "words"),
    "side": ("short side", "short_side"),
    "sha256": ("sha256", "sha256"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """The state of a grid: the whole of its address."""

    filters: Mapping[str, str] = field(default_factory=dict)
    sort: str = "uid"
    page: int = 1
    seed: int = 1
    # Look at all shards of a large corpus, not at a sample of them.
    all: bool = False

    @classmethod
    def parse(cls, query: Iterable[tuple[str, str]]) -> Self:
        """Return the state that an address's query holds; empty values count as absent. Raises CapfiltError."""
        filters: dict[str, str] = {}
        rest: dict[str, str] = {}
        for name, raw in query:
            value = " ".join(printable(raw).split())
            if len(value) > _MAX_VALUE:
                raise CapfiltError(f"{name}: more than {_MAX_VALUE} characters")
            if value:
                (filters if name in FILTERS else rest)[name] = value
        for name, value in filters.items():
            _check(name, value)
        if unknown := [name for name in rest if name not in ("sort", "page", "seed", "all")]:
            raise CapfiltError(f"no filter {unknown[0]!r}{did_you_mean(unknown[0], list(FILTERS))}")
        sort = rest.get("sort", "uid")
        if sort.removeprefix("-") not in SORTS:
            raise CapfiltError(f"sort={sort}: one of {', '.join(SORTS)}, or one of them after a minus sign")
        return cls(
            filters=filters,
            sort=sort,
            page=_number("page", rest.get("page", "1")),
            seed=_number("seed", rest.get("seed", "1")),
            all="all" in rest,
        )

    def query(self) -> str:
        """Return the state as the query of an address."""
        state: dict[str, object] = {**self.filters}
        defaults = View()
        state |= {
            name: getattr(self, name)
            for name in ("sort", "page", "seed")
            if getattr(self, name) != getattr(defaults, name)
        }
        return urlencode(state | ({"all": "yes"} if self.all else {}))

    def at_page(self, page: int) -> Self:
        """Return the state with another page."""
        return replace(self, page=page)

    def without(self, name: str) -> Self:
        """Return the state without one filter, from its first page."""
        kept = {other: value for other, value in self.filters.items() if other != name}
        return replace(self, filters=kept, page=1)

    def conditions(self) -> list[str]:
        """Return the filters as SQL."""
        return [FILTERS[name].condition(value) for name, value in self.filters.items()]

    def order(self) -> str:
        """Return the order as SQL; the uid decides between equals."""
        name = self.sort.removeprefix("-")
        if name == "random":
            return f"md5(concat(uid, '{self.seed}'))"
        column = SORTS[name][1]
        ends = " DESC" if self.sort.startswith("-") else ""
        return f"{column}{ends} NULLS LAST" + ("" if name == "uid" else ", uid")


def _check(name: str, value: str) -> None:
    allowed = FILTERS[name].values
    if allowed and value not in allowed:
        raise CapfiltError(f"{name}={value}: one of {', '.join(allowed)}")
    FILTERS[name].condition(value)


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= _MAX_PAGE):
        raise CapfiltError(f"{name}={text[:20]}: a number from 1 to {_MAX_PAGE:,}")
    return int(text)
