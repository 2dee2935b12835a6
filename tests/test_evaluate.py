"""Evaluation of real, tiny models: retrieval, captions, answers, the probe, and the commands."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from corpora import make_corpus
from PIL import Image
from torch import Tensor
from trained import pictures, trained_config, trained_stage
from typer.testing import CliRunner

from jobs.cli.commands.evaluate import evaluate
from jobs.pretrain import pretrain
from schemas.errors import CapfiltError
from training.blip2.stage1 import Stage1
from training.blip2.stage2 import Stage2
from training.checkpoint import Checkpoints, State, TrainingProgress
from training.convert.export import export_model
from training.convert.load import load_trained
from training.data.held_out import HeldOut
from training.data.transforms import blip_caption
from training.evaluate.captioning import caption_scores
from training.evaluate.generation import Decoding, Stage1Generator, Stage2Generator
from training.evaluate.images import BenchmarkImages
from training.evaluate.retrieval import Stage1Matcher, contrastive_lists, retrieve
from training.evaluate.validation import validate

pytestmark = pytest.mark.training

TEXTS = [
    "a red circle", "blue square on grass", "A dog, sitting!", "a cat under tree", "two car", "the green",
    "a large white triangle near the tree", "three dog running", "a photo of small car", "black circle in street",
    "white sky", "a picture of two cat", "red", "a tree",
]  # fmt: skip
IMAGES = 7
IMAGE_OF_TEXT = [index % IMAGES for index in range(len(TEXTS))]
GREEDY = Decoding(beams=1, min_tokens=0, max_tokens=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def stage1(folder: Path) -> Stage1:
    return trained_stage(folder)


@pytest.fixture(scope="module", params=["opt", "t5"])
def stage2(folder: Path, request: pytest.FixtureRequest) -> Stage2:
    return trained_stage(folder, 2, family=request.param)


def batches(size: int) -> Callable[[], Iterator[Tensor]]:
    return lambda: iter(pictures(IMAGES).split(size))


# -- retrieval -------------------------------------------------------------------------------------------------


@torch.no_grad()
def all_scores(stage: Stage1) -> tuple[Tensor, Tensor]:
    """Return similarities and matching logits of every pair, computed one by one, padded to the full length."""
    similarity_NM = torch.empty(IMAGES, len(TEXTS))
    logit_NM = torch.empty(IMAGES, len(TEXTS))
    for row, pixels_CHW in enumerate(pictures(IMAGES)):
        image = stage.encode_pixels(pixels_CHW[None])
        image_QC = stage.embed_images(image)[0][0]
        for column, text in enumerate(TEXTS):
            tokens = stage.tokenizer([blip_caption(text)], 35)
            similarity_NM[row, column] = max(image_QC @ stage.embed_texts(tokens)[0])
            logit_NM[row, column] = stage.match(image, tokens)[0, :, 1].mean()
    return similarity_NM, logit_NM


def recalls(score_NM: Tensor, owner: list[int], of: str) -> dict[str, float]:
    """Return recalls as LAVIS's report does: the best rank of a right one in the full matrix."""
    ranks = []
    for row, scores in enumerate(score_NM):
        order = scores.argsort(descending=True, stable=True).tolist()
        right = [c for c, image in enumerate(owner) if image == row] if of == "text" else [owner[row]]
        ranks.append(min(order.index(column) for column in right))
    return {f"{of}_r{at}": 100 * sum(rank < at for rank in ranks) / len(ranks) for at in (1, 5, 10)}


def with_rerank(similarity: Tensor, logit: Tensor, candidates: int) -> Tensor:
    score = torch.full_like(similarity, -100.0)
    top, columns = similarity.topk(min(candidates, similarity.shape[1]), dim=1)
    return score.scatter(1, columns, top + logit.gather(1, columns))


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("rerank", [0, 2, 5, 128])
def test_retrieval_is_the_published_one(stage1: Stage1, rerank: int, batch_size: int) -> None:
    similarity_NM, logit_NM = all_scores(stage1)
    if rerank:
        by_image = with_rerank(similarity_NM, logit_NM, rerank)
        by_text = with_rerank(similarity_NM.T, logit_NM.T, rerank)
    else:
        by_image, by_text = similarity_NM, similarity_NM.T
    metrics = retrieve(
        Stage1Matcher(stage1, texts_at_once=5), batches(batch_size), TEXTS, IMAGE_OF_TEXT, rerank
    )
    expected = recalls(by_image, IMAGE_OF_TEXT, "text") | recalls(by_text, IMAGE_OF_TEXT, "image")
    if 0 < rerank < 10:
        # Behind the candidates LAVIS's matrix holds ties at -100, whose order says nothing.
        expected = {name: value for name, value in expected.items() if int(name.rpartition("r")[2]) <= rerank}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-4)


def test_reranking_matters_here(stage1: Stage1) -> None:
    matcher = Stage1Matcher(stage1)
    by_itc = retrieve(matcher, batches(3), TEXTS, IMAGE_OF_TEXT, 0)
    assert by_itc != retrieve(matcher, batches(3), TEXTS, IMAGE_OF_TEXT, 128)


def test_lists_do_not_depend_on_the_blocks(stage1: Stage1) -> None:
    matcher = Stage1Matcher(stage1)
    whole = contrastive_lists(matcher, batches(IMAGES), matcher.tokenize(TEXTS), 4)
    small = Stage1Matcher(stage1, texts_at_once=3)
    parts = contrastive_lists(small, batches(3), small.tokenize(TEXTS), 4, block_elements=1)
    for ranking, other in zip(whole, parts, strict=True):
        assert torch.equal(ranking.positions, other.positions)
        assert torch.allclose(ranking.similarities, other.similarities, atol=1e-6)


# -- text ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def greedy_caption(stage: Stage1, pixels_CHW: Tensor, prompt: list[int], tokens: int) -> str:
    """Return the likeliest word after word, by ITG's own path."""
    _, queries = stage.embed_images(stage.encode_pixels(pixels_CHW[None]))
    ids = [stage.begin_id, *prompt]
    written: list[int] = []
    for _ in range(tokens):
        hidden_BLD = stage.Qformer.captions(torch.tensor([ids + written]), queries)
        written.append(int(stage.Qformer.logits(hidden_BLD[0, -1:]).argmax()))
        if written[-1] == stage.tokenizer.tokenizer.sep_token_id:
            break
    return stage.tokenizer.tokenizer.decode(written, skip_special_tokens=True).strip()


def test_stage1_captions_are_those_of_its_captioning_head(stage1: Stage1) -> None:
    captions = Stage1Generator(stage1).caption(pictures(4), "", GREEDY)
    assert captions == [greedy_caption(stage1, pixels_CHW, [], 6) for pixels_CHW in pictures(4)]
    assert len(set(captions)) > 1


def test_a_prompt_is_read_and_not_returned(stage1: Stage1) -> None:
    words = stage1.tokenizer.tokenizer("a photo of", add_special_tokens=False).input_ids
    captions = Stage1Generator(stage1).caption(pictures(3), "a photo of", GREEDY)
    assert captions == [greedy_caption(stage1, pixels_CHW, words, 6) for pixels_CHW in pictures(3)]


@pytest.mark.parametrize(
    "decoding", [GREEDY, Decoding(beams=3, min_tokens=2, max_tokens=7, length_penalty=-1.0)]
)
def test_captions_do_not_depend_on_the_batch(stage1: Stage1, decoding: Decoding) -> None:
    captioner = Stage1Generator(stage1)
    together = captioner.caption(pictures(5), "", decoding)
    assert together == [captioner.caption(pixels_CHW[None], "", decoding)[0] for pixels_CHW in pictures(5)]


def test_answers_do_not_depend_on_the_other_prompts(stage2: Stage2) -> None:
    prompts = ["question : a red dog ? answer :", "dog", "a large white cat in street", ""]
    writer = Stage2Generator(stage2)
    for decoding in (GREEDY, Decoding(beams=3, min_tokens=1, max_tokens=7, length_penalty=-1.0)):
        together = writer.answer(pictures(4), prompts, decoding)
        alone = [writer.answer(pictures(4)[n : n + 1], [prompts[n]], decoding)[0] for n in range(4)]
        assert together == alone
    assert len(set(together)) > 1


@torch.no_grad()
def test_stage2_writes_what_its_language_model_finds_likeliest(stage2: Stage2) -> None:
    language, prompt = stage2.language, "a red dog"
    read = language.tokenizer([prompt], return_tensors="pt").input_ids
    for pixels_CHW in pictures(3):
        read_BSW = torch.cat([stage2.soft_prompt(pixels_CHW[None]), language.embed(read)], dim=1)
        written: list[int] = []
        for _ in range(5):
            if language.name == "opt":
                so_far = language.embed(torch.tensor([written], dtype=torch.long))
                logits_BLV = language.model(inputs_embeds=torch.cat([read_BSW, so_far], dim=1)).logits
            else:
                begun = torch.tensor([[language.model.config.decoder_start_token_id, *written]])
                logits_BLV = language.model(inputs_embeds=read_BSW, decoder_input_ids=begun).logits
            written.append(int(logits_BLV[0, -1].argmax()))
            end = "\n" if language.name == "opt" else "</s>"
            if written[-1] == language.tokenizer.convert_tokens_to_ids(end):
                break
        expected = language.tokenizer.decode(written, skip_special_tokens=True).strip()
        decoding = Decoding(beams=1, min_tokens=0, max_tokens=5)
        assert Stage2Generator(stage2).caption(pixels_CHW[None], prompt, decoding) == [expected]


# -- probe -----------------------------------------------------------------------------------------------------


def held_out(captions: list[list[str]]) -> list[HeldOut]:
    return [
        HeldOut(pixels_CHW, texts, f"{n:032x}")
        for n, (pixels_CHW, texts) in enumerate(zip(pictures(len(captions)), captions, strict=True))
    ]


def test_probe_of_stage1(stage1: Stage1) -> None:
    captions = [[blip_caption(TEXTS[n]), blip_caption(TEXTS[n + IMAGES])] for n in range(IMAGES)]
    metrics = validate(stage1, held_out(captions), stage1.config)
    similarity_NM, _ = all_scores(stage1)
    by_image = [IMAGE_OF_TEXT[similarity_NM[n].argmax()] == n for n in range(IMAGES)]
    by_text = [int(similarity_NM[:, m].argmax()) == IMAGE_OF_TEXT[m] for m in range(len(TEXTS))]
    assert metrics["text_r1"] == pytest.approx(100 * sum(by_image) / IMAGES)
    assert metrics["image_r1"] == pytest.approx(100 * sum(by_text) / len(TEXTS))
    right = 0
    with torch.no_grad():
        for n, pixels_CHW in enumerate(pictures(IMAGES)):
            image = stage1.encode_pixels(pixels_CHW[None])
            for label, text in ((1, captions[n][0]), (0, captions[(n + 1) % IMAGES][0])):
                right += int(stage1.match(image, stage1.tokenizer([text]))[0].mean(0).argmax()) == label
    assert metrics["itm_accuracy"] == pytest.approx(right / (2 * IMAGES))
    written = Stage1Generator(stage1).caption(
        pictures(IMAGES), "", Decoding(beams=1, min_tokens=0, max_tokens=20)
    )
    assert metrics["cider"] == pytest.approx(caption_scores(written, captions)["cider"])


def test_a_caption_that_images_share_is_right_for_each(stage1: Stage1) -> None:
    metrics = validate(stage1, held_out([["a red dog"]] * 4), stage1.config)
    assert (metrics["text_r1"], metrics["image_r1"]) == (100.0, 100.0)


def test_probe_looks_at_no_more_images_than_it_is_told(stage1: Stage1) -> None:
    captions = [[blip_caption(text)] for text in TEXTS]
    few = stage1.config.model_copy(update={"probe": stage1.config.probe.model_copy(update={"images": 3})})
    assert validate(stage1, held_out(captions), few) == validate(stage1, held_out(captions)[:3], few)


def test_probe_compiles_nothing(folder: Path) -> None:
    compiled = []

    def count(graph: torch.fx.GraphModule, _: list) -> Callable:
        compiled.append(graph)
        return graph.forward

    stage = trained_stage(folder)
    for block in (*stage.visual_encoder.blocks, *stage.Qformer.bert.encoder.layer):
        block.compile(backend=count, dynamic=False)
    validate(stage, held_out([["a red dog"], ["two cat"]]), stage.config)
    assert not compiled


def test_probe_of_stage2(stage2: Stage2) -> None:
    metrics = validate(stage2, held_out([["a red dog"], ["two cat", "cat"]]), stage2.config)
    assert set(metrics) == {"cider"}


# -- pictures --------------------------------------------------------------------------------------------------


def test_pictures_are_squeezed_whole_by_pillow(tmp_path: Path) -> None:
    Image.fromarray(pictures(1, 64)[0].permute(1, 2, 0).numpy()).resize((90, 41)).save(tmp_path / "a.png")
    pixels_CHW = BenchmarkImages(str(tmp_path), 32).pixels("a.png")
    with Image.open(tmp_path / "a.png") as image:
        expected = image.convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
    assert pixels_CHW.permute(1, 2, 0).numpy().tobytes() == expected.tobytes()


def test_pictures_come_in_order_and_a_missing_one_is_told(tmp_path: Path) -> None:
    files = []
    for n, pixels_CHW in enumerate(pictures(5)):
        files.append(f"{n}.png")
        Image.fromarray(pixels_CHW.permute(1, 2, 0).numpy()).save(tmp_path / files[-1])
    pixels_BCHW = torch.cat(list(BenchmarkImages(str(tmp_path), 32).batches(files, 2)))
    assert torch.equal(pixels_BCHW, pictures(5))
    with pytest.raises(CapfiltError, match=r"absent.jpg: no such image; --images must be"):
        list(BenchmarkImages(str(tmp_path), 32).batches([*files, "absent.jpg"], 2))
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(CapfiltError, match=r"bad.jpg does not decode"):
        BenchmarkImages(str(tmp_path), 32).pixels("bad.jpg")


# -- models and commands -----------------------------------------------------------------------------------------


def save_checkpoint(stage1: Stage1, folder: Path, **vision: str) -> None:
    """Save what a run would have saved, with its image encoder elsewhere perhaps."""
    config = stage1.config.model_dump(mode="json")
    config["vision"] |= vision
    progress = TrainingProgress(step=2, samples=16, snapshot="f" * 64, config=config, world_size=1)
    state = State(progress=progress, model=stage1.trainable_state(), optimizer={})
    Checkpoints(str(folder)).save(
        state, run_id="r", metrics={}, asynchronous=False, keep_last=1, committed=lambda _: None
    )


def test_a_checkpoint_whose_models_moved_says_how_to_name_them(stage1: Stage1, tmp_path: Path) -> None:
    save_checkpoint(stage1, tmp_path / "run", model="local-dir:/moved/away", pretrained="")
    with pytest.raises(
        CapfiltError, match=r"vision\.model = .* no folder /moved/away \(from the config .* -c RECIPE"
    ):
        load_trained(str(tmp_path / "run"))
    assert load_trained(str(tmp_path / "run"), stage1.config)


def test_a_checkpoint_of_a_run_is_evaluated_as_it_was_trained(stage1: Stage1, tmp_path: Path) -> None:
    save_checkpoint(stage1, tmp_path / "run")
    loaded = load_trained(str(tmp_path / "run"))
    assert not loaded.training
    expected = stage1.trainable_state()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.trainable_state().items())


def test_the_probe_command_says_what_the_run_said(tmp_path: Path) -> None:
    make_corpus(str(tmp_path / "corpus"), ("cc",), shards=2)
    config = trained_config(tmp_path, data={"held_out": 5}, probe={"every_steps": 4, "images": 4})
    summary = pretrain(config)
    lines = map(json.loads, (Path(summary.folder) / "metrics.jsonl").read_text().splitlines())
    told = [line for line in lines if "probe_cider" in line][-1]
    # Shards that come later do not move what the run held out.
    make_corpus(str(tmp_path / "corpus"), ("sbu",), shards=2)
    metrics = invoke("probe", summary.folder)
    assert metrics["samples"] == 4
    assert {f"probe_{name}": value for name, value in metrics["metrics"].items()} == pytest.approx(
        {name: value for name, value in told.items() if name != "step"}, abs=1e-3
    )
    nothing = trained_config(tmp_path, run={"name": "all"}, optim={"steps": 1})
    with pytest.raises(CapfiltError, match=r"all held no images out \(data.held_out\)"):
        invoke("probe", pretrain(nothing).folder)


@pytest.fixture
def benchmark(tmp_path: Path) -> dict[str, str]:
    """Write a folder of images with captions in LAVIS's layout and questions in GQA's."""
    images = tmp_path / "images"
    images.mkdir()
    for n, pixels_CHW in enumerate(pictures(IMAGES)):
        Image.fromarray(pixels_CHW.permute(1, 2, 0).numpy()).save(images / f"{n}.png")
        Image.fromarray(pixels_CHW.permute(1, 2, 0).numpy()).save(images / f"n{n}.jpg")
    captions = [{"image": f"{n}.png", "caption": [TEXTS[n], TEXTS[n + IMAGES]]} for n in range(IMAGES)]
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    questions = {str(n): {"imageId": f"n{n}", "question": "A dog?", "answer": "red"} for n in range(IMAGES)}
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    return {
        "images": str(images),
        "annotations": str(tmp_path / "captions.json"),
        "questions": str(tmp_path / "questions.json"),
    }


def invoke(*arguments: str) -> dict:
    result = CliRunner().invoke(evaluate, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_evaluate_retrieval_and_caption(stage1: Stage1, benchmark: dict[str, str], tmp_path: Path) -> None:
    model = str(tmp_path / "exported")
    export_model(stage1, Path(model))
    where = ["--annotations", benchmark["annotations"], "--images", benchmark["images"]]
    metrics = invoke("retrieval", model, *where, "--dataset", "flickr30k", "--batch-size", "3")
    expected = retrieve(
        Stage1Matcher(stage1), batches(7), [t for n in range(IMAGES) for t in (TEXTS[n], TEXTS[n + IMAGES])],
        [n for n in range(IMAGES) for _ in range(2)],
    )  # fmt: skip
    assert metrics["metrics"] == pytest.approx(expected, abs=1e-3)
    assert (metrics["samples"], metrics["checkpoint"], metrics["protocol"]["rerank"]) == (IMAGES, model, 128)
    assert metrics["published"]["ViT-g"]["text_r1"] == 97.6

    answers_path = tmp_path / "said" / "captions.json"
    beams = ["--beams", "2", "--min-tokens", "1"]
    metrics = invoke("caption", model, *where, *beams, "--predictions", str(answers_path))
    rows = json.loads(answers_path.read_text())
    references = [[TEXTS[n], TEXTS[n + IMAGES]] for n in range(IMAGES)]
    assert metrics["metrics"] == pytest.approx(
        caption_scores([row["caption"] for row in rows], references), abs=1e-3
    )
    assert [row["image_id"] for row in rows] == list(range(IMAGES))

    assert metrics["protocol"]["not_computed"] == "SPICE"
    penalised = invoke(
        "caption", model, *where, *beams, "--repetition-penalty", "5", "--predictions", str(answers_path)
    )
    assert penalised["protocol"]["repetition_penalty"] == 5.0
    assert json.loads(answers_path.read_text()) != rows
    wrong = CliRunner().invoke(evaluate, ["caption", model, *where, "--repetition-penalty", "0"])
    assert wrong.exit_code == 2 and "0 is not a number over 0" in wrong.output

    text = CliRunner().invoke(evaluate, ["retrieval", model, *where, "--dataset", "coco"]).stdout
    assert "published: ViT-g, fine-tuned" in text
    assert "rerank" in text


def test_evaluate_vqa(stage2: Stage2, benchmark: dict[str, str], tmp_path: Path) -> None:
    model = str(tmp_path / "exported")
    export_model(stage2, Path(model))
    answers_path = tmp_path / "answers.json"
    metrics = invoke(
        "vqa", model, "--questions", benchmark["questions"], "--images", benchmark["images"],
        "--predictions", str(answers_path), "--prompt", "question : {} answer :",
    )  # fmt: skip
    rows = json.loads(answers_path.read_text())
    assert [row["question_id"] for row in rows] == [str(n) for n in range(IMAGES)]
    right = sum(row["answer"].split() == ["red"] for row in rows)
    assert metrics["metrics"]["accuracy"] == pytest.approx(100 * right / IMAGES, abs=1e-3)
    assert metrics["protocol"]["length_penalty"] == -1.0


def test_a_model_of_the_other_stage_is_refused(
    stage1: Stage1, benchmark: dict[str, str], tmp_path: Path
) -> None:
    model = str(tmp_path / "exported")
    export_model(stage1, Path(model))
    with pytest.raises(CapfiltError, match="name a checkpoint of stage 2"):
        invoke("vqa", model, "--questions", benchmark["questions"], "--images", benchmark["images"])
    with pytest.raises(CapfiltError, match="no such image"):
        invoke("retrieval", model, "--annotations", benchmark["annotations"], "--images", str(tmp_path))
