"""Recount and re-hash a corpus against its records, and name each discrepancy.

What is checked: every committed file's size, sha256, rows or samples; that no uid or key is lost or doubled
from one stage to the next; that no image is stored twice, by a retry or otherwise; that curated tars say what
their Parquet says; that what a stage was made from is what is committed now; that the manifest lists what the
records commit.
"""

import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.corpus.corpus_state import CorpusState
from pipeline.corpus.records import Records, ShardId
from pipeline.corpus.shard_files import IMAGE_EXTENSIONS, read_tar, schema_mismatch
from pipeline.corpus.uids import pack_uids, unpack_uids
from pipeline.digests import sha256_file
from pipeline.manifest.manifest import Manifest
from pipeline.manifest.verify_checks import COLUMNS, TAR_COLUMNS, ShardTables
from pipeline.manifest.verify_progress import Discrepancy, ShardFindings, VerifyProgress
from pipeline.regular_files import NotRegularFileError
from pipeline.storage.storage import Storage
from schemas.catalog import DATA_TABLES
from schemas.corpus_format import formats_in
from schemas.errors import CorruptShardError, first_line
from schemas.names import is_outside_tar
from schemas.records import MARKS_INPUT, OutputFile, ShardRecord
from schemas.stages import STAGE_FOLDERS, STAGES, Stage
from schemas.tables import URLS

_SCHEMAS = {"urls": URLS, **DATA_TABLES}


@dataclass(slots=True, kw_only=True)
class Verification:
    """What was looked at, and every discrepancy."""

    shards: int = 0
    files: int = 0
    bytes: int = 0
    # Shards that an earlier verification, which was stopped, had read.
    read_before: int = 0
    differences: list[Discrepancy] = field(default_factory=list)


def verify(
    manifest: Manifest,
    *,
    quick: bool = False,
    threads: int | None = None,
    progress: VerifyProgress | None = None,
) -> Verification:
    """Compare a whole corpus with its records.

    Args:
        quick: sizes only, as listings have them; nothing is read but the records that no part of the manifest holds.
        progress: where to note each shard that was read, and to take those from that a stopped verification has read.
    """
    committed = _committed(manifest, quick)
    shards: dict[tuple[str, str], dict[Stage, ShardRecord]] = {}
    for (stage, source, shard), record in sorted(committed.items()):
        shards.setdefault((source, shard), {})[stage] = record
    # Files of an earlier format may lack what the checks do not need.
    written_by = formats_in(Records(manifest.storage).list_formats())
    needed = COLUMNS if len(written_by) > 1 else {name: schema.names for name, schema in _SCHEMAS.items()}
    checks = [_ShardCheck(manifest.storage, by_stage, needed) for _, by_stage in sorted(shards.items())]
    read_before = 0
    if quick:
        listed = {
            info.path: info.bytes
            for folder in STAGE_FOLDERS.values()
            for info in manifest.storage.list(folder)
        }
        for check in checks:
            check.sizes(listed)
    else:
        with ThreadPoolExecutor(threads or min(16, 2 * (os.cpu_count() or 1))) as workers:
            read_before = sum(workers.map(lambda check: check.read_once(progress), checks))
    findings = [check.findings for check in checks]
    verification = Verification(
        shards=len(checks),
        files=sum(found.files for found in findings),
        bytes=sum(found.bytes for found in findings),
        read_before=read_before,
        differences=[discrepancy for found in findings for discrepancy in found.discrepancies],
    )
    if not quick:
        verification.differences += _doubled_uids(checks)
    verification.differences += _manifest_discrepancies(manifest, committed)
    if progress is not None:
        progress.forget()
    return verification


def _committed(manifest: Manifest, quick: bool) -> dict[ShardId, ShardRecord]:
    """Return the committed records, url shards included: where all is read, from the records themselves."""
    records = Records(manifest.storage)
    if quick:
        state = CorpusState(records, compacted=manifest.compacted.shard_records)
        committed, urls = state.committed, state.urls
    else:
        committed, urls = records.shards(), records.url_shards()
    return committed | {("urls", *shard): record for shard, record in urls.items()}


class _ShardCheck:
    """The files of one shard, all stages; ``needed`` are the columns that a table's file must have."""

    def __init__(
        self, storage: Storage, records: Mapping[Stage, ShardRecord], needed: Mapping[str, list[str]]
    ) -> None:
        self.needed = needed
        self.storage = storage
        self.records = records
        self.findings = ShardFindings()

    def report(self, path: str, what: str) -> None:
        self.findings.discrepancies.append(Discrepancy(path=path, what=what))

    def read_once(self, progress: VerifyProgress | None) -> bool:
        """Read every file, unless that was done before; tell whether it was."""
        if progress is None:
            self.contents()
            return False
        if (found := progress.found(self.records)) is not None:
            self.findings = found
            return True
        self.contents()
        progress.keep(self.records, self.findings)
        return False

    def sizes(self, listed: Mapping[str, int]) -> None:
        """Compare the sizes of the files with those of the listed ones, by path."""
        for file in self._outputs().values():
            size = self._outside_size(file.path) if is_outside_tar(file.path) else listed.get(file.path)
            if size is None:
                self.report(file.path, "missing")
            else:
                self._compare_size(file, size)

    def _outside_size(self, path: str) -> int | None:
        try:
            return self.storage.info(path).bytes
        except FileNotFoundError:
            return None

    def contents(self) -> None:
        """Read every file, then compare the stages with one another."""
        outputs = self._outputs()
        read = {name: self._read(name, file) for name, file in outputs.items()}
        tables = {name: rows for name, rows in read.items() if rows is not None}
        self._compare_inputs()
        if "select" in self.records:
            read_by_select = "matches" if "filter.parquet" in self.records["select"].inputs else "scores"
            tables |= {"judged": tables[read_by_select]} if read_by_select in tables else {}
        with ShardTables(tables) as shard:
            for name, difference in shard.discrepancies():
                self.report(outputs[name].path, difference)
            for stage in STAGES:
                if stage in self.records and (what := shard.miscount(stage, self.records[stage].counts)):
                    self.report(self.records[stage].path, what)
        if "urls" in tables:
            self.findings.listed_N2 = _uids(tables["urls"], pc.field("retry_of").is_null())
        if "raw" in tables:
            self.findings.stored_N2 = _uids(tables["raw"], pc.field("status") == "ok")

    def _outputs(self) -> dict[str, OutputFile]:
        """Return the committed files by the names of their tables: ``urls``, ``raw``, ``raw_tar``, ..."""
        return {
            STAGE_FOLDERS[stage] + ("_tar" if name == "tar" else ""): file
            for stage in ("urls", *STAGES)
            if stage in self.records
            for name, file in sorted(self.records[stage].outputs.items())
            # An imported tar is checked with the crawl's record, which has its digest.
            if name != "adopted"
        }

    def _compare_size(self, file: OutputFile, size: int) -> bool:
        self.findings.files += 1
        self.findings.bytes += size
        if size != file.bytes:
            self.report(file.path, f"{size:,} bytes, its record says {file.bytes:,}")
        return size == file.bytes

    def _read(self, name: str, file: OutputFile) -> pa.Table | None:
        """Return a file's rows or samples, or None where it cannot be read."""
        try:
            with self.storage.local_copy(file.path) as path:
                if self._compare_size(file, path.stat().st_size) and sha256_file(path) != file.sha256:
                    self.report(file.path, "another sha256 than its record says")
                is_tar = name.endswith("_tar")
                rows = self._samples(name, file, path) if is_tar else self._rows(name, file, path)
                if rows is not None and rows.num_rows != file.rows:
                    unit = "samples" if is_tar else "rows"
                    self.report(file.path, f"{rows.num_rows:,} {unit}, its record says {file.rows:,}")
                return rows
        except FileNotFoundError:
            self.report(file.path, "missing")
        except NotRegularFileError as error:
            self.report(file.path, error.strerror or "")
        except CorruptShardError as error:
            self.report(file.path, str(error))
        except (OSError, pa.ArrowInvalid, EOFError, tarfile.TarError) as error:
            self.report(file.path, f"cannot be read: {first_line(error)}")
        return None

    def _rows(self, name: str, file: OutputFile, path: Path) -> pa.Table | None:
        if mismatch := schema_mismatch(pq.read_schema(path), _SCHEMAS[name], self.needed[name]):
            self.report(file.path, mismatch)
            return None
        return pq.read_table(path, columns=COLUMNS.get(name), memory_map=False)

    def _samples(self, name: str, file: OutputFile, path: Path) -> pa.Table:
        """Return the key of each sample, and of a curated tar its texts. Pixels are covered by the sha256."""
        samples: dict[str, dict[str, object]] = {}
        if path.stat().st_size == 0 and file.rows == 0:  # img2dataset's shard without a single image
            return TAR_COLUMNS.empty_table()
        with path.open("rb") as tar:
            for key, members in read_tar(tar):
                if not IMAGE_EXTENSIONS & members.keys():
                    continue
                if key in samples:
                    self.report(file.path, f"two samples with the key {key}")
                samples[key] = {"key": key, **(_texts(members) if name == "curated_tar" else {})}
        return pa.Table.from_pylist(list(samples.values()), schema=TAR_COLUMNS)

    def _compare_inputs(self) -> None:
        """Compare what each stage was made from with what is committed now."""
        for stage, record in self.records.items():
            for name, sha256 in record.inputs.items():
                if name == MARKS_INPUT:  # whether they still hold, a plan says
                    continue
                upstream, _, output = name.partition(".")
                source = self.records.get(cast(Stage, upstream))
                if source is None or output not in source.outputs:
                    self.report(record.path, f"made from {name}, which is not committed")
                elif source.outputs[output].sha256 != sha256:
                    self.report(
                        record.path, f"stale: {upstream} was made anew since; run {stage} --recompute"
                    )


def _texts(members: Mapping[str, bytes]) -> dict[str, object]:
    """Return what KEY.json and KEY.txt of a curated sample say; captions that are not a list of texts are none."""
    try:
        captions, caption = json.loads(members["json"]), members["txt"].decode()
    except (KeyError, ValueError) as error:
        return {"error": repr(error)}
    is_list = isinstance(captions, list) and all(isinstance(text, str) for text in captions)
    return {"captions": captions if is_list else None, "caption": caption}


def _uids(rows: pa.Table, which: pc.Expression) -> np.ndarray:
    return pack_uids(rows.filter(which)["uid"].to_pylist())


def _doubled_uids(checks: Sequence[_ShardCheck]) -> Iterator[Discrepancy]:
    """Find uids that two url shards list, retries not counted, or whose image two crawled shards hold."""
    doubled: tuple[tuple[Stage, list[np.ndarray], str], ...] = (
        ("urls", [check.findings.listed_N2 for check in checks], "are also in"),
        ("crawl", [check.findings.stored_N2 for check in checks], "are ok, and also in"),
    )
    for stage, uids, what in doubled:
        for (first, second), shared in _shared(uids).items():
            here, there = (checks[index].records[stage].outputs["parquet"].path for index in (second, first))
            [example] = unpack_uids(shared[:1])
            yield Discrepancy(path=here, what=f"{len(shared):,} uids {what} {there}, such as {example}")


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
    return {pair: words[rows] for pair, rows in places.items()}


def _manifest_discrepancies(
    manifest: Manifest, committed: Mapping[ShardId, ShardRecord]
) -> list[Discrepancy]:
    with manifest.open() as query:
        rows = query.rows("SELECT stage, source, shard, attempt FROM shards WHERE state = 'committed'")
    listed = {tuple(row.values()) for row in rows}
    recorded = {(*shard, record.attempt) for shard, record in committed.items()}
    fix = "run capfilt manifest rebuild"
    whats = [f"lists {'/'.join(shard)}, which has no record; {fix}" for shard in sorted(listed - recorded)]
    whats += [
        f"does not list {'/'.join(shard)}, which is committed; {fix}" for shard in sorted(recorded - listed)
    ]
    return [Discrepancy(path="manifest/shards", what=what) for what in whats]
