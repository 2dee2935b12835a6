"""Display of a run's progress: a live table on a terminal, else one line per interval."""

import json
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from pipeline.runs.events import Level, ShardEvent
from pipeline.runs.progress import StageProgress
from pipeline.runs.survey import Survey
from pipeline.text import readable_duration
from schemas.json_record import utc_now
from schemas.stages import Stage

_LINE_INTERVAL_S = 10.0


class Progress:
    """A display of a run's progress; this one shows nothing."""

    def log(self, text: str) -> None:
        """Print what the run waits for now."""

    def event(self, event: ShardEvent) -> None:
        """Print what happened to a shard, where somebody should look at it."""
        if event.level != "info":
            self.log(str(event))

    def update(self, snapshot: Mapping[Stage, StageProgress]) -> None:
        """Show the sums of the stages."""

    def close(self) -> None:
        """Show the last state and release the terminal."""


class _Rates:
    """Shards, images per second and time left, by stage."""

    def __init__(self, before: Survey, stages: tuple[Stage, ...], limit: int | None) -> None:
        self.stages = stages
        self.done_before = {stage: before.of(stage).done for stage in stages}
        self.total = {stage: before.of(stage).total for stage in stages}
        if limit is not None:
            self.total = {
                stage: min(total, self.done_before[stage] + limit) for stage, total in self.total.items()
            }
        self.start = time.monotonic()

    def row(self, stage: Stage, progress: StageProgress) -> tuple[str, ...]:
        """Return stage, shards, images/s, share kept, shards failed, time left; or what it waits for."""
        done, total = self.done_before[stage] + progress.shards, self.total[stage]
        seconds = max(time.monotonic() - self.start, 1e-9)
        left = total - done
        success = (
            f"{progress.rows_out / progress.rows_in:.0%}" if progress.rows_in and stage != "caption" else "-"
        )
        if left <= 0:
            eta = "done"
        elif progress.shards:
            eta = readable_duration(left * seconds / progress.shards)
        else:
            eta = progress.state or "starting"
        rate = f"{progress.images / seconds:,.1f}" if progress.images else "-"
        failed = str(len(progress.quarantined)) if progress.quarantined else "-"
        return stage, f"{done:,}/{total:,}", rate, success, failed, eta


class LiveProgress(Progress):
    """A table that redraws itself."""

    def __init__(self, console: Console, rates: _Rates) -> None:
        self._rates = rates
        self._live = Live(console=console, refresh_per_second=4)
        self._live.start()
        self.update({})

    def log(self, text: str) -> None:
        """Print a line above the table."""
        self._live.console.print(text, highlight=False)

    def update(self, snapshot: Mapping[Stage, StageProgress]) -> None:
        """Redraw."""
        table = Table("stage", box=None, pad_edge=False)
        for title in ("shards", "images/s", "kept", "failed", "time left"):
            table.add_column(title, justify="right")
        for stage in self._rates.stages:
            table.add_row(*self._rates.row(stage, snapshot.get(stage, StageProgress())))
        self._live.update(table)

    def close(self) -> None:
        """Leave the last table on the screen."""
        self._live.stop()


class LineProgress(Progress):
    """One line an interval, for logs."""

    def __init__(self, rates: _Rates) -> None:
        self._rates = rates
        self._next = time.monotonic() + _LINE_INTERVAL_S
        self._last: Mapping[Stage, StageProgress] = {}

    def log(self, text: str) -> None:
        """Print at once."""
        print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)

    def update(self, snapshot: Mapping[Stage, StageProgress]) -> None:
        """Print the sums when the interval is over."""
        self._last = snapshot
        if time.monotonic() >= self._next:
            self._print_sums()
            self._next = time.monotonic() + _LINE_INTERVAL_S

    def _print_sums(self) -> None:
        parts = []
        for stage in self._rates.stages:
            _, shards, rate, kept, failed, eta = self._rates.row(
                stage, self._last.get(stage, StageProgress())
            )
            has_rate = eta[0].isdigit()  # before the first shard it is what the stage waits for
            facts = {
                f"{rate} images/s": rate,
                f"{kept} kept": kept,
                f"{failed} failed": failed,
                f"{eta} left" if has_rate else eta: eta,
            }
            known = ", ".join(text for text, value in facts.items() if value not in ("-", "done"))
            parts.append(f"{stage} {shards}" + (f" ({known})" if known else ""))
        self.log("  ".join(parts))

    def close(self) -> None:
        """Print the last sums."""
        self._print_sums()


class JsonProgress(LineProgress):
    """One JSON object a line, for programs: what is said, what happens to each shard, and each interval the sums."""

    def __init__(self, rates: _Rates, run_id: str) -> None:
        super().__init__(rates)
        self._run_id = run_id
        self._handler = _JsonHandler(self)
        logging.getLogger().addHandler(self._handler)

    def log(self, text: str, level: Level = "info") -> None:
        """Print a message."""
        self._print({"level": level, "event": "message", "message": text})

    def event(self, event: ShardEvent) -> None:
        """Print any event of a shard."""
        self._print(event.fields())

    def _print_sums(self) -> None:
        for stage, progress in self._last.items():
            sums = {name: getattr(progress, name) for name in ("shards", "images", "rows_in", "rows_out")}
            shards = {
                "shards_quarantined": len(progress.quarantined),
                "shards_total": self._rates.total.get(stage, 0),
            }
            self._print({"level": "info", "event": "progress", "stage": stage, **sums, **shards})

    def _print(self, fields: dict[str, Any]) -> None:
        line = {"time": utc_now(), "run_id": self._run_id} | fields
        print(json.dumps(line), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Print the last sums, and leave the log."""
        super().close()
        logging.getLogger().removeHandler(self._handler)


class _JsonHandler(logging.Handler):
    """Has the warnings of capfilt and its libraries in the same log."""

    def __init__(self, progress: JsonProgress) -> None:
        super().__init__(logging.WARNING)
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        is_error = record.levelno >= logging.ERROR
        self._progress.log(record.getMessage(), "error" if is_error else "warning")


def open_progress(
    console: Console,
    before: Survey,
    stages: tuple[Stage, ...],
    limit: int | None,
    quiet: bool,
    json_run: str = "",
) -> Progress:
    """Return the progress that fits where the output goes; of the run ``json_run``, JSON."""
    if json_run:
        return JsonProgress(_Rates(before, stages, limit), json_run)
    if quiet:
        return Progress()
    rates = _Rates(before, stages, limit)
    return LiveProgress(console, rates) if console.is_terminal else LineProgress(rates)
