"""A committed corpus without web or models: real lists, Parquet and records, made-up answers and scores.

Ten captions an image and the web's own. Every fourth URL failed. Tars only where pictures are given.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.attempt import Attempt
from pipeline.histograms import LENGTH_EDGES, SCORE_EDGES, histogram
from pipeline.intake import read_lists
from pipeline.records import Records, now
from pipeline.shards import write_parquet, write_tar
from pipeline.storage import Storage
from pipeline.urlshards import url_shards
from schemas.config import CapfiltConfig
from schemas.records import ModelRecord, RunRecord, ShardRecord, ShardTask, Stage
from schemas.tables import CANDIDATES, CAPTIONS, CURATED, SAMPLES

SOURCE = "bench"
_RUN = "20260101T000000-bench"
_MODELS: dict[str, str] = {"captioner": "c" * 64, "ranker": "d" * 64}
_SYNTHETIC, _CANDIDATES = 10, 11
_FAILED_EVERY = 4
_FAILURES = (("failed", "timeout", None), ("failed", "http_4xx", 404), ("invalid", "not_an_image", 200))
_KEPT = 2
_SIDES_PX = (512, 384)
_THINGS = ("dog", "bus", "red chair", "harbour at dusk", "plate of food", "man with a hat", "street sign")


class SyntheticCorpus:
    """A corpus of so many images under a folder: its lists taken in, its shards ready to be made.

    Args:
        pictures: what the crawl's tars hold, in turn; without any there are no tars.
    """

    def __init__(
        self, folder: Path, images: int, samples_per_shard: int = 10_000, pictures: Sequence[bytes] = ()
    ) -> None:
        self.pictures = pictures
        self.config = CapfiltConfig.model_validate(
            {
                "corpus": {"path": str(folder / "corpus"), "samples_per_shard": samples_per_shard},
                "source": [{"name": SOURCE, "input": [str(folder / "list.parquet")]}],
            }
        )
        self.records = Records(Storage(self.config.corpus.path))
        assert samples_per_shard % _FAILED_EVERY == 0, "a shard's key decides which of its URLs failed"
        self._start_run()
        urls = images + images // (_FAILED_EVERY - 1)
        pq.write_table(_url_list(urls), folder / "list.parquet")
        read_lists(self.config, self.records, _RUN)
        self._urls = url_shards(self.records)

    @property
    def shards(self) -> list[str]:
        """The names of the shards, in order."""
        return [shard for _, shard in sorted(self._urls)]

    def task(self, stage: Stage, shard: str, **inputs: ShardRecord) -> ShardTask:
        """Return the task that a run would hand to a worker."""
        return ShardTask(
            corpus=self.config.corpus.path,
            stage=stage,
            source=SOURCE,
            kind="web",
            shard=shard,
            run_id=_RUN,
            fingerprint="f" * 64,
            inputs=inputs,
        )

    def crawl(self, shard: str) -> ShardRecord:
        """Commit a shard's samples, and its tar: an empty one where there are no pictures."""
        urls = self._urls[SOURCE, shard]
        with self.records.storage.open(urls.outputs["parquet"].path) as file:
            samples = _samples(pq.read_table(file))
        with Attempt(self.records, self.task("crawl", shard, urls=urls)) as attempt:
            stored = [key for key, status in _columns(samples, "key", "status") if status == "ok"]
            tally = attempt.tally
            tally.rows_in, tally.rows_out, tally.images = samples.num_rows, len(stored), len(stored)
            for status, reason in _columns(samples, "status", "reason"):
                tally.count(status, reason)
            tally.histograms["short_side_px"] = histogram([min(_SIDES_PX)] * len(stored), SCORE_EDGES)
            tar = attempt.folder / "samples.tar"
            named = enumerate(stored) if self.pictures else ()
            pictures = ((key, {"jpg": self._picture(number)}) for number, key in named)
            return attempt.commit(
                {"parquet": _parquet(attempt, samples, SAMPLES), "tar": (tar, write_tar(tar, pictures))}
            )

    def _picture(self, number: int) -> bytes:
        return self.pictures[number % len(self.pictures)]

    def caption(self, shard: str, crawl: ShardRecord) -> ShardRecord:
        """Commit ten captions of each of a shard's images."""
        captions = _captions(self._read(crawl))
        with Attempt(self.records, self.task("caption", shard, crawl=crawl)) as attempt:
            tally = attempt.tally
            tally.rows_in = tally.images = crawl.rows_out
            tally.rows_out, tally.models = captions.num_rows, (_MODELS["captioner"],)
            tally.count("ok", rows=tally.images)
            tally.histograms["caption_words"] = histogram([7.0] * captions.num_rows, LENGTH_EDGES)
            return attempt.commit({"parquet": _parquet(attempt, captions, CAPTIONS)})

    def rank(self, shard: str, crawl: ShardRecord, caption: ShardRecord) -> ShardRecord:
        """Commit the scores of eleven captions of each of a shard's images."""
        candidates = _scored(self._read(crawl), self._read(caption), seed=int(shard))
        with Attempt(self.records, self.task("rank", shard, crawl=crawl, caption=caption)) as attempt:
            tally = attempt.tally
            tally.rows_in = tally.rows_out = candidates.num_rows
            tally.images, tally.models = crawl.rows_out, (_MODELS["ranker"],)
            tally.count("scored", rows=candidates.num_rows)
            tally.histograms["score"] = histogram(candidates["score"].to_numpy(), SCORE_EDGES)
            return attempt.commit({"parquet": _parquet(attempt, candidates, CANDIDATES)})

    def select(self, shard: str, crawl: ShardRecord, rank: ShardRecord) -> ShardRecord:
        """Commit the rows of the best two captions, and a tar without the images."""
        curated = _curated(self._read(crawl), self._read(rank))
        with Attempt(self.records, self.task("select", shard, crawl=crawl, rank=rank)) as attempt:
            tally = attempt.tally
            tally.rows_in = tally.rows_out = tally.images = curated.num_rows
            tally.count("kept", rows=curated.num_rows)
            kept = np.concatenate([[0.0], *curated["scores"].to_numpy()])[1:]
            tally.histograms["kept_score"] = histogram(kept, SCORE_EDGES)
            tar = attempt.folder / "samples.tar"
            return attempt.commit(
                {"parquet": _parquet(attempt, curated, CURATED), "tar": (tar, write_tar(tar, ()))}
            )

    def _read(self, record: ShardRecord) -> pa.Table:
        with self.records.storage.open(record.outputs["parquet"].path) as file:
            table = pq.read_table(file)
        return table.filter(pa.compute.equal(table["status"], "ok")) if record.stage == "crawl" else table

    def _start_run(self) -> None:
        self.records.write_run(
            RunRecord(
                run_id=_RUN,
                command="run",
                config=self.config.model_dump(mode="json"),
                config_digest="0" * 64,
                started_at=now(),
                host="bench",
                versions={},
            )
        )
        for kind, digest in _MODELS.items():
            self.records.register_model(
                ModelRecord(
                    digest=digest,
                    kind=kind,
                    name=kind,
                    revision="",
                    files={},
                    parameters=1,
                    registered_at=now(),
                )
            )


def _url_list(urls: int) -> pa.Table:
    return pa.table(
        {
            "url": [f"https://host{number % 997}.example/photos/{number:09}.jpg" for number in range(urls)],
            "caption": [f"what the web says beside picture {number}" for number in range(urls)],
        }
    )


def _parquet(attempt: Attempt, table: pa.Table, schema: pa.Schema) -> tuple[Path, int]:
    path = attempt.folder / "rows.parquet"
    return path, write_parquet(path, table, schema)


def _columns(table: pa.Table, *names: str) -> zip:
    return zip(*(table[name].to_pylist() for name in names), strict=True)


def _table(columns: dict[str, Any], schema: pa.Schema) -> pa.Table:
    """Build a table from columns; one that is missing is NULL."""
    rows = len(next(iter(columns.values())))
    return pa.table(
        {field.name: columns.get(field.name, pa.nulls(rows, field.type)) for field in schema}
    ).cast(schema)


def _samples(urls: pa.Table) -> pa.Table:
    """Return what the crawl would have said of each URL."""
    answers = []
    for uid, key in _columns(urls, "uid", "key"):
        answers.append(_ok(uid) if int(key[5:]) % _FAILED_EVERY != _FAILED_EVERY - 1 else _failed(uid))
    columns: dict[str, Any] = {name: urls[name] for name in urls.column_names}
    return _table(columns | {name: [one[name] for one in answers] for name in answers[0]}, SAMPLES)


def _ok(uid: str) -> dict[str, Any]:
    width, height = _SIDES_PX
    return {"status": "ok", "reason": None, "http_status": 200, "attempts": 1, "body_bytes": 100_000,
            "sha256": uid * 2, "format": "JPEG", "original_width": width, "original_height": height,
            "width": width, "height": height, "image_bytes": 60_000, "seconds": 0.25}  # fmt: skip


def _failed(uid: str) -> dict[str, Any]:
    status, reason, http_status = _FAILURES[int(uid[:8], 16) % len(_FAILURES)]
    answer = dict.fromkeys(_ok(uid)) | {"status": status, "reason": reason, "http_status": http_status}
    return answer | {"attempts": 1, "seconds": 0.5}


def _identity(samples: pa.Table, times: int) -> dict[str, Any]:
    rows = np.repeat(np.arange(samples.num_rows), times)
    return {name: samples[name].take(pa.array(rows)) for name in ("uid", "source", "shard", "key")}


def _captions(samples: pa.Table) -> pa.Table:
    texts = [
        f"a photo of a {_THINGS[int(uid[index], 16) % len(_THINGS)]} near {uid[index : index + 6]}"
        for uid in samples["uid"].to_pylist()
        for index in range(_SYNTHETIC)
    ]
    rows = len(texts)
    columns = _identity(samples, _SYNTHETIC) | {
        "origin": ["synthetic"] * rows,
        "candidate": np.tile(np.arange(_SYNTHETIC), samples.num_rows),
        "raw_text": [f"{text} ." for text in texts],
        "text": texts,
        "seed": [int(uid[:15], 16) for uid in samples["uid"].to_pylist() for _ in range(_SYNTHETIC)],
        "num_tokens": np.full(rows, 11),
    }
    return _table(columns, CAPTIONS)


def _scored(samples: pa.Table, captions: pa.Table, seed: int) -> pa.Table:
    """Return captions and web captions by key, with scores as CLIP ViT-L/14's are distributed."""
    texts = [given[0] for given in samples["captions"].to_pylist()]
    rows = len(texts)
    web = _identity(samples, 1) | {
        "origin": ["web"] * rows, "candidate": np.zeros(rows, np.int16), "raw_text": texts, "text": texts,
    }  # fmt: skip
    table = pa.concat_tables([captions, _table(web, CAPTIONS)]).sort_by("key")
    scores = np.random.default_rng(seed).normal(0.22, 0.05, table.num_rows).clip(-1, 1)
    columns: dict[str, Any] = {name: table[name] for name in table.column_names}
    return _table(columns | {"score": scores, "truncated": np.zeros(table.num_rows, bool)}, CANDIDATES)


def _curated(samples: pa.Table, candidates: pa.Table) -> pa.Table:
    """Return the best two of each image's eleven, as the selection's rows have them."""
    scores_BK = candidates["score"].to_numpy().reshape(-1, _CANDIDATES)
    best_BK = np.argsort(-scores_BK, axis=1)[:, :_KEPT] + np.arange(len(scores_BK))[:, None] * _CANDIDATES
    best = candidates.take(pa.array(best_BK.ravel()))

    def pairs(name: str) -> list[list[Any]]:
        values = best[name].to_pylist()
        return [values[start : start + _KEPT] for start in range(0, len(values), _KEPT)]

    captions, given = pairs("text"), ("uid", "source", "shard", "key", "url", "width", "height", "sha256")
    columns: dict[str, Any] = {name: samples[name] for name in given} | {
        "status": ["kept"] * samples.num_rows,
        "caption": [texts[0] for texts in captions],
        "captions": captions,
        "scores": pairs("score"),
        "origins": pairs("origin"),
        "candidates": pairs("candidate"),
    }
    return _table(columns, CURATED)
