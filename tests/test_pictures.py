"""Sources whose pictures lie in files: the same pictures in five forms, and everything that may be wrong with one."""

import csv
import http.server
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import parse_config
from pipeline.corpus.records import Records
from pipeline.intake.pictures.fetch import FileFetcher
from pipeline.intake.pictures.places import Place, parse_place
from pipeline.shards.shard_reader import committed_table
from pipeline.shards.uids import sample_uid
from pipeline.storage.storage import Storage
from schemas.config import CapfiltConfig
from schemas.errors import CapfiltError
from tests.processes import ROOT
from tests.raw_shards import encoded, picture
from tests.runs import curated_rows, do_run

WEIGHTS = ROOT / "jobs" / "demo" / "weights"
JPG = encoded(picture(0, (120, 100)))
IMAGES = {f"{number:03d}": encoded(picture(number, (120, 96 + number))) for number in range(12)}
CAPTIONS = {key: f"a green circle number {int(key)}" for key in IMAGES}


def config_of(folder: Path, inputs: list[str], **values: Any) -> CapfiltConfig:
    """Return a config of one source, with the demo's models."""
    crawl = {"image_size_px": 128, "min_size_px": 32, **values.pop("crawl", {})}
    source = {"name": "own", "input": inputs, **values}
    caption = {"model": str(WEIGHTS / "captioner"), "min_length": 3, "max_length": 12}
    rank = {"model": f"local-dir:{WEIGHTS / 'ranker'}", "pretrained": ""}
    return CapfiltConfig.model_validate(
        {
            "corpus": {"path": str(folder / "corpus"), "samples_per_shard": 5},
            "source": [source], "crawl": crawl, "caption": caption, "rank": rank,
        }
    )  # fmt: skip


def crawled(config: CapfiltConfig) -> dict[str, dict[str, Any]]:
    """Crawl; return the samples by URL."""
    done = do_run(config, command="crawl", stages=("crawl",))
    assert done.exit_code in (0, 3)
    return samples(config)


def samples(config: CapfiltConfig) -> dict[str, dict[str, Any]]:
    records = Records(Storage(config.corpus.path))
    rows = [
        row
        for record in records.shards(("crawl",)).values()
        for row in committed_table(records, record.outputs["parquet"]).to_pylist()
    ]
    assert len({row["url"] for row in rows}) == len(rows)
    return {row["url"]: row for row in rows}


def reasons(config: CapfiltConfig) -> dict[str, str]:
    return {url.partition(":")[2]: row["reason"] or "ok" for url, row in crawled(config).items()}


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def image_table(**columns: list[Any]) -> pa.Table:
    """Return a table as `datasets` writes it: the images as structs of bytes and path."""
    images = [{"bytes": data, "path": f"{key}.jpg"} for key, data in IMAGES.items()]
    return pa.table({"image": images, "caption": list(CAPTIONS.values()), "id": list(IMAGES), **columns})


# -- the same pictures in every form: each returns the config of a source ------------------------------------


def as_folder(folder: Path) -> CapfiltConfig:
    pictures = folder / "pets"
    pictures.mkdir()
    for key, data in IMAGES.items():
        (pictures / f"{key}.jpg").write_bytes(data)
    with (pictures / "metadata.jsonl").open("w") as table:
        for key in IMAGES:
            print(json.dumps({"file_name": f"{key}.jpg", "caption": CAPTIONS[key], "id": key}), file=table)
    return config_of(folder, [str(pictures)], format="imagefolder", uid_column="id")


def as_tars(folder: Path) -> CapfiltConfig:
    members = [
        member
        for key, data in IMAGES.items()
        for member in (
            (f"{key}.jpg", data),
            (f"{key}.json", json.dumps({"id": key, "caption": CAPTIONS[key]}).encode()),
        )
    ]
    write_tar(folder / "pets" / "0.tar", members[:14])
    write_tar(folder / "pets" / "1.tar", members[14:])
    return config_of(folder, [str(folder / "pets")], format="webdataset", uid_column="id")


def as_parquet(folder: Path) -> CapfiltConfig:
    (folder / "data").mkdir()
    pq.write_table(image_table(), folder / "data" / "train-00000-of-00001.parquet", row_group_size=5)
    return config_of(folder, [str(folder / "data")], format="huggingface", uid_column="id")


def as_arrow(folder: Path) -> CapfiltConfig:
    (folder / "saved" / "train").mkdir(parents=True)
    (folder / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    table = image_table()
    path = folder / "saved" / "train" / "data-00000-of-00001.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table, max_chunksize=4)
    return config_of(folder, [str(folder / "saved")], format="huggingface", uid_column="id")


def as_list_of_files(folder: Path) -> CapfiltConfig:
    (folder / "files").mkdir()
    with (folder / "list.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["url", "caption", "id"])
        for number, (key, data) in enumerate(IMAGES.items()):
            path = folder / "files" / f"{key}.jpg"
            path.write_bytes(data)
            rows.writerow([path.name if number % 2 else path.as_uri(), CAPTIONS[key], key])
    crawl = {"allow_files": [str(folder / "files")]}
    return config_of(folder, [str(folder / "list.csv")], uid_column="id", crawl=crawl)


class _ImageHandler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        data = IMAGES[self.path.strip("/")]
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _ImageHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


def over_http(folder: Path, host: str) -> CapfiltConfig:
    with (folder / "list.jsonl").open("w") as file:
        for key in IMAGES:
            print(json.dumps({"url": f"http://{host}/{key}", "caption": CAPTIONS[key], "id": key}), file=file)
    crawl = {"allow_hosts": [host]}
    return config_of(folder, [str(folder / "list.jsonl")], uid_column="id", crawl=crawl)


@pytest.fixture(scope="module")
def fetched(host: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The curated rows of the pictures as a web server gives them."""
    config = over_http(tmp_path_factory.mktemp("http"), host)
    assert do_run(config).exit_code == 0
    return told(config)


def told(config: CapfiltConfig) -> list[dict[str, Any]]:
    """Return what does not depend on where a picture lay, by identity."""
    names = ("uid", "status", "caption", "captions", "scores", "origins")
    rows = [{name: row[name] for name in names if name in row} for row in curated_rows(config.corpus.path)]
    return sorted(rows, key=lambda row: row["uid"])


FORMS = [as_folder, as_tars, as_parquet, as_arrow, as_list_of_files]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_the_same_pictures_give_the_same_captions(
    form: Callable[[Path], CapfiltConfig], fetched: list[dict[str, Any]], tmp_path: Path
) -> None:
    config = form(tmp_path)
    assert do_run(config).exit_code == 0
    assert len(fetched) == len(IMAGES) and told(config) == fetched


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_what_is_read_once_is_not_read_again(form: Callable[[Path], CapfiltConfig], tmp_path: Path) -> None:
    config = form(tmp_path)
    assert {row["status"] for row in crawled(config).values()} == {"ok"}
    assert do_run(config, command="crawl", stages=("crawl",)).record.shards_done == 0


# -- names and identities ------------------------------------------------------------------------------------


def test_a_picture_is_named_after_its_folder_wherever_that_is(tmp_path: Path) -> None:
    for place in ("here", "there"):
        folder = tmp_path / place / "pets" / "größe 100%#1"
        folder.mkdir(parents=True)
        (folder / "1.jpg").write_bytes(JPG)
    url = "imagefolder:pets/größe 100%25%231/1.jpg"
    for place in ("here", "there"):
        config = config_of(tmp_path / place, [str(tmp_path / place / "pets")], format="imagefolder")
        (row,) = crawled(config).values()
        assert (row["url"], row["uid"], row["status"]) == (url, sample_uid("own", url), "ok")
        assert row["final_url"] == str(tmp_path / place / "pets" / "größe 100%#1" / "1.jpg")


def test_names_that_are_not_text_are_read_all_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "pets"
    folder.mkdir()
    for name in (b"\xff\xfe.jpg", b"line\nbreak.jpg", b"back\\slash.jpg"):
        (folder / os.fsdecode(name)).write_bytes(JPG)
    rows_by_url = crawled(config_of(tmp_path, [str(folder)], format="imagefolder"))
    assert set(rows_by_url) == {
        f"imagefolder:pets/{name}.jpg" for name in ("%FF%FE", "line%0Abreak", "back\\slash")
    }
    assert {row["status"] for row in rows_by_url.values()} == {"ok"}


@pytest.mark.parametrize(
    "text", ["a/b.jpg", "ü 1%.jpg", "x/y#z.png", "100%25.jpg", 'q"<>?&.jpg', "\udcff.jpg"]
)
def test_a_name_survives_its_url(text: str) -> None:
    place = Place(folder="pets", relative=text, item=text)
    url = place.url("webdataset")
    assert parse_place(url) == place
    assert url.encode().decode() == url and url.isprintable()


def test_two_folders_of_one_name_are_refused(tmp_path: Path) -> None:
    for place in ("a", "b"):
        (tmp_path / place / "pets").mkdir(parents=True)
        (tmp_path / place / "pets" / "1.jpg").write_bytes(JPG)
    inputs = [str(tmp_path / place / "pets") for place in ("a", "b")]
    with pytest.raises(CapfiltError, match="both called 'pets'"):
        crawled(config_of(tmp_path, inputs, format="imagefolder"))


# -- folders of images ---------------------------------------------------------------------------------------


def test_captions_of_a_folder_come_from_the_nearest_table_then_from_texts_then_not_at_all(
    tmp_path: Path,
) -> None:
    pets = tmp_path / "pets"
    (pets / "cats").mkdir(parents=True)
    for name in ("1.jpg", "2.jpeg", "3.jpg", "cats/1.jpg", "cats/2.jpg"):
        (pets / name).write_bytes(JPG)
    (pets / "metadata.csv").write_text("file_name,caption\n1.jpg,one\ncats/1.jpg,from above\n")
    (pets / "cats" / "metadata.jsonl").write_text('{"file_name": "1.jpg", "caption": ["near", "by"]}\n')
    (pets / "1.txt").write_text("not this one")
    (pets / "2.txt").write_text("two, from a text\n")
    (pets / ".hidden.jpg").write_bytes(JPG)
    rows_by_url = crawled(config_of(tmp_path, [str(pets)], format="imagefolder"))
    assert {url.removeprefix("imagefolder:pets/"): row["captions"] for url, row in rows_by_url.items()} == {
        "1.jpg": ["one"],
        "2.jpeg": ["two, from a text"],
        "3.jpg": [],
        "cats/1.jpg": ["near", "by"],
        "cats/2.jpg": [],
    }


def test_every_file_of_a_folder_ends_with_its_reason(tmp_path: Path) -> None:
    pets = tmp_path / "pets"
    pets.mkdir()
    files = {
        "good.jpg": JPG,
        "tiny.png": encoded(picture(1, (8, 8)), "PNG"),
        "wide.jpg": encoded(picture(1, (900, 40))),
        "half.jpg": JPG[: len(JPG) // 2],
        "empty.jpg": b"",
        "page.jpg": b"<!DOCTYPE html><html></html>",
        "huge.jpg": JPG + bytes(300_000),
        "old.tiff": encoded(picture(1), "TIFF"),
        "notes.md": b"not an image by its name: no row",
    }
    for name, data in files.items():
        (pets / name).write_bytes(data)
    (pets / "gone.jpg").symlink_to(tmp_path / "nothing")
    (pets / "metadata.csv").write_text("file_name,caption\nnever.jpg,was not there\n../secret.jpg,outside\n")
    os.mkfifo(pets / "pipe.jpg")
    config = config_of(tmp_path, [str(pets)], format="imagefolder", crawl={"max_body_bytes": 200_000})
    (tmp_path / "secret.jpg").write_bytes(JPG)
    assert reasons(config) == {
        "pets/good.jpg": "ok",
        "pets/tiny.png": "too_small",
        "pets/wide.jpg": "aspect_ratio",
        "pets/half.jpg": "image_truncated",
        "pets/empty.jpg": "empty_body",
        "pets/page.jpg": "not_an_image",
        "pets/huge.jpg": "body_too_large",
        "pets/old.tiff": "format_refused",
        "pets/gone.jpg": "unreadable_file",
        "pets/pipe.jpg": "forbidden_file",
        "pets/never.jpg": "unreadable_file",
        "pets/../secret.jpg": "forbidden_file",
    }


def test_a_glob_takes_what_it_matches_with_its_descriptions(tmp_path: Path) -> None:
    pets = tmp_path / "pets"
    (pets / "x").mkdir(parents=True)
    for name in ("a.jpg", "b.png", "x/c.jpg"):
        (pets / name).write_bytes(JPG)
    (pets / "metadata.csv").write_text("file_name,caption\na.jpg,A\nb.png,B\nnever.jpg,N\n")
    rows_by_url = crawled(config_of(tmp_path, [str(pets / "**" / "*.jpg")], format="imagefolder"))
    assert {url: row["captions"] for url, row in rows_by_url.items()} == {
        "imagefolder:pets/a.jpg": ["A"], "imagefolder:pets/x/c.jpg": []
    }  # fmt: skip


def test_a_folder_that_grew_is_read_again_and_keeps_what_it_has(tmp_path: Path) -> None:
    config = as_folder(tmp_path)
    before = crawled(config)
    pets = Path(config.source[0].input[0])
    (pets / "more.jpg").write_bytes(JPG)
    with (pets / "metadata.jsonl").open("a") as table:
        print(json.dumps({"file_name": "more.jpg", "caption": "more", "id": "m"}), file=table)
    after = crawled(config)
    assert {url: row["key"] for url, row in before.items()} | {"imagefolder:pets/more.jpg": "0000300000"} == {
        url: row["key"] for url, row in after.items()
    }


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no file in"),
        ({"a.txt": b"x"}, "no image in"),
        ({"a.jpg": JPG, "metadata.jsonl": b'{"file_name": "a.jpg", "text": "x"}'}, "no column 'caption'"),
        ({"a.jpg": JPG, "metadata.csv": b"file_name,caption\n,x\n"}, "file_name is empty"),
        ({"a.jpg": JPG, "a.txt": b"\xff\xfe\x00"}, "not UTF-8"),
    ],
)
def test_a_folder_that_cannot_be_read_is_refused_in_one_line(
    files: dict[str, bytes], message: str, tmp_path: Path
) -> None:
    (tmp_path / "pets").mkdir()
    for name, data in files.items():
        (tmp_path / "pets" / name).write_bytes(data)
    with pytest.raises(CapfiltError, match=message) as refused:
        crawled(config_of(tmp_path, [str(tmp_path / "pets")], format="imagefolder"))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "corpus" / "urls").exists()


# -- tars ----------------------------------------------------------------------------------------------------


def test_every_sample_of_other_peoples_tars_is_accounted_for(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "wds" / "a" / "0.tar",
        [
            ("k1.JPG", JPG), ("k1.TXT", b"upper case"),
            ("d.1/img_2.0.jpeg", JPG), ("d.1/img_2.0.caption", b"dots"),
            ("texts/k3.txt", b"first"), ("k4.jpg", JPG),
            ("k5.webp", encoded(picture(2, (64, 64)), "WEBP")), ("k5.json", b'{"TEXT": "from json"}'),
            ("k6.json", b'["one", "two"]'), ("k6.png", encoded(picture(2, (64, 64)), "PNG")),
            ("k7.txt", b"no image at all"), ("._k1.jpg", b"macOS"), ("k8.jpg", JPG[:500]), ("k8.txt", b"cut"),
        ],
    )  # fmt: skip
    write_tar(
        tmp_path / "wds" / "1.tar",
        [*((f"{key}.jpg", JPG) for key in "ab"), *((f"{key}.txt", key.encode()) for key in "ba")],
    )
    config = config_of(tmp_path, [str(tmp_path / "wds")], format="webdataset")
    rows_by_url = crawled(config)
    assert {
        url.removeprefix("webdataset:wds/"): (row["reason"] or "ok", row["captions"])
        for url, row in rows_by_url.items()
    } == {
        "1.tar#a": ("ok", ["a"]),
        "1.tar#b": ("ok", ["b"]),
        "a/0.tar#k1": ("ok", ["upper case"]),
        "a/0.tar#d.1/img_2.0": ("ok", ["dots"]),
        "a/0.tar#texts/k3": ("missing_member", ["first"]),
        "a/0.tar#k4": ("ok", []),
        "a/0.tar#k5": ("ok", ["from json"]),
        "a/0.tar#k6": ("ok", ["one", "two"]),
        "a/0.tar#k7": ("missing_member", ["no image at all"]),
        "a/0.tar#k8": ("image_truncated", ["cut"]),
    }


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("0.tar", b"not a tar at all" * 100, "not a readable tar"),
        ("0.tar.gz", b"\x1f\x8b", "decompress"),
        ("0.zip", b"PK", r"no \*.tar in"),
    ],
)
def test_tars_that_cannot_be_read_are_refused_by_name(
    name: str, data: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "wds").mkdir()
    (tmp_path / "wds" / name).write_bytes(data)
    with pytest.raises(CapfiltError, match=message):
        crawled(config_of(tmp_path, [str(tmp_path / "wds")], format="webdataset"))


def test_a_cut_tar_and_a_repeated_key_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tar(tmp_path / "wds" / "0.tar", [("a.jpg", JPG), ("a.txt", b"a"), ("b.jpg", JPG), ("a.jpg", JPG)])
    tar = tmp_path / "wds" / "0.tar"
    tar.write_bytes(tar.read_bytes().rstrip(b"\0"))
    with tar.open("ab") as file:
        file.write(bytes(-tar.stat().st_size % 512))
    rows_by_url = crawled(config_of(tmp_path, [str(tmp_path / "wds")], format="webdataset"))
    assert {url: row["captions"] for url, row in rows_by_url.items()} == {
        "webdataset:wds/0.tar#a": ["a"],
        "webdataset:wds/0.tar#b": [],
    }
    message = [record.message for record in caplog.records if "0.tar" in record.message]
    assert message == [
        f"{tar} has no end mark and may have been cut: samples may be missing",
        f"{tar}: samples left out: 1 with a key seen before",
    ]


def test_a_tar_that_is_lost_or_spoilt_before_its_crawl_gives_every_row_a_reason(tmp_path: Path) -> None:
    config = as_tars(tmp_path)
    do_run(config, command="crawl", stages=("crawl",), limit=1)
    (tmp_path / "pets" / "0.tar").write_bytes(b"spoilt" * 1000)
    fetcher = FileFetcher(config.source[0], config.crawl, Storage(str(tmp_path)))
    with fetcher:
        lost = fetcher.fetch("webdataset:pets/0.tar#001")
        assert (lost.status, lost.reason) == ("failed", "unreadable_file")
        assert fetcher.fetch("webdataset:pets/1.tar#011").status == "ok"
        assert fetcher.fetch("webdataset:pets/1.tar#other").reason == "missing_member"
        assert fetcher.fetch("webdataset:pets/2.tar#001").reason == "unreadable_file"


# -- tables --------------------------------------------------------------------------------------------------


def test_the_column_of_images_is_found_or_named(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    images = [{"bytes": JPG, "path": None}, {"bytes": None, "path": "elsewhere.jpg"}, None]
    raw = pa.array([JPG, JPG, b""], pa.binary())
    table = pa.table({"image": images, "thumbnail": images, "raw": raw, "text": ["a", "b", "c"]})
    pq.write_table(table, tmp_path / "data" / "0.parquet")

    def config(**values: Any) -> CapfiltConfig:
        return config_of(
            tmp_path,
            [str(tmp_path / "data" / "*.parquet")],
            format="huggingface",
            caption_column="text",
            **values,
        )

    with pytest.raises(CapfiltError, match=r"several columns of images \(image, thumbnail\); set url_column"):
        crawled(config())
    with pytest.raises(CapfiltError, match="'text' is not a column of images"):
        crawled(config(url_column="text"))
    assert reasons(config(url_column="image")) == {
        "data/0.parquet#0": "ok", "data/0.parquet#1": "missing_member", "data/0.parquet#2": "missing_member"
    }  # fmt: skip


def test_a_table_without_images_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "0.parquet"
    config = config_of(tmp_path, [str(path)], format="huggingface")
    pq.write_table(pa.table({"url": ["http://a"], "caption": ["x"]}), path)
    with pytest.raises(CapfiltError, match="no column of images"):
        crawled(config)
    path.write_bytes(b"PAR1 nothing")
    with pytest.raises(CapfiltError, match="cannot be read"):
        crawled(config)
    pq.write_table(pa.table({"image": pa.array([JPG], pa.binary())}), path)
    with pytest.raises(CapfiltError, match="no column 'caption'"):
        crawled(config)


def test_an_image_that_a_dictionary_multiplies_takes_its_memory_once(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    zeros = pa.DictionaryArray.from_arrays(
        pa.array([0] * 400, pa.int32()), pa.array([bytes(60_000_000)], pa.binary())
    )
    pq.write_table(
        pa.table({"image": zeros}),
        tmp_path / "data" / "0.parquet",
        dictionary_pagesize_limit=1 << 30,
        store_schema=False,
    )
    config = config_of(tmp_path, [str(tmp_path / "data")], format="huggingface", caption_column="")
    code = (
        "import resource, sys; from pathlib import Path; from schemas.config import CapfiltConfig;"
        "from pipeline.storage.storage import Storage; from pipeline.intake.pictures.fetch import FileFetcher;"
        "config = CapfiltConfig.model_validate_json(sys.argv[1]); storage = Storage(config.corpus.path);"
        "fetcher = FileFetcher(config.source[0], config.crawl, storage);"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "reasons = {fetcher.fetch(f'huggingface:data/0.parquet#{row}').reason for row in range(60)};"
        "print(reasons, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, config.model_dump_json()],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    reasons, _, kilobytes = done.stdout.rpartition(" ")
    assert reasons == "{'body_too_large'}", done.stderr
    assert int(kilobytes) < 400_000  # of which 60 MB are the entry; 16 copies would be 960 MB


# -- lists of files ------------------------------------------------------------------------------------------


def test_a_list_reads_files_of_allowed_folders_alone(tmp_path: Path) -> None:
    allowed, secret = tmp_path / "allowed", tmp_path / "secret.jpg"
    (allowed / "in").mkdir(parents=True)
    secret.write_bytes(JPG)
    (allowed / "in" / "a b.jpg").write_bytes(JPG)
    (allowed / "link.jpg").symlink_to(secret)
    os.mkfifo(allowed / "pipe")
    entries = {
        "in/a b.jpg": "ok",
        f"file://{allowed}/in/a%20b.jpg": "ok",
        str(allowed / "in" / "a b.jpg"): "ok",
        "../secret.jpg": "forbidden_file",
        "in/../../secret.jpg": "forbidden_file",
        f"file://{secret}": "forbidden_file",
        "/etc/hostname": "forbidden_file",
        "link.jpg": "forbidden_file",
        "pipe": "forbidden_file",
        "in": "unreadable_file",
        "absent.jpg": "unreadable_file",
        "file://host/a.jpg": "bad_scheme",
        "ftp://127.0.0.1/a.jpg": "bad_scheme",
    }
    (tmp_path / "list.txt").write_text("".join(f"{entry}\n" for entry in entries))
    inputs = [str(tmp_path / "list.txt")]
    config = config_of(tmp_path, inputs, caption_column="", crawl={"allow_files": [str(allowed)]})
    assert {url: row["reason"] or "ok" for url, row in crawled(config).items()} == entries


def test_without_allowed_folders_no_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(JPG)
    (tmp_path / "list.txt").write_text(f"file://{tmp_path}/a.jpg\n{tmp_path}/a.jpg\n")
    config = config_of(tmp_path, [str(tmp_path / "list.txt")], caption_column="")
    assert [row["reason"] for row in crawled(config).values()] == ["bad_scheme", "bad_url"]
    (tmp_path / "list.txt").write_text("a.jpg\nb.jpg\n")
    with pytest.raises(CapfiltError, match=r"crawl\.allow_files"):
        crawled(config_of(tmp_path / "other", [str(tmp_path / "list.txt")], caption_column=""))


def test_allowed_folders_are_relative_to_the_config(tmp_path: Path) -> None:
    text = (
        '[corpus]\npath = "c"\n[[source]]\nname = "a"\ninput = ["l.csv"]\n[crawl]\nallow_files = ["pics"]\n'
    )
    assert parse_config(text, "c.toml", (), tmp_path).crawl.allow_files == (str(tmp_path / "pics"),)


# -- what somebody else's url shards may ask for -------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "imagefolder:pets/../secret.jpg", "imagefolder:pets/x/../../secret.jpg", "imagefolder:../secret.jpg",
        "imagefolder:/secret.jpg", "imagefolder:pets/%2e%2e/secret.jpg", "imagefolder:pets//secret.jpg",
        "imagefolder:other/secret.jpg", "imagefolder:pets", "webdataset:pets/000.jpg", "file:pets/000.jpg",
        "imagefolder:pets/000.jpg%00", "http://127.0.0.1/000.jpg",
    ],
)  # fmt: skip
def test_no_place_leads_out_of_the_inputs(url: str, tmp_path: Path) -> None:
    config = as_folder(tmp_path)
    (tmp_path / "secret.jpg").write_bytes(JPG)
    with FileFetcher(config.source[0], config.crawl, Storage(str(tmp_path))) as fetcher:
        fetch = fetcher.fetch(url)
        assert (fetch.status, fetch.reason, fetch.body) == ("refused", "forbidden_file", None)


# -- remote --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [as_folder, as_tars, as_parquet], ids=lambda form: form.__name__)
def test_pictures_are_read_from_a_bucket(
    form: Callable[[Path], CapfiltConfig], s3_root: str, tmp_path: Path
) -> None:
    local = form(tmp_path)
    folder = Path(local.source[0].input[0])
    for file in filter(Path.is_file, folder.rglob("*")):
        Storage(s3_root).put(file, f"{folder.name}/{file.relative_to(folder)}")
    there = local.source[0].model_copy(update={"input": (f"{s3_root}/{folder.name}",)})
    remote = local.model_copy(
        update={
            "source": (there,),
            "corpus": local.corpus.model_copy(update={"path": str(tmp_path / "other")}),
        }
    )
    names = ("uid", "status", "captions", "sha256", "image_bytes", "key")
    here = {url: {name: row[name] for name in names} for url, row in crawled(local).items()}
    assert here == {url: {name: row[name] for name in names} for url, row in crawled(remote).items()}
    assert {row["status"] for row in here.values()} == {"ok"}
