"""Lists as files: every format is read alike, and a list that cannot be read is named with the row."""

import bz2
import csv
import gzip
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.intake.lists.columns import Wanted
from pipeline.intake.lists.files import BATCH_ROWS, find_files, read_columns
from pipeline.intake.lists.text_columns import not_blank
from pipeline.storage.storage import Storage
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


def error_of(path: Path, *columns: str, form: str = "auto") -> str:
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
    assert "its name does not tell the format" in error_of(tmp_path / "list.dat")


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
    assert [url for batch in batches for url in batch.columns["url"]] == [
        f"http://a/{n}" for n in range(count)
    ]


# -- what cannot be read -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "write"), [("a.parquet", write_parquet), ("a.csv", write_csv), ("a.jsonl", write_jsonl)]
)
def test_missing_column_names_the_nearest(tmp_path: Path, name: str, write: Callable[..., None]) -> None:
    write(tmp_path / name, [{"URL": "http://a/1", "captions": "x", " Caption ": "y"}])
    assert error_of(tmp_path / name, "url") == (
        ": no column 'url'; did you mean URL? (it has URL, captions,  Caption ); set url_column"
    )
    assert error_of(tmp_path / name, "caption").startswith(
        ": no column 'caption'; did you mean ' Caption '? ("
    )
    assert error_of(tmp_path / name, "captoins").startswith(
        ": no column 'captoins'; did you mean captions? ("
    )


def test_missing_header_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "cc3m.tsv").write_text("a cat\thttp://a/1\n")
    assert "put a header line" in error_of(tmp_path / "cc3m.tsv")


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
    assert error_of(tmp_path / name, "url").startswith(expected)


# -- finding -------------------------------------------------------------------------------------------------


def found_names(folder: Path, *inputs: str) -> list[str]:
    files = find_files([str(folder / name) for name in inputs], Storage(str(folder)), "source.s.input")
    return [str(Path(file.path).relative_to(folder)) for file in files]


def test_globs_are_sorted_and_files_named_once(tmp_path: Path) -> None:
    for name in ("b.csv", "a.csv", "c[1].csv", "deep/er/x.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("url\n")
    assert found_names(tmp_path, "b.csv", "*.csv") == ["b.csv", "a.csv", "c[1].csv"]
    assert found_names(tmp_path, "c[1].csv", "**/x.csv") == ["c[1].csv", "deep/er/x.csv"]


def test_inputs_that_name_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(CapfiltError, match=r"source\.s\.input: no file matches .*/\*\.csv"):
        found_names(tmp_path, "*.csv")
    with pytest.raises(CapfiltError, match=r"folder is a folder; name its files .* format = \"img2dataset\""):
        found_names(tmp_path, "folder")
    with pytest.raises(CapfiltError, match=r"source\.s\.input: nope://x cannot be listed"):
        find_files(["nope://x"], Storage(str(tmp_path)), "source.s.input")


def test_remote_lists_are_read_alike(tmp_path: Path) -> None:
    storage = Storage("memory://lists")
    write_csv(tmp_path / "a.csv.gz", ROWS)
    storage.write("in/a.csv.gz", (tmp_path / "a.csv.gz").read_bytes())
    (file,) = find_files(["memory://lists/in/*.gz"], Storage(str(tmp_path)), "source.s.input")
    assert file.path.startswith("memory://")
    (batch,) = read_columns(Storage(str(tmp_path)), file.path, "auto", Wanted(url="url", columns=("url",)))
    assert batch.columns == {"url": [row["url"] for row in ROWS]}


# -- as lists are published, exported and saved --------------------------------------------------------------

PAIRS = [{"url": "http://a/1", "caption": "one"}, {"url": "http://a/2", "caption": "two"}]


def save(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.mark.parametrize("name", ["a.tsv.GZ", "a.TSV.gzip", "a.tsv.bz2", "a.tsv.zst", "A.TSV.ZSTD", "a.tsv"])
@pytest.mark.parametrize("codec", ["gzip", "bz2", "zstd"])
def test_packing_is_told_by_the_content(tmp_path: Path, name: str, codec: str) -> None:
    text = b"url\tcaption\nhttp://a/1\tone\nhttp://a/2\ttwo\n"
    halves = (
        [bytes(pa.compress(part, codec=codec, asbytes=True)) for part in (text[:20], text[20:])]
        if codec in ("gzip", "zstd")
        else [bz2.compress(text[:20]), bz2.compress(text[20:])]
    )
    assert read(save(tmp_path / name, b"".join(halves)), "url", "caption") == PAIRS


@pytest.mark.parametrize("name", ["a.csv.gz", "a.tsv.bz2", "a.jsonl.zst", "a.json", "a.txt"])
def test_empty_lists_have_no_rows(tmp_path: Path, name: str) -> None:
    assert read(save(tmp_path / name, b""), "url") == []
    assert read(save(tmp_path / name, gzip.compress(b"", mtime=0)), "url") == []


@pytest.mark.parametrize("codec", ["gzip", "bz2", "zstd"])
def test_cut_packed_lists_are_named_by_the_line(tmp_path: Path, codec: str) -> None:
    text = "url\n" + "".join(f"http://a/{n * 7919 % 10007}\n" for n in range(200_000))
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(text.encode())
    path = save(tmp_path / "a.csv", sink.getvalue().to_pybytes()[:-100])
    assert re.match(r": line [\d,]+: cannot be read: (Compressed file ended|Truncated)", error_of(path))


@pytest.mark.parametrize("name", ["a.parquet.gz", "a.PARQUET.zst", "a.pq.bz2"])
def test_packed_parquet(tmp_path: Path, name: str) -> None:
    write_parquet(tmp_path / "plain", ROWS)
    codec = {"gz": "gzip", "zst": "zstd", "bz2": "bz2"}[name.rpartition(".")[2]]
    with pa.CompressedOutputStream(str(tmp_path / name), codec) as file:
        file.write((tmp_path / "plain").read_bytes())
    assert read(tmp_path / name, "url", "caption", "n") == ROWS


@pytest.mark.parametrize("start", ["", "\ufeff", " \n ", "\ufeff\r\n"])
@pytest.mark.parametrize("between", [", ", ",\r\n", "\n ,\t"])
def test_json_array(tmp_path: Path, start: str, between: str) -> None:
    items = [*PAIRS, {"caption": "é🙂 [{}] \\ud83d", "url": None, "x": [{"y": 1}]}]
    text = start + "[ " + between.join(json.dumps(item, ensure_ascii=False) for item in items) + " ]\n\n"
    text = text.replace("\\\\ud83d", "\\ud83d")
    rows = read_numbered(save(tmp_path / "a.json", text), "url", "caption")
    assert [place for place, _ in rows] == ["item 1", "item 2", "item 3"]
    assert [row for _, row in rows] == [*PAIRS, {"url": None, "caption": "é🙂 [{}] ?"}]


def test_json_array_items_may_be_cut_anywhere_by_the_buffer(tmp_path: Path) -> None:
    items = [
        {"url": f"http://a/{n}", "caption": '\\"é🙂\\u00e9 ' * (n % 97), "n": -n * 1.5} for n in range(4000)
    ]
    assert read(save(tmp_path / "a.json", json.dumps(items)), "url", "caption", "n") == items
    assert read(save(tmp_path / "a.json", json.dumps(items, ensure_ascii=False, indent=1)), "n", "url") == [
        {"n": item["n"], "url": item["url"]} for item in items
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"url": "x"}, {"url": ]', ": item 2: not JSON: Expecting value at its character 9"),
        ('[{"url": "x"}, {"url": "y"', ": item 2: not JSON: Expecting ',' delimiter"),
        ('[{"url": "x"} {"url": "y"}]', ": item 1: not JSON: ']' is expected after it, found '{'"),
        ('[{"url": "x"}', ": item 1: not JSON: ']' is expected after it, the file ends"),
        ('[{"url": "x"}, ["y"]]', ': item 2: ["y"]] is not an object'),
        ('[{"url": "x"}, null]', ": item 2: null] is not an object"),
        ('[{"url": "x"}]\n[{"url": "y"}]', ": item 1: the array ends here, and more text follows"),
        ('["http://a/1"]', ': item 1: "http://a/1"] is not an object'),
        ('{"url": "x"} {"url": "y"}\n', ": line 1: not JSON: more text after the value at column 13"),
        ('{\n"url": "x"\n}\n', ": line 1: not JSON: Expecting property name"),
        ('{"url": "x", "url": "y"}\n', ": line 1: the object has 'url' twice"),
        ('[{"url": "x", "url": "y"}]', ": item 1: the object has 'url' twice"),
        ('{"url": "x", "\\u0075rl": "y"}\n', ": line 1: the object has 'url' twice"),
        ('{"u\\u0072\\u006C" : "x", "url": "y"}\n', ": line 1: the object has 'url' twice"),
        ('[{"url": "x"}, {"ur\\u006c": "a \\"b\\": c", "url": "y"}]', ": item 2: the object has 'url' twice"),
        ('[{"u\\u0072l"\n: "x", "\\u0075rl": "y"}]', ": item 1: the object has 'url' twice"),
        ('{"url": "x"}\n{"url": "caf\udce9"}\n', ": line 2: not UTF-8 text (byte 0xe9 at byte 13)"),
        ('[{"url": "x"}, {"url": "caf\udce9"}]', ": item 2: not UTF-8 text (byte 0xe9 at byte 28)"),
        ('{"caption": "x"}\n{}\n', ": no column 'url' (it has caption); set url_column"),
        ("[{}]", ": no column 'url' (it has none); set url_column"),
    ],
)
def test_faulty_json_is_named(tmp_path: Path, text: str, expected: str) -> None:
    assert error_of(save(tmp_path / "a.json", text.encode("utf-8", "surrogateescape"))).startswith(expected)


def test_json_keys_that_nobody_asks_for_may_repeat(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jsonl", '{"url": "x", "n": 1, "n": 2}\n[]\n')
    assert error_of(path) == ": line 2: [] is not an object with the columns"
    assert read(save(path, '{"url": "x", "n": 1, "n": 2}\n'), "url") == [{"url": "x"}]


@pytest.mark.parametrize(
    ("name", "line", "advice"),
    [
        ("a.tsv", "a cat\thttp://a/1", "put a header line (caption<TAB>url) above it"),
        ("a.tsv", "http://a/1\ta cat", "put a header line (url<TAB>caption) above it"),
        ("a.csv", "http://a/1,a cat", "put a header line (url,caption) above it"),
        ("a.csv", '"a cat, two",https://a/1', "put a header line (caption,url) above it"),
        ("a.csv", "http://a/1", 'put the line url above it, and set caption_column = ""'),
        (
            "a.tsv",
            "7\ta cat\thttp://a/1",
            "put a header line above it that names its 3 columns; number 3 is url",
        ),
        ("a.tsv", '"url"\t"caption"', 'set the source\'s format = "tsv-quoted"'),
        ("a.tsv", "url\tcaption\rhttp\tx\r", "its lines end in CR alone"),
        ("a.csv", "url;caption", "separated by semicolons, which no format here has"),
        (
            "a.csv",
            "url\tcaption",
            'separated by tabs: rename it to .tsv, or set the source\'s format = "tsv"',
        ),
        (
            "a.tsv",
            "url,caption",
            'separated by commas: rename it to .csv, or set the source\'s format = "csv"',
        ),
    ],
)
def test_header_that_fits_is_advised(tmp_path: Path, name: str, line: str, advice: str) -> None:
    message = error_of(save(tmp_path / name, line + "\n" + line + "\n"), "url", "caption")
    assert message.startswith(": no column ") and advice in message
    header = advice.partition("(")[2].partition(")")[0].replace("<TAB>", "\t")
    if header:
        path = save(tmp_path / name, f"{header}\n{line}\n")
        assert [row["url"].partition("/")[0] for row in read(path, "url", "caption")] in (
            ["http:"],
            ["https:"],
        )


QUOTED = (
    'url\tcaption\nhttp://a/1\t"He said ""hello""\nand left"\nhttp://a/2\t"after\ta tab"\nhttp://a/3\tplain\n'
)


def test_quoted_tsv(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tsv", QUOTED)
    assert error_of(path, "url") == (
        ": line 3: 1 field, the header has 2; there are quotes: "
        'if this TSV is quoted as a CSV is, set the source\'s format = "tsv-quoted"'
    )
    rows = read_numbered(path, "url", "caption", form="tsv-quoted")
    assert [row["caption"] for _, row in rows] == ['He said "hello"\nand left', "after\ta tab", "plain"]
    assert [place for place, _ in rows] == ["line 2", "line 4", "line 5"]


def test_cells_beyond_the_csv_modules_limit(tmp_path: Path) -> None:
    data = "data:image/png;base64," + "A" * 200_000
    rows = [data, "http://a/2"]
    quoted = read(save(tmp_path / "a.csv", f'url,caption\n"{data}",x\nhttp://a/2,y\n'), "url")
    plain = read(save(tmp_path / "a.csv", f"url,caption\n{data},x\nhttp://a/2,y\n"), "url", "caption")
    assert [row["url"] for row in quoted] == [row["url"] for row in plain] == rows
    assert [row["caption"] for row in plain] == ["x", "y"]
    assert read(save(tmp_path / "a.tsv", f"caption\turl\n{'x' * 200_000}\t{data}\n"), "url") == [
        {"url": data}
    ]
    message = error_of(save(tmp_path / "a.csv", f"url,caption\n{data},x,y\n"))
    assert message == ": line 2: 4 fields, the header has 2"


def test_a_row_over_several_lines_is_named_by_all(tmp_path: Path) -> None:
    path = save(tmp_path / "a.csv", 'url,caption\nhttp://a/1,x\nhttp://a/2,"two\nlines",z\n')
    assert error_of(path) == ": lines 3 to 4: 3 fields, the header has 2"
    path = save(tmp_path / "a.csv", 'url,caption\nhttp://a/1,"no end\nx\ny\n')
    assert error_of(path) == ": lines 2 to 4: unexpected end of data"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("url\thttp\n".encode("utf-16"), ": is UTF-16 text; convert it: iconv"),
        (b"PAR1xxxxPAR1", ": is Parquet; name it .parquet"),
        (b"PK\x03\x04rest", ": is a zip archive or a spreadsheet"),
        (b"\xfd7zXZ\x00rest", ": is an xz archive; unpack it"),
        (gzip.compress(gzip.compress(b"url\nx\n", mtime=0), mtime=0), ": is compressed twice; unpack it"),
        ("url\ncafé\n".encode("latin-1"), ": line 2: not UTF-8 text (byte 0xe9 at byte 4)"),
    ],
)
@pytest.mark.parametrize("name", ["a.csv", "a.tsv.gz", "a.jsonl", "a.txt"])
def test_what_is_not_text_is_called_by_its_name(
    tmp_path: Path, data: bytes, expected: str, name: str
) -> None:
    if b"caf" in data and name in ("a.jsonl", "a.txt"):
        return
    assert error_of(save(tmp_path / name, data)).startswith(expected)


def test_plain_list_of_urls(tmp_path: Path) -> None:
    path = save(tmp_path / "a.txt", "\ufeffhttp://a/1\r\n\r\nhttp://a/2\n")
    assert [row["url"] for row in read(path, "url")] == ["http://a/1", None, "http://a/2"]
    assert error_of(path, "url", "caption").endswith('without captions, set caption_column = ""')
    assert 'set the source\'s format to "tsv"' in error_of(save(path, "url\tcaption\nhttp://a/1\tx\n"))
    assert "'a red ball' is not a URL" in error_of(save(path, "a red ball\na blue one\n"), "url", "caption")


@pytest.mark.parametrize("end", ["", ".gz"])
def test_pair_of_url_and_caption_files(tmp_path: Path, end: str) -> None:
    packed = gzip.compress if end else bytes
    path = save(tmp_path / f"x_urls.txt{end}", packed(b"http://a/1\nhttp://a/2\n"))
    beside = save(tmp_path / f"x_captions.txt{end}", packed(b"one\ntwo\n"))
    assert read(path, "url", "caption") == PAIRS
    assert read(path, "caption", "url") == PAIRS
    save(beside, packed(b"one\n"))
    with pytest.raises(CapfiltError, match=r"x_captions\.txt(\.gz)?: has fewer lines than the file"):
        read(path, "url", "caption")


# -- Parquet as others write it ------------------------------------------------------------------------------

TEXT_COLUMNS = [
    pa.array(["http://a/1", None]),
    pa.array(["http://a/1", None], pa.large_string()),
    pa.array(["http://a/1", None], pa.string_view()),
    pa.array(["http://a/1", None]).dictionary_encode(),
]


@pytest.mark.parametrize("urls", TEXT_COLUMNS, ids=lambda column: str(column.type)[:12])
@pytest.mark.parametrize("stored", [True, False])
def test_parquet_text_columns(tmp_path: Path, urls: pa.Array, stored: bool) -> None:
    pq.write_table(pa.table({"url": urls}), tmp_path / "a.parquet", store_schema=stored)
    assert read(tmp_path / "a.parquet", "url") == [{"url": "http://a/1"}, {"url": None}]


def test_a_text_is_blank_where_python_says_so() -> None:
    letters = [chr(number) for number in range(sys.maxunicode + 1) if not 0xD800 <= number < 0xE000]
    texts = [*letters, "", None, " \u3000\n", " \0", "\u2003a"]
    expected = [bool(text) and not text.isspace() for text in texts]
    assert not_blank(pa.array(texts)).tolist() == expected
    assert not_blank(pa.array([], pa.string())).tolist() == []


def test_parquet_bytes_that_are_not_text_are_named_by_the_row(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(
        pa.string(), 2, pa.array([b"http://a/1", b"caf\xe9"], pa.binary()).buffers()
    )
    pq.write_table(pa.table({"url": broken}), tmp_path / "a.parquet")
    assert error_of(tmp_path / "a.parquet").startswith(": row 2: url: not UTF-8 text (byte 0xe9 at byte 4)")


@pytest.mark.parametrize("write", ["parquet", "csv", "tsv"])
def test_two_columns_of_one_name(tmp_path: Path, write: str) -> None:
    path = tmp_path / f"a.{write}"
    if write == "parquet":
        pq.write_table(pa.table([["http://a/1"], ["x"], ["y"]], names=["url", "caption", "caption"]), path)
    else:
        separator = "," if write == "csv" else "\t"
        path.write_text(
            "\n".join(separator.join(row) for row in (["url", "caption", "caption"], ["u", "x", "y"]))
        )
    assert error_of(path, "url", "caption") == ": 2 columns are called 'caption'; rename or remove one"
    assert len(read(path, "url")) == 1
