"""NaN and infinity in training and evaluation: refused when weights are read, and where a model computes them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from corpora import make_corpus
from safetensors.torch import load_file, save_file
from small_stage import SmallStage, batches, config, make_loop
from test_evaluate import GREEDY, IMAGE_OF_TEXT, TEXTS, held_out
from trained import begun_stage, pictures, trained_config, trained_stage

from jobs.pretrain import pretrain
from pipeline.digests import sha256_file
from schemas.errors import CapfiltError, NotFiniteError
from training.convert.export import export_model
from training.convert.load import load_trained
from training.evaluate.generation import Decoding, Stage1Generator, Stage2Generator
from training.evaluate.retrieval import Stage1Matcher, retrieve
from training.evaluate.validation import validate
from training.trainer.loop import TrainingStopped

pytestmark = pytest.mark.training


def spoil(file: Path, name: str, value: float = math.nan) -> None:
    """Put one bad value into a tensor of a file of safetensors."""
    tensors = load_file(file)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file, metadata={"format": "pt"})


# -- reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "file", "tensor", "named"),
    [
        (1, "clip/open_clip_model.safetensors", "visual.conv1.weight", "vision.model = 'local-dir:"),
        (
            1,
            "eva/open_clip_model.safetensors",
            "visual.trunk.blocks.1.mlp.fc1.weight",
            "vision.model = 'local-dir:",
        ),
        (1, "bert/model.safetensors", "bert.embeddings.word_embeddings.weight", "qformer.weights: "),
        (2, "opt/model.safetensors", "model.decoder.layers.0.fc1.weight", "language.model: "),
        (2, "t5/model.safetensors", "shared.weight", "language.model: "),
    ],
)
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_frozen_model_that_is_not_finite_is_refused(
    tmp_path: Path, stage: int, file: str, tensor: str, named: str, value: float
) -> None:
    family = "t5" if file.startswith("t5") else "opt"
    run = trained_config(tmp_path, stage, eva=file.startswith("eva"), family=family)
    spoil(tmp_path / file, tensor, value)
    with pytest.raises(CapfiltError) as refused:
        begun_stage(run)
    line = str(refused.value)
    assert line.startswith(named) and "not finite (NaN or infinite)" in line
    assert tensor.removeprefix("visual.").removeprefix("trunk.") in line


def test_a_block_that_is_left_off_may_be_anything(tmp_path: Path) -> None:
    run = trained_config(tmp_path)
    spoil(tmp_path / "clip" / "open_clip_model.safetensors", "visual.transformer.resblocks.1.ln_1.weight")
    assert run.vision.drop_blocks == 1
    begun_stage(run)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("kind", ["own", "huggingface", "lavis"])
def test_weights_of_others_that_are_not_finite_are_refused(folder: Path, tmp_path: Path, kind: str) -> None:
    stage = trained_stage(folder, eva=kind == "huggingface")
    path = tmp_path / "exported"
    if kind == "lavis":
        path = tmp_path / "blip2.pth"
        torch.save(
            {"model": stage.trainable_state() | {"query_tokens": torch.full((1, 4, 32), math.inf)}}, path
        )
    else:
        export_model(stage, path)
        spoil(path / "model.safetensors", "query_tokens")
    with pytest.raises(CapfiltError, match=r"1 of \d+ tensors hold .*query_tokens first") as refused:
        load_trained(str(path), stage.config)
    assert str(path) in str(refused.value)


def test_an_image_encoder_of_the_file_that_is_not_finite_is_refused(folder: Path, tmp_path: Path) -> None:
    stage = trained_stage(folder, eva=True)
    export_model(stage, tmp_path / "exported")
    spoil(tmp_path / "exported" / "model.safetensors", "vision_model.encoder.layers.0.mlp.fc1.weight")
    with pytest.raises(CapfiltError, match=r"exported: its image encoder: 1 of "):
        load_trained(str(tmp_path / "exported"))


@pytest.mark.parametrize("part", ["model.query_tokens", "optimizer.query_tokens.exp_avg"])
def test_a_checkpoint_that_is_not_finite_is_neither_resumed_nor_begun_from_nor_evaluated(
    tmp_path: Path, part: str
) -> None:
    make_corpus(str(tmp_path / "corpus"), ("cc",), shards=1)
    run = trained_config(tmp_path, optim={"steps": 2}, checkpoint={"every_steps": 2})
    summary = pretrain(run)
    where = f"{summary.folder}/{summary.checkpoint}"
    spoil_checkpoint(Path(where), part)
    with pytest.raises(CapfiltError, match=r"hold values that are not finite") as refused:
        pretrain(run)
    assert str(refused.value).startswith(where)
    if part.startswith("model"):
        with pytest.raises(CapfiltError, match="not finite"):
            load_trained(summary.folder)
        other = trained_config(tmp_path, run={"name": "other", "init_from": summary.folder})
        with pytest.raises(CapfiltError, match=r"^run\.init_from = .*not finite"):
            pretrain(other)
        assert not (Path(summary.folder).parent / "other").exists()


def spoil_checkpoint(folder: Path, name: str) -> None:
    """Put NaN into a checkpoint and the file's digest into its record, as versions wrote it that did not look."""
    record_file = folder.with_name(f"{folder.name}.json")
    record = json.loads(record_file.read_text())
    for file in folder.glob("*.safetensors"):
        if name in load_file(file):
            spoil(file, name)
            record["sha256"][file.name] = sha256_file(file)
    record_file.write_text(json.dumps(record))


# -- computing ---------------------------------------------------------------------------------------------------


def broken(folder: Path, parameter: str, stage: int = 1, **options: Any) -> Any:
    """Return a model that computes NaN from a parameter on, as one whose numbers overflow there."""
    model = trained_stage(folder, stage, **options)
    with torch.no_grad():
        model.get_parameter(parameter).view(-1)[-1] = math.nan
    return model


@pytest.mark.parametrize(
    ("parameter", "what"),
    [
        ("vision_proj.weight", "embeddings of images"),
        ("text_proj.bias", "embeddings of texts"),
        ("itm_head.weight", "matching logits"),
        ("visual_encoder.tower.conv1.weight", "embeddings of images"),
    ],
)
def test_retrieval_and_probe_refuse_what_is_not_finite(folder: Path, parameter: str, what: str) -> None:
    stage = broken(folder, parameter)
    with pytest.raises(NotFiniteError, match=f"^the model's {what} are not finite"):
        retrieve(Stage1Matcher(stage), lambda: iter(pictures(7).split(3)), TEXTS, IMAGE_OF_TEXT, 4)
    with pytest.raises(NotFiniteError, match=what):
        validate(stage, held_out([[text] for text in TEXTS[:7]]), stage.config)


@pytest.mark.parametrize(
    "decoding", [GREEDY, Decoding(beams=3, min_tokens=2, max_tokens=5)], ids=["greedy", "beams"]
)
@pytest.mark.parametrize(
    ("parameter", "options"),
    [
        ("Qformer.cls.predictions.bias", {}),
        ("query_tokens", {}),
        ("opt_proj.weight", {"stage": 2, "family": "opt"}),
        ("t5_proj.bias", {"stage": 2, "family": "t5"}),
    ],
)
def test_captions_of_logits_that_are_not_finite_are_refused(
    folder: Path, parameter: str, options: dict, decoding: Decoding
) -> None:
    stage = broken(folder, parameter, **options)
    writer = Stage2Generator(stage) if options else Stage1Generator(stage)
    with pytest.raises(NotFiniteError, match="^the model's logits of words are not finite"):
        writer.caption(pictures(2), "a photo of", decoding)


# -- the loop ----------------------------------------------------------------------------------------------------


def test_a_first_step_that_is_not_finite_does_not_blame_the_learning_rate(tmp_path: Path) -> None:
    loop = make_loop(config(tmp_path), SmallStage(explode_at={1}))
    with pytest.raises(TrainingStopped, match=r"step 1: loss is nan.*, before any weight.*precision") as told:
        loop.run(batches())
    assert "peak_lr" not in str(told.value)


def test_a_last_update_that_overflows_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    loop = make_loop(config(tmp_path, optim={"steps": 6}), SmallStage())
    step = loop.optimizer.step

    def overflowing() -> None:
        step()
        if loop.step == 5:
            loop.stage.temp.data.fill_(math.inf)

    loop.optimizer.step = overflowing
    with pytest.raises(
        TrainingStopped, match=r"step 6: after it temp is nan or infinite, .*no checkpoint was written"
    ):
        loop.run(batches())
    assert [record.step for record in loop.checkpoints.committed()] == [5]
