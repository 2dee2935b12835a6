"""Lists as files: every format is read alike, and a list that cannot be read is named with the row."""

import csv
import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.listcolumns import Wanted
from pipeline.lists import BATCH_ROWS, find_files, read_columns
from pipeline.storage import Storage
from schemas.errors import CapfiltError

ROWS = [
    {"url": "http://a/1", "caption": 'a "quoted", word', "n": "1"},
    {"url": "http://ä/ü?x=1", "caption": "naïve 日本 🙂", "n": "2"},
    {"url": None, "caption": "no url", "n": "3"},
    {"url": "http://a/4", "caption": None, "n": None},
]


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=2)


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with opened(path) as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_tsv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with opened(path) as file:
        for cells in [list(rows[0]), *(row.values() for row in rows)]:
            file.write("\t".join(cell or "" for cell in cells) + "\n")


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with opened(path) as file:
        for row in rows:
            file.write(json.dumps({name: value for name, value in row.items() if value is not None}) + "\n\n")


def opened(path: Path) -> Any:
    opener = gzip.open if path.suffix == ".gz" else open
    return opener(path, "wt", encoding="utf-8", newline="")


def read(path: Path, *columns: str, form: str = "auto") -> list[dict[str, Any]]:
    return [row for _, row in read_numbered(path, *columns, form=form)]


def read_numbered(path: Path, *columns: str, form: str = "auto") -> list[tuple[str, dict[str, Any]]]:
    """Return where each row is, and the row."""
    wanted = Wanted(url="url", caption="caption", columns=columns)
    rows = []
    for batch in read_columns(Storage(str(path.parent)), str(path), form, wanted):
        for number, cells in enumerate(zip(*batch.columns.values(), strict=True)):
            rows.append((batch.place(number), dict(zip(batch.columns, cells, strict=True))))
    return rows


def complaint(path: Path, *columns: str, form: str = "auto") -> str:
    with pytest.raises(CapfiltError) as error:
        read(path, *(columns or ("url",)), form=form)
    assert str(error.value).startswith(str(path))
    return str(error.value).removeprefix(str(path))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("list.parquet", write_parquet),
        ("list.csv", write_csv),
        ("list.csv.gz", write_csv),
        ("list.tsv", write_tsv),
        ("LIST.TSV.gz", write_tsv),
        ("list.jsonl", write_jsonl),
        ("list.jsonl.gz", write_jsonl),
        ("list.json", write_jsonl),
    ],
)
def test_formats_agree(
    tmp_path: Path, name: str, write: Callable[[Path, Sequence[dict[str, Any]]], None]
) -> None:
    write(tmp_path / name, ROWS)
    assert read(tmp_path / name, "url", "caption", "n") == ROWS
    assert read(tmp_path / name, "caption") == [{"caption": row["caption"]} for row in ROWS]


def test_format_can_be_told(tmp_path: Path) -> None:
    write_csv(tmp_path / "list.dat", ROWS)
    assert read(tmp_path / "list.dat", "url", "caption", "n", form="csv") == ROWS
    assert "its name does not tell the format" in complaint(tmp_path / "list.dat")


def test_csv_keeps_line_breaks_and_skips_the_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes('\ufeffurl,caption\r\nhttp://a/1,"two\nlines"\r\n\r\n'.encode())
    assert read(tmp_path / "a.csv", "url", "caption") == [{"url": "http://a/1", "caption": "two\nlines"}]


def test_tsv_has_no_quoting(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('url\tcaption\r\nhttp://a/1\t"half a quote\r\nhttp://a/2\ta "b" c\r\n')
    assert [row["caption"] for row in read(tmp_path / "a.tsv", "caption")] == ['"half a quote', 'a "b" c']


def test_lone_surrogates_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"url": "http://a/\\ud83d\\ude42", "caption": ["\\uD800x"]}\n')
    assert read(tmp_path / "a.jsonl", "url", "caption") == [{"url": "http://a/🙂", "caption": ["?x"]}]


def test_batches_are_bounded_and_in_order(tmp_path: Path) -> None:
    count = 2 * BATCH_ROWS + 10
    (tmp_path / "a.tsv").write_text("url\n" + "".join(f"http://a/{n}\n" for n in range(count)))
    wanted = Wanted(url="url", columns=("url",))
    batches = list(read_columns(Storage(str(tmp_path)), str(tmp_path / "a.tsv"), "auto", wanted))
    assert [len(batch.columns["url"]) for batch in batches] == [BATCH_ROWS, BATCH_ROWS, 10]
    assert [url for batch in batches for url in batch.columns["url"]] == [f"http://a/{n}" for n in range(count)]


# -- what cannot be read -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "write"), [("a.parquet", write_parquet), ("a.csv", write_csv), ("a.jsonl", write_jsonl)]
)
def test_missing_column_names_the_nearest(tmp_path: Path, name: str, write: Callable[..., None]) -> None:
    write(tmp_path / name, [{"URL": "http://a/1", "captions": "x", " Caption ": "y"}])
    assert complaint(tmp_path / name, "url") == (
        ": no column 'url'; did you mean URL? (it has URL, captions,  Caption ); set url_column"
    )
    assert complaint(tmp_path / name, "caption").startswith(": no column 'caption'; did you mean ' Caption '? (")
    assert complaint(tmp_path / name, "captoins").startswith(": no column 'captoins'; did you mean captions? (")


def test_missing_header_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "cc3m.tsv").write_text("a cat\thttp://a/1\n")
    assert "put a header line" in complaint(tmp_path / "cc3m.tsv")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.parquet", b"not parquet", ": cannot be read: "),
        ("a.parquet", b"", ": cannot be read: "),
        ("a.csv", b"url,caption\nhttp://a/1,x\nhttp://a/2\n", ": line 3: 1 field, the header has 2"),
        ("a.csv", b'url\n"x\n', ": line 2: unexpected end of data"),
        ("a.csv", b'url\nx\n"x"y\n', ": line 3: ',' expected after '\"'"),
        ("a.tsv", b"url\tcaption\nx\ty\tz\n", ": line 2: 3 fields, the header has 2"),
        ("a.csv", b"url\nhttp://a/\xe9\n", ": line 2: not UTF-8 text (byte 0xe9 at byte 10)"),
        ("a.jsonl", b'{"url": "x"}\n{"url": \n', ": line 2: not JSON: Expecting value at column 8"),
        ("a.jsonl", b'{"url": "x"}\n3\n', ": line 2: 3 is not an object"),
    ],
)
def test_damage_is_named(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert complaint(tmp_path / name, "url").startswith(expected)


# -- finding -------------------------------------------------------------------------------------------------


def found(folder: Path, *inputs: str) -> list[str]:
    files = find_files([str(folder / name) for name in inputs], Storage(str(folder)), "source.s.input")
    return [str(Path(file.path).relative_to(folder)) for file in files]


def test_globs_are_sorted_and_files_named_once(tmp_path: Path) -> None:
    for name in ("b.csv", "a.csv", "c[1].csv", "deep/er/x.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("url\n")
    assert found(tmp_path, "b.csv", "*.csv") == ["b.csv", "a.csv", "c[1].csv"]
    assert found(tmp_path, "c[1].csv", "**/x.csv") == ["c[1].csv", "deep/er/x.csv"]


def test_inputs_that_name_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(CapfiltError, match=r"source\.s\.input: no file matches .*/\*\.csv"):
        found(tmp_path, "*.csv")
    with pytest.raises(CapfiltError, match=r"folder is a folder; name its files .* format = \"img2dataset\""):
        found(tmp_path, "folder")
    with pytest.raises(CapfiltError, match=r"source\.s\.input: nope://x cannot be listed"):
        find_files(["nope://x"], Storage(str(tmp_path)), "source.s.input")


def test_remote_lists_are_read_alike(tmp_path: Path) -> None:
    storage = Storage("memory://lists")
    write_csv(tmp_path / "a.csv.gz", ROWS)
    storage.write("memory://lists/in/a.csv.gz", (tmp_path / "a.csv.gz").read_bytes())
    (file,) = find_files(["memory://lists/in/*.gz"], Storage(str(tmp_path)), "source.s.input")
    assert file.path.startswith("memory://")
    (batch,) = read_columns(Storage(str(tmp_path)), file.path, "auto", Wanted(url="url", columns=("url",)))
    assert batch.columns == {"url": [row["url"] for row in ROWS]}
