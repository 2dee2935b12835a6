"""Another selection, before it is made: what it would keep of the scores that are there, and the images at its line."""

import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from jobs.look import questions
from jobs.look.snapshot import Answer, Snapshot
from jobs.look.view import View
from pipeline.corpus.corpus_state import CorpusState
from pipeline.corpus.records import Records
from pipeline.marks.search import marks_of_shards
from pipeline.runs.preview import SourcePreview, preview_selection
from schemas.config import CapfiltConfig, SelectConfig
from schemas.errors import CapfiltError
from schemas.json_record import first_error

_LINE_CARDS = 12
# The rules are those of the select stage, in Python: some 1.5 CPU seconds.
_IMAGES = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What a selection would keep, by source, and twelve images on either side of its minimum score, if it has one."""

    select: SelectConfig
    sources: list[SourcePreview]
    options: str
    sides: list[tuple[str, View, Answer]]


def preview(snapshot: Snapshot, query: Iterable[tuple[str, str]]) -> Preview:
    """Return the preview of the selection that an address names; what it does not name stays as it is.

    Of a large corpus it is one of the shards that the other pages look at, too.

    Raises CapfiltError for a wrong value, before anything is scored.
    """
    config = _config(snapshot)
    chosen = {name: value for name, value in query if value and name in SelectConfig.model_fields}
    try:
        select = SelectConfig.model_validate({**config.select.model_dump(), **chosen}, strict=False)
    except ValidationError as error:
        raise CapfiltError(f"[select]: {first_error(error)}") from error
    records = Records(snapshot.manifest.storage)
    state = CorpusState(
        records, within=snapshot.sample.shards, compacted=snapshot.manifest.compacted.shard_records
    )
    changed = config.model_copy(update={"select": select})
    sides: dict[str, View] = {}
    if (line := select.min_score) is not None:
        sides["Just kept"] = View(filters={"score": f"{line:g}.."}, sort="score")
        sides["Just lost"] = View(filters={"score": f"..{line:g}"}, sort="-score")
    return Preview(
        select=select,
        sources=preview_selection(
            changed, records, state, marks_of_shards(records, state, save=False), max_images=_IMAGES
        ),
        options=_options(select),
        sides=[(title, view, _cards(snapshot, view)) for title, view in sides.items()],
    )


def _config(snapshot: Snapshot) -> CapfiltConfig:
    """Return the config of the last run that selected."""
    rows = snapshot.ask(questions.LAST_CONFIG).rows
    if not rows:
        raise CapfiltError("no run of this corpus is recorded, so its config is not known")
    values: dict[str, Any] = json.loads(rows[0]["config"])
    try:
        return CapfiltConfig.model_validate(values)
    except ValidationError as error:
        raise CapfiltError(f"the config of run {rows[0]['run_id']}: {first_error(error)}") from error


def _cards(snapshot: Snapshot, view: View) -> Answer:
    scope = snapshot.scope_of(view)
    return snapshot.ask_cards(questions.rows_of(view, scope, _LINE_CARDS), scope)


def _options(select: SelectConfig) -> str:
    """Return the options of ``capfilt select`` that make this selection."""
    values = {"top_k": select.top_k, "min_score": select.min_score, "web_caption": select.web_caption}
    return " ".join(
        f"--set {shlex.quote(f'select.{name}={value}')}"
        for name, value in values.items()
        if value is not None
    )
