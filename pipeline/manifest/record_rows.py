"""Records as rows of the manifest's tables: what each JSON file under records/ says, by column."""

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from pipeline.corpus.records import parse_record
from schemas.errors import CapfiltError
from schemas.records import (
    CheckpointRecord,
    IntakeRecord,
    Json,
    ModelRecord,
    QuarantineRecord,
    RunRecord,
    ShardRecord,
)

Row = dict[str, Any]


def table_of(path: str) -> str | None:
    """Return the table that a file under records/ belongs to, or None where it is none (begun attempts)."""
    kind = path.split("/")[1]
    if not path.endswith(".json") or kind not in _READERS:
        return None
    return kind if kind in ("runs", "models", "checkpoints") else "shards"


def committed_path(row: Row) -> str:
    """Return where the committed record of a row's shard is, if it has one."""
    return f"records/{row['stage']}/{row['source']}/{row['shard']}.json"


def rows_of(path: str, text: bytes) -> list[Row]:
    """Return the rows of one record file. Raises CapfiltError naming a file that is no record."""
    kind, rows = _READERS[path.split("/")[1]]
    record = parse_record(kind, path, text)
    try:
        return rows(record)
    except (ValueError, OverflowError) as error:  # a time that is none
        raise CapfiltError(f"{path} is not a record ({error}): restore it, or delete it") from error


def _shard_row(record: ShardRecord, state: str) -> Row:
    files = record.outputs
    return {
        "stage": record.stage,
        "source": record.source,
        "shard": record.shard,
        "state": state,
        "run_id": record.run_id,
        "attempt": record.attempt,
        "fingerprint": record.fingerprint,
        "inputs": _pairs(record.inputs),
        "models": list(record.models),
        "paths": [(name, file.path) for name, file in sorted(files.items())],
        "sha256": [(name, file.sha256) for name, file in sorted(files.items())],
        "bytes": sum(file.bytes for file in files.values()),
        "rows_in": record.rows_in,
        "rows_out": record.rows_out,
        "images": record.images,
        "counts": _pairs(record.counts),
        "histograms": _json(
            {name: {"edges": part.edges, "counts": part.counts} for name, part in record.histograms.items()}
        ),
        "seconds": _pairs(record.seconds),
        "started_at": _time(record.started_at),
        "finished_at": _time(record.finished_at),
        "host": record.host,
        "device": record.device,
        "versions": _pairs(record.versions),
    }


def _committed(record: ShardRecord) -> list[Row]:
    return [_shard_row(record, "committed")]


def _retired(record: ShardRecord) -> list[Row]:
    return [_shard_row(record, "retired")]


def _quarantined(record: QuarantineRecord) -> list[Row]:
    return [
        {
            "stage": record.stage,
            "source": record.source,
            "shard": record.shard,
            "state": "quarantined",
            "run_id": record.run_id,
            "counts": [("attempts", record.attempts)],
            "finished_at": _time(record.finished_at),
            "error": record.error,
        }
    ]


def _intake(batch: IntakeRecord) -> list[Row]:
    """Return one row for each url shard of a batch; ``counts`` names the kind, by which retries are found."""
    return [
        {
            "stage": "urls",
            "source": batch.source,
            "shard": shard,
            "state": "committed",
            "run_id": batch.run_id,
            "attempt": batch.attempt,
            "fingerprint": batch.signature,
            "paths": [("parquet", file.path)],
            "sha256": [("parquet", file.sha256)],
            "bytes": file.bytes,
            "rows_in": file.rows,
            "rows_out": file.rows,
            "counts": [(batch.kind, file.rows)],
            "finished_at": _time(batch.finished_at),
        }
        for shard, file in sorted(batch.shards.items())
    ]


def _run(record: RunRecord) -> list[Row]:
    return [
        {
            "run_id": record.run_id,
            "command": record.command,
            "config": _json(record.config),
            "config_digest": record.config_digest,
            "started_at": _time(record.started_at),
            "finished_at": _time(record.finished_at),
            "outcome": record.outcome,
            "shards_done": record.shards_done,
            "shards_skipped": record.shards_skipped,
            "shards_failed": record.shards_failed,
            "host": record.host,
            "versions": _pairs(record.versions),
        }
    ]


def _model(record: ModelRecord) -> list[Row]:
    return [
        {
            "digest": record.digest,
            "kind": record.kind,
            "name": record.name,
            "revision": record.revision,
            "files": _pairs(record.files),
            "parameters": record.parameters,
            "registered_at": _time(record.registered_at),
        }
    ]


def _checkpoint(record: CheckpointRecord) -> list[Row]:
    return [
        {
            "path": record.path,
            "stage": record.stage,
            "run_id": record.run_id,
            "step": record.step,
            "samples": record.samples,
            "snapshot": record.snapshot,
            "models": list(record.models),
            "sha256": _pairs(record.sha256),
            "metrics": _json(record.metrics),
            "created_at": _time(record.created_at),
        }
    ]


# By the folder under records/: what its files are, and their rows.
_READERS: dict[str, tuple[type[Json], Callable[[Any], list[Row]]]] = {
    "crawl": (ShardRecord, _committed),
    "caption": (ShardRecord, _committed),
    "rank": (ShardRecord, _committed),
    "select": (ShardRecord, _committed),
    "retired": (ShardRecord, _retired),
    "quarantine": (QuarantineRecord, _quarantined),
    "intake": (IntakeRecord, _intake),
    "runs": (RunRecord, _run),
    "models": (ModelRecord, _model),
    "checkpoints": (CheckpointRecord, _checkpoint),
}


def _pairs(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return sorted(values.items())


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)
