"""A folder made by img2dataset's own command line is taken as a crawled one, where it lies."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from pipeline.digests import sha256_file
from pipeline.images.decode import ImageError, read_header
from pipeline.stages.crawl import CrawlWorker
from pipeline.stages.img2dataset_shard import import_row, import_shard, reason_of
from pipeline.storage.storage import Storage
from schemas.errors import CorruptShardError
from schemas.records import OutputFile, ShardRecord
from schemas.statuses import REASONS
from schemas.tables import SAMPLES_FILE
from tests.hostile import HostileSite
from tests.url_tasks import corpus_config, crawl_task, new_records, url_rows

EXPECTED = {
    "/plain.jpg": ("ok", None),
    "/404": ("failed", "http_4xx"),
    "/plain.png": ("ok", None),
    "/500": ("failed", "http_5xx"),
    "/html.jpg": ("invalid", "not_an_image"),
    "/plain.webp": ("ok", None),
    "/pixel.gif": ("invalid", "too_small"),
    "/opted-out/0.jpg": ("opted_out", "x_robots_tag"),
    "/redirect/loop": ("refused", "redirect_loop"),
    "/rotated6.jpg": ("ok", None),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder of img2dataset's command line: one shard of ten URLs."""
    folder = tmp_path_factory.mktemp("img2dataset")
    with HostileSite() as site:
        urls = [site.url(path) for path in EXPECTED]
        pa.csv.write_csv(
            pa.table({"url": urls, "caption": [f"at {path}" for path in EXPECTED]}), folder / "list.csv"
        )
        command = [
            sys.executable, "-m", "img2dataset.main", f"--url_list={folder}/list.csv", "--input_format=csv",
            "--caption_col=caption", f"--output_folder={folder}/out", "--output_format=webdataset",
            "--processes_count=1", "--thread_count=8", "--image_size=128", "--resize_mode=keep_ratio",
            "--min_image_size=16", "--enable_wandb=False", "--timeout=5",
        ]  # fmt: skip
        code = f"import sys; sys.argv = {command[2:]!r}; from img2dataset import main; main()"
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            timeout=120,
            env=os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"},
        )
    return folder / "out"


def import_folder(folder: Path, corpus: Path) -> tuple[ShardRecord, list[dict[str, Any]]]:
    img2dataset_rows = pq.read_table(folder / "00000.parquet").to_pylist()
    rows = url_rows([(row["url"], row["caption"]) for row in img2dataset_rows])
    for row, their in zip(rows, img2dataset_rows, strict=True):
        row["key"] = their["key"]
    records = new_records(corpus)
    record = CrawlWorker(corpus_config(corpus, {}), records)(crawl_task(records, rows, f"{folder}/00000.tar"))
    return record, pq.read_table(
        records.storage.url(record.outputs["parquet"].path), schema=SAMPLES_FILE
    ).to_pylist()


@pytest.mark.slow
def test_its_own_folder(folder: Path, tmp_path: Path) -> None:
    record, samples = import_folder(folder, tmp_path)
    ends = {"/" + s["url"].split("/", 3)[3]: (s["status"], s["reason"]) for s in samples}
    assert ends == EXPECTED
    tar = record.outputs["tar"]
    assert (tar.path, tar.sha256) == (f"{folder}/00000.tar", sha256_file(folder / "00000.tar"))
    assert (tar.rows, record.rows_in, record.rows_out, record.images) == (4, 10, 4, 4)
    data = (folder / "00000.tar").read_bytes()
    for sample in samples:
        if sample["status"] == "ok":
            header = read_header(data[sample["offset"] :][: sample["image_bytes"]])
            assert (header.width, header.height) == (sample["width"], sample["height"])
            assert (sample["width"], sample["height"]) in ((160, 120), (120, 160), (171, 128), (128, 171))
            assert len(sample["sha256"]) == 64 and sample["image_bytes"] > 500
        else:
            assert REASONS[sample["reason"]].status == sample["status"] and sample["detail"]
    assert next(s["http_status"] for s in samples if s["url"].endswith("/404")) == 404
    assert not list(tmp_path.glob("raw/**/*.tar"))


@pytest.mark.slow
def test_images_that_are_not_in_the_tar_are_named(folder: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "out"
    damaged.mkdir()
    (damaged / "00000.parquet").write_bytes((folder / "00000.parquet").read_bytes())
    with tarfile.open(folder / "00000.tar") as old, tarfile.open(damaged / "00000.tar", "w") as new:
        lost = old.getnames()[0].split(".")[0]
        for info in old:
            if not info.name.startswith(lost):
                new.addfile(info, old.extractfile(info))
    record, samples = import_folder(damaged, tmp_path / "corpus")
    assert record.counts["invalid/missing_member"] == 1
    assert [s["key"] for s in samples if s["reason"] == "missing_member"] == [lost]
    assert record.outputs["tar"].rows == record.rows_out == 3


_IMPORT = r"""
import re, sys
from pathlib import Path
from pipeline.stages.img2dataset_shard import import_shard
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError
from schemas.records import OutputFile
tar = sys.argv[1]
rows = [{"key": f"{number:09d}"} for number in range(int(sys.argv[2]))]
try:
    samples, _ = import_shard(rows, OutputFile(path=tar, bytes=10240, sha256="", rows=0), Storage("/tmp"), 1)
    print(len(samples), samples[-1]["reason"])
except CapfiltError as error:
    print(error)
print(int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024)
"""


@pytest.mark.parametrize(
    ("column", "mib", "expected"),
    [
        ("error_message", 8, "200 http_4xx"),
        ("status", 8, "200 http_4xx"),
        ("sha256", 8, "200 http_4xx"),
        ("error_message", 17, "error_message has more than 16 MiB"),
    ],
)
def test_one_long_text_in_every_row_of_its_parquet_fits_in_memory(
    tmp_path: Path, column: str, mib: int, expected: str
) -> None:
    rows = 200
    with tarfile.open(tmp_path / "00000.tar", "w"):
        pass
    text = pa.array(["HTTP Error 404: Not Found" + "x" * (mib << 20)])
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), text)
    plain = {
        "key": [f"{number:09d}" for number in range(rows)],
        "status": ["failed_to_download"] * rows,
        "error_message": ["HTTP Error 404: Not Found"] * rows,
    }
    table = pa.table(plain | {column: repeated})
    pq.write_table(table, tmp_path / "00000.parquet", compression="zstd", store_schema=False)
    command = [sys.executable, "-c", _IMPORT, str(tmp_path / "00000.tar"), str(rows)]
    printed, peak_mib = subprocess.run(
        command, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert expected in printed and int(peak_mib) < 700, f"{peak_mib} MiB: {printed}"


@pytest.mark.parametrize("column", ["key", "status", "error_message"])
def test_a_parquet_without_what_img2dataset_writes_is_named(tmp_path: Path, column: str) -> None:
    with tarfile.open(tmp_path / "00000.tar", "w"):
        pass
    table = pa.table({"key": ["000000000"], "status": ["success"], "error_message": [None]}).drop_columns(
        column
    )
    pq.write_table(table, tmp_path / "00000.parquet")
    imported = OutputFile(path=str(tmp_path / "00000.tar"), bytes=10240, sha256="", rows=0)
    with pytest.raises(CorruptShardError, match=f"00000.parquet has no column {column}, which"):
        import_shard([{"key": "000000000"}], imported, Storage(str(tmp_path)), 1)


@pytest.mark.slow
def test_a_folder_that_changed_is_refused(folder: Path, tmp_path: Path) -> None:
    changed = tmp_path / "out"
    changed.mkdir()
    img2dataset_rows = pq.read_table(folder / "00000.parquet")
    pq.write_table(img2dataset_rows.slice(1), changed / "00000.parquet")
    (changed / "00000.tar").write_bytes((folder / "00000.tar").read_bytes())
    rows = url_rows([("http://example.com/a.jpg", "a")])
    rows[0]["key"] = img2dataset_rows["key"][0].as_py()
    records = new_records(tmp_path / "corpus")
    worker = CrawlWorker(corpus_config(tmp_path / "corpus", {}), records)
    task = crawl_task(records, rows, f"{changed}/00000.tar")
    with pytest.raises(CorruptShardError, match="no row with key"):
        worker(task)
    with (changed / "00000.tar").open("ab") as tar:
        tar.write(bytes(512))
    with pytest.raises(CorruptShardError, match="when it was read"):
        worker(task)
    (changed / "00000.tar").unlink()
    with pytest.raises(CorruptShardError, match=r"00000\.tar"):
        worker(task)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("HTTP Error 404: Not Found", "http_4xx"),
        ("HTTP Error 429: Too Many Requests", "rate_limited"),
        ("HTTP Error 503: Service Unavailable", "http_5xx"),
        ("HTTP Error 304: Not Modified", "http_other"),
        ("HTTP Error 302: The HTTP server returned a redirect error that would lead to an infinite loop.\n"
         "The last 30x error message was:\nFound", "redirect_loop"),
        ("<urlopen error [Errno -2] Name or service not known>", "dns"),
        ("<urlopen error [Errno -3] Temporary failure in name resolution>", "dns"),
        ("<urlopen error [Errno 111] Connection refused>", "connect"),
        ("[Errno 104] Connection reset by peer", "connect"),
        ("Remote end closed connection without response", "connect"),
        ("<urlopen error timed out>", "timeout"),
        ("The read operation timed out", "timeout"),
        ("<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: certificate has expired "
         "(_ssl.c:1006)>", "tls"),
        ("<urlopen error _ssl.c:990: The handshake operation timed out>", "timeout"),
        ("IncompleteRead(53 bytes read, 99 more expected)", "body_truncated"),
        ("unknown url type: 'image.jpg'", "bad_url"),
        ("<urlopen error unknown url type: htps>", "bad_scheme"),
        ("'ascii' codec can't encode character '\\xe4' in position 5: ordinal not in range(128)", "bad_url"),
        ("Use of image disallowed by X-Robots-Tag directive", "x_robots_tag"),
        ("hash mismatch", "bad_response"),
    ],
)  # fmt: skip
def test_messages_of_failed_downloads(message: str, reason: str) -> None:
    assert reason_of("failed_to_download", message) == reason


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("Image decoding error", "not_an_image"),
        ("image too small", "too_small"),
        ("image area too large", "too_many_pixels"),
        ("aspect ratio too large", "aspect_ratio"),
        ("OpenCV(4.14.0) :-1: error: (-5:Bad argument) something else", "image_truncated"),
    ],
)
def test_messages_of_failed_resizes(message: str, reason: str) -> None:
    assert reason_of("failed_to_resize", message) == reason


def test_an_image_that_does_not_open_is_not_a_success() -> None:
    img2dataset_rows = {"status": "success", "error_message": None}
    sample = import_row({"uid": "u"}, img2dataset_rows, ImageError("not_an_image", "starts with b'<'"), 10**6)
    assert (sample["status"], sample["reason"]) == ("invalid", "not_an_image")
