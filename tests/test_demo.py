"""``capfilt demo`` as a newcomer runs it, judged by the world's own truth; and all that README and docs print of it."""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import sys
import tarfile
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

from jobs.bench.fixtures.s3 import S3Server
from jobs.demo.run import demo_config
from jobs.docs import answers, ask
from pipeline.lineage.checkpoint_trace import trace_checkpoint
from pipeline.lineage.sample_trace import trace
from pipeline.manifest.manifest import Manifest
from pipeline.storage.storage import Storage
from tests.documented import PAGES, ROOT, agrees, answer_of, block_lines, run_line, shell
from tests.notebooks import assert_shown, outputs_of
from tests.processes import cli_here
from tests.runs import config_file
from training.blip2.stage1 import Stage1
from training.blip2.stage2 import Stage2
from training.convert.load import load_trained
from training.evaluate.generation import Decoding, Stage2Generator
from training.evaluate.images import BenchmarkImages
from training.evaluate.retrieval import Stage1Matcher

pytestmark = pytest.mark.ray
README = ROOT / "README.md"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """Return a folder with a whole ``demo-corpus`` in it, and the figures that making it printed."""
    folder = tmp_path_factory.mktemp("whole")
    done = shell("capfilt demo --json", folder, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert ":8421" in done.stderr, "identities depend on the demo's usual port, and something else has it"
    return folder, json.loads(done.stdout)


@pytest.fixture(scope="module")
def again(demo: tuple[Path, dict]) -> str:
    """Return what the demo prints over a corpus that is done."""
    with pytest.MonkeyPatch.context() as patch:
        # The program is called capfilt where it is on PATH.
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        done = run_line("capfilt demo", demo[0])
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.timeout(2000)
def test_demo_makes_captions_true_and_training_better(demo: tuple[Path, dict]) -> None:
    _, figures = demo
    assert figures["urls"] >= 2000
    assert figures["images"] + figures["failures"] == figures["urls"]
    assert 0.10 <= figures["failures"] / figures["urls"] <= 0.20
    assert sum(figures["failures_by_reason"].values()) == figures["failures"]
    assert figures["curated_images"] + figures["dropped"] == figures["images"]
    assert figures["web_true_share"] <= 0.60
    assert figures["curated_true_share"] >= 0.90
    captions = figures["captions"]
    assert list(captions) == ["web", "filtered", "captioned", "capfilt"]
    assert captions["web"]["texts"] == figures["images"] > captions["filtered"]["texts"]
    assert captions["captioned"]["texts"] == 10 * figures["images"]
    assert captions["filtered"]["true_share"] >= 0.90
    assert captions["capfilt"]["true_share"] >= captions["captioned"]["true_share"] + 0.05
    assert figures["seconds"] > 0
    assert figures["training_seconds"] > 0
    curated, web, chance = (figures["stage1"][name] for name in ("curated", "web", "chance"))
    for recall in ("text_r1", "image_r1"):
        assert curated[recall] >= 5 * chance
        assert curated[recall] >= web[recall] + 0.1
    assert curated["itm_accuracy"] > 0.80
    # Of the last step alone, which may have drawn none.
    assert 0 <= curated["false_negative_share"] < 1
    for corpus_figures in figures["stage2"].values():
        assert corpus_figures["caption_loss"] < corpus_figures["text_only_loss"]


def test_an_image_and_the_four_trainings_know_each_other(demo: tuple[Path, dict]) -> None:
    manifest = Manifest(Storage(str(demo[0] / "demo-corpus")))
    [(uid,)] = manifest.query("SELECT min(uid) FROM trained_on").rows
    in_sql = manifest.query(f"SELECT checkpoint FROM trained_on WHERE uid = '{uid}' ORDER BY checkpoint").rows
    runs = {checkpoint.split("/")[2] for (checkpoint,) in in_sql}
    assert runs == {"demo-stage1", "demo-stage1-web", "demo-stage2-opt", "demo-stage2-t5"}
    [traced] = trace(manifest, uid)
    used = sorted(row["path"] for row in traced["checkpoints"] if row["use"] == "trained on")
    assert used == [checkpoint for (checkpoint,) in in_sql]
    for path in used:
        shards = trace_checkpoint(f"{manifest.storage.root}/{path}")["shards"]
        assert (traced["source"], traced["shard"]) in {(shard["source"], shard["shard"]) for shard in shards}


def test_demo_runs_again_in_no_time(demo: tuple[Path, dict], again: str) -> None:
    folder, figures = demo
    assert "12 of 12 shards done" in again
    for share in (figures["curated_true_share"], figures["stage1"]["curated"]["text_r1"]):
        assert f"{share:.1%}" in again
    # The commands that it ends with do what they say.
    commands, lines = (
        [line.strip() for line in part.strip().splitlines()]
        for part in again.partition("try next:")[2].split(
            "and what was exported, in Python, without capfilt:"
        )
    )
    assert len(commands) >= 5 and len(lines) == 3
    printed = {}
    for line in commands:
        done = run_line(line, folder)
        assert done.returncode == 0 and done.stdout, (line, done.stderr)
        printed[line] = done.stdout
    # Evaluated by hand, the trained model has the figures of the demo's table.
    [table] = [output for line, output in printed.items() if "evaluate retrieval" in line]
    curated = figures["stage1"]["curated"]
    for row, kind in (("ITC", "_r1"), ("ITM over the first 10", "_r1_reranked")):
        shares = re.findall(r"[\d.]+%", re.search(rf"^{row}  .*$", table, re.MULTILINE)[0])
        assert (shares[0], shares[3]) == tuple(f"{curated[side + kind]:.1%}" for side in ("text", "image"))
    # So do its lines of Python.
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as python:
        exec("\n".join(lines), {})
    assert python.getvalue().startswith("a picture of a ")
    shutil.rmtree(folder / "demo-corpus-blip2")
    assert run_line("capfilt verify demo-corpus", folder).returncode == 0


def exported(folder: Path, stage: int, name: str) -> tuple[Stage1 | Stage2, Path]:
    """Return a model of the demo as capfilt loads it, and the folder that ``capfilt export`` made of it."""
    run, path = folder / f"demo-corpus/checkpoints/stage{stage}/{name}", folder / f"{name}-hf"
    done = cli_here("export", str(run), str(path))
    assert done.returncode == 0 and "written in the Hugging Face format" in done.stdout, done.stderr
    return load_trained(str(run)), path


def held_out_files(folder: Path, count: int) -> list[Path]:
    """Return image files that no training saw: PNGs of the model's size, and as many JPEGs that are resized."""
    pngs = sorted((folder / "demo-corpus" / "held-out").glob("*.png"))[:count]
    jpegs = folder / "jpegs"
    jpegs.mkdir(exist_ok=True)
    for png in pngs:
        Image.open(png).resize((128, 96), Image.Resampling.LANCZOS).save(jpegs / f"{png.stem}.jpg")
    return [*pngs, *sorted(jpegs.iterdir())]


def capfilts_pixels(files: list[Path]) -> Tensor:
    return torch.stack([BenchmarkImages(str(file.parent), 64).pixels(file.name) for file in files])


@torch.no_grad()
def test_the_exported_stage1_scores_as_here(demo: tuple[Path, dict]) -> None:
    folder, _ = demo
    stage, path = exported(folder, 1, "demo-stage1")
    files = held_out_files(folder, 12)
    rows = json.loads((folder / "demo-corpus" / "held-out" / "captions.json").read_text())
    captions = [row["caption"][0] for row in rows[:12]] * 2

    model = Blip2ForImageTextRetrieval.from_pretrained(path).eval()
    # transformers resizes with torchvision unless it is asked for Pillow: a level more or less in a few pixels.
    processor = AutoProcessor.from_pretrained(path, backend="pil")
    inputs = processor([Image.open(file) for file in files], captions, padding=True, return_tensors="pt")
    itc_NM = model(**inputs).logits_per_image
    itm_N2 = model(**inputs, use_image_text_matching_head=True).logits_per_image

    matcher, pixels_NCHW = Stage1Matcher(stage), capfilts_pixels(files)
    texts = matcher.tokenize(captions)
    similarity_NQM = torch.einsum(
        "nqc,mc->nqm", matcher.embed_images(pixels_NCHW), matcher.embed_texts(texts)
    )
    torch.testing.assert_close(itc_NM, similarity_NQM.amax(dim=1), atol=1e-5, rtol=0)
    expected_N2 = torch.cat(matcher.match(pixels_NCHW, texts, torch.arange(len(files))[:, None]))
    torch.testing.assert_close(itm_N2, expected_N2, atol=1e-5, rtol=0)
    # The scores say something: of most captions this image is the best one among the first twelve.
    assert (itc_NM[:12, :12].argmax(dim=0) == torch.arange(12)).float().mean() > 0.5


@torch.no_grad()
@pytest.mark.parametrize("family", ["opt", "t5"])
def test_the_exported_stage2_writes_the_captions_that_capfilt_writes(
    demo: tuple[Path, dict], family: str
) -> None:
    folder, _ = demo
    stage, path = exported(folder, 2, f"demo-stage2-{family}")
    files = held_out_files(folder, 12)
    model = Blip2ForConditionalGeneration.from_pretrained(path).eval()
    processor = AutoProcessor.from_pretrained(path, backend="pil")
    prompt = "a picture of"
    for beams in (1, 5):
        captions = []
        for file in files:
            inputs = processor(Image.open(file), prompt, return_tensors="pt")
            ids_BL = model.generate(**inputs, num_beams=beams, max_new_tokens=16)
            read = inputs.input_ids.shape[1] if family == "opt" else 0
            captions.append(processor.decode(ids_BL[0, read:], skip_special_tokens=True).strip())
        decoding = Decoding(beams=beams, min_tokens=0, max_tokens=16)
        assert Stage2Generator(stage).caption(capfilts_pixels(files), prompt, decoding) == captions
        assert len(set(captions)) > 6


def test_readme_shows_what_the_demo_prints(again: str) -> None:
    comes = again.splitlines()
    printed = [line for line in answer_of(README, "make demo") if not line.startswith("installing into")]
    assert len(printed) > 20
    assert [line for line in printed if not any(agrees(line, right, 0.05) for right in comes)] == []


# Columns of seconds and rates: another machine, another number.
_TIMED = {"seconds", "worker_seconds", "images_per_second"}


def test_docs_show_the_answers_that_come(demo: tuple[Path, dict]) -> None:
    folder, _ = demo
    comes, printed = ask(str(folder / "demo-corpus")), answers()
    assert comes.keys() == printed.keys()
    differing = {
        question: (printed[question], comes[question])
        for question in printed
        if not all(
            agrees(printed_line, right, 0.01)
            for printed_line, right in zip(
                _untimed(printed[question]), _untimed(comes[question]), strict=True
            )
        )
    }
    assert differing == {}, "python -m jobs.docs demo-corpus"


def _untimed(table: str) -> list[str]:
    """Return a printed table's lines without the columns that hold times."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]
    return [
        "  ".join(cell for name, cell in zip(rows[0], row, strict=True) if name not in _TIMED) for row in rows
    ]


# What cannot run as printed where there are no weights and no cluster: checked as far as it goes without.
_INSTEAD = {
    "capfilt look demo-corpus": "--html corpus.html",
    "capfilt run -c corpus.toml": "--dry-run",
    "capfilt pretrain -c jobs/recipes/blip2-stage": "--dry-run",
    "capfilt bootstrap -c jobs/recipes/blip-bootstrap.toml": "--dry-run",
    "capfilt experiment": "--help",
    "capfilt submit": None,
    "capfilt doctor -c corpus.toml": None,
    "capfilt evaluate retrieval blip2/checkpoints/stage1/blip2-stage1-vitg": None,
    "capfilt export blip2/checkpoints/stage1/blip2-stage1-vitg": None,
    "capfilt export blip/checkpoints": None,
    "capfilt evaluate retrieval blip2_pretrained.pth": None,
    "capfilt export blip2_pretrained.pth": None,
    "capfilt pretrain -c recipe.toml": None,
    "capfilt init downloads": "--demo-weights",
    "capfilt run -c mine.toml": "--local",
    "capfilt run -c own.toml": "--dry-run",
}


def _as_it_can_run(line: str) -> str | None:
    code = line.partition("  #")[0].rstrip()
    # A preview needs scores, which the README's corpus does not have here; and a mark changes what the demo would do.
    code = code.replace("-c corpus.toml --preview", "-c scored.json --preview")
    code = code.replace("capfilt mark demo-corpus", "capfilt mark marked-corpus")
    code = code.replace("capfilt sql CORPUS", "capfilt sql demo-corpus")
    # The pages copy a recipe to the current folder first.
    code = code.replace("pretrain -c blip2-stage", "pretrain -c jobs/recipes/blip2-stage")
    for start, instead in _INSTEAD.items():
        if code.startswith(start) and "--dry-run" not in code and "--html" not in code:
            return f"{code} {instead}" if instead else None
    return code


def _outcome(line: str, folder: Path) -> tuple[int, str]:
    """Return a line's exit code and what it prints: run by the shell if it has a redirection, else in this process."""
    if ">" in shlex.split(line, comments=True):
        done = shell(line, folder)
        return done.returncode, done.stdout + done.stderr or "into a file"
    done = run_line(line, folder)
    return done.returncode, done.stdout + done.stderr


def _write_others_shards(folder: Path) -> None:
    """Write ``downloads``, a folder as img2dataset leaves it, and ``shards``, a WebDataset, from images of the demo."""
    curated = folder / "demo-corpus" / "curated" / "world" / "00000.tar"
    (folder / "shards").mkdir()
    shutil.copy(curated, folder / "shards")
    (folder / "downloads").mkdir()
    with tarfile.open(curated) as tar, tarfile.open(folder / "downloads" / "00000.tar", "w") as copy:
        image = next(member for member in tar if member.name.endswith(".jpg"))
        data = tar.extractfile(image)
        image.name = "000000000.jpg"
        copy.addfile(image, data)
    rows = {
        "url": ["http://example.org/a.jpg", "http://example.org/b.jpg"],
        "caption": ["a", "b"],
        "key": ["000000000", "000000001"],
        "status": ["success", "failed_to_download"],
        "error_message": [None, "HTTP Error 404: Not Found"],
    }
    pq.write_table(pa.table(rows), folder / "downloads" / "00000.parquet")


def _write_for_curating(folder: Path) -> None:
    """Write what docs/curating.md takes: a copy of the corpus to mark, a list of uids, and the config of the scores."""
    corpus = folder / "demo-corpus"
    shutil.copytree(corpus, folder / "marked-corpus")
    uid = pq.read_table(next((corpus / "curated" / "world").glob("*.parquet")))["uid"][0].as_py()
    pq.write_table(pa.table({"uid": [uid]}), folder / "opt-outs.parquet")
    urls = corpus / "input" / "urls.parquet"
    first = urlsplit(pq.read_table(urls, columns=["url"])["url"][0].as_py())
    config_file(demo_config(corpus, urls, f"http://{first.netloc}"), folder / "scored.json")


def _upload(corpus: Path, folder: str) -> None:
    for file in filter(Path.is_file, (corpus / folder).rglob("*")):
        Storage("s3://bucket/corpus").put(file, str(file.relative_to(corpus)))


@pytest.mark.timeout(1800)
def test_every_printed_line_runs(demo: tuple[Path, dict], again: str, s3_server: S3Server) -> None:
    """Each ``capfilt`` line of README, docs and recipes, in their order, on what the demo left."""
    folder, _ = demo
    urlopen(Request(f"{s3_server.url}/bucket", method="PUT")).close()
    (folder / "lists").mkdir()
    pq.write_table(
        pa.table({"url": ["http://example.org/a.jpg"], "caption": ["a"]}), folder / "lists/cc3m-0.parquet"
    )
    _write_others_shards(folder)
    _write_for_curating(folder)
    (folder / "question.sql").write_text("SELECT count(*) AS images FROM curated")
    (config,) = re.findall(r"```toml\n(.*?)```", README.read_text(), flags=re.S)
    (folder / "corpus.toml").write_text(config)
    lines = dict.fromkeys(
        line
        for page in PAGES
        # tests/test_quickstart.py follows that page on pictures of its own
        if page.name != "quickstart.md"
        for line in block_lines(page)
        if not line.startswith("capfilt bench")
    )
    assert len(lines) > 12
    # Each once, whatever comment stands behind it on which page; test_demo_runs_again_in_no_time ran these.
    commands = dict.fromkeys(filter(None, map(_as_it_can_run, lines)))
    ran = {line.strip() for line in again.partition("try next:")[2].splitlines()}
    failed = {}
    for command in (command for command in commands if command not in ran):
        if "s3://bucket/corpus" in command and not Storage("s3://bucket/corpus").is_corpus():
            _upload(folder / "demo-corpus", "records")
            for stage in ("raw", "captions", "scores", "matches", "curated"):
                _upload(folder / "demo-corpus", stage)
        code, output = _outcome(command, folder)
        if code or not output:
            failed[command] = output[-500:]
    assert failed == {}


def test_the_python_page_shows_what_comes(demo: tuple[Path, dict]) -> None:
    page = ROOT / "docs" / "python.md"
    assert_shown(page, outputs_of(page, demo[0]))


def test_demo_without_training(demo: tuple[Path, dict]) -> None:
    folder, figures = demo
    corpus = run_line("capfilt demo --corpus-only --json", folder)
    assert corpus.returncode == 0, corpus.stderr
    expected = {
        name: figures[name] for name in figures.keys() - {"training_seconds", "stage1", "stage2", "seconds"}
    }
    corpus_figures = json.loads(corpus.stdout)
    assert corpus_figures.pop("seconds") > 0 and corpus_figures == expected


def test_demo_leaves_other_peoples_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    refused = run_line(f"capfilt demo --out {tmp_path}", tmp_path)
    assert refused.returncode == 2 and "something other than a demo corpus" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
