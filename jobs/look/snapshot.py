"""A corpus as it stood at one moment: which of its shards are looked at, and their cards, kept ready for questions."""

import random
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from operator import itemgetter
from typing import Any

from jobs.look import questions
from jobs.look.questions import Scope
from jobs.look.view import View
from pipeline.corpus.records import Records
from pipeline.manifest.manifest import Manifest, Query
from pipeline.shards.stored_images import StoredImages

Row = dict[str, Any]

# Of a corpus with more images, samples are looked at: those of so many shards, the same ones each time.
MAX_IMAGES, SAMPLED_SHARDS = 200_000, 20
# What DuckDB may take of each connection; beyond it, it uses the disk.
_MEMORY = "192MB"
_SCOPES = 2
# Of the cards, answers of at most so many rows are remembered, the last of them.
_SHORT_ROWS, _SHORT_ANSWERS = 12, 200


@dataclass(frozen=True, slots=True)
class Answer:
    """The rows of one statement, and how long it took."""

    sql: str
    rows: list[Row]
    seconds: float


class _Connection:
    """A connection that answers one question at a time."""

    def __init__(self, query: Query) -> None:
        self.query = query
        self.turn = threading.RLock()

    def answer(self, sql: str, known: str = "") -> Answer:
        """Answer a question; ``known``: a condition in it that every row here fulfils, which need not be checked."""
        with self.turn:
            start = time.perf_counter()
            rows = self.query.rows(sql.replace(known, "true") if known else sql)
            return Answer(sql, rows, time.perf_counter() - start)

    def reread_marks(self) -> None:
        with self.turn:
            self.query.reread_marks()

    def close(self) -> None:
        with self.turn:
            self.query.__exit__()


class Snapshot:
    """What was committed when it was made. Thread-safe.

    Args:
        max_images: up to so many images, all are looked at.
    """

    def __init__(self, manifest: Manifest, *, max_images: int = MAX_IMAGES) -> None:
        self.manifest = manifest
        self.taken_at = datetime.now(UTC)
        self.images = StoredImages(Records(manifest.storage))
        # Read once, for all connections.
        query = manifest.open(shards=(), memory=_MEMORY)
        self._tables, self._records = query.records, _Connection(query)
        self._histograms: dict[tuple[str, str], list[Row]] | None = None
        self._answers: dict[str, Answer] = {}
        # Those that the first screen asks each time.
        self._short_answers: dict[str, Answer] = {}
        self._lock = threading.RLock()
        self._summing = threading.Lock()
        self._cards: OrderedDict[Scope, _Connection] = OrderedDict()
        # Of each scope: how long its cards took to compute.
        self._seconds: dict[Scope, float] = {}
        self.shards: list[Row] = self.ask(questions.SHARDS).rows
        self.num_images: int = sum(row["images"] for row in self.shards)
        self.is_sampled = self.num_images > max_images

    @property
    def histograms(self) -> dict[tuple[str, str], list[Row]]:
        """The histograms of all records, by stage and name: the bins that count anything, in order, of each source."""
        with self._summing:
            if self._histograms is None:
                histograms: dict[tuple[str, str], list[Row]] = {}
                for row in sorted(self._records.query.histogram_sums(), key=itemgetter("low")):
                    histograms.setdefault((row["stage"], row["name"]), []).append(row)
                self._histograms = histograms
            return self._histograms

    @cached_property
    def sample(self) -> Scope:
        """The shards that are looked at where no other is named: all of a small corpus, else some drawn by lot."""
        return self._drawn() if self.is_sampled else Scope()

    def scope_of(self, view: View) -> Scope:
        """Return the shards that a view looks at: the one that it names, all if it asks for them, else the sample."""
        if not self.is_sampled or view.all:
            return Scope()
        source, shard = view.filters.get("source"), view.filters.get("shard")
        if source and shard:
            return Scope(((source, shard),))
        return self._drawn(source) if source else self.sample

    def _drawn(self, source: str = "") -> Scope:
        """Return some shards, of one source if it is given; a shard that does not exist where there are none."""
        places = ((row["source"], row["shard"]) for row in self.shards if source in ("", row["source"]))
        names = sorted(places)
        drawn = random.Random(0).sample(names, min(SAMPLED_SHARDS, len(names)))
        return Scope(tuple(sorted(drawn)) or (("", ""),))

    def commits(self) -> list[Row]:
        """Return what tells two snapshots apart: how many records there are, and when the last of each kind came."""
        return self.ask(questions.COMMITS).rows

    def ask(self, sql: str) -> Answer:
        """Answer a question to the records; there are few, and each is asked once."""
        # Of two who ask at once, as at the start, the second waits for the first one's answer.
        with self._records.turn:
            if sql not in self._answers:
                self._answers[sql] = self._records.answer(sql)
            return self._answers[sql]

    def ask_cards(self, sql: str, scope: Scope) -> Answer:
        """Answer a question to the cards or candidates of some shards; the statement names the same shards."""
        with self._lock:
            if sql in self._short_answers:
                return self._short_answers[sql]
            connection = self._open(scope)
        with connection.turn:
            # Without the snapshot's lock: who holds that may wait for this turn.
            if (remembered := self._short_answers.get(sql)) is not None:
                return remembered
            answer = connection.answer(sql, *scope.condition)
            if len(answer.rows) <= _SHORT_ROWS:
                self._short_answers = dict([*self._short_answers.items(), (sql, answer)][-_SHORT_ANSWERS:])
        return answer

    def shards_read(self, view: View) -> int:
        """Return of how many shards a view may open files."""
        with self._lock:
            return self._open(self.scope_of(view)).query.num_shards

    def _open(self, scope: Scope) -> "_Connection":
        """Return the connection of a scope, with its cards computed; the last few stay open."""
        if scope not in self._cards:
            # All shards of a large corpus are read anew for each question: their cards would not fit.
            start = time.perf_counter()
            query = self.manifest.open(
                in_place=True, shards=scope.shards, memory=_MEMORY, records=self._tables
            )
            if scope.shards is not None or not self.is_sampled:
                query.keep("cards")
            self._cards[scope], self._seconds[scope] = _Connection(query), time.perf_counter() - start
            while len(self._cards) > _SCOPES:
                _, oldest = self._cards.popitem(last=False)
                oldest.close()
        self._cards.move_to_end(scope)
        return self._cards[scope]

    def seconds_for_all(self, scope: Scope) -> int:
        """Return about how long a question to all shards takes, from how long those of a scope took."""
        shards = len(scope.shards or ()) or 1
        return max(1, round(self._seconds.get(scope, 0.0) * len(self.shards) / shards))

    def marks(self, uids: Sequence[str], scope: Scope) -> dict[str, list[Row]]:
        """Return the marks that hold for some samples, by uid."""
        marks: dict[str, list[Row]] = {}
        for row in self.ask_cards(questions.marks_of(uids), scope).rows if uids else ():
            marks.setdefault(row["uid"], []).append(row)
        return marks

    def marks_of_sample(self, sample: Row) -> list[Row]:
        """Return the marks that hold for one sample, of which ``uid``, ``source`` and ``shard`` are read."""
        scope = Scope(((sample["source"], sample["shard"]),)) if self.is_sampled else Scope()
        return self.marks([sample["uid"]], scope).get(sample["uid"], [])

    def reread_marks(self) -> None:
        """Take the marks as they are now."""
        with self._lock:
            for connection in self._cards.values():
                connection.reread_marks()
            self._short_answers = {}

    def prepare(self) -> None:
        """Compute the cards that most questions read, and sum up the histograms, so that nobody waits for them."""
        with ThreadPoolExecutor(1) as beside:
            summed = beside.submit(lambda: self.histograms)
            with self._lock:
                self._open(self.sample)
            summed.result()

    def close(self) -> None:
        """Close the connections."""
        with self._lock:
            for connection in (self._records, *self._cards.values()):
                connection.close()

    def captions(self, cards: Sequence[Row], scope: Scope) -> dict[str, list[Row]]:
        """Return every caption of some cards, best first, by uid."""
        captions: dict[str, list[Row]] = {card["uid"]: [] for card in cards if card["score"] is not None}
        if captions:
            shards = {(card["source"], card["shard"]) for card in cards}
            for row in self.ask_cards(questions.captions_of(captions, shards), scope).rows:
                captions[row["uid"]].append(row)
        return captions


class Snapshots:
    """The newest snapshot, made anew in the background once it is some seconds old: a run may be working."""

    def __init__(self, manifest: Manifest, *, max_images: int = MAX_IMAGES, max_age_s: float = 15.0) -> None:
        self._manifest = manifest
        self._max_images = max_images
        self._max_age_s = max_age_s
        self._lock = threading.Lock()
        self._refreshing = threading.Lock()
        self._current: Snapshot | None = None
        self._looked_at = 0.0

    def current(self) -> Snapshot:
        """Return a snapshot: the first call makes it, later ones get the last one while a newer one is made."""
        with self._lock:
            if self._current is None:
                self._renew()
            elif time.monotonic() - self._looked_at > self._max_age_s and self._refreshing.acquire(
                blocking=False
            ):
                threading.Thread(target=self._refresh, daemon=True).start()
            assert self._current is not None
            return self._current

    def close(self) -> None:
        """Close the newest snapshot; those before it close when nothing reads them any more."""
        with self._refreshing, self._lock:
            if self._current is not None:
                self._current.close()

    def _refresh(self) -> None:
        try:
            self._renew()
        finally:
            self._refreshing.release()

    def _renew(self) -> None:
        snapshot = Snapshot(self._manifest, max_images=self._max_images)
        current = self._current
        if current is None:
            self._current = snapshot
        elif snapshot.commits() != current.commits():
            snapshot.prepare()
            self._current = snapshot
        else:  # the cards that are ready stay
            snapshot.close()
        self._looked_at = time.monotonic()
