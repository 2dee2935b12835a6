"""Raw shards as a crawl commits them, made of pictures that a test draws."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.corpus.commit import ShardCommit
from pipeline.corpus.records import Records
from pipeline.shards.shard_files import write_parquet, write_tar
from pipeline.shards.uids import sample_uid
from pipeline.storage.storage import Storage
from schemas.config import CapfiltConfig
from schemas.records import ShardRecord, ShardTask
from schemas.stages import Stage
from schemas.tables import SAMPLES

SOURCE = "tiny"


def picture(seed: int, size: tuple[int, int] = (40, 48)) -> Image.Image:
    """Draw a picture of coloured blocks, another for every seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def config_of(corpus: Path, **sections: object) -> CapfiltConfig:
    return CapfiltConfig.model_validate(
        {"corpus": {"path": str(corpus), "seed": 7}, "source": [{"name": SOURCE, "input": ["unused.csv"]}]}
        | sections
    )


def task_of(config: CapfiltConfig, stage: Stage, kind: str = "web", **inputs: ShardRecord) -> ShardTask:
    return ShardTask(
        corpus=config.corpus.path,
        stage=stage,
        source=SOURCE,
        kind=kind,
        shard="00000",
        run_id="test",
        fingerprint="f",
        inputs=inputs,
    )


def sample_row(key: str, captions: list[str], **values: object) -> dict[str, object]:
    url = f"http://example.org/{key}.jpg"
    row = {
        "uid": sample_uid(SOURCE, url),
        "source": SOURCE,
        "shard": "00000",
        "key": key,
        "url": url,
        "captions": captions,
        "input_rows": 1,
        "status": "ok",
        "width": 40,
        "height": 48,
        "sha256": "0" * 64,
    }
    return row | values


def commit_crawl(
    config: CapfiltConfig,
    images: dict[str, dict[str, bytes]],
    captions: dict[str, list[str]],
    failed: tuple[str, ...] = (),
) -> ShardRecord:
    """Commit a raw shard: the members of each stored sample, a row for each stored or failed one."""
    records = Records(Storage(config.corpus.path))
    rows = [sample_row(key, captions.get(key, [])) for key in images]
    rows += [sample_row(key, captions.get(key, []), status="failed", reason="dns") for key in failed]
    with ShardCommit(records, task_of(config, "crawl")) as commit:
        tar, parquet = commit.folder / "raw.tar", commit.folder / "raw.parquet"
        stored = len(write_tar(tar, images.items()))
        written = write_parquet(parquet, rows, SAMPLES)
        commit.stats.rows_in, commit.stats.rows_out = written, stored
        return commit.publish({"tar": (tar, stored), "parquet": (parquet, written)})
