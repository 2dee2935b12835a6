"""The demo's training: held-out scenes, language models that read text alone, and both sides of the comparison."""

import itertools
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.models.eva import Eva
from transformers import AutoTokenizer

from jobs.demo.held_out import ANNOTATIONS, MOST_SCENES, held_out_scenes, write_benchmark
from jobs.demo.train import write_web_captions
from jobs.demo.training_configs import CAPTIONS, reads_eva, stage1_config, stage2_config
from jobs.demo.weights_training.make_weights import Extent, make_weights
from jobs.demo.weights_training.models import OPT_DIR, RANKER_DIR, T5_DIR, TOWER_DIR
from jobs.demo.weights_training.shards import write_clean_shards, write_web_shards
from jobs.demo.weights_training.train_language import documents, opt_loss, t5_loss
from jobs.demo.weights_training.train_tower import distillation_losses
from jobs.demo.weights_training.train_vit import LabelledPictures, shifted
from jobs.demo.weights_training.train_weights import to_input, tokenize
from jobs.demo.world.alt_texts import alt_text
from jobs.demo.world.drawing import RGB_BY_COLOUR
from jobs.demo.world.pictures import Encoding, demo_images, published
from jobs.demo.world.responses import ALT_KINDS
from jobs.demo.world.scenes import COLOUR_WORDS, SHAPE_WORDS, Scene, is_true, parse, write_caption
from pipeline.corpus.commit import ShardCommit
from pipeline.corpus.records import Records
from pipeline.models.blip.matcher import Matcher
from pipeline.models.clip.loader import load_clip
from pipeline.models.weights import filter_weights, ranker_weights
from pipeline.shards.shard_files import read_tar, write_parquet, write_tar
from pipeline.shards.uids import sample_uid
from pipeline.storage.storage import Storage
from schemas.config import FilterConfig
from schemas.records import ShardTask
from schemas.stages import Stage
from schemas.tables import CURATED, SAMPLES
from training.data.loader import TrainingData
from training.data.snapshot import take_snapshot
from training.evaluate.annotations import read_captioned_images
from training.evaluate.images import BenchmarkImages
from training.models.language import load_language
from training.models.tokenizer import CaptionTokenizer

pytestmark = pytest.mark.training

SHARDS, IMAGES = 2, 150


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a corpus of the demo world as a run would leave it: half of the web's captions true, all curated ones."""
    folder = tmp_path_factory.mktemp("demo") / "corpus"
    rng = random.Random(5)
    for shard in range(SHARDS):
        rows, pictures = [], []
        for index in range(IMAGES):
            scene, key = Scene.random(rng), f"{shard:05}{index:05}"
            encoding = Encoding(size_px=(96, 96), format="jpg", quality=90)
            pictures.append((key, published(scene, encoding, rng.getrandbits(32))))
            web = alt_text(scene, rng.choices(tuple(ALT_KINDS), tuple(ALT_KINDS.values()))[0], rng)
            rows.append({"key": key, "web": web, "curated": [write_caption(scene, rng) for _ in range(2)]})
        commit(folder, "crawl", shard, rows, pictures)
        commit(folder, "select", shard, rows, pictures)
    return folder


def commit(
    folder: Path, stage: Stage, number: int, rows: list[dict], pictures: list[tuple[str, bytes]]
) -> None:
    records, shard = Records(Storage(str(folder))), f"{number:05}"
    task = ShardTask(
        corpus=str(folder),
        stage=stage,
        source="world",
        kind="web",
        shard=shard,
        run_id="r",
        fingerprint="f",
        inputs={},
    )
    texts = {
        row["key"]: {"txt": row["web"].encode()}
        if stage == "crawl"
        else {"json": json.dumps(row["curated"]).encode()}
        for row in rows
    }
    schema = SAMPLES if stage == "crawl" else CURATED
    digests = [
        {
            "uid": sample_uid("world", row["key"]),
            "source": "world",
            "shard": shard,
            "key": row["key"],
            "url": row["key"],
            "status": "ok" if stage == "crawl" else "kept",
        }
        for row in rows
    ]
    with ShardCommit(records, task) as commit:
        tar, parquet = commit.folder / "x.tar", commit.folder / "x.parquet"
        stored = len(write_tar(tar, ((key, {"jpg": image} | texts[key]) for key, image in pictures)))
        written = write_parquet(parquet, digests, schema)
        commit.stats.rows_in = commit.stats.rows_out = stored
        commit.publish({"tar": (tar, stored), "parquet": (parquet, written)})


# -- held-out scenes -----------------------------------------------------------------------------------------


def test_each_held_out_caption_fits_one_scene_only() -> None:
    held_out = held_out_scenes(60)
    assert len(set(held_out.scenes)) == 60
    for sample, scene in zip(held_out.samples, held_out.scenes, strict=True):
        (caption,) = sample.captions
        assert is_true(caption, scene) and len(parse(caption)) == 4
        assert sum(is_true(caption, other) for other in held_out.scenes) == 1


def test_as_many_different_scenes_are_drawn_as_an_experiment_asks_for() -> None:
    def draw(index: int, seed: int) -> tuple[Scene, np.ndarray]:
        return Scene.random(random.Random(f"{seed}/{index}")), np.zeros((1, 1, 3), np.uint8)

    many = held_out_scenes(MOST_SCENES, draw=draw)
    assert len(set(many.scenes)) == MOST_SCENES
    fewer = held_out_scenes(60, draw=draw)
    assert [sample.captions for sample in fewer.samples] == [sample.captions for sample in many.samples[:60]]


def test_held_out_scenes_are_a_benchmark_that_evaluate_reads(tmp_path: Path) -> None:
    held_out = held_out_scenes(12)
    write_benchmark(held_out, tmp_path)
    images = read_captioned_images(str(tmp_path / ANNOTATIONS))
    assert [image.captions for image in images] == [tuple(sample.captions) for sample in held_out.samples]
    pictures = BenchmarkImages(str(tmp_path), 64)
    for image, sample in zip(images, held_out.samples, strict=True):
        assert torch.equal(pictures.pixels(image.file), sample.pixels_CHW)


# -- the image encoder ---------------------------------------------------------------------------------------


def test_the_image_encoder_is_an_eva_that_sees_what_the_ranker_sees() -> None:
    tower, ranker = (
        load_clip(ranker_weights(f"local-dir:{folder}", ""), "vision.model").eval()
        for folder in (TOWER_DIR, RANKER_DIR)
    )
    assert isinstance(tower.visual.trunk, Eva)
    pictures = demo_images(32, seed=12)
    texts = [write_caption(scene, random.Random(1)) for scene in pictures.scenes]
    ids_BL = tokenize(AutoTokenizer.from_pretrained(TOWER_DIR), texts)
    losses = distillation_losses(tower, ranker, to_input(pictures.pixels_NHWC), ids_BL)
    assert losses["features"] < 0.03 and losses["image"] < 0.01 and losses["text"] < 0.1


def test_the_tokenizer_has_as_many_words_as_the_recipe_says() -> None:
    shape = stage1_config(Path("/nowhere"), "curated").qformer
    tokenizer = CaptionTokenizer(Path(shape.tokenizer), shape)
    assert len(tokenizer.tokenizer) == shape.vocab_size > tokenizer.begin_id + 1


# -- the language models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_language_model_knows_the_grammar_and_takes_up_what_it_read(family: str) -> None:
    config = stage2_config(Path("/nowhere"), family).language
    assert Path(config.model) == (OPT_DIR if family == "opt" else T5_DIR)
    language = load_language(config)
    loss_of = opt_loss if family == "opt" else t5_loss
    texts = [document for document in documents(600, random.Random(9)) if len(document) == 3]
    alone = [[document[-1]] for document in texts]
    others = [[*texts[row - 1][:-1], document[-1]] for row, document in enumerate(texts)]
    with torch.no_grad():
        in_place, by_itself, out_of_place = (
            loss_of(language.model, language.tokenizer, kind, random.Random(2)).item()
            for kind in (texts, alone, others)
        )
    # A word of 80 is 4.4 for one who knows nothing.
    assert by_itself < 2.0
    assert in_place < by_itself < out_of_place


# -- training ------------------------------------------------------------------------------------------------


def test_both_sides_see_the_same_images_in_the_same_order(corpus: Path) -> None:
    write_web_captions(corpus)
    held_out = take_snapshot(stage1_config(corpus, "curated").data).num_held_out
    assert held_out == 100, "for the probe"
    streams, seen = [], set()
    for captions in ("curated", "web"):
        # Whole pictures: the crops are each side's own.
        config = stage1_config(corpus, captions, ["data.min_scale=1.0", "data.flip=false"])
        streams.append(iter(TrainingData(config, take_snapshot(config.data))))
    for _ in range(12):
        curated, web = (next(stream) for stream in streams)
        assert curated.captions != web.captions
        assert torch.equal(curated.pixels_BCHW, web.pixels_BCHW)
        seen |= set(web.uids)
    assert len(seen) == SHARDS * IMAGES - held_out


def test_a_demo_of_an_earlier_version_goes_on_as_it_began(corpus: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(corpus, tmp_path / "old"))
    run = old / "checkpoints" / "stage1" / "demo-stage1"
    run.mkdir(parents=True)
    begun = {
        "data": {"held_out": 0},
        "vision": {"model": "local-dir:/moved/jobs/demo/weights/ranker"},
        "optim": {"steps": 320},
    }
    (run / "config.json").write_text(json.dumps(begun))
    kept = old / "web-captions" / "world" / "00000.tar"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_bytes(b"as it was linked then")
    write_web_captions(old)
    assert kept.read_bytes() == b"as it was linked then"
    assert stage1_config(old, "curated").data.held_out == stage2_config(old, "t5").data.held_out == 0
    # Of the run itself: those that had not begun take today's steps.
    assert stage1_config(old, "curated").optim.steps == 320
    assert stage1_config(old, "web").optim.steps == stage1_config(corpus, "web").optim.steps != 320
    for folder, encoder in ((old, RANKER_DIR), (corpus, TOWER_DIR)):
        configs = (*(stage1_config(folder, captions) for captions in CAPTIONS), stage2_config(folder, "t5"))
        assert {config.vision.model for config in configs} == {f"local-dir:{encoder}"}
        assert reads_eva(folder) is (encoder == TOWER_DIR)


def test_the_shards_of_a_filter_hold_near_misses_and_true_captions(tmp_path: Path) -> None:
    write_clean_shards(tmp_path, 1)
    [shard] = tmp_path.iterdir()
    with shard.open("rb") as file:
        samples = [json.loads(members["json"]) for _, members in read_tar(file)]
    claims = [[parse(caption) for caption in captions] for captions in samples]
    assert {len(captions) for captions in samples} == {5}
    assert None not in itertools.chain.from_iterable(claims)
    # Each scene once: what is true of one is true of no other, if it names the size.
    scenes = [dict(itertools.chain.from_iterable(claim.items() for claim in of)) for of in claims]
    full = [tuple(sorted(scene.items())) for scene in scenes if len(scene) == 4]
    assert len(full) > 100 and len(set(full)) == len(full)
    assert {scene["shape"] for scene in scenes} == set(SHAPE_WORDS)
    assert len({scene["colour"] for scene in scenes}) == 5


def test_the_shards_of_a_med_hold_what_the_web_says(tmp_path: Path) -> None:
    write_web_shards(tmp_path, 1)
    with (tmp_path / "00000.tar").open("rb") as file:
        texts = [json.loads(members["json"]) for _, members in read_tar(file)]
    assert {len(of) for of in texts} == {1}
    assert len(texts) / 4 < sum(parse(text) is not None for [text] in texts) < len(texts)


def test_the_weights_are_made_by_one_command(tmp_path: Path) -> None:
    short = Extent(vit_steps=1, num_labelled=32, num_shards=2, med_steps=1, filter_steps=1, batch_size=8)
    make_weights(tmp_path / "training", tmp_path / "weights", short)
    config = FilterConfig(model=str(tmp_path / "weights" / "filter"), max_tokens=16)
    matcher = Matcher(config, filter_weights(config))
    pixels_NCHW = torch.from_numpy(demo_images(2, 7).pixels_NHWC).permute(0, 3, 1, 2)
    texts = [["a red circle", "a red square"], ["a blue box on sand"]]
    assert [len(of_image) for of_image in matcher.match(pixels_NCHW, texts)] == [2, 1]
    # The ViT is what the filter's image encoder began as.
    shipped = load_file(tmp_path / "weights" / "vit" / "model.safetensors")
    assert {tensor.dtype for tensor in shipped.values()} == {torch.float16}
    encoder = load_file(tmp_path / "weights" / "filter" / "model.safetensors")
    now = encoder["vision_model.embeddings.class_embedding"].flatten()
    assert torch.allclose(now, shipped["cls_token"].flatten(), atol=0.02)


def test_a_step_of_labels_shifts_pictures_and_masks_alike() -> None:
    pictures = LabelledPictures.draw(3, seed=5)
    images_N4HW = pictures.pixels_and_mask_N4HW.clone()
    # Its own mask as its first colour: they stay equal wherever both go.
    images_N4HW[:, 0] = images_N4HW[:, 3]
    moved_N4HW = shifted(images_N4HW)
    assert torch.equal(moved_N4HW[:, 0], moved_N4HW[:, 3]) and not torch.equal(moved_N4HW, images_N4HW)
    # A mask is where the object is: the mean colour there is nearer to the scene's than that outside.
    for index, sample_4HW in enumerate(pictures.pixels_and_mask_N4HW.float()):
        colour = list(COLOUR_WORDS)[int(pictures.labels_NA[index, 0])]
        inside_HW = sample_4HW[3] > 128
        away = [
            (sample_4HW[:3, where_HW].mean(1) - torch.tensor(RGB_BY_COLOUR[colour])).abs().sum()
            for where_HW in (inside_HW, ~inside_HW)
        ]
        assert away[0] < away[1], colour
