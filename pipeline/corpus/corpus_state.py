"""What is committed in a corpus at one moment, and brought up to date: read once, then only what has changed."""

from collections.abc import Callable, Collection

from pipeline.corpus.records import Records, ShardId, url_shards_of
from pipeline.storage.file_info import FileInfo
from schemas.corpus_format import require_known_format
from schemas.records import QuarantineRecord, ShardRecord, shard_record_path

# So many are read as quickly as the manifest's parts.
_FEW_RECORDS = 64

CompactedShards = Callable[[list[FileInfo]], dict[str, ShardRecord]]


def none_compacted(_: list[FileInfo]) -> dict[str, ShardRecord]:
    """Return no record: all are read."""
    return {}


def committed_shards(
    records: Records, files: list[FileInfo], compacted: CompactedShards
) -> dict[ShardId, ShardRecord]:
    """Return the records in listed files as ``Records.read_shards`` does; of many, the compacted ones from parts."""
    if len(files) < _FEW_RECORDS:
        return records.read_shards(files)
    held = compacted(files)
    records.require_imported(held.values())
    read = records.read_shards([info for info in files if info.path not in held])
    return {record.shard_id: record for record in held.values()} | read


class CorpusState:
    """What is committed in a corpus: its url shards, the records of its stages, its quarantine.

    Read once when it is made. ``refresh`` lists the records again, and reads only those that are new or changed.

    Args:
        within: the shards (source, shard) of which records are read; None reads all.
        compacted: returns those of listed records that the manifest's parts hold: they need not be read.
    """

    def __init__(
        self,
        records: Records,
        *,
        within: Collection[tuple[str, str]] | None = None,
        compacted: CompactedShards = none_compacted,
    ) -> None:
        require_known_format(records.storage.root, records.list_formats())
        self._records = records
        self._within = within
        self._compacted = compacted
        # By path of a record's file.
        self._versions: dict[str, str] = {}
        self.urls: dict[tuple[str, str], ShardRecord] = {}
        # Shards of which later ones try URLs again, or may.
        self.retried: frozenset[tuple[str, str]] = frozenset()
        self.committed: dict[ShardId, ShardRecord] = {}
        self.quarantined: dict[ShardId, QuarantineRecord] = {}
        self.refresh_urls()
        self.refresh()

    def refresh(self) -> None:
        """Bring the records of the stages and the quarantine up to date."""
        files = [info for info in self._records.list_shards() if self._is_within(*place_of_record(info.path))]
        versions = {info.path: info.version for info in files}
        changed = [info for info in files if self._versions.get(info.path) != info.version]
        read = committed_shards(self._records, changed, self._compacted)
        unchanged = versions.keys() - {info.path for info in changed}
        kept = {
            shard: record
            for shard, record in self.committed.items()
            if shard_record_path(*shard) in unchanged
        }
        self.committed = kept | read
        # Last, so that a refresh that is interrupted above is repeated whole.
        self._versions = versions
        self.quarantined = self._records.quarantined()

    def refresh_urls(self) -> None:
        """Bring the url shards up to date, after an intake."""
        batches = self._records.intakes()
        self.urls = {
            place: record for place, record in url_shards_of(batches).items() if self._is_within(*place)
        }
        self.retried = frozenset(
            (source, shard)
            for batch in batches
            if batch.kind == "retry"
            for source, shard in self.urls
            if source == batch.source and any(batch.retries_of(shard))
        )

    def _is_within(self, source: str, shard: str) -> bool:
        return self._within is None or (source, shard) in self._within

    def committed_by(self, run_id: str) -> list[ShardRecord]:
        """Return the records that a run has committed."""
        return [record for record in self.committed.values() if record.run_id == run_id]


def place_of_record(path: str) -> tuple[str, str]:
    """Return the source and shard that the file of a shard's record is named by."""
    *_, source, name = path.split("/")
    return source, name.removesuffix(".json")
