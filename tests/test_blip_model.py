"""BLIP's models: equal to transformers' under mapped weights, in parameters and operations to the paper's counts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import IMAGE_PX
from tiny_training import tiny_blip_config
from torch import Tensor
from trained import pictures
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from schemas.errors import CapfiltError
from schemas.pretrain import BlipKind, PretrainConfig
from training.blip.cost import flops_saved_per_sample
from training.blip.initial import copy_text, copy_vit, read_vit
from training.blip.stage import BlipStage
from training.blip.vision import resize_positions
from training.build import build_stage, meta_stage
from training.convert.export_blip import blip_config
from training.convert.key_map import blip_from_hf, blip_to_hf
from training.distributed import World
from training.losses import IGNORED, captioning_loss

pytestmark = pytest.mark.training

CAPTIONS = ["a red circle", "the dog on grass", "two cats near a tree in the street"]


def spread_stage(config: PretrainConfig, world: World | None = None) -> BlipStage:
    """Return a model whose weights are large enough for everything to matter, the same each time."""
    stage = build_stage(config, world or World(), "cpu")
    assert isinstance(stage, BlipStage)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in stage.trainable_named_parameters():
            if name != "temp":
                parameter.add_(torch.randn_like(parameter) * 0.15)
    stage.begin()
    return stage


def normalised(pixels_BCHW: Tensor, stage: BlipStage) -> Tensor:
    vision = stage.visual_encoder
    return pixels_BCHW * vision.scale_C11 + vision.shift_C11


@torch.no_grad()
def test_captioner_equals_transformers(tmp_path: Path) -> None:
    stage = spread_stage(tiny_blip_config(tmp_path, tmp_path, "blip-captioner")).eval()
    reference = BlipForConditionalGeneration(blip_config(stage)).eval()
    missing, unexpected = reference.load_state_dict(blip_to_hf(stage.trainable_state())[0], strict=False)
    assert not unexpected and all("predictions.decoder" in name for name in missing)
    reference.tie_weights()
    pixels_BCHW, texts = pictures(3, IMAGE_PX), stage.tokenize(CAPTIONS)
    texts = texts.beginning_with(stage.begin_id)
    labels_BL = texts.ids_BL.masked_fill(~texts.mask_BL, IGNORED)
    expected = reference(
        pixel_values=normalised(pixels_BCHW, stage),
        input_ids=texts.ids_BL,
        attention_mask=texts.mask_BL.long(),
        labels=labels_BL,
    )
    features_BPE = stage.visual_encoder(pixels_BCHW)
    assert torch.allclose(features_BPE, expected.last_hidden_state, atol=1e-5)
    hidden_BLD = stage.text_decoder(texts.ids_BL, stage.project(features_BPE)[1])
    logits_BLV = stage.text_decoder.logits(hidden_BLD)
    assert torch.allclose(logits_BLV[texts.mask_BL], expected.logits[texts.mask_BL], atol=1e-5)
    targets_BL = stage.labels(texts)
    loss = captioning_loss(
        stage.text_decoder.logits,
        hidden_BLD[targets_BL != IGNORED],
        targets_BL[targets_BL != IGNORED],
        smoothing=0.1,
    )
    assert reference.config.text_config.label_smoothing == 0.1
    assert (loss / (targets_BL != IGNORED).sum()).item() == pytest.approx(expected.loss.item(), abs=1e-5)


@torch.no_grad()
def test_greedy_captions_equal_transformers(tmp_path: Path) -> None:
    stage = spread_stage(tiny_blip_config(tmp_path, tmp_path, "blip-captioner")).eval()
    reference = BlipForConditionalGeneration(blip_config(stage)).eval()
    reference.load_state_dict(blip_to_hf(stage.trainable_state())[0], strict=False)
    reference.tie_weights()
    pixels_BCHW = pictures(4, IMAGE_PX)
    expected_BL = reference.generate(
        pixel_values=normalised(pixels_BCHW, stage), do_sample=False, num_beams=1, max_new_tokens=8
    )
    image = stage.project(stage.visual_encoder(pixels_BCHW))[1]
    ids_BL = torch.full((4, 1), stage.begin_id)
    end_id, ended_B = stage.tokenizer.tokenizer.sep_token_id, torch.zeros(4, dtype=torch.bool)
    while ids_BL.shape[1] < expected_BL.shape[1]:
        next_B = stage.text_decoder.logits(stage.text_decoder(ids_BL, image)[:, -1]).argmax(dim=1)
        ids_BL = torch.cat((ids_BL, next_B.masked_fill(ended_B, 0)[:, None]), dim=1)
        ended_B |= next_B == end_id
    assert torch.equal(ids_BL, expected_BL)
    assert len({tuple(row) for row in ids_BL.tolist()}) > 1


@torch.no_grad()
def test_filter_equals_transformers(tmp_path: Path) -> None:
    stage = spread_stage(tiny_blip_config(tmp_path, tmp_path, "blip-filter")).eval()
    reference = BlipForImageTextRetrieval(blip_config(stage)).eval()
    mapped, unmapped = blip_to_hf(stage.trainable_state())
    assert unmapped.keys() == {"temp"}
    reference.load_state_dict(mapped, strict=True)
    pixels_BCHW, texts = pictures(3, IMAGE_PX), stage.tokenize(CAPTIONS)
    inputs = {"pixel_values": normalised(pixels_BCHW, stage), "attention_mask": texts.mask_BL.long()}
    features_BPE = stage.visual_encoder(pixels_BCHW)
    expected = reference(input_ids=texts.beginning_with(stage.match_id).ids_BL, **inputs).itm_score
    assert torch.allclose(stage.match(stage.project(features_BPE)[0], texts), expected, atol=1e-5)
    expected = reference(input_ids=texts.ids_BL, use_itm_head=False, **inputs).itm_score
    similarity = (
        stage.encoders.embed_images(features_BPE) @ stage.encoders.embed_texts(texts.ids_BL, texts.mask_BL).T
    )
    assert torch.allclose(similarity, expected, atol=1e-5)
    assert similarity.std() > 0.05


def test_names_of_a_question_answering_model_go_there_and_back(tmp_path: Path) -> None:
    config = blip_config(spread_stage(tiny_blip_config(tmp_path, tmp_path)))
    tensors = BlipForQuestionAnswering(config).state_dict()
    named = blip_from_hf(tensors, "vqa")
    assert {"visual_encoder.cls_token", "text_encoder.encoder.layer.0.crossattention.self.key.weight"} < set(
        named
    )
    again, unmapped = blip_to_hf(named)
    assert not unmapped and again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    with pytest.raises(CapfiltError, match="not a tensor of BLIP"):
        blip_from_hf({"qformer.x": torch.zeros(1)}, "there")


# -- what is shared ------------------------------------------------------------------------------------------


def full_size(stage: BlipKind = "blip-pretrain", **blip: Any) -> PretrainConfig:
    return PretrainConfig.model_validate(
        {
            "run": {"name": "full", "stage": stage},
            "data": {"corpus": [{"path": "nowhere"}]},
            "blip": blip,
            "optim": {"batch_size": 2400},
        }
    )


@pytest.mark.parametrize(
    ("share", "parameters"),
    [
        ("all", 224_075_071),
        ("all-but-cross-attention", 252_441_919),
        ("all-but-self-attention", 252_441_919),
        ("none", 361_333_567),
    ],
)
def test_parameters_are_those_of_the_papers_table_3(share: str, parameters: int) -> None:
    stage = meta_stage(full_size(share=share))
    assert sum(parameter.numel() for _, parameter in stage.trainable_named_parameters()) == parameters


def test_operations_follow_from_the_shapes() -> None:
    """2 MKN for each product, by hand: three times where trained, once more by the momentum encoders."""
    width, image, text, layers, words = 768, 197, 30, 1, 30524
    small = {"vision": {"layers": layers}, "text": {"layers": layers}}
    block = 12 * width**2
    vision = layers * (2 * image * block + 4 * image**2 * width) + 2 * (image - 1) * 768 * width
    alone = layers * (2 * text * block + 4 * text**2 * width)
    cross = layers * (2 * text * 2 * width**2 + 4 * text * image * width)
    head = 2 * (text - 1) * width * (width + words)
    projection = layers * 2 * image * width * 2 * width
    embedded = vision + alone + 2 * 2 * width * 256
    itm = 3 * (alone + cross + 2 * width * 2)
    lm = alone + cross + head
    for stage, share, flops, saved in (
        ("blip-pretrain", "all", 4 * embedded + 3 * (itm + lm + projection), 3),
        ("blip-pretrain", "none", 4 * embedded + 3 * (itm + lm + 2 * projection), 2),
        ("blip-captioner", "all", 3 * (vision + lm + projection), 0),
        ("blip-filter", "all", 4 * embedded + 3 * (itm + projection), 2),
    ):
        counted = meta_stage(full_size(stage, share=share, **small))
        assert (counted.flops_per_sample(), flops_saved_per_sample(counted)) == (
            flops,
            saved * 3 * projection,
        )


@pytest.mark.parametrize(
    ("share", "apart"),
    [
        ("all", set()),
        ("all-but-cross-attention", {"crossattention"}),
        ("all-but-self-attention", {"attention"}),
        ("none", {"attention", "crossattention", "intermediate", "output"}),
    ],
)
def test_what_the_decoder_has_for_itself(tmp_path: Path, share: str, apart: set[str]) -> None:
    config = tiny_blip_config(tmp_path, tmp_path)
    stage = build_stage(
        config.model_copy(update={"blip": config.blip.model_copy(update={"share": share})}), World(), "cpu"
    )
    names = {name for name, _ in stage.trainable_named_parameters()}
    prefix = "text_decoder.bert.encoder.layer.1."
    assert {name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)} == apart
    assert ("text_decoder.bert.embeddings.word_embeddings.weight" in names) == (share == "none")


# -- first weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ViTModel, ViTForImageClassification])
@torch.no_grad()
def test_an_image_encoder_begins_from_a_vit(tmp_path: Path, kind: type) -> None:
    torch.manual_seed(0)
    shape = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=IMAGE_PX,
        patch_size=8, initializer_range=0.2, layer_norm_eps=1e-6,
    )  # fmt: skip
    model = kind(shape).eval()
    model.save_pretrained(tmp_path / "vit")
    stage = build_stage(tiny_blip_config(tmp_path, tmp_path), World(), "cpu").eval()
    copy_vit(stage.visual_encoder, read_vit(tmp_path / "vit", "blip.vision.init"))
    pixels_BCHW = pictures(2, IMAGE_PX)
    vit = model if kind is ViTModel else model.vit
    expected = vit(normalised(pixels_BCHW, stage)).last_hidden_state
    assert torch.allclose(stage.visual_encoder(pixels_BCHW), expected, atol=1e-5)


def test_positions_are_resized_as_blip_resizes_them() -> None:
    torch.manual_seed(0)
    positions_1PE = torch.randn(1, 1 + 4 * 4, 6)
    resized = resize_positions(positions_1PE, 1 + 7 * 7)
    assert resized.shape == (1, 50, 6) and torch.equal(resized[:, 0], positions_1PE[:, 0])
    square = positions_1PE[:, 1:].reshape(1, 4, 4, 6).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(square, size=(7, 7), mode="bicubic", align_corners=False)
    assert torch.equal(resized[:, 1:], expected.permute(0, 2, 3, 1).flatten(1, 2))
    assert resize_positions(positions_1PE, 17) is positions_1PE


@torch.no_grad()
def test_text_models_begin_from_bert(tmp_path: Path) -> None:
    stage = build_stage(tiny_blip_config(tmp_path, tmp_path), World(), "cpu").eval()
    text = stage.shape.text
    torch.manual_seed(0)
    bert = BertForMaskedLM(
        BertConfig(
            vocab_size=text.vocab_size - 2, hidden_size=text.width, num_hidden_layers=text.layers,
            num_attention_heads=text.heads, intermediate_size=text.ffn_width,
            max_position_embeddings=text.max_positions, type_vocab_size=1, initializer_range=0.2,
        )
    ).eval()  # fmt: skip
    bert.bert.embeddings.token_type_embeddings.weight.zero_()
    added = stage.text_encoder.embeddings.word_embeddings.weight[-2:].clone()
    for model in stage.text_models:
        copy_text(model, bert.state_dict())
    texts = stage.tokenize(CAPTIONS)
    mask = texts.mask_BL[:, None, None, :]
    expected = bert(texts.ids_BL, attention_mask=texts.mask_BL.long()).logits
    for model in (stage.text_encoder, stage.text_decoder.bert):
        logits = stage.text_decoder.logits(model(texts.ids_BL, mask))
        assert torch.allclose(logits[texts.mask_BL][:, :-2], expected[texts.mask_BL], atol=1e-4)
    assert torch.equal(stage.text_encoder.embeddings.word_embeddings.weight[-2:], added)
