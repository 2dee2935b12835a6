"""Lists that somebody made to break the reader, or that a crash cut: bounded in memory, and named."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.intake.lists.columns import Wanted
from pipeline.intake.lists.files import read_columns
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError

# Of a process that has read nothing, some 100 MiB are used.
_MEMORY_LIMIT_MIB = 500
_CHILD = r"""
import re, sys
from pathlib import Path
from pipeline.intake.lists.columns import Wanted
from pipeline.intake.lists.files import read_columns
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError
rows = 0
try:
    for batch in read_columns(Storage("/"), sys.argv[1], "auto", Wanted(url="url", columns=("url",))):
        rows += len(batch.numbers)
    print(rows, "rows")
except CapfiltError as error:
    print(error)
# Not ru_maxrss: it counts what the parent held when it forked.
print(int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024)
"""


def read_in_child(path: Path, limit_mib: int = _MEMORY_LIMIT_MIB) -> str:
    """Read a list in a process of its own and return what it said, having checked its memory."""
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(path)], capture_output=True, text=True, check=True, timeout=120
    )
    printed, peak_mib = done.stdout.splitlines()
    assert int(peak_mib) < limit_mib, f"{peak_mib} MiB: {printed}"
    return printed.removeprefix(str(path))


def packed(path: Path, start: bytes, repeated: bytes, times: int) -> Path:
    """Write a file of gzip members: its start, then one piece again and again."""
    member = gzip.compress(repeated, 6, mtime=0)
    path.write_bytes(gzip.compress(start, mtime=0) + member * times)
    return path


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("line.jsonl.gz", b'{"url": "http://a/1"}\n{"url": "'),
        ("item.json.gz", b'[{"url": "http://a/1"}, {"url": "'),
        ("cell.csv.gz", b'url\nhttp://a/1\n"'),
        ("line.tsv.gz", b"url\nhttp://a/1\n"),
        ("line.txt.gz", b"http://a/1\n"),
    ],
)
def test_row_without_an_end_is_named(tmp_path: Path, name: str, start: bytes) -> None:
    message = read_in_child(packed(tmp_path / name, start, b"0" * (10 << 20), 60))
    place = {"line.jsonl.gz": "line 2", "item.json.gz": "item 2", "line.txt.gz": "line 2"}.get(name, "line 3")
    assert message.startswith(f": {place}: ") and "more than 16 MiB" in message


def test_row_of_very_many_lines_is_named(tmp_path: Path) -> None:
    packed(tmp_path / "a.csv.gz", b'url\nhttp://a/1\n"\n', b'","\n' * 1_000_000, 40)
    assert read_in_child(tmp_path / "a.csv.gz").startswith(": line 3: a row of more than 16 MiB begins here")


@pytest.mark.parametrize("codec", ["gzip", "bz2", "zstd"])
def test_list_that_is_mostly_repetition_is_a_bomb(tmp_path: Path, codec: str) -> None:
    line = b"x" * ((1 << 20) - 1) + b"\n"
    with pa.CompressedOutputStream(str(tmp_path / "a.tsv.zst"), codec) as file:
        file.write(b"url\n")
        for _ in range(80):
            file.write(line)
    message = read_in_child(tmp_path / "a.tsv.zst")
    assert ": cannot be read: it decompresses to more than 100 times its size" in message
    assert message.startswith(": line 6")  # 64 MiB in


def test_small_lists_may_repeat_themselves(tmp_path: Path) -> None:
    packed(tmp_path / "a.tsv.gz", b"url\n", b"\n" * 100_000 + b"http://a/1\n" * 1_000, 20)
    assert read_in_child(tmp_path / "a.tsv.gz") == "20000 rows"


# -- Parquet -------------------------------------------------------------------------------------------------


def write(path: Path, urls: pa.Array, **options: object) -> Path:
    pq.write_table(pa.table({"url": urls}), path, compression="zstd", store_schema=False, **options)
    return path


def dictionary(entries: list[str], repeats: int) -> pa.DictionaryArray:
    """Return the first entry once, then the others again and again."""
    indices = [0, *(1 + n % (len(entries) - 1) for n in range(repeats))]
    return pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32()), entries)


def test_parquet_cell_of_half_a_gigabyte(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", pa.array(["x" * (80 << 20)]), use_dictionary=False)
    assert path.stat().st_size < 100_000
    assert read_in_child(path).startswith(": row group 1 has 1 values, 83,8")


def test_parquet_page_of_nothing_but_one_letter(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", pa.array(["x" * (1 << 20)] * 80), use_dictionary=False)
    assert read_in_child(path).startswith(": row group 1 has 80 values, 83,8")


def test_parquet_dictionary_with_one_long_entry(tmp_path: Path) -> None:
    """Eight MiB in each of 300 rows, out of 3 kB: decoded a few rows at a time."""
    urls = dictionary(["http://a/1", "http://a/" + "x" * (8 << 20)], 300)
    path = write(tmp_path / "a.parquet", urls, dictionary_pagesize_limit=1 << 30)
    assert path.stat().st_size < 10_000
    assert read_in_child(path) == "301 rows"


def test_parquet_dictionary_with_an_entry_that_only_its_rows_make_large(tmp_path: Path) -> None:
    """100 kB in each of 8000 rows, out of one entry: no row is large, and a batch of them is not either."""
    urls = dictionary(["http://a/1", "http://a/" + "x" * 100_000], 8000)
    path = write(tmp_path / "a.parquet", urls, dictionary_pagesize_limit=1 << 30)
    assert read_in_child(path) == "8001 rows"


def test_parquet_dictionary_entry_that_is_not_a_url(tmp_path: Path) -> None:
    urls = dictionary(["http://a/1", "x" * (20 << 20)], 5000)
    path = write(tmp_path / "a.parquet", urls, dictionary_pagesize_limit=1 << 30)
    assert read_in_child(path).startswith(": row 2: url has more than 16 MiB")


def test_parquet_list_of_one_long_entry_again_and_again(tmp_path: Path) -> None:
    texts = dictionary(["a", "x" * (4 << 20)], 999)
    nested = pa.ListArray.from_arrays(pa.array([0, 1, 1000], pa.int32()), texts)
    path = write(tmp_path / "a.parquet", nested, dictionary_pagesize_limit=1 << 30)
    assert read_in_child(path).startswith(": row 2: url has more than 16 MiB")


def test_parquet_values_that_repeat_their_beginnings(tmp_path: Path) -> None:
    urls = [f"{'x' * (8 << 20)}{n}" for n in range(64)]
    path = write(
        tmp_path / "a.parquet",
        pa.array(urls),
        use_dictionary=False,
        column_encoding={"url": "DELTA_BYTE_ARRAY"},
    )
    assert read_in_child(path) == "64 rows"


def test_parquet_with_sixty_million_missing_urls(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", pa.nulls(60_000_000, pa.string()), row_group_size=60_000_000)
    assert read_in_child(path).startswith(": row group 1 has 60,000,000 values")


def test_packed_parquet_is_bounded_too(tmp_path: Path) -> None:
    packed(tmp_path / "a.parquet.gz", b"PAR1", b"0" * (10 << 20), 10)
    assert "it decompresses to more than 100 times its size" in read_in_child(tmp_path / "a.parquet.gz")


# -- JSON that parsers do not survive ------------------------------------------------------------------------


def error_of(path: Path, *columns: str) -> str:
    wanted = Wanted(url="url", caption="caption", columns=columns or ("url",))
    with pytest.raises(CapfiltError) as error:
        list(read_columns(Storage("/"), str(path), "auto", wanted))
    assert str(error.value).startswith(str(path))
    return str(error.value).removeprefix(str(path))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("[" * 100_000 + "]" * 100_000, "cannot be used: nested more than 64 levels deep"),
        ('{"a":' * 70 + "1" + "}" * 70, "cannot be used: nested more than 64 levels deep"),
        ("[" * 100_000, "more than 64 levels deep"),
        ("9" * 5000, "cannot be used: a number has thousands of digits"),
    ],
    ids=["arrays", "objects", "open", "digits"],
)
@pytest.mark.parametrize("form", ["lines", "array"])
def test_json_that_python_cannot_hold(tmp_path: Path, value: str, expected: str, form: str) -> None:
    row = f'{{"url": "http://a/2", "x": {value}}}'
    first = json.dumps({"url": "http://a/1", "x": 0, "caption": "[[[[ {{{{ " * 40})
    path = tmp_path / "a.json"
    path.write_text(f"{first}\n{row}\n" if form == "lines" else f"[{first}, {row}]")
    message = error_of(path, "url", "x")
    assert message.startswith(": line 2: " if form == "lines" else ": item 2: ")
    assert expected in message


def test_header_of_a_million_columns_is_cut(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",".join(f"column{n}" for n in range(1_000_000)) + "\n")
    assert len(error_of(tmp_path / "a.csv")) < 500


def test_names_in_messages_cannot_steer_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\x1b[31mred,b\n1,2\n")
    assert "\x1b" not in error_of(tmp_path / "a.csv")


def test_array_is_streamed(tmp_path: Path) -> None:
    """BLIP's own lists are one line of millions of objects; memory must not hold them."""
    with (tmp_path / "a.json").open("w") as file:
        file.write("[")
        for n in range(200_000):
            file.write(f'{", " if n else ""}{{"url": "http://a/{n}", "caption": "{"word " * 80}"}}')
        file.write("]")
    assert (tmp_path / "a.json").stat().st_size > 80_000_000
    assert read_in_child(tmp_path / "a.json", limit_mib=220) == "200000 rows"
