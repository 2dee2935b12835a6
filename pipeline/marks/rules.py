"""What the marks of a corpus come to: by shard the rules that hold there, by sample what they say of it."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.text import same_text_key
from schemas.marks import FoundMark, MarkRecord, MarkRule, MarkSearchRecord
from schemas.names import url_host
from schemas.statuses import By

# By source and shard: the rules that concern samples of it.
ShardMarks = Mapping[tuple[str, str], tuple[MarkRule, ...]]


def rules_by_shard(marks: Iterable[MarkRecord], searches: Iterable[MarkSearchRecord]) -> ShardMarks:
    """Return the rules that hold, by the shards where their samples were found: what was taken back holds no more."""
    marks = list(marks)
    undone = undone_values(marks)
    by_id = {mark.mark: mark for mark in marks if not mark.undoes}
    rules: dict[tuple[str, str], set[MarkRule]] = {}
    finds: list[FoundMark] = [*by_id.values(), *searches]
    for find in finds:
        # A search may be left of a mark that somebody deleted.
        if (mark := by_id.get(find.mark)) is not None:
            for place, value in _places(find, set(mark.values)):
                if (mark.mark, value) not in undone:
                    rules.setdefault(place, set()).add(_rule(mark, value))
    return {place: tuple(sorted(held, key=lambda rule: rule.to_json())) for place, held in rules.items()}


def undone_values(marks: Iterable[MarkRecord]) -> set[tuple[str, str]]:
    """Return the values of marks that were taken back, each as (mark, value)."""
    return {
        (mark, value)
        for undo in marks
        for mark, values in undo.undoes.items()
        for value in values
    }  # fmt: skip


def _rule(mark: MarkRecord, value: str) -> MarkRule:
    return MarkRule(what=mark.what, named_by=mark.named_by, value=value, caption=mark.captions.get(value, ""))


def _places(find: FoundMark, values: set[str]) -> Iterator[tuple[tuple[str, str], str]]:
    for source, shards in find.shards.items():
        for shard, held in shards.items():
            for value in held:
                if value in values:
                    yield (source, shard), value


@dataclass(frozen=True, slots=True)
class SampleMarks:
    """What rules say of a sample; ``texts`` are keys (``same_text_key``) of captions that are out of the running."""

    is_dropped: bool = False
    texts: frozenset[str] = frozenset()


NO_MARKS = SampleMarks()


class RuleBook:
    """The rules of a shard, looked up by sample."""

    def __init__(self, rules: Iterable[MarkRule]) -> None:
        self.drops: set[tuple[By, str]] = set()
        self.texts: dict[tuple[By, str], set[str]] = {}
        for rule in rules:
            if rule.what == "drop":
                self.drops.add((rule.named_by, rule.value))
            else:
                self.texts.setdefault((rule.named_by, rule.value), set()).add(same_text_key(rule.caption))

    def on(self, sample: Mapping[str, Any]) -> SampleMarks:
        """Return what holds for a sample, of which ``uid``, ``url`` and ``sha256`` are read."""
        if not self.drops and not self.texts:
            return NO_MARKS
        names: set[tuple[By, str]] = {
            ("uid", sample["uid"]),
            ("url", sample["url"]),
            ("host", url_host(sample["url"] or "")),
            ("sha256", sample["sha256"]),
        }
        texts = frozenset[str]().union(*(self.texts.get(name, ()) for name in names))
        return SampleMarks(not names.isdisjoint(self.drops), texts)
