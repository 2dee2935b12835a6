"""What the committed records of a run, or of a corpus, add up to: URLs, images, kept, and why the rest was lost."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from schemas.records import ShardRecord


@dataclass(slots=True, kw_only=True)
class Totals:
    """Sums over records. ``lost`` and ``dropped`` count rows by reason: of the crawl, and of the selection."""

    urls: int = 0
    images: int = 0
    captioned: int = 0
    ranked: int = 0
    selected: int = 0
    kept: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, records: Iterable[ShardRecord]) -> "Totals":
        """Add up records."""
        totals = cls()
        for record in records:
            totals.add(record)
        return totals

    def add(self, record: ShardRecord) -> None:
        """Add one record."""
        match record.stage:
            case "crawl":
                self.urls += record.rows_in
                self.images += record.images
                self.lost.update(_by_reason(record))
            case "caption":
                self.captioned += record.images
            case "rank":
                self.ranked += record.images
            case "select":
                self.selected += record.rows_in
                self.kept += record.counts.get("kept", 0)
                self.dropped.update(_by_reason(record, "dropped"))


def _by_reason(record: ShardRecord, status: str = "") -> dict[str, int]:
    """Return a record's rows by the reason under their status."""
    pairs = ((name.partition("/"), rows) for name, rows in record.counts.items())
    return {reason: rows for (above, _, reason), rows in pairs if reason and status in ("", above)}
