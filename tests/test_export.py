"""Exports: Hugging Face's classes give our numbers, nothing is lost on the way there and back."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_convert import full_size
from torch import Tensor
from trained import pictures, trained_stage
from transformers import (
    AutoProcessor,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
)

from pipeline.models.blip.matcher import Matcher
from pipeline.models.weights import filter_weights
from schemas.config import FilterConfig
from schemas.errors import CapfiltError
from tests.raw_shards import encoded
from training.blip2.stage1 import Stage1
from training.blip2.stage2 import Stage2
from training.build import meta_stage
from training.convert import load
from training.convert.export import blip2_config, export_model
from training.convert.key_map import to_hf
from training.convert.load import load_trained
from training.convert.read import read_external
from training.convert.state import stage_state
from training.evaluate.generation import Decoding, Stage2Generator
from training.evaluate.retrieval import Stage1Matcher
from training.trainer.base_models import read_initial_weights

pytestmark = pytest.mark.training

TEXTS = ["a red dog", "two cat on street", "the large white triangle near tree"]
# ln_vision's epsilon is 1e-5 here, as in LAVIS; Hugging Face has one epsilon, 1e-6, for the encoder and it.
TOLERANCE = 5e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def stage1(folder: Path) -> Stage1:
    return trained_stage(folder, eva=True)


@pytest.fixture(scope="module")
def exported1(stage1: Stage1, folder: Path) -> Path:
    assert export_model(stage1, folder / "exported1") == "huggingface"
    return folder / "exported1"


@pytest.fixture(scope="module", params=["opt", "t5"])
def stage2(folder: Path, request: pytest.FixtureRequest) -> Stage2:
    return trained_stage(folder, 2, eva=True, family=request.param)


@pytest.fixture(scope="module")
def exported2(stage2: Stage2, folder: Path) -> Path:
    exported = folder / f"exported2-{stage2.language.name}"
    assert export_model(stage2, exported) == "huggingface"
    return exported


def images(number: int) -> list[Image.Image]:
    return [Image.fromarray(pixels_CHW.permute(1, 2, 0).numpy()) for pixels_CHW in pictures(number)]


@torch.no_grad()
def test_retrieval_scores_are_hugging_faces(stage1: Stage1, exported1: Path) -> None:
    model = Blip2ForImageTextRetrieval.from_pretrained(exported1).eval()
    processor = AutoProcessor.from_pretrained(exported1)
    inputs = processor(images=images(3), text=TEXTS, padding=True, return_tensors="pt")
    itc_NM = model(**inputs).logits_per_image
    itm_N2 = model(**inputs, use_image_text_matching_head=True).logits_per_image

    matcher = Stage1Matcher(stage1)
    similarity_NQM = torch.einsum(
        "nqc,mc->nqm", matcher.embed_images(pictures(3)), matcher.embed_texts(matcher.tokenize(TEXTS))
    )
    torch.testing.assert_close(itc_NM, similarity_NQM.amax(dim=1), atol=TOLERANCE, rtol=0)
    capfilt_N2 = torch.cat(matcher.match(pictures(3), matcher.tokenize(TEXTS), torch.arange(3)[:, None]))
    torch.testing.assert_close(itm_N2, capfilt_N2, atol=TOLERANCE, rtol=0)
    assert itm_N2.std() > 20 * TOLERANCE


@torch.no_grad()
def test_an_exported_stage_1_is_a_filter(stage1: Stage1, exported1: Path) -> None:
    config = FilterConfig(model=str(exported1))
    engine = Matcher(config, filter_weights(config))
    prepared = [engine.prepare(encoded(image, "PNG")) for image in images(3)]
    pixels_BCHW = torch.stack([pixels_CHW for pixels_CHW in prepared if pixels_CHW is not None])
    matcher = Stage1Matcher(stage1)
    pairs = torch.arange(3)[:, None]
    expected_N = torch.cat(matcher.match(pictures(3), matcher.tokenize(TEXTS), pairs)).softmax(-1)[:, 1]
    matched = engine.match(pixels_BCHW, [[text] for text in TEXTS])
    assert [row[0] for row in matched] == pytest.approx(expected_N.tolist(), abs=TOLERANCE)


def test_weights_of_another_number_of_heads_are_refused(stage1: Stage1, exported1: Path) -> None:
    heads = stage1.config.qformer.heads
    [weights] = read_initial_weights(
        stage1.config.model_copy(
            update={"run": stage1.config.run.model_copy(update={"init_from": str(exported1)})}
        )
    )
    weights.load_into(stage1)
    assert weights.heads == {"qformer.heads": heads}
    config = stage1.config.model_copy(
        update={"qformer": stage1.config.qformer.model_copy(update={"heads": heads // 2})}
    )
    with pytest.raises(
        CapfiltError, match=rf"exported1' has qformer\.heads = {heads}, and the config {heads // 2}"
    ):
        weights.load_into(meta_stage(config))


def test_pixels_are_hugging_faces(stage1: Stage1, exported1: Path) -> None:
    vision = stage1.visual_encoder
    inputs = AutoProcessor.from_pretrained(exported1)(images=images(2), return_tensors="pt")
    capfilt_BCHW = pictures(2) * vision.scale_C[:, None, None] + vision.shift_C[:, None, None]
    torch.testing.assert_close(inputs.pixel_values, capfilt_BCHW, atol=1e-5, rtol=0)


def hugging_faces(
    model: Blip2ForConditionalGeneration, folder: Path, image: Image.Image, text: str, decoding: Decoding
) -> str:
    """Return what transformers alone writes about an image after a text, as its documentation shows."""
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(images=image, text=text, return_tensors="pt")
    ids_BL = model.generate(
        **inputs,
        num_beams=decoding.beams,
        min_new_tokens=decoding.min_tokens,
        max_new_tokens=decoding.max_tokens,
        length_penalty=decoding.length_penalty,
    )
    if not model.config.text_config.is_encoder_decoder:
        ids_BL = ids_BL[:, inputs.input_ids.shape[1] :]
    return processor.batch_decode(ids_BL, skip_special_tokens=True)[0].strip()


@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(beams=1, min_tokens=0, max_tokens=8),
        Decoding(beams=3, min_tokens=3, max_tokens=8),
        Decoding(beams=3, min_tokens=1, max_tokens=8, length_penalty=-1.0),
    ],
    ids=["greedy", "beams", "short"],
)
def test_generate_is_hugging_faces(stage2: Stage2, exported2: Path, decoding: Decoding) -> None:
    model = Blip2ForConditionalGeneration.from_pretrained(exported2).eval()
    reference_ids = [
        hugging_faces(model, exported2, image, text, decoding)
        for image, text in zip(images(3), TEXTS, strict=True)
    ]
    assert Stage2Generator(stage2).answer(pictures(3), TEXTS, decoding) == reference_ids
    assert any(reference_ids)


@torch.no_grad()
def test_the_soft_prompt_is_hugging_faces(stage2: Stage2, exported2: Path) -> None:
    model = Blip2ForConditionalGeneration.from_pretrained(exported2).eval()
    inputs = AutoProcessor.from_pretrained(exported2)(images=images(3), return_tensors="pt")
    prompt_BQW = model.get_image_features(inputs.pixel_values).pooler_output
    torch.testing.assert_close(prompt_BQW, stage2.soft_prompt(pictures(3)), atol=20 * TOLERANCE, rtol=1e-3)


def require_same(expected: dict[str, Tensor], actual: dict[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def test_stage1_there_and_back_is_bit_equal(stage1: Stage1, exported1: Path) -> None:
    imported = read_external(str(exported1))
    require_same(
        stage1.trainable_state(), stage_state(imported.trained, stage1.trainable_state(), stage=1, where="x")
    )
    require_same(stage1.visual_encoder.tower.state_dict(), imported.vision)


def test_stage2_there_and_back_is_bit_equal(stage2: Stage2, exported2: Path) -> None:
    imported = read_external(str(exported2))
    require_same(
        stage2.trainable_state(), stage_state(imported.trained, stage2.trainable_state(), stage=2, where="x")
    )
    require_same(stage2.visual_encoder.tower.state_dict(), imported.vision)


def test_what_hugging_face_saves_again_loads_here(
    stage1: Stage1, exported1: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    again = tmp_path / "again"
    Blip2ForImageTextRetrieval.from_pretrained(exported1).save_pretrained(again)
    # Without our side file there are no temperature and no captioning head: training cannot go on from that.
    with pytest.raises(CapfiltError, match=r"missing, (temp|Qformer.cls.*) first"):
        stage_state(read_external(str(again)).trained, stage1.trainable_state(), stage=1, where="again")
    loaded = load_trained(str(again), stage1.config)
    assert "captions of this model are meaningless" in caplog.text
    assert torch.equal(
        Stage1Matcher(loaded).embed_images(pictures(2)), Stage1Matcher(stage1).embed_images(pictures(2))
    )
    shutil.copy(exported1 / "capfilt_extra.safetensors", again)
    require_same(stage1.trainable_state(), load_trained(str(again), stage1.config).trainable_state())


def test_an_image_encoder_of_the_file_is_taken(stage1: Stage1, exported1: Path, tmp_path: Path) -> None:
    model = Blip2ForImageTextRetrieval.from_pretrained(exported1)
    with torch.no_grad():
        model.vision_model.encoder.layers[0].mlp.fc1.bias.add_(1.0)
    model.save_pretrained(tmp_path / "tuned")
    shutil.copy(exported1 / "capfilt_extra.safetensors", tmp_path / "tuned")
    tuned = load_trained(str(tmp_path / "tuned"), stage1.config)
    expected = stage1.visual_encoder.tower.blocks[0].mlp.fc1.bias + 1
    assert torch.equal(tuned.visual_encoder.tower.blocks[0].mlp.fc1.bias, expected)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_clip_vit_is_exported_in_our_own_format(folder: Path, tmp_path: Path, stage: int) -> None:
    model = trained_stage(folder, stage)
    assert export_model(model, tmp_path / "own") == "capfilt"
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == ["capfilt.json", "model.safetensors"]
    description = json.loads((tmp_path / "own" / "capfilt.json").read_text())
    assert (description["format"], description["version"], description["stage"]) == (
        "capfilt-blip2",
        1,
        stage,
    )
    require_same(model.trainable_state(), load_trained(str(tmp_path / "own")).trainable_state())
    (tmp_path / "own" / "capfilt.json").write_text('{"format": "capfilt-blip2", "version": 2}')
    with pytest.raises(
        CapfiltError, match="this capfilt reads 'capfilt-blip2' and 'capfilt-blip', version 1"
    ):
        load_trained(str(tmp_path / "own"))


def test_a_folder_with_files_is_left_alone(stage1: Stage1, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(CapfiltError, match="is not empty"):
        export_model(stage1, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_a_language_model_without_room_for_the_image_token_gets_it(tmp_path: Path, family: str) -> None:
    stage2 = trained_stage(tmp_path, 2, eva=True, family=family)
    language = stage2.language
    words = len(language.tokenizer)
    language.model.resize_token_embeddings(words)
    # The padding token is never the likeliest, as in every model that was trained.
    with torch.no_grad():
        language.model.get_output_embeddings().weight[language.tokenizer.pad_token_id] = 0
    export_model(stage2, tmp_path / "exported")
    assert language.model.get_input_embeddings().num_embeddings == words, "the stage stays as it is"
    model = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "exported").eval()
    assert model.config.image_token_id == words
    for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert embeddings.weight.shape[0] == words + 1
    decoding = Decoding(beams=1, min_tokens=0, max_tokens=8)
    captions = [
        hugging_faces(model, tmp_path / "exported", *pair, decoding)
        for pair in zip(images(3), TEXTS, strict=True)
    ]
    assert Stage2Generator(stage2).answer(pictures(3), TEXTS, decoding) == captions


@pytest.mark.parametrize(
    ("stage", "family", "language"),
    [(1, "opt", ""), (2, "opt", "facebook/opt-2.7b"), (2, "t5", "google/flan-t5-xl")],
)
def test_full_size_tensors_are_exactly_hugging_faces(stage: int, family: str, language: str) -> None:
    built = meta_stage(full_size("EVA01-g-14", stage, family, language or "facebook/opt-2.7b"))
    tensors = dict(built.trainable_state())
    tensors |= {
        f"visual_encoder.{name}": stored for name, stored in built.visual_encoder.tower.state_dict().items()
    }
    kind, more = Blip2ForImageTextRetrieval, {}
    if isinstance(built, Stage2):
        kind, more = Blip2ForConditionalGeneration, {"text_config": built.language.model.config}
        tensors |= {
            f"language_model.{name}": stored for name, stored in built.language.model.state_dict().items()
        }
    config = blip2_config(built.config, built.visual_encoder, **more)
    with torch.device("meta"):
        reference_state = kind(config).state_dict()
    mapped, _ = to_hf(tensors)
    assert {name: tensor.shape for name, tensor in mapped.items()} == {
        name: tensor.shape for name, tensor in reference_state.items()
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [("ffn_width", 1 << 40), ("vocab_size", 1 << 40), ("layers", 1 << 40), ("projection_width", 8)],
)
def test_an_exports_config_is_compared_with_its_weights_first(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: int
) -> None:
    export_model(trained_stage(folder, 1), tmp_path / "own")
    path = tmp_path / "own" / "capfilt.json"
    description = json.loads(path.read_text())
    description["config"]["qformer"][key] = value
    path.write_text(json.dumps(description))
    monkeypatch.setattr(load, "build_stage", lambda *_, **__: pytest.fail("built before it was compared"))
    with pytest.raises(CapfiltError, match=r"of another shape|there are \d+ tensors"):
        load_trained(str(tmp_path / "own"))
