"""NaN and infinity are refused where they come in, in weights, in what models compute, and in stored scores."""

import math
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from corpora import NUM_CAPTIONS
from raw_shards import commit_crawl, config_of, encoded, picture, task_of
from safetensors.torch import load_file, save_file
from test_selection import commit_scores
from tiny_models import START_ID, save_captioner, save_ranker
from torch import Tensor
from torch.nn.functional import normalize
from transformers import BlipForConditionalGeneration

from pipeline.candidates import Candidate
from pipeline.corpus.records import Records
from pipeline.models.blip.captioner import BlipCaptioner
from pipeline.models.blip.decoder import BlipDecoder
from pipeline.models.blip.generation import NOT_FINITE, GridSampler, RowSampler
from pipeline.models.checks import require_finite_weights
from pipeline.models.clip.ranker import ClipRanker
from pipeline.models.weights import captioner_weights, ranker_weights
from pipeline.rng import caption_seeds, uniforms
from pipeline.stages.caption import CaptionWorker
from pipeline.stages.rank import RankWorker
from pipeline.stages.selection import SelectWorker, select
from pipeline.storage.storage import Storage
from schemas.config import CaptionConfig, SelectConfig
from schemas.errors import CapfiltError, CorruptShardError, NotFiniteError

BAD_VALUES = (math.nan, math.inf, -math.inf)
CAPTIONER_FILE, RANKER_FILE = "model.safetensors", "open_clip_model.safetensors"


def change(file: Path, part: str, how: Callable[[Tensor], Tensor]) -> str:
    """Change the first tensor whose name has a part; return its name."""
    tensors = load_file(file)
    name = next(key for key in sorted(tensors) if part in key)
    save_file(tensors | {name: how(tensors[name])}, file, metadata={"format": "pt"})
    return name


def with_one(value: float) -> Callable[[Tensor], Tensor]:
    """Return what puts one bad value among the others."""
    return lambda tensor: tensor.index_put((torch.tensor([tensor.shape[0] - 1]),), torch.tensor(value))


def captioner(folder: Path) -> BlipCaptioner:
    config = CaptionConfig(model=str(folder))
    return BlipCaptioner(config, captioner_weights(config), 0)


def ranker(folder: Path) -> ClipRanker:
    return ClipRanker(ranker_weights(f"local-dir:{folder}", ""), "auto")


# -- weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", BAD_VALUES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_bad_value_is_found_in_any_dtype(value: float, dtype: torch.dtype) -> None:
    sound = {
        # The largest values there are: a sum of them would be infinite.
        "large": torch.full((300,), torch.finfo(dtype).max, dtype=dtype),
        "none": torch.empty(0, dtype=dtype),
        "ids": torch.arange(3),
        "flags": torch.tensor([True]),
        "shape": torch.empty(3, device="meta", dtype=dtype),
    }
    require_finite_weights(sound, "here")
    require_finite_weights({}, "here")
    bad = sound["large"].clone()
    bad[177] = value
    with pytest.raises(CapfiltError, match=r"^here: 1 of 6 tensors hold .*NaN or infinite.*, b\w+ first"):
        require_finite_weights(sound | {"bad": bad}, "here")


def test_a_name_of_others_does_not_reach_the_terminal_as_it_is() -> None:
    with pytest.raises(CapfiltError) as refused:
        require_finite_weights({"a\x1b[2J": torch.tensor(math.nan)}, "here")
    assert "\x1b" not in str(refused.value)


@pytest.mark.parametrize("value", BAD_VALUES)
@pytest.mark.parametrize("part", ["vision_model", "text_decoder", "crossattention"])
def test_a_captioner_with_bad_weights_is_refused(tmp_path: Path, part: str, value: float) -> None:
    folder = save_captioner(tmp_path / "captioner")
    name = change(folder / CAPTIONER_FILE, part, with_one(value))
    with pytest.raises(CapfiltError) as refused:
        captioner(folder)
    assert type(refused.value) is CapfiltError, "the run is wrong, not a shard"
    assert str(refused.value).startswith(f"caption.model = {str(folder)!r} in {folder}: 1 of ")
    assert "not finite" in str(refused.value) and name in str(refused.value)


@pytest.mark.parametrize("value", BAD_VALUES)
@pytest.mark.parametrize("part", ["visual", "ln_final", "text_projection"])
def test_a_ranker_with_bad_weights_is_refused(tmp_path: Path, part: str, value: float) -> None:
    folder = save_ranker(tmp_path / "ranker")
    name = change(folder / RANKER_FILE, part, with_one(value))
    with pytest.raises(CapfiltError) as refused:
        ranker(folder)
    assert type(refused.value) is CapfiltError
    assert f"in {folder}: 1 of " in str(refused.value) and name in str(refused.value)


# -- what models compute -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BlipForConditionalGeneration:
    folder = save_captioner(tmp_path_factory.mktemp("captioner"))
    return BlipForConditionalGeneration.from_pretrained(folder).eval()


@pytest.mark.parametrize("value", BAD_VALUES)
def test_samplers_mark_the_samples_whose_logits_are_not_finite(
    model: BlipForConditionalGeneration, value: float
) -> None:
    decoder, config = BlipDecoder(model.text_decoder).eval(), CaptionConfig(num_captions=3)
    image_BPE = torch.randn(3, 17, 32, generator=torch.Generator().manual_seed(1))
    numbers = torch.from_numpy(uniforms(caption_seeds(3, ["a", "b", "c"], 3), 19))
    expected = RowSampler(decoder, [START_ID], config)(image_BPE, numbers)
    broken_BPE = image_BPE.clone()
    broken_BPE[1, 4, 7] = value
    grid = GridSampler(decoder, [START_ID], config, 3)
    for sampler in (RowSampler(decoder, [START_ID], config), grid):
        tokens_BNT = sampler(broken_BPE, numbers)
        assert (tokens_BNT == NOT_FINITE).any(dim=2).tolist() == [[False] * 3, [True] * 3, [False] * 3]
        assert torch.equal(tokens_BNT[[0, 2]], expected[[0, 2]])
    # Nothing of it is left in the buffers for the next batch.
    assert torch.equal(grid(image_BPE, numbers), expected)


@pytest.mark.parametrize("sampler", [RowSampler, lambda *args: GridSampler(*args, 2)])
def test_logits_that_break_in_the_middle_of_a_caption_are_marked(
    model: BlipForConditionalGeneration, sampler: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, config = BlipDecoder(model.text_decoder).eval(), CaptionConfig(num_captions=2)
    logits, calls = decoder.logits, []

    def breaking(hidden: Tensor) -> Tensor:
        calls.append(1)
        return logits(hidden).index_fill(1, torch.tensor([30]), math.nan if len(calls) == 4 else -1.0)

    monkeypatch.setattr(decoder, "logits", breaking)
    numbers = torch.from_numpy(uniforms(caption_seeds(3, ["a", "b"], 2), 19))
    tokens_BNT = sampler(decoder, [START_ID], config)(torch.zeros(2, 17, 32), numbers)
    assert (tokens_BNT == NOT_FINITE).any(dim=2).all()


@pytest.fixture
def crawled(tmp_path: Path) -> tuple:
    config = config_of(tmp_path / "corpus", caption={"num_captions": 2}, rank={"pretrained": ""})
    images = {f"00000000{index}": {"jpg": encoded(picture(index))} for index in range(3)}
    return config, commit_crawl(config, images, {key: ["a red circle"] for key in images})


def test_a_captioner_that_overflows_leaves_its_shard_uncommitted(tmp_path: Path, crawled: tuple) -> None:
    config, crawl = crawled
    folder = save_captioner(tmp_path / "captioner")
    change(
        folder / CAPTIONER_FILE,
        "vision_model.post_layernorm.weight",
        lambda weight: torch.full_like(weight, 1e30),
    )
    change(folder / CAPTIONER_FILE, "crossattention.self.key.weight", lambda weight: weight * 1e30)
    config = config.model_copy(update={"caption": CaptionConfig(model=str(folder), num_captions=2)})
    records = Records(Storage(config.corpus.path))
    with pytest.raises(NotFiniteError, match=r"^the logits of caption\.model = .*captioner' are not finite"):
        CaptionWorker(config, records)(task_of(config, "caption", crawl=crawl))
    assert records.read("caption", "tiny", "00000") is None


@pytest.mark.parametrize("part", ["visual.ln_post.weight", "ln_final.weight"])
def test_a_ranker_that_overflows_leaves_its_shard_uncommitted(
    tmp_path: Path, crawled: tuple, part: str
) -> None:
    config, crawl = crawled
    folder = save_ranker(tmp_path / "ranker")
    # The length of such an embedding is infinite in float32; divided by it, every score would be 0.
    change(folder / RANKER_FILE, part, lambda weight: torch.full_like(weight, 1e25))
    rank = config.rank.model_copy(update={"model": f"local-dir:{folder}"})
    config = config.model_copy(update={"rank": rank})
    records = Records(Storage(config.corpus.path))
    with pytest.raises(NotFiniteError, match=r"^the scores of rank\.model = .*ranker' are not finite"):
        RankWorker(config, records)(task_of(config, "rank", kind="human", crawl=crawl))
    assert records.read("rank", "tiny", "00000") is None


def test_sound_embeddings_are_normalised_as_torch_does() -> None:
    embeddings = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)) * 10
    embeddings[3] = 0
    embeddings[4] *= 1e-20
    assert torch.equal(ClipRanker._embed(lambda inputs: inputs, embeddings), normalize(embeddings, dim=-1))


# -- scores that older versions stored ---------------------------------------------------------------------------


def stored(tmp_path: Path, **bad: float) -> tuple:
    """Commit a shard whose second image has a bad score."""
    config = config_of(tmp_path / "corpus")
    keys = ["000000001", "000000002"]
    crawl = commit_crawl(config, {key: {"jpg": encoded(picture(0))} for key in keys}, {})
    good = Candidate(origin="synthetic", candidate=0, text="a dog", score=0.3, rerank_score=0.2)
    values = {"score": 0.3, "rerank_score": 0.2} | bad
    broken = Candidate(origin="synthetic", candidate=0, text="a cat", **values)
    return config, crawl, commit_scores(config, {keys[0]: [good], keys[1]: [broken]})


@pytest.mark.parametrize("value", BAD_VALUES)
@pytest.mark.parametrize("column", ["score", "rerank_score"])
def test_stored_scores_that_are_not_finite_are_not_curated(tmp_path: Path, column: str, value: float) -> None:
    config, crawl, rank = stored(tmp_path, **{column: value})
    records = Records(Storage(config.corpus.path))
    file = rank.outputs["parquet"].path
    with pytest.raises(
        CorruptShardError, match=rf"^{file}: 1 of 2 values of {column} are not finite.*--recompute"
    ):
        SelectWorker(config, records)(task_of(config, "select", crawl=crawl, rank=rank))
    assert records.read("select", "tiny", "00000") is None
    assert not list((tmp_path / "corpus").glob("curated/**/*.tar"))


def test_sound_scores_and_missing_ones_are_curated(tmp_path: Path) -> None:
    config, crawl, rank = stored(tmp_path, rerank_score=None)
    records = Records(Storage(config.corpus.path))
    record = SelectWorker(config, records)(task_of(config, "select", crawl=crawl, rank=rank))
    assert record.rows_out == 2
    rows = pq.read_table(tmp_path / "corpus" / record.outputs["parquet"].path).to_pylist()
    assert all(row["status"] == "kept" for row in rows)


@pytest.mark.parametrize("kind", ["web", "human"])
@pytest.mark.parametrize("value", BAD_VALUES)
def test_a_selection_keeps_no_candidate_whose_score_is_not_finite(kind: str, value: float) -> None:
    bad = [
        Candidate(origin="synthetic", candidate=0, text="a", score=value),
        Candidate(origin="synthetic", candidate=1, text="b", score=0.5, rerank_score=value),
    ]
    good = Candidate(origin="synthetic", candidate=NUM_CAPTIONS, text="c", score=0.1)
    assert select(bad, SelectConfig(), kind).kept == ()
    assert select([*bad, good], SelectConfig(), kind).kept == (good,)
