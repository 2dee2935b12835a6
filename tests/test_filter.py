"""BLIP's filter: transformers' match probabilities, the stage around them, and selections by its verdict."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from tiny_models import END_ID, START_ID, save_captioner, save_matcher, save_qformer_matcher
from torch import Tensor
from transformers import (
    BertTokenizer,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    BlipForImageTextRetrieval,
    BlipImageProcessorPil,
    BlipProcessor,
)

from jobs.bench.fixtures.compute import counted_flops
from jobs.cli.commands.plan import plan_corpus
from jobs.doctor import node_checks
from pipeline.candidates import Candidate, choose
from pipeline.corpus.fingerprint import stage_fingerprint
from pipeline.corpus.records import Records
from pipeline.lineage.sample_trace import trace
from pipeline.manifest.manifest import Manifest
from pipeline.manifest.verify.corpus import verify
from pipeline.models.blip.matcher import MatchEncoder, Matcher
from pipeline.models.blip.vision import VisionTower
from pipeline.models.weights import captioner_weights, filter_weights
from pipeline.stages.selection import select
from pipeline.storage.storage import Storage
from schemas.config import CapfiltConfig, CaptionConfig, FilterConfig, SelectConfig
from schemas.errors import CapfiltError
from tests.corpora import make_corpus
from tests.processes import cli_here
from tests.raw_shards import encoded, picture
from tests.runs import config_file, curated_files, curated_rows, do_run, small_config, with_values

TEXTS = [
    ["a red dog", "two cats on the street near a large white triangle", "sky", "a red dog ."],
    [],
    ["the blue car"],
    ["a dog", "a cat", "a tree under the small black circle"],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_matcher(tmp_path_factory.mktemp("matcher"))


@pytest.fixture(scope="module")
def reference(folder: Path) -> BlipForImageTextRetrieval:
    return BlipForImageTextRetrieval.from_pretrained(folder).eval()


def matcher(folder: Path, **options: Any) -> Matcher:
    config = FilterConfig(model=str(folder), **options)
    return Matcher(config, filter_weights(config))


def pixels(engine: Matcher, images: int) -> Tensor:
    prepared = [engine.prepare(encoded(picture(number), "PNG")) for number in range(images)]
    return torch.stack([image for image in prepared if image is not None])


# -- the engine ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_are_transformers(reference: BlipForImageTextRetrieval) -> None:
    generator = torch.Generator().manual_seed(1)
    pixels_BCHW = torch.randn(3, 3, 32, 32, generator=generator)
    lengths = [(3, 9, 2, 40), (1,), (5, 5, 17)]
    tokens = [
        [
            [START_ID + 1, *torch.randint(5, START_ID, (length,), generator=generator).tolist()]
            for length in row
        ]
        for row in lengths
    ]
    logits_T2 = MatchEncoder(reference)(VisionTower(reference.vision_model)(pixels_BCHW), tokens)
    expected = [
        reference(torch.tensor([ids]), pixels_BCHW[image : image + 1]).itm_score[0]
        for image, row in enumerate(tokens)
        for ids in row
    ]
    torch.testing.assert_close(logits_T2, torch.stack(expected), atol=1e-5, rtol=0)
    assert logits_T2.std(0).min() > 0.1


@torch.no_grad()
def test_from_bytes_to_probabilities_as_transformers_does_it(
    folder: Path, reference: BlipForImageTextRetrieval
) -> None:
    engine = matcher(folder, first_token="cls")
    processor = BlipProcessor(BlipImageProcessorPil.from_pretrained(folder), engine._tokenizer)
    matched = engine.match(pixels(engine, 4), TEXTS)
    assert [len(row) for row in matched] == [len(row) for row in TEXTS]
    for number, (texts, probabilities) in enumerate(zip(TEXTS, matched, strict=True)):
        for text, probability in zip(texts, probabilities, strict=True):
            inputs = processor(images=picture(number), text=text, return_tensors="pt")
            expected = reference(**inputs).itm_score.softmax(-1)[0, 1]
            assert probability == pytest.approx(float(expected), abs=1e-5)
    assert max(max(row) for row in matched if row) - min(min(row) for row in matched if row) > 0.2


def test_the_first_token_is_blips_encoder_token(folder: Path) -> None:
    by_default, cls = matcher(folder), matcher(folder, first_token="cls")
    [ids], [cls_ids] = by_default.tokenize(["a red dog"]), cls.tokenize(["a red dog"])
    assert ids[0] == START_ID + 1 and cls_ids[0] == cls._tokenizer.cls_token_id
    assert ids[1:] == cls_ids[1:] and ids[-1] == END_ID
    assert by_default.match(pixels(cls, 4), TEXTS) != cls.match(pixels(cls, 4), TEXTS)


def test_probabilities_depend_on_neither_batch_nor_company(folder: Path) -> None:
    engine = matcher(folder)
    pixels_BCHW = pixels(engine, 4)
    together = engine.match(pixels_BCHW, TEXTS)
    for image, texts in enumerate(TEXTS):
        for position, text in enumerate(texts):
            [[alone]] = engine.match(pixels_BCHW[image : image + 1], [[text]])
            assert alone == pytest.approx(together[image][position], abs=1e-6)


def test_texts_are_cut_to_max_tokens(folder: Path) -> None:
    ids = matcher(folder, max_tokens=5).tokenize(["a red dog on the street"])
    assert len(ids[0]) == 5 and ids[0][-1] == END_ID
    with pytest.raises(CapfiltError, match=r"filter\.max_tokens = 49: '.*' ends at 48 tokens; set no more"):
        filter_weights(FilterConfig(model=str(folder), max_tokens=49))
    assert filter_weights(FilterConfig(model=str(folder), max_tokens=48)).digest


def test_an_image_is_encoded_and_projected_once_for_all_its_texts(
    reference: BlipForImageTextRetrieval,
) -> None:
    encode, tower = MatchEncoder(reference), VisionTower(reference.vision_model)
    pixels_1CHW = torch.zeros(1, 3, 32, 32)

    def flops(texts: int) -> float:
        return counted_flops(lambda: encode(tower(pixels_1CHW), [[[1, 2, 3]] * texts]))

    text = flops(2) - flops(1)
    of_image = flops(1) - text
    # One more text adds its own three tokens; nothing of the image is computed again.
    assert flops(11) == pytest.approx(of_image + 11 * text, rel=1e-6)
    naive = counted_flops(
        lambda: reference(torch.ones(11, 3, dtype=torch.long), pixels_1CHW.expand(11, -1, -1, -1))
    )
    assert naive > 4 * flops(11)


@torch.no_grad()
def test_a_stage_1_of_blip2_matches_as_transformers_does_it(tmp_path: Path) -> None:
    folder = save_qformer_matcher(tmp_path / "stage1")
    engine = matcher(folder)
    reference = Blip2ForImageTextRetrieval.from_pretrained(folder).eval()
    processor = Blip2Processor(BlipImageProcessorPil.from_pretrained(folder), engine._tokenizer)
    matched = engine.match(pixels(engine, 4), TEXTS)
    for number, (texts, probabilities) in enumerate(zip(TEXTS, matched, strict=True)):
        for text, probability in zip(texts, probabilities, strict=True):
            inputs = processor(images=picture(number), text=text, return_tensors="pt")
            logits = reference(**inputs, use_image_text_matching_head=True).logits_per_image
            assert probability == pytest.approx(float(logits.softmax(-1)[0, 1]), abs=1e-5)
    assert max(max(row) for row in matched if row) - min(min(row) for row in matched if row) > 0.02
    # What the processor adds for language models is a word that the Q-Former does not know.
    [[odd, unknown]] = engine.match(pixels(engine, 1), [["a <image> dog", "a [UNK] dog"]])
    assert odd == unknown
    pixels_1CHW = torch.zeros(1, 3, 32, 32)

    def flops(texts: int) -> float:
        return counted_flops(lambda: engine.encode(engine.vision(pixels_1CHW), [[[1, 2, 3]] * texts]))

    text = flops(2) - flops(1)
    assert flops(11) == pytest.approx(flops(1) + 10 * text, rel=1e-6)
    assert text < 0.2 * flops(1)
    with pytest.raises(CapfiltError, match=r"max_tokens = 49: '.*' ends at 48 tokens"):
        matcher(folder, max_tokens=49)


def test_models_that_are_not_filters_are_refused(tmp_path: Path, folder: Path) -> None:
    captioner = save_captioner(tmp_path / "captioner")
    with pytest.raises(
        CapfiltError, match=r"filter\.model.*no itm_head\.\*; the filter must be a BLIP retrieval"
    ):
        matcher(captioner)
    with pytest.raises(
        CapfiltError, match=r"caption\.model.*no text_decoder\.\*; the captioner must be a BLIP"
    ):
        captioner_weights(CaptionConfig(model=str(save_matcher(tmp_path / "matcher"))))
    mixed = save_matcher(tmp_path / "mixed")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(60))]
    BertTokenizer(vocab={word: index for index, word in enumerate(words)}).save_pretrained(mixed)
    with pytest.raises(
        CapfiltError, match=f"tokenizer has 65 words, and the model embeddings of {START_ID + 2}"
    ):
        matcher(mixed)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CapfiltError, match=r"config\.json is missing in .*filter\.model.*retrieval model"):
        matcher(tmp_path / "empty")


# -- the selection -------------------------------------------------------------------------------------------


def candidate(
    origin: str, number: int, score: float | None, match: float | None, text: str = ""
) -> Candidate:
    return Candidate(
        origin=origin,
        candidate=number,
        text=text or f"{origin} {number}",
        score=score,
        match_probability=match,
    )


CANDIDATES = [
    candidate("synthetic", 0, 0.30, 0.20),
    candidate("synthetic", 1, 0.25, 0.90),
    candidate("synthetic", 2, 0.20, 0.95),
    candidate("synthetic", 3, 0.10, 0.60),
    candidate("web", 0, 0.35, 0.49),
]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, ["web 0", "synthetic 0"]),
        ({"by": "itm"}, ["synthetic 2", "synthetic 1"]),
        ({"by": "both"}, ["synthetic 1", "synthetic 2"]),
        ({"by": "both", "min_score": 0.22, "top_k": 5}, ["synthetic 1"]),
        ({"by": "itm", "min_score": 0.99, "top_k": 1}, ["synthetic 2"]),
        ({"by": "itm", "min_match": 0.4, "top_k": 9}, ["synthetic 2", "synthetic 1", "synthetic 3", "web 0"]),
        ({"by": "both", "min_match": 0.4, "web_caption": "always", "top_k": 1}, ["web 0", "synthetic 1"]),
        ({"by": "both", "web_caption": "always", "top_k": 1}, ["synthetic 1"]),
        ({"by": "both", "min_match": 0.0, "web_caption": "never", "top_k": 1}, ["synthetic 0"]),
    ],
    ids=str,
)
def test_what_is_kept(options: dict, kept: list[str]) -> None:
    assert [candidate.text for candidate in select(CANDIDATES, SelectConfig(**options)).kept] == kept


def test_an_image_whose_every_text_is_refused_keeps_none() -> None:
    refused = select(CANDIDATES, SelectConfig(by="both", min_match=0.99))
    assert refused.kept == () and refused.reason == "filtered_out"
    # CLIP's score plays no part in the filter's verdict, nor does the missing one.
    unscored = [candidate("synthetic", 0, None, 0.9), candidate("web", 0, None, 0.1)]
    assert [candidate.text for candidate in select(unscored, SelectConfig(by="itm")).kept] == ["synthetic 0"]
    for match in (None, float("nan")):
        blind = select([candidate("synthetic", 0, 0.3, match)], SelectConfig(by="itm"))
        assert blind.kept == () and blind.reason == "not_scored"
    reasons = {choice.candidate.text: choice.reason for choice in choose(CANDIDATES, by="itm", top_k=1)}
    assert reasons["web 0"] == "filtered_out" and reasons["synthetic 1"] == "outscored"


def test_a_filter_is_asked_for_where_the_selection_needs_one(tmp_path: Path) -> None:
    values = {
        "corpus": {"path": str(tmp_path)}, "source": [{"name": "a", "input": ["a.txt"]}], "select": {"by": "itm"}
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"'itm' needs a filter; add a section \[filter\]"):
        CapfiltConfig.model_validate(values)
    CapfiltConfig.model_validate(values | {"filter": {}})


def test_fingerprints_of_corpora_without_a_filter_stay(tmp_path: Path) -> None:
    values = {"corpus": {"path": str(tmp_path)}, "source": [{"name": "a", "input": ["a.txt"]}]}
    plain, filtered = (CapfiltConfig.model_validate(values | more) for more in ({}, {"filter": {}}))
    inputs = {"crawl": {"tar": "1"}, "rank": {"parquet": "2"}}
    # As the first release computed it.
    before = "62daf099205f1c14c931554480fa7bb0dd1318b5769a75957d22ec2cab6dc2cb"
    assert stage_fingerprint(plain, "select", "web", inputs) == before
    assert stage_fingerprint(filtered, "select", "web", inputs) == before


# -- the stage -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(base_url: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> CapfiltConfig:
    """Return the config of a corpus that was made with a filter, selected by both."""
    place = tmp_path_factory.mktemp("filtered")
    config = small_config(str(place / "corpus"), place / "urls.parquet", base_url, 24, 8)
    config = CapfiltConfig.model_validate(config.model_dump() | {"filter": {"model": str(folder)}})
    config = with_values(config, select={"by": "both"})
    assert do_run(config).exit_code == 0
    return config


def ask(config: CapfiltConfig, sql: str) -> list[tuple]:
    return Manifest(Storage(config.corpus.path)).query(sql).rows


def test_every_candidate_has_its_probability(corpus: CapfiltConfig) -> None:
    assert ask(
        corpus, "SELECT count(*) FROM candidates WHERE match_probability IS NULL OR score IS NULL"
    ) == [(0,)]
    ((total, judged),) = ask(corpus, "SELECT count(*), count(DISTINCT match_probability) FROM candidates")
    ((images,),) = ask(corpus, "SELECT count(*) FROM samples WHERE status = 'ok'")
    assert total == 11 * images and judged > images
    assert ask(corpus, "SELECT sum(rows_out) FROM progress WHERE stage = 'filter'") == [(total,)]
    assert ask(
        corpus,
        "SELECT status, sum(rows) FROM outcomes WHERE stage = 'filter' AND kind = 'status' GROUP BY ALL",
    ) == [("scored", total)]
    assert verify(Manifest(Storage(corpus.corpus.path))).differences == []


def test_only_what_matches_is_kept(corpus: CapfiltConfig) -> None:
    rows = curated_rows(corpus.corpus.path)
    kept = [row for row in rows if row["status"] == "kept"]
    refused = [row for row in rows if row["reason"] == "filtered_out"]
    assert kept and refused and len(kept) + len(refused) == len(rows)
    under = ask(
        corpus,
        """SELECT count(*) FROM kept_captions JOIN candidates USING (source, shard, uid, origin, candidate)
        WHERE match_probability < 0.5""",
    )
    assert under == [(0,)]
    [traced] = trace(Manifest(Storage(corpus.corpus.path)), refused[0]["uid"])
    assert {candidate["outcome"] for candidate in traced["candidates"]} == {
        "refused by the filter: match under 0.5"
    }
    assert all(candidate["match_probability"] < 0.5 for candidate in traced["candidates"])
    assert [row["kind"] for row in traced["models"]] == ["captioner", "filter", "ranker"]


def test_another_selection_computes_no_probability_again(corpus: CapfiltConfig, tmp_path: Path) -> None:
    records = Records(Storage(corpus.corpus.path))
    before = {key: record.attempt for key, record in records.shards(("filter", "rank")).items()}
    with pytest.raises(CapfiltError, match=r"\): select\.by 'both' -> 'clip'\. Restore"):
        do_run(with_values(corpus, select={"by": "clip"}))
    stale = do_run(with_values(corpus, select={"by": "clip"}), recompute=True)
    assert stale.exit_code == 0
    assert {row["reason"] for row in curated_rows(corpus.corpus.path)} == {None}
    assert {key: record.attempt for key, record in records.shards(("filter", "rank")).items()} == before
    assert do_run(corpus, recompute=True).exit_code == 0
    assert {row["reason"] for row in curated_rows(corpus.corpus.path)} == {None, "filtered_out"}


def test_matches_of_a_selection_without_scores_stand_beside_older_scores(corpus: CapfiltConfig) -> None:
    """Where the filter alone decides, its matches have read no scores; those of the ranking before are still there."""
    counted = "SELECT count(score), count(match_probability) FROM candidates"
    ((_, matches),) = ask(corpus, counted)
    itm, clip = (with_values(corpus, select={"by": by}) for by in ("itm", "clip"))
    assert do_run(itm, recompute=True).exit_code == 0
    assert ask(itm, counted) == [(0, matches)]
    ((uid,),) = ask(itm, "SELECT min(uid) FROM curated WHERE len(captions) = 2")
    [traced] = trace(Manifest(Storage(itm.corpus.path)), uid)
    outcomes = [candidate["outcome"] for candidate in traced["candidates"]]
    assert outcomes[:2] == ["kept as number 1", "kept as number 2"]
    assert not any("decode" in outcome for outcome in outcomes)
    # CLIP decides again, and has scores that the matches have not read.
    assert do_run(clip, recompute=True).exit_code == 0
    assert ask(clip, counted) == [(matches, matches)]
    assert plan_corpus(corpus)["stale_because"] == {"select.by 'clip' -> 'both'": 3}
    assert do_run(corpus, recompute=True).exit_code == 0
    assert ask(corpus, counted) == [(matches, matches)]


def test_adding_a_filter_leaves_the_curated_shards_of_clips_selection(
    base_url: str, folder: Path, tmp_path: Path
) -> None:
    config = small_config(str(tmp_path / "corpus"), tmp_path / "urls.parquet", base_url, 8, 8)
    assert do_run(config).exit_code == 0
    files = curated_files(config.corpus.path)
    filtered = CapfiltConfig.model_validate(config.model_dump() | {"filter": {"model": str(folder)}})
    done = do_run(filtered)
    assert done.exit_code == 0 and done.totals.filtered > 0 and done.totals.selected == 0
    assert curated_files(config.corpus.path) == files


def test_other_scores_take_over_the_probabilities(
    corpus: CapfiltConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranked anew, the shard is filtered anew, since it repeats the scores; but no image is looked at again."""
    records = Records(Storage(corpus.corpus.path))
    ((_, source, shard), record), *_ = sorted(records.shards(("filter",)).items())
    with records.storage.open(record.outputs["parquet"].path) as file:
        old = pq.read_table(file)
    looked_at: list[int] = []
    match = Matcher.match

    def counting(self: Matcher, pixels_BCHW: Tensor, texts: Any) -> Any:
        looked_at.append(len(texts))
        return match(self, pixels_BCHW, texts)

    monkeypatch.setattr(Matcher, "match", counting)
    ranked_anew = with_values(corpus, rank={"pixels": "fast"})
    assert do_run(ranked_anew, recompute=True).exit_code == 0
    assert looked_at == []
    with records.storage.open(records.read("filter", source, shard).outputs["parquet"].path) as file:
        new = pq.read_table(file)
    assert new["match_probability"].equals(old["match_probability"])
    assert not new["score"].equals(old["score"])
    # Another prompt changes the texts: everything is computed again.
    assert do_run(with_values(ranked_anew, caption={"prompt": "a"}), recompute=True).exit_code == 0
    assert sum(looked_at) > 0
    assert do_run(corpus, recompute=True).exit_code == 0


def test_the_filter_alone_decides_and_clip_ranks_nothing(
    base_url: str, folder: Path, corpus: CapfiltConfig, tmp_path: Path
) -> None:
    config = small_config(str(tmp_path / "corpus"), tmp_path / "urls.parquet", base_url, 16, 8)
    values = config.model_dump() | {"filter": {"model": str(folder)}}
    values["select"] |= {"by": "itm", "top_k": 11}
    values["rank"] |= {"model": "local-dir:/nowhere"}
    config = CapfiltConfig.model_validate(values)
    assert do_run(config).exit_code == 0
    assert Records(Storage(config.corpus.path)).shards(("rank",)) == {}
    rows = ask(config, "SELECT scores, captions FROM curated")
    assert rows and all(score is None for scores, _ in rows for score in scores)
    assert verify(Manifest(Storage(config.corpus.path))).differences == []
    planned = cli_here("plan", "-c", str(config_file(config, tmp_path / "c.json")), "--json")
    assert {row["stage"] for row in json.loads(planned.stdout)["stages"]} == {
        "crawl",
        "caption",
        "filter",
        "select",
    }
    refused = cli_here("rank", "-c", str(config_file(config, tmp_path / "c.json")))
    assert refused.returncode == 2 and 'select.by = "itm"' in refused.stderr
    # With the ranking the filter's file is made anew too: for no other reason than that.
    values["select"] |= {"by": "both"}
    values["rank"] |= {"model": corpus.rank.model}
    with pytest.raises(CapfiltError, match=r"\): select\.by 'itm' -> 'both'\. Restore"):
        do_run(CapfiltConfig.model_validate(values))


def test_doctor_reads_the_filters_weights(corpus: CapfiltConfig, tmp_path: Path) -> None:
    damaged = CapfiltConfig.model_validate(corpus.model_dump() | {"filter": {"model": str(tmp_path)}})
    # The same checks without the command's process, which imports every library.
    for config, state in ((corpus, "ok"), (damaged, "fail")):
        [check] = [one for one in node_checks(config, 0) if one.name == "filter"]
        assert check.state == state, check
    said = cli_here("doctor", "-c", str(config_file(damaged, tmp_path / "c.json")), "--json")
    assert asdict(check) in json.loads(said.stdout)


def test_a_corpus_without_the_section_has_no_such_stage(base_url: str, tmp_path: Path) -> None:
    config = small_config(str(tmp_path / "corpus"), tmp_path / "urls.parquet", base_url, 8, 8)
    refused = cli_here("filter", "-c", str(config_file(config, tmp_path / "c.json")))
    assert refused.returncode == 2 and "no section [filter]" in refused.stderr
    planned = cli_here("plan", "-c", str(config_file(config, tmp_path / "c.json")), "--json")
    assert "filter" not in planned.stdout


def test_candidates_are_those_of_the_last_stage_that_holds(tmp_path: Path) -> None:
    """Scores until they are filtered; and again once they are made anew, since the matches repeat older ones."""
    corpus = make_corpus(str(tmp_path), shards=2, stages=("crawl", "caption", "rank"))
    ((rows,),) = Manifest(corpus.storage).query("SELECT count(*) FROM candidates").rows
    corpus.make("cc", "00000", ("filter",))
    both = "SELECT shard, count(*), count(score), count(match_probability) FROM candidates GROUP BY ALL ORDER BY ALL"
    half = rows // 2
    assert Manifest(corpus.storage).query(both).rows == [
        ("00000", half, half, half),
        ("00001", half, half, 0),
    ]
    corpus.rank_anew("cc", "00000")
    assert Manifest(corpus.storage).query(both).rows == [("00000", half, half, 0), ("00001", half, half, 0)]
