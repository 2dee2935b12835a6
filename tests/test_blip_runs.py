"""BLIP through the command: MED, captioner and filter one after another, resume, and weights in everybody's format."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from trained import pictures
from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval

from jobs.cli.main import main
from jobs.pretrain import pretrain
from jobs.run_record import begin_run
from pipeline.models.blip.captioner import BlipCaptioner
from pipeline.models.blip.matcher import Matcher
from pipeline.models.weights import captioner_weights, filter_weights
from schemas.config import CaptionConfig, FilterConfig
from schemas.errors import CapfiltError
from schemas.pretrain import BlipKind, PretrainConfig
from tests.corpora import make_corpus
from tests.test_blip_model import normalised, spread_stage
from tests.tiny_training import tiny_blip_config
from training.blip.stage import BlipStage
from training.checkpoint import State, read_model
from training.convert.export import export_model
from training.convert.export_blip import blip_config
from training.convert.key_map import blip_from_hf
from training.convert.load import load_blip2, load_trained
from training.convert.read import read_external
from training.distributed import World
from training.trainer.run import pretrain as train_as_rank

pytestmark = pytest.mark.training


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blip-runs")
    make_corpus(str(folder / "corpus"), sources=("cc", "coco"), shards=1, images=24)
    return folder


def config_of(workspace: Path, stage: BlipKind, output: Path, **sections: dict) -> PretrainConfig:
    sections["run"] = {"output": str(output), "name": "tiny"} | sections.get("run", {})
    return tiny_blip_config(workspace, workspace / "corpus", stage, **sections)


@pytest.fixture(scope="module")
def med(workspace: Path) -> str:
    """Return the folder of a trained MED."""
    return pretrain(config_of(workspace, "blip-pretrain", workspace / "out")).folder


def tuned(workspace: Path, med: str, stage: BlipKind, **blip: object) -> PretrainConfig:
    return config_of(
        workspace,
        stage,
        workspace / "out",
        run={"init_from": med},
        data={"corpus": [{"path": str(workspace / "corpus"), "sources": ["coco"]}]},
        blip=blip,
        optim={"steps": 2},
    )


def assert_same(tensors: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)


def jpeg() -> bytes:
    data = io.BytesIO()
    Image.fromarray(pictures(1)[0].permute(1, 2, 0).numpy()).save(data, "JPEG")
    return data.getvalue()


# -- the chain -----------------------------------------------------------------------------------------------


def test_a_captioner_from_a_med_captions_a_corpus(
    workspace: Path,
    med: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def command(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["capfilt", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        return capsys.readouterr().out

    config = tuned(workspace, med, "blip-captioner", prompt="a picture of ")
    file = tmp_path / "captioner.json"
    file.write_text(json.dumps(config.model_dump(mode="json")))
    summary = json.loads(command("pretrain", "-c", str(file), "--json"))
    assert summary["folder"].endswith("/blip-captioner/tiny") and summary["step"] == 2
    assert {"lm", "loss"} <= summary["metrics"].keys() and "itc" not in summary["metrics"]
    folder = str(tmp_path / "exported")
    assert f"caption.model = {folder!r}" in command("export", summary["folder"], folder)
    BlipForConditionalGeneration.from_pretrained(folder)
    section = CaptionConfig(model=folder, prompt="a picture of ", num_captions=2, max_length=12)
    captions = BlipCaptioner(section, captioner_weights(section), 0)([jpeg()], ["00"])
    assert len(captions[0]) == 2
    record, _ = read_model(summary["folder"])
    assert record.stage == "blip-captioner"


def test_a_filter_from_a_med_filters_a_corpus(workspace: Path, med: str, tmp_path: Path) -> None:
    summary = pretrain(tuned(workspace, med, "blip-filter", negatives_of=0, alpha_epochs=1.0))
    assert {"itc", "itm", "itm_accuracy"} <= summary.metrics.keys() and "lm" not in summary.metrics
    stage = load_trained(summary.folder)
    folder = tmp_path / "exported"
    assert export_model(stage, folder) == "huggingface"
    reference = BlipForImageTextRetrieval.from_pretrained(folder).eval()
    section = FilterConfig(model=str(folder), max_tokens=12)
    matcher = Matcher(section, filter_weights(section))
    pixels_BCHW = matcher.prepare(jpeg())[None]
    (probabilities,) = matcher.match(pixels_BCHW, [["a red circle", "the dog"]])
    texts = stage.tokenize(["a red circle", "the dog"])
    logits_R2 = stage.match(stage.project(stage.visual_encoder(pixels_BCHW))[0], texts)
    assert probabilities == pytest.approx(logits_R2.softmax(1)[:, 1].tolist(), abs=1e-5)
    assert reference.config.text_config.bos_token_id == stage.begin_id
    with pytest.raises(CapfiltError, match="evaluate reads BLIP-2's"):
        load_blip2(summary.folder)


def test_the_manifest_has_what_a_captioner_began_from(workspace: Path, med: str) -> None:
    config = tuned(workspace, med, "blip-captioner", prompt="a picture of ")
    state = read_model(pretrain(config).folder)[1]
    kinds = {model.kind: model.name for model in state.progress.models}
    assert kinds.keys() == {"tokenizer", "blip"} and kinds["blip"] == med
    other = config.model_copy(update={"run": config.run.model_copy(update={"init_from": ""})})
    with pytest.raises(
        CapfiltError, match=r"began from .*, not from random weights; restore run\.init_from, blip"
    ):
        pretrain(other)


# -- resume --------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """A kill, as far as a training is concerned: nothing is written after it."""


@pytest.mark.slow
def test_a_killed_run_goes_on_with_queue_and_momentum_encoders(workspace: Path, tmp_path: Path) -> None:
    def config(name: str) -> PretrainConfig:
        vision = {"layers": 2, "width": 32, "heads": 4, "patch_px": 8, "drop_path": 0.2}
        return config_of(
            workspace,
            "blip-pretrain",
            tmp_path,
            run={"name": name},
            data={"rand_augment": True, "min_scale": 0.2},
            blip={"vision": vision},
            optim={"steps": 20, "schedule": "epochs", "epoch_steps": 6},
            checkpoint={"every_steps": 5},
        )

    def train(name: str, kill_at_check: int = 0) -> State:
        checks = 0

        def stop_asked() -> bool:
            nonlocal checks
            checks += 1
            if checks == kill_at_check:
                raise Killed
            return False

        run = begin_run("pretrain", config(name))
        summary = train_as_rank(config(name), World(), run, stop_asked=stop_asked, log=lambda text: None)
        return read_model(summary.folder)[1]

    whole = train("whole")
    with pytest.raises(Killed):
        train("killed", kill_at_check=13)
    resumed = train("killed")
    assert resumed.progress.samples == whole.progress.samples == 160
    for part in ("model", "optimizer", "auxiliary"):
        assert_same(getattr(resumed, part), getattr(whole, part))
    assert whole.auxiliary["queue.pointer"] == 160 % 24
    # The momentum encoders are not the encoders, and are drawn with dropout: a resume without them would differ.
    name = "visual_encoder.cls_token"
    assert not torch.equal(whole.auxiliary[f"momentum.{name}"], whole.model[name])


# -- weights of others ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["blip-pretrain", "blip-captioner", "blip-filter"])
def test_exports_come_back_bit_equal(workspace: Path, tmp_path: Path, stage: BlipKind) -> None:
    config = config_of(workspace, stage, tmp_path)
    model = spread_stage(config)
    assert export_model(model, tmp_path / "folder") == (
        "capfilt" if stage == "blip-pretrain" else "huggingface"
    )
    assert export_model(model, tmp_path / "model.pth") == "blip"
    for path, recipe in (("folder", None), ("model.pth", config)):
        assert_same(load_trained(str(tmp_path / path), recipe).trainable_state(), model.trainable_state())
    (tmp_path / "again").mkdir()
    again = load_trained(str(tmp_path / "model.pth"), config)
    assert export_model(again, tmp_path / "again.pth") == "blip"
    files = [torch.load(tmp_path / name)["model"] for name in ("model.pth", "again.pth")]
    assert_same(*files)
    with pytest.raises(CapfiltError, match="is there already"):
        export_model(model, tmp_path / "model.pth")


@pytest.mark.parametrize("stage", ["blip-captioner", "blip-filter"])
def test_a_file_has_what_blips_own_loaders_ask_for(workspace: Path, tmp_path: Path, stage: BlipKind) -> None:
    model = spread_stage(config_of(workspace, stage, tmp_path))
    export_model(model, tmp_path / "model.pth")
    tensors = torch.load(tmp_path / "model.pth")["model"]
    if stage == "blip-captioner":
        # blip_decoder asserts that no key is missing.
        wanted = set(blip_from_hf(BlipForConditionalGeneration(blip_config(model)).state_dict(), "there"))
        assert tensors.keys() == wanted | {"text_decoder.bert.embeddings.position_ids"}
        return
    # blip_retrieval begins with the file's momentum encoders, and resizes their position embeddings.
    wanted = set(blip_from_hf(BlipForImageTextRetrieval(blip_config(model)).state_dict(), "there"))
    encoders = (wanted | {"text_encoder.embeddings.position_ids"}) - {"itm_head.weight", "itm_head.bias"}
    momentum = {name: re.sub(r"^(\w+)\.", r"\1_m.", name) for name in encoders}
    assert tensors.keys() == wanted | {"temp"} | momentum.keys() | set(momentum.values())
    assert "visual_encoder_m.pos_embed" in momentum.values()
    assert all(torch.equal(tensors[name], tensors[second]) for name, second in momentum.items())
    trained = sum(tensor.nbytes for tensor in model.trainable_state().values())
    assert (tmp_path / "model.pth").stat().st_size < 1.3 * trained


def released(stage: BlipStage) -> dict[str, Tensor]:
    """Return a pretrained model as BLIP's repository releases it, with a head that is not the word embeddings."""
    tensors = {n: t for n, t in stage.state_dict().items() if not n.startswith(("momentum.", "queue."))}
    tensors |= {
        n.removeprefix("momentum.").replace("encoder.", "encoder_m.", 1): t
        for n, t in stage.state_dict().items()
        if n.startswith("momentum.")
    }
    torch.manual_seed(9)
    words = tensors["text_encoder.embeddings.word_embeddings.weight"]
    return tensors | {
        "image_queue": torch.randn(16, 24),
        "text_queue": torch.randn(16, 24),
        "queue_ptr": torch.zeros(1, dtype=torch.long),
        "text_encoder.embeddings.position_ids": torch.arange(48)[None],
        "text_decoder.bert.embeddings.position_ids": torch.arange(48)[None],
        "text_decoder.cls.predictions.decoder.weight": words + torch.randn_like(words),
        "text_decoder.cls.predictions.decoder.bias": tensors["text_decoder.cls.predictions.bias"],
    }


def test_a_released_pretraining_is_read(workspace: Path, tmp_path: Path) -> None:
    config = config_of(workspace, "blip-pretrain", tmp_path, blip={"tied_head": False})
    stage = spread_stage(config)
    tensors = released(stage)
    path = tmp_path / "model_base.pth"
    torch.save({"model": tensors}, path)
    read = load_trained(str(path), config).trainable_state()
    assert all(torch.equal(tensors[name], value) for name, value in read.items())
    assert len(read) == len(stage.trainable_state())
    # A model with one matrix would lose the head's; BLIP's captioner ends with it, and the filter does not have it.
    tied = config_of(workspace, "blip-pretrain", tmp_path)
    with pytest.raises(CapfiltError, match=r"set blip\.tied_head = false"):
        load_trained(str(path), tied)
    captioner = load_trained(str(path), config_of(workspace, "blip-captioner", tmp_path)).trainable_state()
    head = tensors["text_decoder.cls.predictions.decoder.weight"]
    assert torch.equal(captioner["text_decoder.bert.embeddings.word_embeddings.weight"], head)
    shared = "encoder.layer.1.output.dense.weight"
    assert torch.equal(captioner[f"text_decoder.bert.{shared}"], tensors[f"text_encoder.{shared}"])
    filter_state = load_trained(str(path), config_of(workspace, "blip-filter", tmp_path)).trainable_state()
    assert all(torch.equal(tensors[name], value) for name, value in filter_state.items())
    unshared = tensors | {"text_decoder.bert." + shared: tensors["text_encoder." + shared] + 1}
    torch.save({"model": unshared}, path)
    with pytest.raises(CapfiltError, match=r"set another blip\.share"):
        load_trained(str(path), config)


def test_weights_that_do_not_fit_are_named(workspace: Path, tmp_path: Path) -> None:
    captioner = config_of(workspace, "blip-captioner", tmp_path)
    export_model(spread_stage(captioner), tmp_path / "captioner.pth")
    with pytest.raises(CapfiltError, match=r"not a checkpoint of this blip-filter model: \d+ missing"):
        load_trained(str(tmp_path / "captioner.pth"), config_of(workspace, "blip-filter", tmp_path))
    tensors = torch.load(tmp_path / "captioner.pth")["model"]
    torch.save(
        {"model": tensors | {"text_encoder.embeddings.word_embeddings.weight": torch.zeros(2)}},
        tmp_path / "vqa.pth",
    )
    with pytest.raises(CapfiltError, match=r"answers questions \(VQA\)"):
        load_trained(str(tmp_path / "vqa.pth"), captioner)
    larger = config_of(workspace, "blip-captioner", tmp_path, data={"image_size_px": 48})
    resized = load_trained(str(tmp_path / "captioner.pth"), larger)
    assert resized.visual_encoder.pos_embed.shape[1] == 1 + (48 // 8) ** 2
    with pytest.raises(CapfiltError, match=r"there is no probe of BLIP's models"):
        pretrain(
            config_of(workspace, "blip-pretrain", tmp_path, probe={"every_steps": 4}, data={"held_out": 8})
        )


def test_an_own_export_of_a_med_holds_each_tensor_once(workspace: Path, tmp_path: Path) -> None:
    stage = spread_stage(config_of(workspace, "blip-pretrain", tmp_path))
    export_model(stage, tmp_path / "own")
    assert json.loads((tmp_path / "own" / "capfilt.json").read_text())["format"] == "capfilt-blip"
    assert load_file(tmp_path / "own" / "model.safetensors").keys() == stage.trainable_state().keys()
    external = read_external(str(tmp_path / "own"))
    assert external is not None and external.method == "blip"


DEMO_CAPTIONER = Path(__file__).parent.parent / "jobs" / "demo" / "weights" / "captioner"


@torch.no_grad()
def test_a_hugging_face_captioner_is_trained_on(workspace: Path, tmp_path: Path) -> None:
    shape = {
        "vision": {"layers": 4, "width": 128, "heads": 4, "patch_px": 8, "mlp_ratio": 3.0},
        "text": {
            "tokenizer": str(DEMO_CAPTIONER), "layers": 3, "width": 128, "heads": 4, "ffn_width": 384,
            "max_text_tokens": 14, "vocab_size": 86, "max_positions": 64, "dropout": 0.0,
        },
    }  # fmt: skip
    config = config_of(workspace, "blip-captioner", tmp_path, blip=shape, data={"image_size_px": 64})
    stage = load_trained(str(DEMO_CAPTIONER), config)
    reference = BlipForConditionalGeneration.from_pretrained(DEMO_CAPTIONER).eval()
    texts = stage.tokenize(["a large red circle on a blue background"]).beginning_with(stage.begin_id)
    assert stage.begin_id == reference.config.text_config.bos_token_id
    pixels_BCHW = pictures(1, 64)
    expected = reference(
        pixel_values=normalised(pixels_BCHW, stage),
        input_ids=texts.ids_BL,
        attention_mask=texts.mask_BL.long(),
    )
    image = stage.project(stage.visual_encoder(pixels_BCHW))[1]
    logits_BLV = stage.text_decoder.logits(stage.text_decoder(texts.ids_BL, image))
    # Hugging Face's image encoder has norms of epsilon 1e-5, BLIP's own of 1e-6.
    assert torch.allclose(logits_BLV[texts.mask_BL], expected.logits[texts.mask_BL], atol=2e-3)
