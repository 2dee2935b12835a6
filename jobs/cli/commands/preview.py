"""What ``capfilt plan --preview`` prints: what another selection would keep."""

from typing import Any

from jobs.output.render import print_table
from pipeline.corpus.corpus_state import CorpusState
from pipeline.corpus.records import Records
from pipeline.manifest.compaction import CompactedRecords
from pipeline.marks.search import marks_of_shards
from pipeline.runs.preview import SourcePreview, preview_selection
from pipeline.storage.storage import Storage
from schemas.config import CapfiltConfig
from schemas.names import printable

_SPARE = ("captions_now", "kept_now")


def preview_corpus(config: CapfiltConfig) -> list[dict[str, Any]]:
    """Return what ``[select]`` would keep, a row a source with shards. Raises CapfiltError where nothing is ranked."""
    records = Records(Storage(config.corpus.path))
    state = CorpusState(records, compacted=CompactedRecords(records.storage).shard_records)
    marks = marks_of_shards(records, state, save=False)
    previews = preview_selection(config, records, state, marks)
    seen = {source_preview.source for source_preview in previews}
    listed = {source.name for source in config.source} & {source for source, _ in state.urls}
    previews += [SourcePreview(source=source) for source in sorted(listed - seen)]
    return [_row(source_preview) for source_preview in previews]


def print_preview(rows: list[dict[str, Any]]) -> None:
    """Print the preview as a table, then what was dropped and why, and whether all shards were read."""
    shown = [
        row | {"captions": sum(row["captions"].values()), "captions_now": sum(row["captions_now"].values())}
        for row in rows
    ]
    columns = ("source", "shards", "images", "kept", "captions", "web_share", "kept_now", "captions_now")
    print_table(shown, columns, title="what select would keep", spare=_SPARE)
    for row in rows:
        for reason, images in sorted(row["dropped"].items()):
            print(printable(f"{row['source']}: {images:,} images dropped, {reason}"))
        if not row["of_shards"]:
            print(
                printable(f"{row['source']}: no shard has what this selection reads; `capfilt run` makes it")
            )
        if row["shards"] < row["of_shards"]:
            print(
                printable(
                    f"{row['source']}: of {row['shards']:,} of {row['of_shards']:,} ranked shards, always the same"
                )
            )


def _row(source_preview: SourcePreview) -> dict[str, Any]:
    share = None if source_preview.web_share is None else round(source_preview.web_share, 6)
    return {
        "source": source_preview.source,
        "shards": source_preview.shards,
        "of_shards": source_preview.of_shards,
        "images": source_preview.images,
        "kept": source_preview.kept,
        "captions": dict(source_preview.captions),
        "web_share": share,
        "dropped": dict(source_preview.dropped),
        "kept_now": source_preview.kept_now,
        "captions_now": dict(source_preview.captions_now),
    }
