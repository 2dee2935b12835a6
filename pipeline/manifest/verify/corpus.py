"""Recount and re-hash a corpus against its records, and name each discrepancy.

What is checked: every committed file's size, sha256, rows or samples; that no uid or key is lost or doubled
from one stage to the next; that no image is stored twice, by a retry or otherwise; that curated tars say what
their Parquet says; that what a stage was made from is what is committed now; that the manifest lists what the
records commit.

Of all shards only their names, the differences and a few hundred bytes each are held, of those in work what their
files hold: the memory does not grow with the samples.
"""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

from pipeline.corpus.corpus_state import CorpusState, place_of_record
from pipeline.corpus.records import Records, ShardId
from pipeline.manifest.manifest import Manifest
from pipeline.manifest.verify.doubled_uids import CheckedShard, doubled_uids
from pipeline.manifest.verify.progress import Discrepancy, ShardFindings, VerifyProgress, shard_name
from pipeline.manifest.verify.selection import EVERY_SHARD, ShardSelection, require_some
from pipeline.manifest.verify.shard_check import ShardCheck, needed_columns
from pipeline.prefetch import prefetch_map
from pipeline.storage.file_info import FileInfo
from pipeline.storage.scratch import temporary_folder
from pipeline.storage.storage import Storage
from schemas.corpus_format import formats_in
from schemas.records import ShardRecord
from schemas.stages import STAGE_FOLDERS, Stage

# The committed records of one shard.
ShardRecords = dict[Stage, ShardRecord]
# Reads the files of shards, and returns what they hold as it is found, in any order. ``needed``: see ``ShardCheck``.
ReadShards = Callable[
    [Storage, Iterator[ShardRecords], Mapping[str, list[str]]], Iterator[tuple[ShardRecords, ShardFindings]]
]

# Shards whose records are read at once.
_BATCH_SHARDS = 64
# A shard of 10,000 images takes up to 120 MB while it is read: more threads would take more than a gigabyte.
_MOST_THREADS = 6


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
    selection: ShardSelection = EVERY_SHARD,
    read: ReadShards | None = None,
    progress: VerifyProgress | None = None,
) -> Verification:
    """Compare a corpus, or some of its shards, with its records.

    Args:
        quick: sizes only, as listings have them; nothing is read but the records that no part of the manifest holds.
        selection: which shards. An image that is stored twice is found where both of its shards are among them.
        read: how the shards' files are read; None for threads of this process.
        progress: where to note each shard that was read, and to take those from that a stopped verification has read.

    Raises CapfiltError where the selection names no shard.
    """
    found = _Found()
    needed = needed_columns(len(formats_in(Records(manifest.storage).list_formats())))
    with ExitStack() as stack:
        if quick:
            _compare_sizes(manifest, selection, needed, found)
        else:
            progress = progress or VerifyProgress(stack.enter_context(temporary_folder()))
            _read_shards(manifest.storage, selection, needed, read or read_here, progress, found)
    differences = [difference for place in sorted(found.by_shard) for difference in found.by_shard[place]]
    found.total.differences = (
        differences + found.doubled + _manifest_discrepancies(manifest, selection, found)
    )
    return found.total


@dataclass(slots=True)
class _Found:
    """What was found so far."""

    total: Verification = field(default_factory=Verification)
    by_shard: dict[tuple[str, str], list[Discrepancy]] = field(default_factory=dict)
    doubled: list[Discrepancy] = field(default_factory=list)
    # Each committed record, with its attempt.
    committed: set[tuple[str, str, str, str]] = field(default_factory=set)

    def begin(self, records: ShardRecords) -> None:
        self.total.shards += 1
        self.committed |= {
            (stage, record.source, record.shard, record.attempt) for stage, record in records.items()
        }

    def add(self, records: ShardRecords, findings: ShardFindings) -> None:
        self.total.files += findings.files
        self.total.bytes += findings.bytes
        if findings.discrepancies:
            self.by_shard[_place_of(records)] = findings.discrepancies


def _place_of(records: ShardRecords) -> tuple[str, str]:
    record = next(iter(records.values()))
    return record.source, record.shard


def _compare_sizes(
    manifest: Manifest, selection: ShardSelection, needed: Mapping[str, list[str]], found: _Found
) -> None:
    state = CorpusState(Records(manifest.storage), compacted=manifest.compacted.shard_records)
    require_some(selection, {*state.urls, *(shard[1:] for shard in state.committed)})
    listed = {
        info.path: info.bytes for folder in STAGE_FOLDERS.values() for info in manifest.storage.list(folder)
    }
    for records in _by_shard(state.committed, state.urls, selection):
        found.begin(records)
        check = ShardCheck(manifest.storage, records, needed)
        check.sizes(listed)
        found.add(records, check.findings)


def _read_shards(
    storage: Storage,
    selection: ShardSelection,
    needed: Mapping[str, list[str]],
    read: ReadShards,
    progress: VerifyProgress,
    found: _Found,
) -> None:
    checked: dict[tuple[str, str], CheckedShard] = {}

    def unread() -> Iterator[ShardRecords]:
        for records in _committed_shards(Records(storage), selection):
            found.begin(records)
            checked[_place_of(records)] = _checked_shard(records)
            if (sizes := progress.sizes(records)) is None:
                yield records
            else:
                found.total.read_before += 1
                found.add(records, ShardFindings(*sizes))

    for records, findings in read(storage, unread(), needed):
        progress.keep(records, findings)
        found.add(records, findings)
    found.doubled = list(doubled_uids(progress, [checked[place] for place in sorted(checked)]))


def _checked_shard(records: ShardRecords) -> CheckedShard:
    kinds: dict[Stage, str] = {"urls": "listed", "crawl": "stored"}
    paths = {
        kind: records[stage].outputs["parquet"].path for stage, kind in kinds.items() if stage in records
    }
    return CheckedShard(shard_name(records), paths)


def read_here(
    storage: Storage,
    shards: Iterator[ShardRecords],
    needed: Mapping[str, list[str]],
    *,
    threads: int | None = None,
) -> Iterator[tuple[ShardRecords, ShardFindings]]:
    """Read the files of shards in threads of this process: see ``ReadShards``."""
    threads = threads or min(_MOST_THREADS, 2 * (os.cpu_count() or 1))

    def read(records: ShardRecords) -> tuple[ShardRecords, ShardFindings]:
        return records, check_shard(storage, records, needed)

    return prefetch_map(read, shards, ahead=threads, threads=threads)


def check_shard(storage: Storage, records: ShardRecords, needed: Mapping[str, list[str]]) -> ShardFindings:
    """Read every file of a shard, and return what they hold."""
    check = ShardCheck(storage, records, needed)
    check.contents()
    return check.findings


def _committed_shards(records: Records, selection: ShardSelection) -> Iterator[ShardRecords]:
    """Yield the committed records of each selected shard, in order, from the records themselves."""
    urls = records.url_shards()
    files: dict[tuple[str, str], list[FileInfo]] = {place: [] for place in urls}
    for info in records.list_shards():
        files.setdefault(place_of_record(info.path), []).append(info)
    require_some(selection, files)
    places = iter(sorted(place for place in files if selection.has(*place)))
    while batch := list(itertools.islice(places, _BATCH_SHARDS)):
        committed = records.read_shards([info for place in batch for info in files[place]])
        yield from _by_shard(committed, {place: urls[place] for place in batch if place in urls}, selection)


def _by_shard(
    committed: Mapping[ShardId, ShardRecord],
    urls: Mapping[tuple[str, str], ShardRecord],
    selection: ShardSelection,
) -> Iterable[ShardRecords]:
    """Return the records of each selected shard, in order of the shards."""
    shards: dict[tuple[str, str], ShardRecords] = {place: {"urls": record} for place, record in urls.items()}
    for (stage, source, shard), record in committed.items():
        shards.setdefault((source, shard), {})[stage] = record
    return [shards[place] for place in sorted(shards) if selection.has(*place)]


def _manifest_discrepancies(
    manifest: Manifest, selection: ShardSelection, found: _Found
) -> list[Discrepancy]:
    with manifest.open() as query:
        rows = query.rows("SELECT stage, source, shard, attempt FROM shards WHERE state = 'committed'")
    listed = {tuple(row.values()) for row in rows if selection.has(row["source"], row["shard"])}
    fix = "run capfilt manifest rebuild"
    whats = [
        f"lists {'/'.join(shard)}, which has no record; {fix}" for shard in sorted(listed - found.committed)
    ]
    whats += [
        f"does not list {'/'.join(shard)}, which is committed; {fix}"
        for shard in sorted(found.committed - listed)
    ]
    return [Discrepancy(path="manifest/shards", what=what) for what in whats]
