"""``capfilt init``: what is found becomes a config that ``capfilt plan`` accepts as it is; errors are one line."""

import gzip
import json
import os
import random
import re
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from jobs.bench.fixtures.s3 import S3Server
from jobs.cli.main import app
from jobs.demo.world.pictures import Encoding, published
from jobs.demo.world.scenes import write_caption
from jobs.demo.world.site import pages
from jobs.init.config_text import RECIPES, recipe_names, samples_per_shard
from jobs.init.machine import Machine, stage_resources, this_machine
from pipeline.config import load_config
from pipeline.models.weights import DEFAULT_RANKER, DEFAULT_RANKER_REPOSITORY
from pipeline.storage.storage import Storage
from schemas.config import CapfiltConfig, ClusterConfig, RankConfig
from schemas.errors import CapfiltError
from tests.corpora import UNFILTERED
from tests.processes import ROOT, cli

URLS = ["http://example.org/a.jpg", "https://example.org/b.png"]
CAPTIONS = ["a cat on a mat", "two dogs in a park"]


def capfilt(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def init(folder: Path, *arguments: object) -> CapfiltConfig:
    """Run init, see that plan accepts what it wrote, and return that."""
    result = capfilt("init", *arguments, "--out", folder / "corpus.toml")
    assert result.exit_code == 0, result.exception
    planned = capfilt("plan", "-c", folder / "corpus.toml", "--json")
    assert planned.exit_code == 0, planned.exception
    return load_config(folder / "corpus.toml")


def _csv(path: Path) -> None:
    path.write_text(
        "".join(f"{url},{text}\n" for url, text in [("URL", "TEXT"), *zip(URLS, CAPTIONS, strict=True)])
    )


def _packed(path: Path) -> None:
    path.write_bytes(
        gzip.compress(b"image_url\talt_text\twidth\n" + f"{URLS[0]}\t{CAPTIONS[0]}\t3\n".encode())
    )


def _quoted(path: Path) -> None:
    path.write_text(f'"caption"\t"url"\n"{CAPTIONS[0]}"\t"{URLS[0]}"\n')


def _lines(path: Path) -> None:
    path.write_text(
        "\n".join(
            json.dumps({"id": 1, "image": url, "sentences": [text]})
            for url, text in zip(URLS, CAPTIONS, strict=True)
        )
    )


def _array(path: Path) -> None:
    path.write_text(
        json.dumps([{"what": text, "where": url} for url, text in zip(URLS, CAPTIONS, strict=True)])
    )


def _parquet(path: Path) -> None:
    # Captions as bytes, and a column of URLs of pages before that of the images.
    pq.write_table(
        pa.table({"page_url": URLS, "caption": [text.encode() for text in CAPTIONS], "url": URLS}), path
    )


def _plain(path: Path) -> None:
    path.write_text("\n".join(URLS))
    path.with_name("sbu_captions.txt").write_text("\n".join(CAPTIONS))


@pytest.mark.parametrize(
    ("name", "write", "columns", "expected_text"),
    [
        ("cats.csv", _csv, ("URL", "TEXT"), "cats.csv: CSV; columns URL, TEXT; 2 rows"),
        ("cats.TSV.gz", _packed, ("image_url", "alt_text"), "TSV, gzip; columns image_url, alt_text, width"),
        ("cats.tsv", _quoted, ("url", "caption"), "quoted TSV"),
        ("cats.jsonl", _lines, ("image", "sentences"), "JSON; columns id, image, sentences; 2 rows"),
        ("cats.json", _array, ("where", "what"), "what has the captions, such as a cat on a mat"),
        ("cats.parquet", _parquet, ("url", "caption"), "Parquet; columns page_url, caption, url; 2 rows"),
        ("sbu_urls.txt", _plain, ("url", "caption"), "plain list; columns url, caption; 2 rows"),
    ],
)  # fmt: skip
def test_a_list_becomes_a_source(
    name: str, write: Callable[[Path], None], columns: tuple[str, str], expected_text: str, tmp_path: Path
) -> None:
    write(tmp_path / name)
    config = init(tmp_path, tmp_path / name)
    [source] = config.source
    assert (source.url_column, source.caption_column) == columns
    assert source.input == (str(tmp_path / name),) and config.corpus.path == str(tmp_path / "corpus")
    text = (tmp_path / "corpus.toml").read_text()
    assert f'input = ["{name}"]' in text and expected_text in " ".join(re.sub(r"\n# +", " ", text).split())
    assert all(len(line) <= 110 for line in text.splitlines()[1:])


def test_a_folder_of_lists_is_read_by_globs(tmp_path: Path) -> None:
    folder = tmp_path / 'lists "of" cats [1]'
    (folder / "deep").mkdir(parents=True)
    for name in ("a.csv", "deep/b.csv"):
        _csv(folder / name)
    (folder / "README.txt").write_text("Lists of cats.")
    [source] = init(tmp_path, tmp_path / "lists*" / "**" / "*.csv").source
    assert source.name == "mine"
    os.rename(folder, tmp_path / "lists")
    (tmp_path / "corpus.toml").unlink()
    [source] = init(tmp_path, tmp_path / "lists").source
    assert source.input == (f"{tmp_path}/lists/**/*.csv",) and source.name == "lists"


def test_no_captions_and_own_hosts_are_said(tmp_path: Path) -> None:
    (tmp_path / "u.txt").write_text(
        "http://127.0.0.1:8421/a.jpg\nhttp://[::1]/b.jpg\nhttps://example.org/c.jpg\n"
    )
    [source] = init(tmp_path, tmp_path / "u.txt").source
    assert source.caption_column == ""
    text = (tmp_path / "corpus.toml").read_text()
    assert '# allow_hosts = ["127.0.0.1:8421", "[::1]:80"]' in text
    # The line can be taken as it is.
    (tmp_path / "corpus.toml").write_text(text.replace("# allow_hosts", "allow_hosts"))
    assert load_config(tmp_path / "corpus.toml").crawl.allow_hosts == ("127.0.0.1:8421", "[::1]:80")


# -- pictures in files ----------------------------------------------------------------------------------------


def draw(folder: Path, count: int) -> list[bytes]:
    """Draw pictures of the demo's world into a folder, half of them with a text beside; return their bytes."""
    folder.mkdir()
    scenes = [page.scene for page in pages(count)]
    encoding = Encoding(size_px=(128, 112), format="jpg", quality=90)
    images = [published(scene, encoding, seed) for seed, scene in enumerate(scenes)]
    for number, (scene, data) in enumerate(zip(scenes, images, strict=True)):
        (folder / f"{number:03d}.JPG").write_bytes(data)
        if number % 2:
            (folder / f"{number:03d}.txt").write_text(write_caption(scene, random.Random(number)))
    return images


def _images(folder: Path, images: list[bytes]) -> str:
    (folder / "pets" / "broken.png").write_bytes(b"no image")
    return "pets"


def _described_images(folder: Path, images: list[bytes]) -> str:
    rows = [{"file_name": f"{number:03d}.JPG", "text": CAPTIONS[0]} for number in range(len(images))]
    (folder / "pets" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return "pets"


def _tars(folder: Path, images: list[bytes]) -> str:
    with tarfile.open(folder / "pets.tar", "w") as tar:
        for file in sorted((folder / "pets").iterdir()):
            tar.add(file, file.name)
    return "*.tar"


def _tables(folder: Path, images: list[bytes]) -> str:
    (folder / "hf").mkdir()
    cells = [{"bytes": data, "path": None} for data in images]
    table = pa.table({"picture": cells, "label": range(len(images)), "sentence": CAPTIONS[:1] * len(images)})
    pq.write_table(table, folder / "hf" / "train-00000-of-00001.parquet")
    return "hf"


def _arrow(folder: Path, images: list[bytes]) -> str:
    (folder / "saved").mkdir()
    table = pa.table(
        {"image": [{"bytes": data, "path": None} for data in images], "what": CAPTIONS[:1] * len(images)}
    )
    with pa.ipc.new_stream(str(folder / "saved" / "data-00000-of-00001.arrow"), table.schema) as stream:
        stream.write_table(table)
    (folder / "saved" / "dataset_info.json").write_text("{}")
    return "saved"


def _list_of_paths(folder: Path, images: list[bytes]) -> str:
    lines = [f"pets/{number:03d}.JPG\t{CAPTIONS[0]}\n" for number in range(len(images))]
    (folder / "list.tsv").write_text("".join(["path\twords\n", *lines]))
    return "list.tsv"


def _list_of_file_urls(folder: Path, images: list[bytes]) -> str:
    (folder / "list.txt").write_text(
        "\n".join(file.as_uri() for file in sorted((folder / "pets").glob("*.JPG")))
    )
    return "list.txt"


@pytest.mark.parametrize(
    ("make", "form", "expected_text"),
    [
        (_images, "imagefolder", "of 7 looked at, 1 will be dropped: 1 not_an_image Guessed NAME.txt"),
        (_images, "imagefolder", "pets: 7 images (.jpg 6, .png 1)"),
        (_described_images, "imagefolder", "text of metadata.jsonl has the captions"),
        (_tars, "webdataset", "the first 9 members of pets.tar: .jpg 6, .txt 3"),
        (_tables, "huggingface", "picture has the images sentence has the captions, such as a cat on a mat"),
        (_arrow, "huggingface", "what has the captions"),
        (_list_of_paths, "auto", "path has the paths of images in ., such as pets/000.JPG"),
        (_list_of_file_urls, "auto", "such as file:///"),
    ],
)  # fmt: skip
def test_pictures_in_files_become_a_source_that_a_crawl_reads(
    make: Callable[[Path, list[bytes]], str],
    form: str,
    expected_text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = draw(tmp_path / "pets", 6)
    monkeypatch.chdir(tmp_path)
    config = init(tmp_path, make(tmp_path, images), "--demo-weights")
    assert [source.format for source in config.source] == [form]
    text = (tmp_path / "corpus.toml").read_text()
    assert expected_text in " ".join(re.sub(r"\n# +", " ", text).split())
    result = capfilt("crawl", "-c", tmp_path / "corpus.toml", "--local", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["images"] == len(images)


def test_paths_that_lead_nowhere_are_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path\nphotos/1.jpg\n")
    error = str(capfilt("init", tmp_path / "list.csv", "--out", tmp_path / "c.toml").exception)
    assert "path has paths of images, such as photos/1.jpg, and none of them is there" in error


# -- what cannot be used -------------------------------------------------------------------------------------


def _make(folder: Path) -> None:
    """Lay out what newcomers may name."""
    for name in ("empty", "notes", "both", "tables", "made/records/crawl/s", "photos"):
        (folder / name).mkdir(parents=True)
    (folder / "notes/movie.mov").write_bytes(b"x")
    for name in ("both/a.jpg", "both/b.tar", "photos/a.jpg"):
        (folder / name).write_bytes(b"x")
    _csv(folder / "cats.csv")
    _csv(folder / "tables/a.csv")
    _parquet(folder / "tables/b.parquet")
    (folder / "made/records/crawl/s/00000.json").write_text("{}")
    (folder / "cc3m.tsv").write_text(f"{CAPTIONS[0]}\t{URLS[0]}\n")
    (folder / "numbers.csv").write_text("a,b\n1,2\n")
    (folder / "semicolons.csv").write_text(f"url;caption\n{URLS[0]};{CAPTIONS[0]}\n")
    (folder / "zip.csv").write_bytes(b"PK\x03\x04")
    (folder / "blank.csv").write_text("")
    (folder / "names").write_text("http://example.org/a.jpg\n")
    (folder / "bad.parquet").write_bytes(b"PAR1 and no more")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["empty"], "the folder is empty: no image, tar, Parquet file or list of URLs in it"),
        (["notes"], r"no image, tar, Parquet file or list of URLs in it (.mov 1)"),
        (["both"], "holds images (1) and tars (1); name one kind"),
        (["tables"], "holds lists of several formats (.csv and .parquet)"),
        (["cats.csv", "photos"], "one source has one kind"),
        (["cat.csv"], "no such file or folder; did you mean cats.csv?"),
        (["*.xml"], "no such file or folder"),
        (["made"], "is a corpus already"),
        (["cc3m.tsv"], "its first line looks like data: put a header line (caption<TAB>url) above it"),
        (["semicolons.csv"], "it has url;caption); its columns seem to be separated by semicolons"),
        (["numbers.csv"], "numbers.csv: no column holds URLs or paths of images (it has a, b)"),
        (["zip.csv"], "is a zip archive or a spreadsheet"),
        (["blank.csv"], "no column holds URLs or paths of images (it has none)"),
        (["names"], "its name does not tell the format"),
        (["bad.parquet"], "bad.parquet: cannot be read"),
        (["nosuch://bucket/list.csv"], "cannot be read"),
        (["cats.csv", "--out", "cats.csv"], "is there already, and is never overwritten"),
        (["cats.csv", "--out", "nowhere/c.toml"], "there is no folder"),
        (["--recipe", "blip3"], "there is none of this name; there are blip-capfilt, blip2, laion-coco"),
        (["cats.csv", "--model", "./nowhere"], "/nowhere': no such folder, and neither a hub id"),
        (["cats.csv", "--ranker", "ViT-L-15"], "is not an architecture of open_clip"),
        (["cats.csv", "--ranker", "local-dir:nowhere"], "there is no folder"),
        (["cats.csv", "--model", "a/b", "--demo-weights"], "--demo-weights names both models"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_what_cannot_be_used_is_one_clear_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _make(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    result = capfilt("init", *arguments)
    assert isinstance(result.exception, CapfiltError), result.output
    assert message in str(result.exception) and "\n" not in str(result.exception)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bucket_without_credentials_is_one_clear_line(s3_server: S3Server, tmp_path: Path) -> None:
    nobody = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_EC2_METADATA_DISABLED": "true"}
    out = str(tmp_path / "c.toml")
    done = cli("init", "s3://nobody/list.csv", "--out", out, HOME=str(tmp_path), **nobody)
    assert done.returncode == 2 and "S3 wants credentials" in done.stderr and done.stderr.count("\n") == 1
    absent = cli("init", "s3://nobody/list.csv", "--out", out)
    assert absent.returncode == 2 and "bucket does not exist" in absent.stderr


def test_lists_on_a_bucket_are_found(s3_root: str, tmp_path: Path) -> None:
    Storage(s3_root).write("lists/cats.csv", f"url,caption\n{URLS[0]},{CAPTIONS[0]}\n".encode())
    [source] = init(tmp_path, f"{s3_root}/lists").source
    assert source.input == (f"{s3_root}/lists/*.csv",)


# -- without lists, and from recipes -------------------------------------------------------------------------


def test_without_an_argument_plan_says_what_to_fill_in(tmp_path: Path) -> None:
    result = capfilt("init", "--out", tmp_path / "corpus.toml")
    assert result.exit_code == 0 and "try next:" in result.output
    error = str(capfilt("plan", "-c", tmp_path / "corpus.toml").exception)
    assert error == f"source.mine.input: no file matches {tmp_path}/your-list.parquet"


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_recipe_is_copied_with_its_lists_to_be_filled_in(recipe: str, tmp_path: Path) -> None:
    assert recipe in capfilt("init", "--help").output
    out = tmp_path / f"{recipe}.toml"
    result = capfilt("init", "--recipe", recipe, "--out", out)
    assert result.exit_code == 0 and "whose lists are to be filled in: lists/" in result.output
    pairs = zip(
        out.read_text().splitlines(), (RECIPES / f"{recipe}.toml").read_text().splitlines(), strict=True
    )
    assert [new.split(" #")[0].split() for new, old in pairs if new != old] == [["path", "=", f'"{recipe}"']]
    error = str(capfilt("plan", "-c", out).exception)
    assert "no file matches" in error and "\n" not in error


def test_a_recipe_takes_the_lists_that_are_named(tmp_path: Path) -> None:
    _csv(tmp_path / "cats.csv")
    config = init(tmp_path, tmp_path / "cats.csv", "--recipe", "laion-coco", "--model", "org/blip")
    assert (config.caption.model, config.rank.model) == ("org/blip", "ViT-L-14")
    assert [source.name for source in config.source] == ["cats"]
    assert (config.caption.num_captions, config.rank.rerank is not None) == (40, True)
    assert config.cluster.caption.gpus == (0.8 if this_machine().gpus else 0)


# -- models --------------------------------------------------------------------------------------------------


def test_models_are_named_by_folder_hub_id_or_architecture(tmp_path: Path) -> None:
    _csv(tmp_path / "cats.csv")
    weights = Path(__file__).parent.parent / "jobs" / "demo" / "weights"
    demo = init(tmp_path, tmp_path / "cats.csv", "--demo-weights")
    assert "coloured shapes alone" in (tmp_path / "corpus.toml").read_text()
    (tmp_path / "corpus.toml").unlink()
    named = init(
        tmp_path, tmp_path / "cats.csv", "--model", weights / "captioner", "--ranker", weights / "ranker"
    )
    assert (demo.caption.model, demo.rank) == (named.caption.model, named.rank)
    assert "nothing to download" in (tmp_path / "corpus.toml").read_text()
    assert named.rank.model == f"local-dir:{weights / 'ranker'}" and named.rank.pretrained == ""
    (tmp_path / "corpus.toml").unlink()
    other = init(
        tmp_path, tmp_path / "cats.csv", "--model", "org/blip", "--ranker", "ViT-B-32/laion2b_s34b_b79k"
    )
    assert (other.caption.model, other.rank.model, other.rank.pretrained) == (
        "org/blip",
        "ViT-B-32",
        "laion2b_s34b_b79k",
    )


def test_the_defaults_of_rank_come_from_the_repository_that_is_looked_for() -> None:
    default = RankConfig()
    assert (default.model, default.pretrained) == DEFAULT_RANKER
    assert open_clip.get_pretrained_cfg(*DEFAULT_RANKER)["hf_hub"].rstrip("/") == DEFAULT_RANKER_REPOSITORY


def test_weights_in_the_cache_need_no_download(tmp_path: Path) -> None:
    _csv(tmp_path / "cats.csv")
    hub = tmp_path / "hub"
    names = {
        "Salesforce/blip-image-captioning-large": (
            "config.json", "preprocessor_config.json", "vocab.txt", "model.safetensors"
        ),
        DEFAULT_RANKER_REPOSITORY: ("open_clip_model.safetensors",),
    }  # fmt: skip
    for repository, files in names.items():
        folder = hub / f"models--{repository.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
        for name in files:
            (folder / "snapshots" / ("0" * 40) / name).write_text("{}")
    asked = ("init", str(tmp_path / "cats.csv"), "--out")
    done = cli(*asked, str(tmp_path / "a.toml"), HF_HUB_CACHE=str(hub))
    assert done.returncode == 0 and "nothing to download" in done.stdout
    (hub / "models--timm--vit_large_patch14_clip_224.openai" / "refs" / "main").unlink()
    done = cli(*asked, str(tmp_path / "b.toml"), HF_HUB_CACHE=str(hub))
    assert f"the first run downloads {DEFAULT_RANKER_REPOSITORY}: {hub} does not have them" in done.stdout
    assert "HF_HUB_OFFLINE is set, so that a run would stop" in done.stdout


# -- the machine ---------------------------------------------------------------------------------------------


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 512), st.integers(0, 16), st.floats(1, 4096))
def test_the_least_workers_of_all_stages_fit_on_the_machine(cores: int, gpus: int, memory_gib: float) -> None:
    machine = Machine(cores=cores, memory_gib=memory_gib, gpus=("H200",) * gpus)
    cluster = ClusterConfig.model_validate(stage_resources(machine))
    resources = [getattr(cluster, stage) for stage in UNFILTERED]
    assert sum(stage.cpus * stage.min_workers for stage in resources) <= cores
    assert sum(stage.gpus * stage.max_workers for stage in resources) <= gpus + 1e-9
    assert all(stage.gpus > 0 for stage in (cluster.caption, cluster.rank)) == (gpus > 0)


def test_gpus_are_those_of_nvidia_smi_that_are_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nprintf 'NVIDIA H200\\nNVIDIA H200\\n'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert str(this_machine()).endswith("2 x NVIDIA H200")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert this_machine().gpus == ("NVIDIA H200",)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert this_machine().gpus == ()
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert this_machine().gpus == ()


def test_shards_suit_the_number_of_samples() -> None:
    assert [samples_per_shard(n, True) for n in (1, 200, 1_000, 10_000, 10**6)] == [
        100,
        100,
        200,
        1_300,
        10_000,
    ]
    assert samples_per_shard(10**6, False) == samples_per_shard(None, False) == 1_000


def test_the_next_commands_run_as_they_are_printed(tmp_path: Path) -> None:
    _csv(tmp_path / "cats.csv")
    done = cli(
        "init", str(tmp_path / "cats.csv"), "--out", str(tmp_path / "a corpus.toml"), PATH="/usr/bin:/bin"
    )
    plan, run, sql = (line.strip() for line in done.stdout.partition("try next:\n")[2].splitlines())
    program = plan.split()[0]
    assert (ROOT / program).samefile(Path(sys.executable).parent / "capfilt")
    assert run == f"{program} run -c '{tmp_path}/a corpus.toml'"
    assert sql.startswith(f"{program} sql '{tmp_path}/a corpus' \"SELECT ")
