"""The shards that a mark concerns: found once in the files of a shard, and remembered by the commits that made them.

uids, URLs and hosts are looked for in the url shards, so that they are found before the crawl too; a sha256 in what was
crawled. A plan searches only files that no earlier search has read: those of later lists, retries and crawls.
"""

import secrets
from collections.abc import Collection, Iterable, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.corpus.corpus_state import CorpusState
from pipeline.corpus.records import Records
from pipeline.marks.rules import ShardMarks, rules_by_shard, undone_values
from schemas.errors import CorruptShardError, first_line
from schemas.marks import FoundMark, MarkRecord, MarkSearchRecord, Shards
from schemas.names import URL_HOST
from schemas.records import ShardRecord
from schemas.statuses import By

_COLUMNS: dict[By, str] = {"uid": "uid", "url": "url", "host": "url", "sha256": "sha256"}


def marks_of_shards(records: Records, state: CorpusState, *, save: bool) -> ShardMarks:
    """Return the rules that hold, by shard.

    Args:
        state: the url shards and crawls that are there; those that no search has read are read.
        save: note what was found in these, so that nobody reads them again; a plan does not.
    """
    marks = records.marks()
    if not marks:
        return {}
    searches = records.mark_searches()
    crawls = [record for (stage, _, _), record in state.committed.items() if stage == "crawl"]
    new = _search_new_files(records, marks, searches, list(state.urls.values()), crawls)
    if save:
        for search in new:
            records.write_mark(search)
    return rules_by_shard(marks, [*searches, *new])


def _search_new_files(
    records: Records,
    marks: Sequence[MarkRecord],
    searches: Iterable[MarkSearchRecord],
    urls: Sequence[ShardRecord],
    crawls: Sequence[ShardRecord],
) -> list[MarkSearchRecord]:
    """Search the files that came after a mark, for each mark that holds."""
    undone = undone_values(marks)
    searched: dict[str, set[str]] = {}
    finds: list[FoundMark] = [*marks, *searches]
    for done in finds:
        searched.setdefault(done.mark, set()).update(done.searched)
    new_searches = []
    for mark in marks:
        values = [value for value in mark.values if (mark.mark, value) not in undone]
        searchable = crawls if mark.named_by == "sha256" else urls
        files = [file for file in searchable if file.attempt not in searched[mark.mark]]
        if mark.undoes or not values or not files:
            continue
        new_searches.append(
            MarkSearchRecord(
                mark=mark.mark,
                attempt=secrets.token_hex(6),
                searched=attempts_of(files),
                shards=find_shards(records, files, mark.named_by, values),
            )
        )
    return new_searches


def attempts_of(files: Iterable[ShardRecord]) -> tuple[str, ...]:
    """Return what identifies the commits: the shards of one reading of the lists share an id."""
    return tuple(sorted({file.attempt for file in files}))


def find_shards(records: Records, files: Sequence[ShardRecord], by: By, values: Collection[str]) -> Shards:
    """Return, by source and shard, which of the values are there.

    A URL that was tried again is in two shards: it counts in the later one, which holds its image if there is one.
    """
    wanted = pa.array(sorted(values), pa.string())
    hits = records.storage.map(lambda file: _hits(records, file, by, wanted), files)
    values_by_shard: dict[str, dict[str, tuple[str, ...]]] = {}
    moved: dict[tuple[str, str], list[str]] = {}
    for file, rows in sorted(
        zip(files, hits, strict=True), key=lambda pair: int(pair[0].shard), reverse=True
    ):
        again = pc.is_in(rows["uid"], pa.array(moved.get((file.source, file.shard), []), pa.string()))
        rows = rows.filter(pc.invert(again))
        for row in rows.filter(pc.is_valid(rows["retry_of"])).to_pylist():
            moved.setdefault((file.source, row["retry_of"]), []).append(row["uid"])
        if rows.num_rows:
            values_by_shard.setdefault(file.source, {})[file.shard] = tuple(
                sorted(pc.unique(rows["value"]).to_pylist())
            )
    return values_by_shard


def _hits(records: Records, file: ShardRecord, by: By, wanted: pa.Array) -> pa.Table:
    """Return uid, value and retry_of of the rows whose value is wanted. Reads no other column."""
    path = file.outputs["parquet"].path
    try:
        with records.storage.open(path) as opened:
            table = pq.read_table(opened, columns=sorted({"uid", "retry_of", _COLUMNS[by]}))
        column = table[_COLUMNS[by]]
        value = (
            pc.utf8_lower(pc.struct_field(pc.extract_regex(column, URL_HOST), 0)) if by == "host" else column
        )
        table = pa.table({"uid": table["uid"], "value": value, "retry_of": table["retry_of"]})
        return table.filter(pc.is_in(table["value"], wanted))
    except (pa.ArrowException, KeyError) as error:
        raise CorruptShardError(f"{path} cannot be searched for marks: {first_line(error)}") from error
