"""Taking a mark back: what it says, and which samples it frees beside the one that it was seen on."""

from collections.abc import Mapping
from dataclasses import dataclass

from jobs.look import questions
from jobs.look.snapshot import Answer, Row, Snapshot
from schemas.errors import CapfiltError
from schemas.statuses import By

_CARDS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmarking:
    """The marks of a sample that say one thing of it under one name, and the samples that have that name."""

    sample: Row
    marks: list[Row]
    count: Answer
    cards: Answer

    @property
    def mark(self) -> Row:
        """The oldest of the marks; the others differ in reason and caption alone."""
        return self.marks[0]


def held_marks(snapshot: Snapshot, form: Mapping[str, str]) -> list[Row]:
    """Return the marks that say ``what`` by ``named_by`` of the sample ``uid`` in ``source`` and ``shard``.

    Raises CapfiltError where none holds.
    """
    wanted = form.get("what"), form.get("named_by", "uid")
    sample = {name: form.get(name, "") for name in ("uid", "source", "shard")}
    marks = [mark for mark in snapshot.marks_of_sample(sample) if (mark["what"], mark["named_by"]) == wanted]
    if not marks:
        raise CapfiltError("no such mark holds of this sample; somebody may have taken it back")
    return marks


def unmarking(snapshot: Snapshot, form: Mapping[str, str]) -> Unmarking:
    """Return what taking back the marks of ``held_marks`` frees."""
    marks = held_marks(snapshot, form)
    named: tuple[By, str] = marks[0]["named_by"], marks[0]["value"]
    scope = snapshot.sample
    return Unmarking(
        sample={name: form[name] for name in ("uid", "source", "shard")},
        marks=marks,
        count=snapshot.ask_cards(questions.count_named(*named, scope), scope),
        cards=snapshot.ask_cards(questions.rows_named(*named, scope, _CARDS), scope),
    )
