"""The first screen: what became of the URLs, eight rows worth a look, and bars, each with the SQL that it shows."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from jobs.look import questions
from jobs.look.questions import Scope
from jobs.look.snapshot import Answer, Row, Snapshot
from jobs.look.view import View
from schemas.stages import STAGES

ROW_CARDS = 12
_MOST_BARS = 24
_SCORE_STEPS = (0.005, 0.01, 0.02, 0.05, 0.1)
_COUNT_STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class CardRow:
    """Cards that share something, and the grid that shows all of them."""

    title: str
    note: str
    view: View
    count: Answer
    cards: Answer

    @property
    def total(self) -> int:
        """How many samples the row's grid has."""
        total: int = self.count.rows[0]["samples"]
        return total


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One bar of a chart: its range or name, how many it counts, its length, and the filter that it stands for."""

    label: str
    count: int
    percent: int
    filters: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Bars over a range of values."""

    title: str
    unit: str
    bars: list[Bar]
    sql: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """All that the first screen shows."""

    funnel: Answer
    losses: Answer
    stages: list[Row]
    rows: list[CardRow]
    charts: list[Chart]
    reasons: list[Bar]
    hosts: Answer
    scope: Scope


def overview(snapshot: Snapshot, *, cards: int = ROW_CARDS, seed: int = 1) -> Overview:
    """Return the first screen; each row has at most ``cards`` cards."""
    scope = snapshot.sample
    losses = snapshot.ask(questions.LOSSES)
    return Overview(
        funnel=snapshot.ask(questions.FUNNEL),
        losses=losses,
        stages=_stages_under_way(snapshot),
        rows=[_row(snapshot, *row, cards) for row in worth_a_look(snapshot.shards, seed)],
        charts=list(_charts(snapshot)),
        reasons=_reasons(losses.rows),
        hosts=snapshot.ask_cards(questions.hosts_of(scope), scope),
        scope=scope,
    )


def _row(snapshot: Snapshot, title: str, note: str, view: View, cards: int) -> CardRow:
    scope = snapshot.scope_of(view)
    return CardRow(
        title=title,
        note=note,
        view=view,
        count=snapshot.ask_cards(questions.count_of(view, scope), scope),
        cards=snapshot.ask_cards(questions.rows_of(view, scope, cards), scope),
    )


def worth_a_look(shards: Sequence[Row], seed: int = 1) -> Iterator[tuple[str, str, View]]:
    """Yield the eight rows: title, what it means, and the grid. ``shards``: newest first."""

    def row(title: str, note: str, sort: str, **filters: str) -> tuple[str, str, View]:
        return title, note, View(filters=filters, sort=sort, seed=seed)

    yield row("At random", "of all images", "random", image="yes")
    yield row("Lowest best score", "no caption fits well", "score", score="..")
    yield row("The web caption won by most", "over the best synthetic one", "-lead", lead="0..")
    yield row("The web caption lost by most", "to the best synthetic one", "lead", lead="..0")
    yield row("Few distinct texts", "under six among the synthetic ones", "texts", texts="..6")
    yield row("Kept and not kept hardly apart", "by less than 0.01", "margin", margin="0..0.01")
    yield row("The same bytes under several URLs", "copies stand side by side", "sha256", same="yes")
    if shards:
        newest = {"source": shards[0]["source"], "shard": shards[0]["shard"]}
        yield row("The newest shard", f"{newest['source']} {newest['shard']}", "uid", image="yes", **newest)


def _stages_under_way(snapshot: Snapshot) -> list[Row]:
    """Return how far each stage is while a run is under way, or was killed; else nothing."""
    last_run = snapshot.ask(questions.LAST_RUN).rows
    if not last_run or last_run[0]["outcome"] is not None or last_run[0]["command"] == "pretrain":
        return []
    done = {(row["source"], row["stage"]): row["shards"] for row in snapshot.ask(questions.PROGRESS).rows}
    return [
        {"source": source, "stage": name, "shards": done.get((source, name), 0), "total": total}
        for (source, stage), total in done.items()
        if stage == "urls"
        for name in STAGES
        # Most corpora have no filter.
        if name != "filter" or (source, name) in done
    ]


# Title, unit, histogram, the stage that counts it, the filter that a bar stands for, and the bins' widths.
_CHARTS = (
    ("Scores of synthetic captions", "captions", "score", "rank", "synthetic", _SCORE_STEPS),
    ("Scores of web captions", "captions", "web_score", "rank", "web", _SCORE_STEPS),
    ("Scores of human captions", "captions", "human_score", "rank", "human", _SCORE_STEPS),
    ("Scores of kept captions", "captions", "kept_score", "select", "kept", _SCORE_STEPS),
    ("Words of synthetic captions", "captions", "caption_words", "caption", "lengths", _COUNT_STEPS),
    ("Short side, pixels", "images", "short_side_px", "crawl", "side", _COUNT_STEPS),
)


def _charts(snapshot: Snapshot) -> Iterator[Chart]:
    for title, unit, name, stage, filter_name, steps in _CHARTS:
        bins = snapshot.histograms.get((stage, name))
        if not bins:
            continue
        spread = bins[-1]["high"] - bins[0]["low"]
        step = next((step for step in steps if spread / step < _MOST_BARS), steps[-1])
        counts: Counter[int] = Counter()
        for row in bins:
            # As the printed SQL: a bin's lower edge may lie a rounding error below the bar's.
            counts[math.floor(row["low"] / step + 1e-6)] += row["count"]
        yield Chart(
            title=title,
            unit=unit,
            bars=_bars(counts, filter_name, step),
            sql=questions.bars_of(name, stage, step),
        )


def _bars(counts: Mapping[int, int], filter_name: str, step: float) -> list[Bar]:
    """Return the bars of width ``step`` from the first to the last that counts anything, without a gap."""
    most = max(counts.values())
    return [
        Bar(
            label=f"{number * step:g} to {(number + 1) * step:g}",
            count=counts.get(number, 0),
            percent=_percent(counts.get(number, 0), most),
            filters={filter_name: f"{number * step:g}..{(number + 1) * step:g}"},
        )
        for number in range(min(counts), max(counts) + 1)
    ]


def _percent(count: int, most: int) -> int:
    """Return the length of a bar; one that counts anything can be seen."""
    return max(1, round(100 * count / most)) if count else 0


def _reasons(losses: Sequence[Row]) -> list[Bar]:
    most = max((row["rows"] for row in losses), default=1)
    return [
        Bar(
            label=row["reason"] or row["status"],
            count=row["rows"],
            percent=_percent(row["rows"], most),
            filters={name: row[name] for name in ("source", "status", "reason") if row[name]},
        )
        for row in losses
    ]
