"""The records of marks: verdicts of people on samples, which ``select`` obeys; and where their samples lie.

A mark is created once and never changed. Taking it back is a record of its own too, so that of two people who mark and
take back at once each does exactly what he was shown.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, field
from typing import Annotated

from pydantic import Field

from schemas.json_record import FileName, Json, ShardName, Time
from schemas.names import url_host
from schemas.statuses import By, What

MAX_REASON_CHARS = 500
# A URL or a caption is shorter; a record of so many values, with what is found of them, is under the limit of records.
_MAX_VALUE_CHARS = 8192
MAX_VALUES = 100_000

_DIGITS: Mapping[str, re.Pattern[str]] = {
    "uid": re.compile(r"[0-9a-f]{32}"),
    "sha256": re.compile(r"[0-9a-f]{64}"),
}

Value = Annotated[str, Field(min_length=1, max_length=_MAX_VALUE_CHARS)]
Values = Annotated[tuple[Value, ...], Field(max_length=MAX_VALUES)]
# By source and shard, the values of a mark that concern samples of it.
Shards = Mapping[FileName, Mapping[ShardName, Values]]


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkRule(Json):
    """One verdict as ``select`` takes it: what holds for the samples whose ``named_by`` is ``value``.

    ``caption``: the text that is out of the running where ``what`` is ``not-this-caption``, else empty.
    """

    what: What
    named_by: By
    value: str
    caption: str = ""


def rules_digest(rules: Iterable[MarkRule]) -> str:
    """Return the digest of a shard's rules; neither their order nor who made them, or how often, changes it."""
    text = json.dumps(sorted({astuple(rule) for rule in rules}), separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundMark(Json):
    """Where the samples of a mark are.

    ``searched``: the ids (``attempt``) of the intake batches, or of crawl commits where the mark names a ``sha256``,
    whose files were searched for its values; ``shards``: what was found there.
    """

    mark: FileName
    searched: tuple[FileName, ...] = ()
    shards: Shards = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkRecord(FoundMark):
    """A verdict on the samples that ``named_by`` and ``values`` name, or, with ``undoes``, what takes verdicts back.

    ``captions``: by value, the text that ``not-this-caption`` is about. ``undoes``: by mark, the values of it that are
    taken back.
    """

    what: What
    named_by: By
    values: Values
    reason: Annotated[str, Field(max_length=MAX_REASON_CHARS)]
    made_at: Time
    host: str = ""
    captions: Mapping[str, Value] = field(default_factory=dict)
    undoes: Mapping[FileName, Values] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """Where the record is, relative to the corpus."""
        return f"records/marks/{self.mark}.json"

    def require_valid(self) -> None:
        """Raise ValueError unless the values are of their kind, and what is said of values is said of these."""
        for value in self.values:
            if not is_value(self.named_by, value):
                raise ValueError(f"values: {value[:80]!r} is not a {self.named_by}")
        captioned = set(self.values) if self.what == "not-this-caption" else set()
        if not self.undoes and self.captions.keys() != captioned:
            raise ValueError("captions: not one for each value of not-this-caption")
        _require_known(self.values, self.shards)


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkSearchRecord(FoundMark):
    """What a later search found of a mark, in files that were not there when it was made. Derived: it may be lost."""

    attempt: FileName

    @property
    def path(self) -> str:
        """Where the record is, relative to the corpus."""
        return f"records/mark-searches/{self.mark}.{self.attempt}.json"


def is_value(by: By, value: str) -> bool:
    """Tell whether a text is a uid, a URL, a host as tables have them, or a sha256."""
    if by in _DIGITS:
        return _DIGITS[by].fullmatch(value) is not None
    return value == url_host(f"http://{value}") if by == "host" else bool(value)


def _require_known(values: Iterable[str], shards: Shards) -> None:
    known = set(values)
    for source, by_shard in shards.items():
        for shard, values_there in by_shard.items():
            if not known.issuperset(values_there):
                raise ValueError(f"shards.{source}.{shard}: a value that is not of this mark")
