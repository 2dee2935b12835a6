"""Records as rows of the manifest's tables. A column holds the record's field of that name, in the column's type."""

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.corpus.record_files import parse_record
from pipeline.manifest.histograms import histogram_cells
from schemas.catalog.table_schemas import RECORD_TABLES
from schemas.errors import CapfiltError
from schemas.json_record import MOST, Json, fields_of
from schemas.marks import MarkRecord
from schemas.names import is_one_part
from schemas.records import (
    SNAPSHOT_FILE,
    CheckpointRecord,
    IntakeRecord,
    LostAttemptRecord,
    ModelRecord,
    OutputFile,
    QuarantineRecord,
    RunRecord,
    ShardRecord,
    SnapshotRecord,
    SnapshotShard,
)
from schemas.stages import STAGE_INFO, STAGES

Row = dict[str, Any]

# By the folder under records/. What lies in others (begun attempts) is not part of the manifest.
_RECORD_TYPES: dict[str, type[Json]] = {
    **dict.fromkeys(STAGES, ShardRecord),
    "retired": ShardRecord,
    "quarantine": QuarantineRecord,
    "lost_attempts": LostAttemptRecord,
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
                return [_row("shards", fields_of(record) | {"state": "quarantined", "counts": counts})]
            case IntakeRecord():
                return _url_shard_rows(record)
            case MarkRecord():
                return _mark_rows(record)
            case _:
                return [_row(folder, fields_of(record))]
    except (ValueError, OverflowError) as error:  # not a time
        raise CapfiltError(f"{path} is not a record ({error}): restore it, or delete it") from error


def _shard_row(record: ShardRecord, state: str) -> Row:
    files = {name: [file.bytes, file.rows] for name, file in record.outputs.items()}
    row = _row("shards", fields_of(record) | _files(record.outputs) | {"state": state})
    cells = histogram_cells(record.histograms) if record.histograms else {}
    return row | cells | {"files": json.dumps(files, sort_keys=True)}


def shard_records_of(rows: pa.RecordBatch) -> Iterator[ShardRecord]:
    """Yield the committed record that each row of a part was made of, without its histograms.

    Column by column, and texts that many records share only once: there may be 50,000. Raises ValueError where a row
    cannot come from a record.
    """
    _require_numbers(rows)
    columns = {name: _values_of(rows[name]) for name in _RECORD_FIELDS}
    files = map(json.loads, rows["files"].to_pylist())
    outputs = map(_outputs, files, _values_of(rows["paths"]), _values_of(rows["sha256"]))
    for values, output_files in zip(zip(*columns.values(), strict=True), outputs, strict=True):
        record = ShardRecord(**dict(zip(columns, values, strict=True)), outputs=output_files)
        _require_names(record)
        yield record


# Fields that a row holds as they are.
_RECORD_FIELDS = [
    field.name for field in dataclasses.fields(ShardRecord) if field.name not in ("outputs", "histograms")
]
# Those that records and parts of earlier versions lack.
ADDED_FIELDS = ("cpus", "gpus", "node_type")
_TIME = "%Y-%m-%dT%H:%M:%S+00:00"


def _require_numbers(rows: pa.RecordBatch) -> None:
    """Raise ValueError for a count that no record may have, and for a missing value."""
    for name in set(_RECORD_FIELDS) - set(ADDED_FIELDS):
        column = rows[name]
        if column.null_count or (pa.types.is_map(column.type) and _entries(column)[1].null_count):
            raise ValueError(f"{name}: a value is NULL")
    counts = {name: rows[name] for name in ("rows_in", "rows_out", "images")}
    for name, values in (counts | {"counts": _entries(rows["counts"])[1]}).items():
        if len(values) and not (pc.min(values).as_py() >= 0 and pc.max(values).as_py() < MOST):
            raise ValueError(f"{name}: a count is negative or too large")
    for values in (_entries(rows["seconds"])[1], rows["cpus"], rows["gpus"]):
        if not pc.all(pc.is_finite(values), min_count=0).as_py():
            raise ValueError("seconds, cpus, gpus: a number is not finite")


def _values_of(column: pa.Array) -> Iterable[Any]:
    """Return a column's values as a record has them."""
    if pa.types.is_timestamp(column.type):
        # Without its zone, which is UTC: Arrow would look for a database of zones.
        return cast(list[str], pc.strftime(column.view(pa.timestamp("us")), _TIME).to_pylist())
    if pa.types.is_map(column.type):
        keys, items = map(_shared, _entries(column))
        places = pc.subtract(column.offsets, column.offsets[0]).to_pylist()
        return [
            dict(zip(keys[start:end], items[start:end], strict=True))
            for start, end in itertools.pairwise(places)
        ]
    if pa.types.is_list(column.type):
        return map(tuple, column.to_pylist())
    return _shared(column)


def _entries(column: pa.MapArray) -> tuple[pa.Array, pa.Array]:
    """Return all keys and all items of a column of maps; Arrow's own are those of the array that it is a slice of."""
    start, end = column.offsets[0].as_py(), column.offsets[-1].as_py()
    return column.keys.slice(start, end - start), column.items.slice(start, end - start)


def _shared(column: pa.Array) -> list[Any]:
    """Return values; equal texts are one object."""
    if not pa.types.is_string(column.type):
        return column.to_pylist()
    encoded = column.dictionary_encode()
    texts = encoded.dictionary.to_pylist()
    return [None if code is None else texts[code] for code in encoded.indices.to_pylist()]


def _outputs(
    sizes: Mapping[str, tuple[int, int]], paths: Mapping[str, str], sha256: Mapping[str, str]
) -> dict[str, OutputFile]:
    outputs = {}
    for name, (size, rows) in sizes.items():
        if not (type(size) is type(rows) is int and 0 <= size < MOST and 0 <= rows < MOST):
            raise ValueError(f"files.{name}: sizes and rows are counts")
        outputs[name] = OutputFile(path=paths[name], bytes=size, sha256=sha256[name], rows=rows)
    return outputs


_OUTPUTS = {stage: set(STAGE_INFO[stage].outputs) for stage in STAGES}
_is_one_part = functools.lru_cache(is_one_part)


def _require_names(record: ShardRecord) -> None:
    """Raise ValueError unless the outputs are the stage's own files, under names that ``ShardCommit`` gives them."""
    if record.stage not in STAGES:
        raise ValueError(f"stage: {record.stage!r} is none")
    if not (_is_one_part(record.source) and _is_one_part(record.run_id)):
        raise ValueError("source, run_id: not usable in a file's name")
    folder = f"{STAGE_INFO[record.stage].folder}/{record.source}/{record.shard}."
    is_usual = record.attempt.isalnum() and record.outputs.keys() == _OUTPUTS[record.stage]
    for name, file in record.outputs.items():
        is_usual &= file.path in (f"{folder}{record.attempt}.{name}", f"{folder}{name}")
    if not (is_usual and record.shard.isdigit()):
        record.require_valid()


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
            "images": shard.samples,
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
    fields = fields_of(record)
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
