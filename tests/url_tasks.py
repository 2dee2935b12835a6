"""A list of URLs as the intake leaves it: a url shard, its record, and the crawl's task."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.corpus.records import Records
from pipeline.digests import sha256_file
from pipeline.shards.shard_files import write_parquet
from pipeline.shards.uids import sample_uid
from pipeline.storage.scratch import temporary_folder
from pipeline.storage.storage import Storage
from schemas.config import CapfiltConfig
from schemas.json_record import utc_now
from schemas.records import OutputFile, ShardRecord, ShardTask
from schemas.tables import URLS


def corpus_config(root: Path | str, crawl: Mapping[str, Any]) -> CapfiltConfig:
    """Return the config of a corpus of one source."""
    return CapfiltConfig.model_validate(
        {
            "corpus": {"path": str(root)},
            "source": [{"name": "web", "input": ["urls.parquet"]}],
            "crawl": crawl,
        }
    )


def url_rows(pairs: Sequence[tuple[str, str]], shard: str = "00000") -> list[dict[str, Any]]:
    """Return rows of URLS for (url, caption) pairs."""
    return [
        {
            "uid": sample_uid("web", url),
            "source": "web",
            "shard": shard,
            "key": f"{int(shard):05d}{number:05d}",
            "url": url,
            "captions": [caption],
            "input_rows": 1,
        }
        for number, (url, caption) in enumerate(pairs)
    ]


def crawl_task(records: Records, rows: Sequence[Mapping[str, Any]], adopted: str | None = None) -> ShardTask:
    """Store rows as a url shard and return the task of crawling it."""
    shard = rows[0]["shard"]
    path = f"urls/web/{shard}.test.parquet"
    with temporary_folder() as folder:
        local = folder / "urls.parquet"
        write_parquet(local, rows, URLS)
        records.storage.put(local, path)
        file = OutputFile(path=path, bytes=local.stat().st_size, sha256=sha256_file(local), rows=len(rows))
    outputs = {"parquet": file}
    if adopted is not None:
        outputs["adopted"] = OutputFile(path=adopted, bytes=Path(adopted).stat().st_size, sha256="", rows=0)
    urls = ShardRecord(
        stage="urls", source="web", shard=shard, run_id="run", attempt="test", fingerprint=file.sha256,
        inputs={}, outputs=outputs, rows_in=len(rows), rows_out=len(rows), images=0, counts={},
        started_at=utc_now(), finished_at=utc_now(),
    )  # fmt: skip
    return ShardTask(
        corpus=records.storage.root, stage="crawl", source="web", kind="web", shard=shard, run_id="run",
        fingerprint="test", inputs={"urls": urls},
    )  # fmt: skip


def new_records(root: Path | str) -> Records:
    """Return the records of a corpus."""
    return Records(Storage(str(root)))
