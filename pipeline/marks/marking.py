"""Making marks and taking them back: what a person said becomes a record, with the shards that it concerns."""

import secrets
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from pipeline.corpus.records import Records
from pipeline.marks.rules import undone_values
from pipeline.marks.search import attempts_of, find_shards
from pipeline.shards.shard_reader import committed_table
from pipeline.text import same_text_key
from schemas.errors import CapfiltError
from schemas.json_record import utc_now
from schemas.marks import MAX_REASON_CHARS, MAX_VALUES, MarkRecord, Shards, is_value
from schemas.names import fits_utf8, shown
from schemas.records import ShardRecord
from schemas.statuses import By, What

Places = Collection[tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a person says of samples.

    ``caption``: the text that ``not-this-caption`` is about; None for the best one that is kept of each image now.
    """

    what: What
    named_by: By
    values: tuple[str, ...]
    reason: str
    caption: str | None = None


def mark(records: Records, verdict: Verdict, *, within: Places = ()) -> list[MarkRecord]:
    """Mark samples; return the records, of which each says in which shards they are.

    URLs and hosts may be unknown yet: a mark holds for what later lists bring, too.

    Args:
        within: shards (source, shard) that are known to hold all the samples; all others are not searched.

    Raises CapfiltError for a verdict that makes no sense, and where no sample has any of the uids or sha256.
    """
    _require_sound(verdict)
    files = _searchable(records, verdict.named_by)
    searched = [file for file in files if not within or (file.source, file.shard) in within]
    shards = find_shards(records, searched, verdict.named_by, verdict.values)
    if not shards and verdict.named_by in ("uid", "sha256"):
        raise CapfiltError(f"no sample has the {_named(verdict)}")
    captions = dict.fromkeys(verdict.values, verdict.caption or "")
    if verdict.what == "not-this-caption" and verdict.caption is None:
        captions, shards = _kept_captions(records, verdict, shards)
        verdict = replace(verdict, named_by="uid", values=tuple(captions))
        files = _searchable(records, "uid")
    # The id of every file, not only of those within: the samples are known to be in no other.
    attempts = attempts_of(files)
    return [
        _create(
            records,
            verdict,
            values=values,
            searched=attempts,
            shards=_only(shards, set(values)),
            captions={value: captions[value] for value in values}
            if verdict.what == "not-this-caption"
            else {},
        )
        for values in _batches(verdict.values)
    ]


def _searchable(records: Records, named_by: By) -> list[ShardRecord]:
    """Return the commits in whose Parquet such values are looked for."""
    shard_records = records.shards(("crawl",)) if named_by == "sha256" else records.url_shards()
    return list(shard_records.values())


def take_back(records: Records, verdict: Verdict) -> list[MarkRecord]:
    """Take back the marks that say this of these values; those that somebody makes meanwhile stay.

    Without a caption, ``not-this-caption`` is taken back for every text. Raises CapfiltError where no mark says so.
    """
    marks = records.marks()
    undone = undone_values(marks)
    wanted = set(verdict.values)
    undoes = {
        mark.mark: values
        for mark in marks
        if not mark.undoes and (mark.what, mark.named_by) == (verdict.what, verdict.named_by)
        if (values := tuple(v for v in mark.values if v in wanted and (mark.mark, v) not in undone))
        if (values := _about(mark, values, verdict.caption))
    }
    if not undoes:
        raise CapfiltError(
            f"no mark {verdict.what} by {_named(verdict)} holds; ask "
            "SELECT * FROM marks WHERE undone_at IS NULL for those that do"
        )
    all_values = sorted({value for taken in undoes.values() for value in taken})
    return [
        _create(
            records,
            verdict,
            values=batch,
            undoes={mark: taken for mark, held in undoes.items() if (taken := _in(held, set(batch)))},
        )
        for batch in _batches(all_values)
    ]


def places_of(marks: Sequence[MarkRecord]) -> list[tuple[str, str]]:
    """Return the shards (source, shard) that marks concern, as far as they were found when these were made."""
    return sorted(
        {(source, shard) for mark in marks for source, shards in mark.shards.items() for shard in shards}
    )


def _require_sound(verdict: Verdict) -> None:
    if not verdict.values:
        raise CapfiltError(
            "nothing is named that could be marked; give --uid, --url, --host, --sha256 or --from"
        )
    for value in verdict.values:
        if not (fits_utf8(value) and is_value(verdict.named_by, value)):
            raise CapfiltError(f"--{verdict.named_by} {shown(value)}: {_EXPECTED[verdict.named_by]}")
    if not verdict.reason.strip() or len(verdict.reason) > MAX_REASON_CHARS or not fits_utf8(verdict.reason):
        raise CapfiltError(
            f"--reason: 1 to {MAX_REASON_CHARS} characters are expected: why, for who reads it later"
        )
    if verdict.caption is not None and (verdict.what == "drop" or not fits_utf8(verdict.caption)):
        raise CapfiltError(
            "--caption has no effect with --what drop, which drops the image with all its captions"
        )
    if verdict.what == "not-this-caption" and verdict.named_by == "host" and verdict.caption is None:
        raise CapfiltError("--host with --what not-this-caption: name the text with --caption")


_EXPECTED: Mapping[By, str] = {
    "uid": "a uid has 32 hex digits, as the tables have it",
    "sha256": "a sha256 has 64 hex digits, as the column of samples has it",
    "host": "a host is expected as `capfilt failures --hosts` prints it: lower case, without scheme and port",
    "url": "a URL is expected, letter by letter as the tables have it",
}


def _named(verdict: Verdict) -> str:
    more = len(verdict.values) - 1
    others = f", nor any of the {more:,} others" if more else ""
    return f"{verdict.named_by} {shown(verdict.values[0])}{others}"


def _kept_captions(records: Records, verdict: Verdict, shards: Shards) -> tuple[dict[str, str], Shards]:
    """Return, by uid, the best caption that is kept now of each image that a verdict names, and where these are."""
    captions: dict[str, str] = {}
    places: dict[str, dict[str, tuple[str, ...]]] = {}
    for source, by_shard in shards.items():
        for shard, values in by_shard.items():
            kept = dict(_kept_in_shard(records, source, shard, verdict.named_by, set(values)))
            if kept:
                places.setdefault(source, {})[shard] = tuple(sorted(kept))
            captions |= kept
    if not captions:
        raise CapfiltError(f"no caption is kept of the {_named(verdict)}; name the text with --caption")
    return captions, places


def _kept_in_shard(
    records: Records, source: str, shard: str, by: By, values: Collection[str]
) -> Iterator[tuple[str, str]]:
    record = records.read("select", source, shard)
    if record is None:
        return
    table = committed_table(records, record.outputs["parquet"], sorted({"uid", by, "status", "caption"}))
    for row in table.to_pylist():
        if row["status"] == "kept" and row[by] in values:
            yield row["uid"], row["caption"]


def _create(records: Records, verdict: Verdict, **fields: Any) -> MarkRecord:
    record = MarkRecord(
        mark=f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(6)}",
        what=verdict.what,
        named_by=verdict.named_by,
        reason=verdict.reason,
        made_at=utc_now(),
        host=socket.gethostname(),
        **fields,
    )
    records.write_mark(record)
    return record


def _batches(values: Sequence[str]) -> Iterator[tuple[str, ...]]:
    values = tuple(dict.fromkeys(values))
    for start in range(0, len(values), MAX_VALUES):
        yield values[start : start + MAX_VALUES]


def _about(mark: MarkRecord, values: tuple[str, ...], caption: str | None) -> tuple[str, ...]:
    """Return those of a mark's values that are about a text; all where none is named."""
    if caption is None:
        return values
    return tuple(value for value in values if same_text_key(mark.captions[value]) == same_text_key(caption))


def _in(values: tuple[str, ...], wanted: set[str]) -> tuple[str, ...]:
    return tuple(value for value in values if value in wanted)


def _only(shards: Shards, values: set[str]) -> Shards:
    """Return where some of the values are."""
    only: dict[str, dict[str, tuple[str, ...]]] = {}
    for source, by_shard in shards.items():
        for shard, values_there in by_shard.items():
            if held := _in(values_there, values):
                only.setdefault(source, {})[shard] = held
    return only
