"""Which checkpoints were trained on images that are marked."""

from collections import Counter

from pipeline.lineage.trained_on import trained_on
from pipeline.manifest.manifest import Manifest, Query
from pipeline.marks.rules import NO_MARKS, RuleBook, ShardMarks
from schemas.catalog.sql_text import quote
from schemas.marks import MarkRule

# Of more shards a plan reads these alone.
MAX_SHARDS = 200


def checkpoints_with_marked(manifest: Manifest, marks: ShardMarks) -> dict[str, int]:
    """Return the checkpoints that were trained, or may have been, on marked images, with the number of these.

    Reads the rows of at most MAX_SHARDS marked shards, none where no training was recorded.
    """
    images = Counter[str]()
    if not marks:
        return images
    with manifest.open(in_place=True) as query:
        trained = {
            (row["source"], row["shard"])
            for row in query.rows("SELECT DISTINCT source, shard FROM snapshots")
        }
        for place in sorted(trained & marks.keys())[:MAX_SHARDS]:
            uids = _marked_uids(query, *place, marks[place])
            for entry in trained_on(query, *place, uids):
                images[entry.checkpoint["path"]] += sum(use != "held out" for use in entry.uses.values())
    return {path: number for path, number in images.items() if number}


def _marked_uids(query: Query, source: str, shard: str, rules: tuple[MarkRule, ...]) -> list[str]:
    book = RuleBook(rules)
    rows = query.rows(
        "SELECT uid, url, sha256 FROM samples WHERE status = 'ok' "
        f"AND source = {quote(source)} AND shard = {quote(shard)}"
    )
    return [row["uid"] for row in rows if book.on(row) != NO_MARKS]
