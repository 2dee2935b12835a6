"""Records as rows of the manifest's tables. A column holds the record's field of that name, in the column's type."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import pyarrow as pa

from pipeline.corpus.checkpoint_files import SNAPSHOT_FILE
from pipeline.corpus.records import parse_record
from schemas.catalog import RECORD_TABLES
from schemas.errors import CapfiltError
from schemas.json_record import Json
from schemas.marks import MarkRecord
from schemas.records import (
    CheckpointRecord,
    IntakeRecord,
    ModelRecord,
    OutputFile,
    QuarantineRecord,
    RunRecord,
    ShardRecord,
    SnapshotRecord,
    SnapshotShard,
)
from schemas.stages import STAGES

Row = dict[str, Any]

# By the folder under records/. What lies in others (begun attempts) is not part of the manifest.
_RECORD_TYPES: dict[str, type[Json]] = {
    **dict.fromkeys(STAGES, ShardRecord),
    "retired": ShardRecord,
    "quarantine": QuarantineRecord,
    "intake": IntakeRecord,
    "runs": RunRecord,
    "models": ModelRecord,
    "checkpoints": CheckpointRecord,
    "marks": MarkRecord,
}


def table_of(path: str) -> str | None:
    """Return the table that a file under records/ or checkpoints/ belongs to, or None."""
    if SNAPSHOT_FILE.fullmatch(path):
        return "snapshots"
    root, folder, *_ = path.split("/")
    if root != "records" or not path.endswith(".json") or folder not in _RECORD_TYPES:
        return None
    return folder if folder in RECORD_TABLES else "shards"


def rows_of(path: str, text: bytes) -> list[Row]:
    """Return the rows of one record file. Raises CapfiltError naming a file that is not a record."""
    if table_of(path) == "snapshots":
        return _snapshot_rows(path, text)
    folder = path.split("/")[1]
    record = parse_record(_RECORD_TYPES[folder], path, text)
    try:
        match record:
            case ShardRecord():
                return [_shard_row(record, "retired" if folder == "retired" else "committed")]
            case QuarantineRecord():
                counts = {"attempts": record.attempts}
                return [_row("shards", _fields(record) | {"state": "quarantined", "counts": counts})]
            case IntakeRecord():
                return _url_shard_rows(record)
            case MarkRecord():
                return _mark_rows(record)
            case _:
                return [_row(folder, _fields(record))]
    except (ValueError, OverflowError) as error:  # not a time
        raise CapfiltError(f"{path} is not a record ({error}): restore it, or delete it") from error


def _shard_row(record: ShardRecord, state: str) -> Row:
    files = {name: [file.bytes, file.rows] for name, file in record.outputs.items()}
    row = _row("shards", _fields(record) | _files(record.outputs) | {"state": state})
    return row | {"files": json.dumps(files, sort_keys=True)}


def shard_record_of(row: Row) -> ShardRecord:
    """Return the committed record that a row of a part was made of, without its histograms.

    Raises ValueError where the row cannot come from a record.
    """
    paths, sha256 = dict(row["paths"]), dict(row["sha256"])
    outputs = {
        name: {"path": paths.get(name), "sha256": sha256.get(name), "bytes": size, "rows": rows}
        for name, (size, rows) in json.loads(row["files"]).items()
    }
    values = {field.name: row[field.name] for field in dataclasses.fields(ShardRecord) if field.name in row}
    values |= {name: dict(values[name]) for name in ("inputs", "counts", "seconds", "versions")}
    values |= {
        name: values[name].isoformat(timespec="microseconds") for name in ("started_at", "finished_at")
    }
    return ShardRecord.from_json(json.dumps(values | {"outputs": outputs, "histograms": {}}))


def _url_shard_rows(batch: IntakeRecord) -> list[Row]:
    """Return one row for each url shard of a batch; ``counts`` names the batch's kind, by which retries are found."""
    shared = {name: getattr(batch, name) for name in ("source", "run_id", "attempt", "finished_at")}
    shared |= {"stage": "urls", "state": "committed", "fingerprint": batch.signature}
    rows = []
    for shard, file in sorted(batch.shards.items()):
        numbers = {"rows_in": file.rows, "rows_out": file.rows, "counts": {batch.kind: file.rows}}
        rows.append(_row("shards", shared | {"shard": shard} | _files({"parquet": file}) | numbers))
    return rows


def _snapshot_rows(path: str, text: bytes) -> list[Row]:
    """Return one row for each shard that a training reads.

    Beside checkpoints a file that is not such a list gives none: a training that resumes says what is wrong with it.
    """
    try:
        record = parse_record(SnapshotRecord, path, text)
    except CapfiltError:
        if path.startswith("records/"):
            raise
        return []
    folder = record.folder or path.rpartition("/")[0]
    return [
        {
            "digest": record.digest,
            "folder": folder,
            "corpus": shard.corpus,
            "source": shard.source,
            "shard": shard.shard,
            "images": shard.tar.rows - len(shard.held_out),
            "held_out": list(shard.held_out),
            "sha256": [(name, file.sha256) for name, file in _curated_files(shard)],
        }
        for source in record.sources
        for shard in source.shards
    ]


def _curated_files(shard: SnapshotShard) -> list[tuple[str, OutputFile]]:
    return ([("parquet", shard.parquet)] if shard.parquet else []) + [("tar", shard.tar)]


def _mark_rows(record: MarkRecord) -> list[Row]:
    """Return one row for each value of a mark, or for each value of the marks that a record takes back."""
    if record.undoes:
        taken_back = [(mark, value) for mark, values in record.undoes.items() for value in values]
        return [
            _row("marks", {"mark": mark, "value": value, "undone_at": record.made_at})
            for mark, value in taken_back
        ]
    fields = _fields(record)
    return [
        _row("marks", fields | {"value": value, "caption": record.captions.get(value)})
        for value in record.values
    ]


def _files(outputs: Mapping[str, Any]) -> Row:
    return {
        "paths": {name: file.path for name, file in outputs.items()},
        "sha256": {name: file.sha256 for name, file in outputs.items()},
        "bytes": sum(file.bytes for file in outputs.values()),
    }


def _fields(record: Json) -> Row:
    """Return a record's fields. Not ``asdict``: that copies every histogram."""
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


def _row(table: str, values: Row) -> Row:
    """Return those values that are columns of a table, as Arrow takes them."""
    converters = _converters(table)
    return {
        name: None if values[name] is None else convert(values[name])
        for name, convert in converters.items()
        if name in values
    }


@functools.cache
def _converters(table: str) -> dict[str, Callable[[Any], Any]]:
    """Return how a value becomes a cell, by column; once a table, since asking Arrow's types for each cell is slow."""
    return {column.name: _converter(column.type) for column in RECORD_TABLES[table]}


def _converter(dtype: pa.DataType) -> Callable[[Any], Any]:
    if pa.types.is_map(dtype):
        return lambda mapping: sorted(mapping.items())
    if pa.types.is_timestamp(dtype):
        return datetime.fromisoformat
    if pa.types.is_string(dtype):
        return _text
    return lambda value: value


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=dataclasses.asdict)
