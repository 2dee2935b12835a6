"""Recount and re-hash a corpus against its records, and name each difference.

What is checked: every committed file's size, sha256, rows or samples; that no uid or key is lost or doubled
from one stage to the next; that no image is stored twice, by a retry or otherwise; that curated tars say what
their Parquet says; that what a stage was made from is what is committed now; that the manifest lists what the
records commit.
"""

import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.corpus.records import Records
from pipeline.corpus.shard_files import IMAGE_EXTENSIONS, read_tar, schema_mismatch
from pipeline.corpus.uids import pack_uids, unpack_uids
from pipeline.digests import sha256_file
from pipeline.manifest.manifest import Manifest
from pipeline.regular_files import NotRegularFileError
from schemas.catalog import DATA_STAGES, DATA_TABLES
from schemas.errors import CorruptShardError
from schemas.records import STAGES, OutputFile, ShardRecord, Stage
from schemas.statuses import REASONS
from schemas.tables import URLS

_COLUMNS: dict[Stage, list[str]] = {
    "urls": ["uid", "key", "retry_of"],
    "crawl": ["uid", "key", "status", "reason", "retry_of"],
    "caption": ["uid", "origin", "candidate", "text"],
    "rank": ["uid", "origin", "candidate", "text", "score"],
    "select": ["uid", "key", "status", "caption", "captions", "scores", "origins", "candidates"],
}

_SCHEMAS = {"urls": URLS} | {stage: DATA_TABLES[name] for name, stage in DATA_STAGES.items()}

ShardRecords = Mapping[Stage, ShardRecord]
Samples = dict[str, dict[str, bytes]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One thing that is not as committed: where, and what."""

    path: str
    what: str


@dataclass(slots=True, kw_only=True)
class Verification:
    """What was looked at, and every difference found."""

    shards: int = 0
    files: int = 0
    bytes: int = 0
    differences: list[Difference] = field(default_factory=list)


def verify(manifest: Manifest, *, quick: bool = False, threads: int | None = None) -> Verification:
    """Compare a whole corpus with its records.

    Args:
        quick: sizes only, nothing is read.
    """
    records = Records(manifest.storage)
    urls, committed = records.url_shards(), records.shards()
    chains: dict[tuple[str, str], dict[Stage, ShardRecord]] = {
        shard: {"urls": record} for shard, record in sorted(urls.items())
    }
    for (stage, source, shard), record in committed.items():
        chains.setdefault((source, shard), {})[stage] = record
    found = Verification(shards=len(chains))
    checks = [_ShardCheck(records, chain) for chain in chains.values()]
    with ThreadPoolExecutor(threads or min(16, 2 * (os.cpu_count() or 1))) as workers:
        list(workers.map(lambda check: check.sizes() if quick else check.everything(), checks))
    for check in checks:
        found.files += check.files
        found.bytes += check.bytes
        found.differences += check.differences
    if not quick:
        found.differences += _doubled_uids(checks)
    found.differences += _manifest_differences(manifest, {**committed, **_by_stage(urls)})
    return found


class _ShardCheck:
    """All stages of one shard."""

    def __init__(self, records: Records, chain: ShardRecords) -> None:
        self.storage = records.storage
        self.chain = chain
        self.differences: list[Difference] = []
        self.files = 0
        self.bytes = 0
        self.listed = self.stored = np.empty((0, 2), np.uint64)

    def differ(self, path: str, what: str) -> None:
        self.differences.append(Difference(path=path, what=what))

    def sizes(self) -> None:
        """Compare the sizes of the files."""
        for _, _, file in self._outputs():
            try:
                size = self.storage.info(file.path).bytes
            except FileNotFoundError:
                self.differ(file.path, "missing")
                continue
            self.files += 1
            self.bytes += size
            if size != file.bytes:
                self.differ(file.path, f"{size:,} bytes, its record says {file.bytes:,}")

    def everything(self) -> None:
        """Read every file, then compare the stages with one another."""
        tables: dict[Stage, list[dict[str, Any]]] = {}
        tars: dict[Stage, Samples] = {}
        for stage, name, file in self._outputs():
            content = self._content(stage, name, file)
            if content is None:
                continue
            if isinstance(content, dict):
                tars[stage] = content
            else:
                tables[stage] = content
        self._inputs()
        if "urls" in tables:
            self._urls(tables["urls"])
        if "crawl" in tables:
            self._crawl(tables["crawl"], tables.get("urls"), tars.get("crawl"))
            stored = {row["uid"] for row in tables["crawl"] if row["status"] == "ok"}
            if "caption" in tables:
                self._caption(tables["caption"], stored)
            if "rank" in tables:
                self._rank(tables["rank"], tables.get("caption"), stored)
            if "select" in tables:
                self._select(tables["select"], tables.get("rank"), tars.get("select"), stored)

    def _outputs(self) -> Iterator[tuple[Stage, str, OutputFile]]:
        for stage in ("urls", *STAGES):
            if stage in self.chain:
                for name, file in sorted(self.chain[stage].outputs.items()):
                    # An adopted tar is checked with the crawl's record, which has its digest.
                    if name != "adopted":
                        yield stage, name, file

    def _content(self, stage: Stage, name: str, file: OutputFile) -> list[dict[str, Any]] | Samples | None:
        """Return a file's rows or samples, or None where it cannot be read."""
        try:
            with self.storage.local_copy(file.path) as path:
                self.files += 1
                self.bytes += path.stat().st_size
                if path.stat().st_size != file.bytes:
                    self.differ(file.path, f"{path.stat().st_size:,} bytes, its record says {file.bytes:,}")
                elif sha256_file(path) != file.sha256:
                    self.differ(file.path, "another sha256 than its record says")
                return self._tar(stage, file, path) if name == "tar" else self._parquet(stage, file, path)
        except FileNotFoundError:
            self.differ(file.path, "missing")
        except NotRegularFileError as error:
            self.differ(file.path, error.strerror)
        except CorruptShardError as error:
            self.differ(file.path, str(error))
        except (OSError, pa.ArrowInvalid, EOFError, tarfile.TarError) as error:
            self.differ(file.path, f"cannot be read: {str(error).splitlines()[0]}")
        return None

    def _parquet(self, stage: Stage, file: OutputFile, path: Path) -> list[dict[str, Any]] | None:
        if mismatch := schema_mismatch(pq.read_schema(path), _SCHEMAS[stage]):
            self.differ(file.path, mismatch)
            return None
        table = pq.read_table(path, columns=_COLUMNS[stage], memory_map=False)
        if table.num_rows != file.rows:
            self.differ(file.path, f"{table.num_rows:,} rows, its record says {file.rows:,}")
        return table.to_pylist()

    def _tar(self, stage: Stage, file: OutputFile, path: Path) -> Samples:
        if path.stat().st_size == 0 and file.rows == 0:  # img2dataset's shard without a single image
            return {}
        samples: Samples = {}
        with path.open("rb") as tar:
            for key, members in read_tar(tar):
                if not IMAGE_EXTENSIONS & members.keys():
                    continue
                if key in samples:
                    self.differ(file.path, f"two samples with the key {key}")
                # Pixels are behind the sha256; what curated texts say is compared with the Parquet.
                texts = {name: members[name] for name in ("json", "txt") if name in members}
                samples[key] = texts if stage == "select" else {}
        if len(samples) != file.rows:
            self.differ(file.path, f"{len(samples):,} samples, its record says {file.rows:,}")
        return samples

    def _inputs(self) -> None:
        """Compare what each stage was made from with what is committed now."""
        for stage, record in self.chain.items():
            for name, sha256 in record.inputs.items():
                upstream, _, output = name.partition(".")
                now = self.chain.get(upstream)
                if now is None or output not in now.outputs:
                    self.differ(_record_path(record), f"made from {name}, which is not committed")
                elif now.outputs[output].sha256 != sha256:
                    self.differ(
                        _record_path(record),
                        f"stale: {upstream} was made anew since; run {stage} --recompute",
                    )

    def _urls(self, rows: list[dict[str, Any]]) -> None:
        path = self.chain["urls"].outputs["parquet"].path
        self._unique(path, rows, "uid")
        self._unique(path, rows, "key")
        self.listed = pack_uids([row["uid"] for row in rows if row["retry_of"] is None])

    def _crawl(
        self, rows: list[dict[str, Any]], urls: list[dict[str, Any]] | None, tar: Samples | None
    ) -> None:
        record = self.chain["crawl"]
        path = record.outputs["parquet"].path
        if urls is not None:
            self._same(
                path, "uids", (row["uid"] for row in rows), "its url shard", (row["uid"] for row in urls)
            )
        self._unique(path, rows, "key")
        for row in rows:
            reason = row["reason"]
            if (reason is None) != (row["status"] == "ok") or (
                reason in REASONS and REASONS[reason].status != row["status"]
            ):
                self.differ(path, f"{row['uid']} has status {row['status']} with reason {reason}")
        self.stored = pack_uids([row["uid"] for row in rows if row["status"] == "ok"])
        counts = Counter(row["status"] for row in rows)
        self._counted(
            record, {name: number for name, number in record.counts.items() if "/" not in name}, counts
        )
        if tar is not None:
            stored = (row["key"] for row in rows if row["status"] == "ok")
            self._same(
                record.outputs["tar"].path, "keys", list(tar), "the Parquet's rows that are ok", stored
            )

    def _caption(self, rows: list[dict[str, Any]], stored: set[str]) -> None:
        record = self.chain["caption"]
        path = record.outputs["parquet"].path
        captions = Counter(row["uid"] for row in rows)
        self._within(path, captions, "stored images", stored)
        if len(set(captions.values())) > 1:
            self.differ(
                path, f"images have between {min(captions.values())} and {max(captions.values())} captions"
            )
        if len({(row["uid"], row["candidate"]) for row in rows}) != len(rows):
            self.differ(path, "a candidate twice")
        self._counted(
            record,
            {name: record.counts.get(name, 0) for name in ("ok", "failed")},
            {"ok": len(captions), "failed": len(stored) - len(captions)},
        )

    def _rank(
        self, rows: list[dict[str, Any]], captions: list[dict[str, Any]] | None, stored: set[str]
    ) -> None:
        record = self.chain["rank"]
        path = record.outputs["parquet"].path
        self._within(path, (row["uid"] for row in rows), "stored images", stored)
        if captions is not None:
            self._same(
                path,
                "synthetic candidates",
                (_candidate(row) for row in rows if row["origin"] == "synthetic"),
                "the captions",
                map(_candidate, captions),
            )
        scored = sum(row["score"] is not None for row in rows)
        self._counted(
            record,
            {name: record.counts.get(name, 0) for name in ("scored", "unscored")},
            {"scored": scored, "unscored": len(rows) - scored},
        )

    def _select(
        self,
        rows: list[dict[str, Any]],
        scores: list[dict[str, Any]] | None,
        tar: Samples | None,
        stored: set[str],
    ) -> None:
        record = self.chain["select"]
        path = record.outputs["parquet"].path
        self._same(path, "uids", (row["uid"] for row in rows), "the stored images", stored)
        self._unique(path, rows, "key")
        kept = [row for row in rows if row["status"] == "kept"]
        self._counted(
            record,
            {name: record.counts.get(name, 0) for name in ("kept", "dropped")},
            {"kept": len(kept), "dropped": len(rows) - len(kept)},
        )
        if scores is not None:
            known = {_candidate(row): row["score"] for row in scores}
            for row in kept:
                chosen = zip(row["origins"], row["candidates"], row["captions"], row["scores"], strict=True)
                if any(
                    known.get((row["uid"], *place, text), "none") != score for *place, text, score in chosen
                ):
                    self.differ(path, f"{row['uid']} keeps a caption that is not among its scores")
        if tar is not None:
            self._same(
                record.outputs["tar"].path, "keys", list(tar), "the kept rows", (row["key"] for row in kept)
            )
            for row in kept:
                self._curated_texts(record.outputs["tar"].path, row, tar.get(row["key"]))

    def _curated_texts(self, path: str, row: dict[str, Any], members: dict[str, bytes] | None) -> None:
        if members is None:
            return  # named already: a key that is not there
        try:
            captions, best = json.loads(members["json"]), members["txt"].decode()
        except (KeyError, ValueError) as error:
            self.differ(path, f"{row['key']} has no readable json and txt ({error!r})")
            return
        if captions != row["captions"] or [best, row["caption"]] != [row["captions"][0]] * 2:
            self.differ(path, f"{row['key']} has other captions than its row")

    # -- comparisons -----------------------------------------------------------------------------------------

    def _counted(self, record: ShardRecord, said: Mapping[str, int], counted: Mapping[str, int]) -> None:
        said = {name: number for name, number in said.items() if number}
        counted = {name: number for name, number in counted.items() if number}
        if said != counted:
            self.differ(_record_path(record), f"the record counts {said}, its files hold {counted}")

    def _unique(self, path: str, rows: list[dict[str, Any]], column: str) -> None:
        twice = [value for value, times in Counter(row[column] for row in rows).items() if times > 1]
        if twice:
            self.differ(path, f"{len(twice)} {column}s twice, such as {twice[0]}")

    def _same(self, path: str, what: str, here: Iterable[Any], where: str, there: Iterable[Any]) -> None:
        ours, theirs = Counter(here), Counter(there)
        for more, text in (
            (ours - theirs, f"that {where} do not have"),
            (theirs - ours, f"of {where} are not there"),
        ):
            if more:
                self.differ(path, f"{more.total():,} {what} {text}, such as {next(iter(more))}")

    def _within(self, path: str, uids: Iterable[str], where: str, known: set[str]) -> None:
        if strange := set(uids) - known:
            self.differ(path, f"{len(strange):,} uids are not among the {where}, such as {min(strange)}")


def _candidate(row: dict[str, Any]) -> tuple[str, str, int, str]:
    return row["uid"], row["origin"], row["candidate"], row["text"]


def _record_path(record: ShardRecord) -> str:
    return f"records/{record.stage}/{record.source}/{record.shard}.json"


def _by_stage(urls: Mapping[tuple[str, str], ShardRecord]) -> dict[tuple[str, str, str], ShardRecord]:
    return {("urls", source, shard): record for (source, shard), record in urls.items()}


def _doubled_uids(checks: list[_ShardCheck]) -> Iterator[Difference]:
    """Find uids that two url shards list, retries not counted, or whose image two crawled shards hold."""
    for stage, uids, what in (
        ("urls", [check.listed for check in checks], "are also in"),
        ("crawl", [check.stored for check in checks], "are ok, and also in"),
    ):
        for (first, second), shared in _shared(uids).items():
            here, there = (checks[index].chain[stage].outputs["parquet"].path for index in (second, first))
            [example] = unpack_uids(shared[:1])
            yield Difference(path=here, what=f"{len(shared):,} uids {what} {there}, such as {example}")


def _shared(uids: list[np.ndarray]) -> dict[tuple[int, int], np.ndarray]:
    """Return what two of the arrays have in common, by the places of the two."""
    words = np.concatenate([np.empty((0, 2), np.uint64), *uids])
    owners = np.repeat(np.arange(len(uids)), [len(part) for part in uids])
    order = np.lexsort((owners, words[:, 1], words[:, 0]))
    words, owners = words[order], owners[order]
    again = np.flatnonzero((words[1:] == words[:-1]).all(axis=1) & (owners[1:] != owners[:-1]))
    places: dict[tuple[int, int], list[int]] = {}
    for place in again.tolist():
        places.setdefault((int(owners[place]), int(owners[place + 1])), []).append(place)
    return {pair: words[found] for pair, found in places.items()}


def _manifest_differences(
    manifest: Manifest, committed: Mapping[tuple[str, str, str], ShardRecord]
) -> list[Difference]:
    with manifest.open() as query:
        rows = query.rows("SELECT stage, source, shard, attempt FROM shards WHERE state = 'committed'")
    listed = {(row["stage"], row["source"], row["shard"], row["attempt"]) for row in rows}
    recorded = {(*shard, record.attempt) for shard, record in committed.items()}
    mend = "capfilt manifest rebuild mends it"
    return [
        Difference(path="manifest/shards", what=f"lists {'/'.join(one)}, which has no record; {mend}")
        for one in sorted(listed - recorded)
    ] + [
        Difference(path="manifest/shards", what=f"does not list {'/'.join(one)}, which is committed; {mend}")
        for one in sorted(recorded - listed)
    ]
