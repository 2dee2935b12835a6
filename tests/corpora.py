"""Small committed corpora, made without network or models: real files through real attempts and records.

What the crawl and the models would have said is made up from the uid, so that two corpora made alike are
equal.
"""

import io
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from pipeline.corpus.commit import LENGTH_EDGES, SCORE_EDGES, ShardCommit, histogram
from pipeline.corpus.records import Records
from pipeline.digests import sha256_file
from pipeline.manifest.manifest import Manifest
from pipeline.shards.shard_files import write_parquet, write_tar
from pipeline.shards.uids import sample_uid
from pipeline.stages.selection import SelectWorker
from pipeline.storage.scratch import temporary_folder
from pipeline.storage.storage import Storage
from schemas.config import CapfiltConfig
from schemas.json_record import utc_now
from schemas.records import (
    IntakeRecord,
    ModelRecord,
    OutputFile,
    RunRecord,
    ShardRecord,
    ShardTask,
)
from schemas.stages import Stage
from schemas.tables import CANDIDATES, CAPTIONS, MATCHES, SAMPLES, SAMPLES_FILE, URLS

RUN = "20260101T000000-test"
CAPTIONER, RANKER = "c" * 64, "d" * 64
NUM_CAPTIONS = 3
# Of a corpus whose config has no [filter].
UNFILTERED: tuple[Stage, ...] = ("crawl", "caption", "rank", "select")
# How the second to fourth URL of twelve end, by number: status, reason, HTTP status.
FAILURES = {
    0: ("failed", "timeout", None),
    1: ("failed", "http_4xx", 404),
    2: ("invalid", "not_an_image", 200),
}


@dataclass
class Corpus:
    """A corpus under construction: ``add_urls`` then ``make`` shards; or ``make_corpus`` for all at once."""

    root: str
    # Whether crawled shards name the places of their images; those of earlier versions do not.
    places: bool = False
    failures: dict[int, tuple[str, str, int | None]] = field(default_factory=lambda: FAILURES)
    config: CapfiltConfig = field(init=False)
    records: Records = field(init=False)
    manifest: Manifest = field(init=False)

    def __post_init__(self) -> None:
        self.storage = Storage(self.root)
        self.records = Records(self.storage)
        self.manifest = Manifest(self.storage)
        self.config = CapfiltConfig.model_validate(
            {
                "corpus": {"path": self.root},
                "source": [{"name": "cc", "input": ["cc.csv"]}],
                "caption": {"num_captions": NUM_CAPTIONS},
                "select": {"min_score": 0.1},
            }
        )

    def copy(self, root: str) -> "Corpus":
        """Return a copy in another local folder, as if it had been made there: many times as fast as making it."""
        # Files that are new, as those of a corpus that was just made.
        shutil.copytree(self.root, root, copy_function=shutil.copyfile)
        corpus = replace(self, root=root)
        for run in corpus.records.runs():
            corpus.records.write_run(replace(run, config=corpus.config.model_dump(mode="json")))
        return corpus

    def start_run(self, run_id: str = RUN, **end: Any) -> None:
        """Write a run's start, or with ``outcome`` its end."""
        record = RunRecord(
            run_id=run_id,
            command="run",
            config=self.config.model_dump(mode="json"),
            config_digest="0" * 64,
            started_at=utc_now(),
            host="here",
            versions={"python": "3.11"},
        )
        self.records.write_run(replace(record, finished_at=utc_now(), **end) if end else record)

    def register_models(self) -> None:
        """Note the captioner and the ranker."""
        for digest, kind, name in ((CAPTIONER, "captioner", "blip-tiny"), (RANKER, "ranker", "clip-tiny")):
            self.records.register_model(
                ModelRecord(
                    digest=digest,
                    kind=kind,
                    name=name,
                    revision="1",
                    files={"model.safetensors": digest},
                    parameters=7,
                    registered_at=utc_now(),
                )
            )

    def add_urls(
        self,
        source: str,
        shards: Sequence[str],
        images: int,
        batch: int = 0,
        path: str = "",
        caption: str = "",
        extra: str = "{}",
    ) -> None:
        """Commit the lists of a source: ``images`` URLs in each shard, with what is given added to each."""
        rows = {
            shard: [
                _url_row(source, shard, index, path, caption) | {"extra": extra} for index in range(images)
            ]
            for shard in shards
        }
        self._commit_intake(source, rows, "lists", batch)

    def add_retry(self, source: str, of: str, shard: str, batch: int) -> list[str]:
        """Queue a shard's transient failures again as shard ``shard``; return their uids."""
        samples = [row for row in self.read("crawl", source, of) if row["reason"] == "timeout"]
        rows = [
            {name: sample[name] for name in URLS.names}
            | {"shard": shard, "key": f"{shard}{index:05d}", "retry_of": of}
            for index, sample in enumerate(samples)
        ]
        self._commit_intake(source, {shard: rows}, "retry", batch)
        return [row["uid"] for row in rows]

    def _commit_intake(self, source: str, rows: dict[str, list[dict]], kind: str, batch: int) -> None:
        shards = {}
        with temporary_folder() as folder:
            for shard, shard_rows in rows.items():
                local = folder / f"{shard}.parquet"
                count = write_parquet(local, shard_rows, URLS)
                path = f"urls/{source}/{shard}.list{batch}.parquet"
                self.storage.put(local, path)
                shards[shard] = OutputFile(
                    path=path, bytes=local.stat().st_size, sha256=sha256_file(local), rows=count
                )
        total = sum(file.rows for file in shards.values())
        record = IntakeRecord(
            source=source,
            batch=batch,
            kind=kind,
            run_id=RUN,
            attempt=f"list{batch}",
            signature="s" * 64,
            shards=shards,
            rows_in=total,
            rows_new=total,
            rows_duplicate=0,
            rows_known=0,
            finished_at=utc_now(),
            files=(f"{source}.csv",),
        )
        assert self.records.commit_intake(record)

    def read(self, stage: Stage, source: str, shard: str) -> list[dict[str, Any]]:
        """Return the rows of a committed shard's Parquet."""
        import pyarrow.parquet as pq

        with self.storage.open(self.records.read(stage, source, shard).outputs["parquet"].path) as file:
            return pq.read_table(file).to_pylist()

    def make(self, source: str, shard: str, stages: Iterable[Stage] = UNFILTERED) -> list[ShardRecord]:
        """Do the stages of one shard, as a run would."""
        makers = {
            "crawl": self._crawl, "caption": self._caption, "rank": self._rank, "filter": self._filter,
            "select": self._select,
        }  # fmt: skip
        return [makers[stage](source, shard) for stage in stages]

    def task(self, stage: Stage, source: str, shard: str, needs: Sequence[Stage]) -> ShardTask:
        """Return the task that a run would hand to a worker."""
        inputs = {
            name: self.records.url_shards()[source, shard]
            if name == "urls"
            else self.records.read(name, source, shard)
            for name in needs
        }
        return ShardTask(
            corpus=self.root,
            stage=stage,
            source=source,
            kind="web",
            shard=shard,
            run_id=RUN,
            fingerprint="f" * 64,
            inputs=inputs,
        )

    def _crawl(self, source: str, shard: str) -> ShardRecord:
        import pyarrow.parquet as pq

        task = self.task("crawl", source, shard, ("urls",))
        with self.storage.open(task.inputs["urls"].outputs["parquet"].path) as file:
            urls = pq.read_table(file).to_pylist()
        rows = [row | _answer(row, self.failures) for row in urls]
        images = {row["key"]: _jpeg(row["uid"]) for row in rows if row["status"] == "ok"}
        with ShardCommit(self.records, task) as commit:
            tar, parquet = commit.folder / "x.tar", commit.folder / "x.parquet"
            offsets = write_tar(tar, ((key, {"jpg": image}) for key, image in sorted(images.items())))
            stored = len(offsets)
            if self.places:
                for row in rows:
                    row |= {
                        "offset": offsets.get(row["key"]),
                        "image_bytes": len(images.get(row["key"], b"")),
                    }
            written = write_parquet(parquet, rows, SAMPLES_FILE if self.places else SAMPLES)
            stats = commit.stats
            stats.rows_in, stats.rows_out, stats.images = len(rows), stored, stored
            for row in rows:
                stats.count(row["status"], row["reason"])
            stats.histograms["width"] = histogram([16.0] * stored, LENGTH_EDGES)
            return commit.publish({"tar": (tar, stored), "parquet": (parquet, written)})

    def _caption(self, source: str, shard: str) -> ShardRecord:
        return self.caption(self.task("caption", source, shard, ("crawl",)))

    def caption(self, task: ShardTask) -> ShardRecord:
        """Do a captioner's task."""
        rows = [
            _identity(sample) | _caption_row(sample["uid"], index)
            for sample in self.read("crawl", task.source, task.shard)
            if sample["status"] == "ok"
            for index in range(NUM_CAPTIONS)
        ]
        with ShardCommit(self.records, task) as commit:
            parquet = commit.folder / "x.parquet"
            written = write_parquet(parquet, rows, CAPTIONS)
            stats = commit.stats
            stats.rows_in = stats.images = written // NUM_CAPTIONS
            stats.rows_out, stats.models = written, (CAPTIONER,)
            stats.count("ok", rows=stats.images)
            stats.histograms["caption_words"] = histogram([4.0] * written, LENGTH_EDGES)
            return commit.publish({"parquet": (parquet, written)})

    def rank_anew(self, source: str, shard: str) -> ShardRecord:
        """Replace a shard's scores with others."""
        return self._rank(source, shard, more=0.01, replaces=self.records.read("rank", source, shard))

    def _rank(
        self, source: str, shard: str, more: float = 0.0, replaces: ShardRecord | None = None
    ) -> ShardRecord:
        rows = self.read("caption", source, shard)
        for sample in self.read("crawl", source, shard):
            if sample["status"] == "ok":
                text = sample["captions"][0]
                rows.append(
                    _identity(sample) | {"origin": "web", "candidate": 0, "raw_text": text, "text": text}
                )
        for row in rows:
            score = score_of(row["uid"], row["origin"], row["candidate"])
            row |= {"score": score + more, "truncated": False}
        task = replace(self.task("rank", source, shard, ("crawl", "caption")), replaces=replaces)
        with ShardCommit(self.records, task) as commit:
            parquet = commit.folder / "x.parquet"
            rows.sort(key=lambda row: row["key"])
            written = write_parquet(parquet, rows, CANDIDATES)
            stats = commit.stats
            stats.rows_in = stats.rows_out = written
            stats.images, stats.models = written // (NUM_CAPTIONS + 1), (RANKER,)
            stats.count("scored", rows=written)
            stats.histograms["score_web"] = histogram(
                [row["score"] for row in rows if row["origin"] == "web"], SCORE_EDGES
            )
            return commit.publish({"parquet": (parquet, written)})

    def _filter(self, source: str, shard: str) -> ShardRecord:
        rows = [
            row | {"match_probability": score_of(row["uid"], row["origin"], row["candidate"]) * 2.5}
            for row in self.read("rank", source, shard)
        ]
        task = self.task("filter", source, shard, ("crawl", "caption", "rank"))
        with ShardCommit(self.records, task) as commit:
            parquet = commit.folder / "x.parquet"
            written = write_parquet(parquet, rows, MATCHES)
            stats = commit.stats
            stats.rows_in = stats.rows_out = written
            stats.images = written // (NUM_CAPTIONS + 1)
            stats.count("scored", rows=written)
            return commit.publish({"parquet": (parquet, written)})

    def _select(self, source: str, shard: str) -> ShardRecord:
        return SelectWorker(self.config, self.records)(self.task("select", source, shard, ("crawl", "rank")))


def make_corpus(
    root: str,
    sources: Sequence[str] = ("cc",),
    shards: int = 2,
    images: int = 12,
    stages: Sequence[Stage] = UNFILTERED,
    places: bool = False,
) -> Corpus:
    """Return a corpus with ``shards`` shards of ``images`` URLs a source, a quarter of them failed."""
    corpus = Corpus(root, places)
    corpus.start_run()
    corpus.register_models()
    names = [f"{number:05d}" for number in range(shards)]
    for source in sources:
        corpus.add_urls(source, names, images)
        for name in names:
            corpus.make(source, name, stages)
    corpus.start_run(outcome="done", shards_done=len(sources) * shards * len(stages))
    return corpus


def score_of(uid: str, origin: str, candidate: int) -> float:
    """Return a made-up cosine similarity, the same each time."""
    return round(int(sample_uid(uid, f"{origin}{candidate}")[:4], 16) / 65536 * 0.4, 4)


def _url_row(source: str, shard: str, index: int, path: str = "", caption: str = "") -> dict[str, Any]:
    url = f"http://host{index % 3}.example/{path}{shard}/{index}.jpg"
    return {
        "uid": sample_uid(source, url),
        "source": source,
        "shard": shard,
        "key": f"{shard}{index:05d}",
        "url": url,
        "captions": [f"Web words {index}{caption}"],
        "input_rows": 1,
        "extra": "{}",
    }


def _identity(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("uid", "source", "shard", "key")}


def _answer(row: dict[str, Any], failures: dict[int, tuple[str, str, int | None]]) -> dict[str, Any]:
    """Return what a fetch would have said: the second to fourth of twelve fail, a retried row succeeds."""
    index = int(row["key"][5:])
    status, reason, http_status = failures.get((index - 1) % 12, ("ok", None, 200))
    answer = {
        "status": status,
        "reason": reason,
        "http_status": http_status,
        "attempts": 3 if reason == "timeout" else 1,
        "seconds": 0.25,
    }
    if row["retry_of"] is not None or status == "ok":
        answer |= {"status": "ok", "reason": None, "http_status": 200, "final_url": row["url"] + "?final"}
        answer |= {"width": 16, "height": 16, "format": "JPEG", "sha256": row["uid"] * 2, "body_bytes": 999}
    return answer


def _caption_row(uid: str, index: int) -> dict[str, Any]:
    text = f"caption {index % 2} of {uid[:4]}"
    earlier = index - 2 if index >= 2 else None
    return {
        "origin": "synthetic",
        "candidate": index,
        "raw_text": text + " .",
        "text": text,
        "seed": int(uid[:15], 16),
        "num_tokens": 6,
        "duplicate_of": earlier,
    }


def _jpeg(uid: str) -> bytes:
    image = Image.new("RGB", (16, 16), tuple(int(uid[place : place + 2], 16) for place in (0, 2, 4)))
    data = io.BytesIO()
    image.save(data, "JPEG")
    return data.getvalue()


def ranked_corpus(root: str, shards: int) -> Corpus:
    """Return a corpus of so many small shards that wait for their selection."""
    corpus = Corpus(root)
    names = [f"{number:05d}" for number in range(shards)]
    corpus.add_urls("cc", names, images=6)
    for name in names:
        corpus.make("cc", name, ("crawl", "caption", "rank"))
    return corpus
