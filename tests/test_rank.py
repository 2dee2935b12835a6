"""Scores: open_clip's own similarities, whatever the batch; distinct texts once; over-long texts marked."""

from pathlib import Path

import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from raw_shards import commit_crawl, config_of, encoded, picture, task_of
from tiny_models import save_captioner, save_ranker

from pipeline.corpus.records import Records
from pipeline.images.decode import decode_rgb
from pipeline.images.preprocess import decode_pixels
from pipeline.models.clip.ranker import ClipRanker
from pipeline.models.weights import ranker_weights
from pipeline.stages.caption import CaptionWorker
from pipeline.stages.rank import RankWorker
from pipeline.storage.storage import Storage
from schemas.config import CapfiltConfig
from schemas.records import ShardRecord
from schemas.tables import CANDIDATES

TEXTS = [
    ["a red circle", "the dog on grass", "a red circle", "A Red Circle"],
    [],
    ["two cats near a tree", "a red circle"],
    [" ".join(["dog"] * 30), " ".join(["dog"] * 14), " ".join(["dog"] * 15)],
]


@pytest.fixture(scope="module", params=["bert", "bpe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ranker(tmp_path_factory.mktemp("ranker"), bert=request.param == "bert")


def ranker(folder: Path) -> ClipRanker:
    return ClipRanker(ranker_weights(f"local-dir:{folder}", ""), "auto")


def score_images(engine: ClipRanker, images: list, texts: list[list[str]]) -> list:
    levels = [decode_pixels(encoded(image), [engine.preprocess], "exact") for image in images]
    return engine.score_pixels(torch.stack([pixels_CHW for (pixels_CHW,) in levels]), texts)


def test_scores_are_open_clips_cosine_similarities(folder: Path) -> None:
    images = [picture(seed) for seed in range(4)]
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    scores = score_images(ranker(folder), images, TEXTS)
    assert [len(row) for row in scores] == [4, 0, 2, 3]
    with torch.no_grad():
        for image, texts, row in zip(images, TEXTS, scores, strict=True):
            if texts:
                features = model.encode_image(transform(decode_rgb(encoded(image)))[None], normalize=True)
                expected = (features @ model.encode_text(tokenizer(texts), normalize=True).T)[0]
                assert torch.allclose(torch.tensor([score.similarity for score in row]), expected, atol=1e-6)
    assert scores[0][0] == scores[0][2]
    assert len({round(score.similarity, 4) for row in scores for score in row}) > 4


def test_over_long_texts_are_marked(folder: Path) -> None:
    # The context is 16 tokens, start and end included: 14 words fit.
    row = score_images(ranker(folder), [picture(0)] * 4, TEXTS)[3]
    assert [score.truncated for score in row] == [True, False, True]


def test_scores_do_not_depend_on_the_batch(folder: Path) -> None:
    engine = ranker(folder)
    images = [picture(seed) for seed in range(4)]
    whole = score_images(engine, images, TEXTS)
    for index in range(4):
        alone = score_images(engine, [images[index]], [TEXTS[index]])[0]
        for score, other in zip(alone, whole[index], strict=True):
            assert abs(score.similarity - other.similarity) < 1e-6


def test_lower_precision_gives_nearly_the_same_scores(folder: Path) -> None:
    weights = ranker_weights(f"local-dir:{folder}", "")
    images = [picture(seed) for seed in range(4)]
    whole, half = (score_images(ClipRanker(weights, name), images, TEXTS) for name in ("fp32", "bf16"))
    for row, other in zip(whole, half, strict=True):
        for engine, two in zip(row, other, strict=True):
            assert engine.similarity == pytest.approx(two.similarity, abs=0.02)


# -- the worker ----------------------------------------------------------------------------------------------

CAPTIONS = {
    "a": ["A red circle", "a RED circle", "&lt;b&gt;dog&lt;/b&gt; on grass"],
    "b": [],
    "c": ["  ", " ".join(["dog"] * 40)],
    "d": ["a tree"],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "captioner": save_captioner(root / "captioner"),
        "first": save_ranker(root / "first"),
        "second": save_ranker(root / "second", seed=5, bert=False),
    }


def make(tmp_path: Path, models: dict[str, Path], **rank: object) -> tuple[CapfiltConfig, ShardRecord]:
    config = config_of(
        tmp_path / "corpus",
        caption={"model": str(models["captioner"]), "num_captions": 4},
        rank={"model": f"local-dir:{models['first']}", "pretrained": "", "batch_size": 3} | rank,
    )
    whole = encoded(picture(3))
    images = {key: {"jpg": encoded(picture(index))} for index, key in enumerate("dbca")}
    images["e"] = {"jpg": whole[: len(whole) // 2]}
    return config, commit_crawl(config, images, CAPTIONS | {"e": ["broken"]}, failed=("f",))


def rank(config: CapfiltConfig, kind: str, **inputs: ShardRecord) -> tuple[ShardRecord, list[dict]]:
    storage = Storage(config.corpus.path)
    record = RankWorker(config, Records(storage))(task_of(config, "rank", kind, **inputs))
    path = storage.url(record.outputs["parquet"].path)
    assert pq.read_schema(path).equals(CANDIDATES)
    return record, pq.read_table(path).to_pylist()


def test_worker_scores_synthetic_and_web_captions(tmp_path: Path, models: dict[str, Path]) -> None:
    config, crawl = make(tmp_path, models)
    caption = CaptionWorker(config, Records(Storage(config.corpus.path)))(
        task_of(config, "caption", crawl=crawl)
    )
    record, rows = rank(config, "web", crawl=crawl, caption=caption)
    order = {"synthetic": 0, "web": 1}
    places = [(row["key"], order[row["origin"]], row["candidate"]) for row in rows]
    assert places == sorted(places)
    assert len(rows) == 4 * 4 + 7
    by_place = {(row["key"], row["origin"], row["candidate"]): row for row in rows}
    given = [by_place["a", "web", index] for index in range(3)]
    assert [row["text"] for row in given] == ["A red circle", "a RED circle", "dog on grass"]
    assert [row["raw_text"] for row in given] == CAPTIONS["a"]
    assert [row["duplicate_of"] for row in given] == [None, 0, None]
    assert all(row["seed"] is None and row["num_tokens"] is None for row in given)
    assert by_place["c", "web", 0]["text"] == "" and by_place["c", "web", 0]["score"] is None
    assert by_place["c", "web", 1]["truncated"] is True and by_place["a", "web", 0]["truncated"] is False
    assert by_place["e", "web", 0]["score"] is None
    assert all(row["rerank_score"] is None for row in rows)
    # Equal texts of one image have equal scores, and the worker's are the ranker's.
    engine = ranker(models["first"])
    for index, key in enumerate("dbca"):
        mine = [row for row in rows if row["key"] == key and row["text"]]
        expected = score_images(engine, [picture(index)], [[row["text"] for row in mine]])[0]
        for row, score in zip(mine, expected, strict=True):
            assert abs(row["score"] - score.similarity) < 1e-6
    assert (record.rows_in, record.rows_out, record.images) == (23, 21, 5)
    assert record.counts["scored"] == 21
    assert record.counts["unscored/empty"] == 1 and record.counts["unscored/undecodable"] == 1
    assert {name: sum(part.counts) for name, part in record.histograms.items()} == {
        "score": 16,
        "web_score": 5,
        "score_best": 4,
    }


def test_worker_scores_human_captions_without_a_captioner(tmp_path: Path, models: dict[str, Path]) -> None:
    config, crawl = make(tmp_path, models)
    record, rows = rank(config, "human", crawl=crawl)
    assert {row["origin"] for row in rows} == {"human"}
    assert (record.rows_in, record.rows_out) == (7, 5)
    assert sum(record.histograms["human_score"].counts) == 5 and sum(record.histograms["score"].counts) == 0


def test_second_clip_sees_the_first_ones_best_only(tmp_path: Path, models: dict[str, Path]) -> None:
    second = {"model": f"local-dir:{models['second']}", "first": 2}
    config, crawl = make(tmp_path, models, rerank=second)
    caption = CaptionWorker(config, Records(Storage(config.corpus.path)))(
        task_of(config, "caption", crawl=crawl)
    )
    record, rows = rank(config, "web", crawl=crawl, caption=caption)
    assert len(record.models) == 2
    for key in "abcd":
        mine = [row for row in rows if row["key"] == key and row["score"] is not None]
        seen = {row["text"].casefold() for row in mine if row["rerank_score"] is not None}
        best: list[str] = []
        for row in sorted(mine, key=lambda row: -row["score"]):
            if row["text"].casefold() not in best:
                best.append(row["text"].casefold())
        assert seen == set(best[:2])
    assert all(row["rerank_score"] is None for row in rows if row["key"] == "e")


def test_batch_size_changes_nothing_that_counts(tmp_path: Path, models: dict[str, Path]) -> None:
    results = []
    for batch_size in (1, 5):
        config, crawl = make(tmp_path / str(batch_size), models, batch_size=batch_size)
        results.append(rank(config, "human", crawl=crawl)[1])
    for engine, other in zip(*results, strict=True):
        assert engine["score"] == pytest.approx(other["score"], abs=1e-6)
        assert {**engine, "score": 0} == {**other, "score": 0}
