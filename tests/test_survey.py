"""The survey of a corpus: what it reads of the storage, and what it makes of the records."""

from collections import Counter
from pathlib import Path

import pytest

from pipeline.corpus.corpus_state import CorpusState
from pipeline.corpus.records import Records
from pipeline.runs.survey import survey
from pipeline.storage.storage import Storage
from tests.corpora import UNFILTERED, Corpus, make_corpus
from tests.runs import with_values

CRAWL_00000 = "records/crawl/cc/00000.json"


class CountedStorage(Storage):
    """Counts how often each file is read."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.reads: Counter[str] = Counter()

    def read(self, path: str, max_bytes: int | None = None) -> bytes:
        self.reads[path] += 1
        return super().read(path, max_bytes)


def test_a_refresh_reads_only_the_records_that_are_new_or_changed(root: str) -> None:
    corpus = make_corpus(root, shards=2)
    storage = CountedStorage(corpus.root)
    state = CorpusState(Records(storage))
    shard_records = {
        f"records/{stage}/cc/{shard}.json" for stage in UNFILTERED for shard in ("00000", "00001")
    }
    assert {path: storage.reads[path] for path in shard_records} == dict.fromkeys(shard_records, 1)
    assert state.committed == corpus.records.shards() and len(state.urls) == 2

    storage.reads.clear()
    state.refresh()
    assert shard_records & storage.reads.keys() == set()

    crawled = corpus.records.read("crawl", "cc", "00000")
    assert crawled is not None
    corpus.records.retire(crawled)
    state.refresh()
    assert ("crawl", "cc", "00000") not in state.committed and len(state.committed) == 7
    storage.reads.clear()  # the note that stands in its place
    corpus.make("cc", "00000", ("crawl",))
    state.refresh()
    assert shard_records & storage.reads.keys() == {CRAWL_00000} and storage.reads[CRAWL_00000] == 1
    assert state.committed == corpus.records.shards()


def test_a_shard_counts_for_the_run_that_committed_it(tmp_path) -> None:
    corpus = make_corpus(str(tmp_path / "corpus"), shards=1)
    state = CorpusState(corpus.records)
    [run_id] = {record.run_id for record in state.committed.values()}
    committed = state.committed_by(run_id)
    assert {record.stage for record in committed} == set(UNFILTERED) and state.committed_by("another") == []


@pytest.mark.parametrize(("captioner", "ranker"), [(0.8, 0.2), (0.5, 0.5), (1.0, 1.0)])
def test_gpu_hours_do_not_depend_on_how_a_gpu_is_shared(
    tmp_path: Path, captioner: float, ranker: float
) -> None:
    corpus = Corpus(str(tmp_path / "corpus"))
    pools = {"caption": {"gpus": captioner}, "rank": {"gpus": ranker}}
    config = with_values(corpus.config, cluster=pools)
    planned = survey(config, {}, CorpusState(corpus.records), UNFILTERED, {"cc": 129_000_000})
    images = {count.stage: count.images_left for count in planned.counts}
    hours = {count.stage: count.gpu_hours for count in planned.counts if count.stage in ("caption", "rank")}
    assert images["caption"] == images["rank"] > 0
    more = corpus.config.caption.num_captions / 10
    assert hours["caption"] == pytest.approx(images["caption"] * more / 500 / 3600)
    assert hours["rank"] == pytest.approx(images["rank"] * more / 1300 / 3600)
