"""The page of ``capfilt look`` over a large corpus: each page's seconds, the shards it reads, and the memory of all."""

from typing import Any

from jobs.bench.fixtures.corpus import SyntheticCorpus
from jobs.bench.fixtures.machine import Stopwatch, resident_bytes
from jobs.look.grid import grid
from jobs.look.overview import overview
from jobs.look.page import Pages, image_path
from jobs.look.snapshot import Snapshot
from jobs.look.view import SORTS, View
from pipeline.manifest.manifest import Manifest
from pipeline.storage.scratch import temporary_folder

# No page of a large corpus may open the files of more.
_MOST_SHARDS = 24
_FILTERS: tuple[dict[str, str], ...] = (
    {"status": "failed"},
    {"host": "host7.example"},
    {"words": "red chair"},
    {"said": "harbour"},
    {"synthetic": "0.2..0.21"},
    {"kept": "0.3..0.31"},
    {"same": "yes"},
    {"source": "bench", "shard": "00000"},
)


def measure_look(images: int) -> dict[str, Any]:
    """Commit a corpus of ``images`` images without pixels; time the first screen and the first page of each view."""
    with temporary_folder() as folder:
        corpus = SyntheticCorpus(folder, images)
        for shard in corpus.shards:
            corpus.select(shard, **corpus.crawl_to_rank(shard))
        manifest = Manifest(corpus.records.storage)
        manifest.compact()
        with Stopwatch() as opened:
            snapshot = Snapshot(manifest)
            # What the server does once its address is printed.
            snapshot.ask_cards("SELECT count(*) FROM cards", snapshot.sample)
        pages = Pages("corpus", "/bench/", image_path)
        rows = [_timed_overview(snapshot, pages)]
        views = [View(sort=sort) for sort in SORTS] + [View(filters=filters) for filters in _FILTERS]
        rows += [_timed_grid(snapshot, pages, view) for view in views]
        shards, resident = len(snapshot.shards), resident_bytes()
        snapshot.close()
    return {
        "images": images,
        "shards": shards,
        "open_s": round(opened.seconds, 3),
        "resident_bytes": resident,
        "pages": rows,
    }


def _timed_overview(snapshot: Snapshot, pages: Pages) -> dict[str, Any]:
    with Stopwatch() as watch:
        pages.overview(snapshot, overview(snapshot))
    return _row("first screen", watch.seconds, snapshot, View())


def _timed_grid(snapshot: Snapshot, pages: Pages, view: View) -> dict[str, Any]:
    with Stopwatch() as watch:
        pages.grid(snapshot, grid(snapshot, view))
    return _row(view.query() or "all samples", watch.seconds, snapshot, view)


def _row(page: str, seconds: float, snapshot: Snapshot, view: View) -> dict[str, Any]:
    read = snapshot.shards_read(view)
    assert read <= _MOST_SHARDS or not snapshot.is_sampled, f"{page} reads {read} shards"
    return {"page": page, "seconds": round(seconds, 3), "shards_read": read}
