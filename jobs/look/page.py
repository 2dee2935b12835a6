"""HTML of what is shown: one set of templates for the pages of the server and for the file.

Every text of a corpus is somebody else's: Jinja escapes it, and characters that steer (controls, bidirectional marks)
become spaces.
"""

import base64
import hashlib
import json
import shlex
from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any
from urllib.parse import quote as quote_url
from urllib.parse import urlencode

import jinja2
from markupsafe import Markup

from jobs.environment import program_name
from jobs.look.grid import Grid
from jobs.look.overview import Overview, overview
from jobs.look.questions import Scope
from jobs.look.selection import Preview
from jobs.look.snapshot import Row, Snapshot
from jobs.look.unmark import Unmarking
from jobs.look.view import FILTERS, SORTS
from jobs.output.values import cell
from pipeline.images.decode import ImageError, thumbnail
from schemas.names import printable
from schemas.statuses import DROP_REASONS, REASONS

ImageAddress = Callable[[Row], str]

_MINUS = "\N{MINUS SIGN}"
_STATUSES_WITH_IMAGE = ("kept", "dropped", "ok")
# Of the first screen as a file.
_ROWS, _SIDE_PX = 8, 224


def brief(text: Any, most: int) -> str:
    """Return a text's beginning, and how much is left out."""
    text = str(text)
    return text if len(text) <= most else f"{text[:most]}… ({len(text) - most:,} more characters)"


def meaning(reason: str) -> str:
    """Return what a reason means, in words."""
    return REASONS[reason].meaning if reason in REASONS else DROP_REASONS.get(reason, "")


def image_path(card: Row) -> str:
    """Return the path of a card's image on the server; empty where it has none."""
    if card["status"] not in _STATUSES_WITH_IMAGE:
        return ""
    return "/".join(["image", *(quote_url(str(card[name]), safe="") for name in ("source", "shard", "key"))])


@cache
def style() -> str:
    """Return the style sheet: the file, and a class for each percent of a bar's length."""
    lengths = "".join(f".w{share}{{width:{share}%}}.h{share}{{height:{share}%}}" for share in range(1, 101))
    return files("jobs.look").joinpath("style.css").read_text(encoding="utf-8") + lengths


def _inline_style() -> dict[str, str]:
    """Return the style sheet inside the file, and the digest by which its policy admits it."""
    text = style()
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return {"text": Markup(text), "digest": digest}


class Pages:
    """Renders pages of one corpus.

    Args:
        corpus: as the user named it: for the command lines that are printed.
        base: the path that addresses begin with; empty for a file, which has no links.
        image: the address of a card's image; empty where it has none.
    """

    def __init__(self, corpus: str, base: str, image: ImageAddress) -> None:
        self._corpus = corpus
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("jobs.look"),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
            finalize=_printable,
        )
        environment.filters |= {
            "brief": brief,
            "query": urlencode,
            "metrics": _metrics,
            "score": _score,
            "signed": _signed,
        }
        environment.globals |= {
            "base": base,
            "name": corpus.rstrip("/").rpartition("/")[2] or corpus,
            "root": corpus,
            "command": self.command,
            "image": image,
            "meaning": meaning,
            "cell": cell,
            "filters": FILTERS,
            "sorts": SORTS,
            "inline_style": None if base else _inline_style(),
        }
        self._environment = environment

    def command(self, sql: str) -> str:
        """Return the command line that gives the rows of a statement."""
        return f"{program_name()} sql {shlex.quote(self._corpus)} {shlex.quote(sql)}"

    def overview(self, snapshot: Snapshot, view: Overview) -> str:
        """Return the first screen."""
        return self._render("overview.html", snapshot, view=view, scope_note=_note(snapshot, view.scope))

    def grid(self, snapshot: Snapshot, grid: Grid) -> str:
        """Return a page of cards."""
        note = _note(snapshot, snapshot.scope_of(grid.view))
        return self._render("grid.html", snapshot, grid=grid, scope_note=note)

    def sample(self, snapshot: Snapshot, uid: str, traces: list[Row]) -> str:
        """Return the page of one sample: its traces, each with its card."""
        line = f"{program_name()} trace {shlex.quote(self._corpus)} {uid}"
        return self._render("sample.html", snapshot, uid=uid, traces=traces, trace_line=line)

    def unmark(self, snapshot: Snapshot, view: Unmarking, back: str | None) -> str:
        """Return the page that says what taking back a mark frees; ``back``: the grid to go back to, if any."""
        return self._render(
            "unmark.html", snapshot, view=view, back=back, scope_note=_note(snapshot, snapshot.sample)
        )

    def selection(self, snapshot: Snapshot, view: Preview) -> str:
        """Return the page of another selection."""
        bins = snapshot.histograms.get(("rank", "score_best"))
        scores = (bins[0]["low"], bins[-1]["high"]) if bins else (-1.0, 1.0)
        note = _note(snapshot, snapshot.sample)
        return self._render("selection.html", snapshot, view=view, scores=scores, scope_note=note)

    def runs(self, snapshot: Snapshot, answers: Mapping[str, Any]) -> str:
        """Return the page of runs and trainings."""
        return self._render("runs.html", snapshot, **answers)

    def message(self, title: str, message: str) -> str:
        """Return a page that says why there is no other."""
        return self._render("message.html", None, title=title, message=message)

    def _render(self, template: str, snapshot: Snapshot | None, **values: Any) -> str:
        taken_at = f"{snapshot.taken_at:%Y-%m-%d %H:%M:%S}" if snapshot else "-"
        return self._environment.get_template(template).render(taken_at=taken_at, **values)


def overview_file(snapshot: Snapshot, corpus: str, *, images: int) -> str:
    """Return the HTML of the first screen as one file: images inside, no script, no request.

    Its eight rows have ``images`` images in all, at most.
    """
    shown = overview(snapshot, cards=max(1, images // _ROWS))
    return Pages(corpus, "", lambda card: _data_url(snapshot, card)).overview(snapshot, shown)


def _note(snapshot: Snapshot, scope: Scope) -> str:
    if scope.shards is None or not snapshot.is_sampled:
        return ""
    number, total = len(scope.shards), len(snapshot.shards)
    if number == 1:
        return f"One shard of {total:,}."
    return f"A sample: {number} of {total:,} shards, drawn by lot, the same ones each time."


def _printable(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _metrics(row: Row) -> Row:
    """Return the row of a checkpoint with its metrics as people read them."""
    try:
        return row | {"metrics": cell(json.loads(row["metrics"]))}
    except (TypeError, ValueError):
        return row


def _score(value: float | None) -> str:
    return "no score" if value is None else f"{value:.3f}".replace("-", _MINUS)


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", _MINUS)


def _data_url(snapshot: Snapshot, card: Row) -> str:
    """Return a card's image, made small; empty where it has none that decodes."""
    data = snapshot.images.read(card["source"], card["shard"], card["key"])
    if data is None:
        return ""
    try:
        small = thumbnail(data, _SIDE_PX)
    except ImageError:
        return ""
    return f"data:image/jpeg;base64,{base64.b64encode(small).decode()}"
