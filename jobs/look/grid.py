"""A page of cards: each image with its captions, those that were kept first, and what gave no image with its reason."""

from collections import Counter
from dataclasses import dataclass, replace

from jobs.look import questions
from jobs.look.snapshot import Row, Snapshot
from jobs.look.view import PAGE_CARDS, View


@dataclass(frozen=True, slots=True)
class Card:
    """One sample: its row of ``cards``, its captions and its marks. A caption that repeats another is counted there."""

    card: Row
    kept: list[Row]
    others: list[Row]
    marks: list[Row]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """One page of the samples that a view shows."""

    view: View
    total: int
    cards: list[Card]
    count_sql: str
    rows_sql: str
    # Of a sample of the shards: the address of the same view of all, and about how long that takes.
    all_query: str = ""
    all_seconds: int = 0

    @property
    def pages(self) -> int:
        """How many pages there are, at least one."""
        return max(1, -(-self.total // PAGE_CARDS))


def grid(snapshot: Snapshot, view: View) -> Grid:
    """Return a page of a view."""
    scope = snapshot.scope_of(view)
    count = snapshot.ask_cards(questions.count_of(view, scope), scope)
    rows = snapshot.ask_cards(questions.rows_of(view, scope), scope)
    captions = snapshot.captions(rows.rows, scope)
    marks = snapshot.marks([row["uid"] for row in rows.rows], scope)
    is_part = scope.shards is not None and "shard" not in view.filters
    return Grid(
        view=view,
        total=count.rows[0]["samples"],
        cards=[card_of(row, captions.get(row["uid"], []), marks.get(row["uid"], [])) for row in rows.rows],
        count_sql=count.sql,
        rows_sql=rows.sql,
        all_query=replace(view, all=True, page=1).query() if is_part else "",
        all_seconds=snapshot.seconds_for_all(scope) if is_part else 0,
    )


def card_of(card: Row, captions: list[Row], marks: list[Row]) -> Card:
    """Return a card with its captions; ``captions``: best first."""
    repeats = Counter((row["origin"], row["duplicate_of"]) for row in captions)
    places = {
        (row["origin"], row["candidate"]): row | {"repeats": repeats[row["origin"], row["candidate"]]}
        for row in captions
        if row["duplicate_of"] is None
    }
    kept = [
        # A human source keeps texts that need no score: they stand in the card alone.
        places.pop((origin, number), {"text": text, "origin": origin, "score": score, "repeats": 0})
        for text, score, origin, number in zip(
            *(card[name] or () for name in ("captions", "scores", "origins", "candidates")), strict=True
        )
    ]
    return Card(card, kept, list(places.values()), marks)
