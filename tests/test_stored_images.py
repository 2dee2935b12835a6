"""One image is one read at its place in the tar; a shard of an earlier version names no places and is indexed once."""

from pathlib import Path

import pytest

from pipeline.shards.shard_files import image_members
from pipeline.shards.stored_images import StoredImages
from pipeline.storage.storage import Storage
from tests.corpora import Corpus, make_corpus


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "capfilt"


def images_of_tar(corpus: Corpus, shard: str = "00000") -> dict[str, bytes]:
    with corpus.storage.local_copy(corpus.records.read("crawl", "cc", shard).outputs["tar"].path) as path:
        data = path.read_bytes()
        return {member.key: data[member.offset :][: member.size] for member in image_members(path)}


def reads_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of tars that are read whole from now on."""
    whole: list[str] = []
    original = Storage.local_copy
    monkeypatch.setattr(Storage, "local_copy", lambda self, path: whole.append(path) or original(self, path))
    return whole


@pytest.mark.parametrize("places", [True, False], ids=["today's", "earlier"])
def test_every_image_is_read_at_its_place(root: str, places: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make_corpus(root, stages=("crawl",), places=places)
    expected = images_of_tar(corpus)
    whole = reads_of(monkeypatch)
    for _ in range(2):  # a second reader finds the places of an earlier shard in the cache
        images = StoredImages(corpus.records)
        assert {key: images.read("cc", "00000", key) for key in expected} == expected and len(expected) == 9
    assert len(whole) == (0 if places else 1)


def test_what_has_no_image_is_none(tmp_path: Path) -> None:
    corpus = make_corpus(str(tmp_path / "corpus"), stages=("crawl",), places=True)
    images = StoredImages(corpus.records)
    failed = next(row["key"] for row in corpus.read("crawl", "cc", "00000") if row["status"] != "ok")
    asked = [("cc", "00000", failed), ("cc", "00000", "x"), ("cc", "99999", "x"), ("cc", "../00000", "x")]
    assert [images.read(*place) for place in [*asked, ("..", "records", "x"), ("", "", "")]] == [None] * 6


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path: Path, cache: Path) -> None:
    corpus = make_corpus(str(tmp_path / "corpus"), stages=("crawl",))
    cache.parent.mkdir()
    cache.write_text("a file, where the folder would be")
    expected = images_of_tar(corpus)
    images = StoredImages(corpus.records)
    assert {key: images.read("cc", "00000", key) for key in expected} == expected


def test_places_outside_the_tar_are_not_read(tmp_path: Path) -> None:
    corpus = make_corpus(str(tmp_path / "corpus"), stages=("crawl",), places=True)
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = corpus.storage.url(corpus.records.read("crawl", "cc", "00000").outputs["parquet"].path)
    table = pq.read_table(path, memory_map=False)
    sizes = pa.array([1 << 40] * table.num_rows, pa.int64())
    pq.write_table(table.set_column(table.column_names.index("image_bytes"), "image_bytes", sizes), path)
    assert StoredImages(corpus.records).read("cc", "00000", table["key"][0].as_py()) is None
