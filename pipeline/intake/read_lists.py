"""From lists of URLs to url shards: every distinct URL exactly once, numbered permanently.

A batch is one reading of a source's lists. Its shards lie under ``urls/<source>/<shard>.<id>.parquet``
before its record is created; a crash leaves orphans, and of two drivers one wins and the other starts over.
Earlier batches are never changed: what a list has gained becomes further shards.
"""

import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from pipeline.corpus.records import Records
from pipeline.digests import digest_json
from pipeline.intake.dedup import SourcePairs
from pipeline.intake.img2dataset_folders import Img2datasetShard, find_img2dataset_shards
from pipeline.intake.lists.files import caption_files, count_rows, find_files
from pipeline.intake.pictures.formats import PictureSource, picture_source
from pipeline.intake.url_shard_writer import IntakeOutcome, UrlShardWriter
from pipeline.storage.file_info import FileInfo
from pipeline.storage.scratch import temporary_folder
from schemas.config import CapfiltConfig, SourceConfig
from schemas.errors import CapfiltError
from schemas.records import IntakeRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class _Input:
    """The files of a source as they are now; ``importable`` are img2dataset's shards, by Parquet.

    ``files`` are the lists and what belongs to them: a change of any is a change of the source. ``pictures`` holds
    the listing of a source of pictures, which all that reads the source shares.
    """

    source: SourceConfig
    lists: tuple[str, ...]
    files: tuple[FileInfo, ...]
    importable: dict[str, Img2datasetShard]
    pictures: PictureSource | None = None

    @property
    def signature(self) -> str:
        """Digest what decides whether there is anything to read."""
        return digest_json(
            {
                "files": [[file.path, file.bytes, file.version] for file in self.files],
                "url_column": self.source.url_column,
                "uid_column": self.source.uid_column,
            }
        )

    def unread(self, earlier: Sequence[IntakeRecord]) -> list[str]:
        """Return the lists to read: none if all are as they were, else all; of img2dataset's the new ones."""
        if self.signature in {batch.signature for batch in earlier}:
            return []
        if self.source.format != "img2dataset":
            return list(self.lists)
        paths_read = {path for batch in earlier for path in batch.files}
        return [path for path in self.importable if path not in paths_read]


def read_lists(config: CapfiltConfig, records: Records, run_id: str) -> list[IntakeOutcome]:
    """Take in what the sources' lists have gained; a source whose files are unchanged is not read.

    Of each batch, rows_in = rows_new + rows_duplicate + rows_known + rows_without_url. A malformed URL is
    taken in: the crawl gives it a status. Raises CapfiltError, before any work, where an input is missing or
    one of its files lacks a column.
    """
    inputs = [_find_input(source, records) for source in config.source]
    for source_lists in inputs:
        if lists := source_lists.unread(records.intakes(source_lists.source.name)):
            _pairs(source_lists, config, records, lists).check()
    return [_take_in(source_lists, config, records, run_id) for source_lists in inputs]


def unread_rows(config: CapfiltConfig, records: Records) -> dict[str, int]:
    """Return, by source, how many rows its lists hold beyond those taken in; changes nothing.

    Where a list was changed rather than lengthened this is an estimate: its URLs are compared only by a run.
    Raises CapfiltError, as ``read_lists`` does, where a list cannot be read or lacks a column.
    """
    rows = {}
    for source in config.source:
        earlier = records.intakes(source.name)
        source_lists = _find_input(source, records)
        if not (lists := source_lists.unread(earlier)):
            continue
        _pairs(source_lists, config, records, lists).check()
        if source_lists.pictures:
            held = sum(map(source_lists.pictures.count, lists))
        else:
            held = sum(count_rows(records.storage, path, source.format, source.url_column) for path in lists)
        rows_read = sum(batch.rows_in for batch in earlier if batch.kind == "lists")
        rows[source.name] = max(held - rows_read, 0)
    return rows


def check_lists(source: SourceConfig, config: CapfiltConfig, records: Records) -> int:
    """Look at the beginning of every list of a source that a run would read; return how many those are.

    Raises CapfiltError, as ``read_lists`` does, where a list cannot be read or lacks a column.
    """
    source_lists = _find_input(source, records)
    lists = source_lists.unread(records.intakes(source.name))
    if lists:
        _pairs(source_lists, config, records, lists).check()
    return len(lists)


def _pairs(
    source_lists: _Input, config: CapfiltConfig, records: Records, lists: Sequence[str]
) -> SourcePairs:
    return SourcePairs(
        source_lists.source,
        records.storage,
        lists,
        pictures=source_lists.pictures,
        may_hold_paths=bool(config.crawl.allow_files),
        order=config.corpus.order,
    )


def _find_input(source: SourceConfig, records: Records) -> _Input:
    key = f"source.{source.name}.input"
    if pictures := picture_source(source, records.storage):
        return _Input(
            source=source,
            lists=pictures.lists,
            files=tuple(pictures.files()),
            importable={},
            pictures=pictures,
        )
    if source.format != "img2dataset":
        files = find_files(source.input, records.storage, key)
        captions = caption_files(files, source.format, records.storage)
        lists = [file for file in files if file.path not in {beside.path for beside in captions}]
        return _Input(
            source=source,
            lists=tuple(file.path for file in lists),
            files=(*lists, *captions),
            importable={},
        )
    shards = find_img2dataset_shards(source.input, records.storage, key)
    return _Input(
        source=source,
        lists=tuple(shard.parquet.path for shard in shards),
        files=tuple(file for shard in shards for file in (shard.tar, shard.parquet)),
        importable={shard.parquet.path: shard for shard in shards},
    )


def _take_in(source_lists: _Input, config: CapfiltConfig, records: Records, run_id: str) -> IntakeOutcome:
    """Make a source's next batch, again from the start when another driver made one meanwhile."""
    source = source_lists.source
    while True:
        earlier = records.intakes(source.name)
        lists = source_lists.unread(earlier)
        if not lists:
            return IntakeOutcome(source=source.name, record=None)
        # Retries only repeat URLs.
        known = [file.path for batch in earlier if batch.kind != "retry" for file in batch.shards.values()]
        # An img2dataset shard becomes one url shard, however few of its rows are new.
        size = None if source_lists.importable else config.corpus.samples_per_shard
        lists_read = _pairs(source_lists, config, records, lists)
        with temporary_folder() as folder, lists_read.read(folder, known) as (row_counts, pairs):
            writer = UrlShardWriter(records, source.name, earlier, folder, size)
            imported = _write_shards(writer, pairs, source_lists.importable)
        if _find_input(source, records).signature != source_lists.signature:
            writer.discard()
            raise CapfiltError(
                f"source.{source.name}.input: the files changed while they were read; run again"
            )
        batch = writer.commit(
            kind="img2dataset" if source_lists.importable else "lists",
            run_id=run_id,
            signature=source_lists.signature,
            files=tuple(lists),
            adopted={shard: tar.path for shard, tar in imported.items()},
            adopted_bytes={shard: tar.bytes for shard, tar in imported.items()},
            **row_counts,
        )
        if batch is not None:
            return IntakeOutcome(source=source.name, record=batch)


def _write_shards(
    writer: UrlShardWriter,
    new_pairs: Iterable[tuple[str, pa.Table]],
    importable: Mapping[str, Img2datasetShard],
) -> dict[str, FileInfo]:
    """Write the new pairs as url shards; return, by shard, the tars that are imported."""
    imported: dict[str, FileInfo] = {}
    for file, tables in itertools.groupby(new_pairs, key=operator.itemgetter(0)):
        for _, table in tables:
            writer.add(table)
        if importable and (shard := writer.cut()):
            imported[shard] = importable[file].tar
    writer.cut()
    return imported
