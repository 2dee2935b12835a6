"""Intake: lists into url shards, every distinct URL exactly once, whatever the lists hold."""

import json
import multiprocessing
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import parse_config
from pipeline.corpus.commit import ShardCommit
from pipeline.corpus.corpus_state import CorpusState
from pipeline.corpus.records import Records
from pipeline.digests import digest_json
from pipeline.intake import dedup
from pipeline.intake.read_lists import read_lists, unread_rows
from pipeline.intake.retries import queue_retries
from pipeline.shards.shard_files import write_parquet
from pipeline.shards.shard_reader import retried_elsewhere
from pipeline.shards.uids import sample_uid
from pipeline.stages.crawl import CrawlWorker
from pipeline.storage.storage import Storage
from schemas.config import CapfiltConfig
from schemas.errors import CapfiltError
from schemas.records import IntakeRecord, ShardTask
from schemas.tables import SAMPLES, URLS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "lists").mkdir()
    return tmp_path


def configured(
    folder: Path, source: str = "", samples_per_shard: int = 3, inputs: str = "lists/*"
) -> CapfiltConfig:
    text = (
        f'[corpus]\npath = "corpus"\nsamples_per_shard = {samples_per_shard}\n'
        f'[[source]]\nname = "s"\ninput = ["{inputs}"]\n{source}'
    )
    return parse_config(text, "corpus.toml", base_folder=folder)


def records_of(config: CapfiltConfig) -> Records:
    return Records(Storage(config.corpus.path))


def write_list(folder: Path, name: str, rows: Sequence[tuple[str | None, Any]]) -> None:
    columns = {"url": [url for url, _ in rows], "caption": [caption for _, caption in rows]}
    pq.write_table(pa.table(columns), folder / "lists" / name)


def take_in(config: CapfiltConfig) -> IntakeRecord | None:
    (outcome,) = read_lists(config, records_of(config), "run")
    assert (outcome.record is None) == ("nothing new" in str(outcome))
    if outcome.record is not None:
        batch = outcome.record
        assert (
            batch.rows_in == batch.rows_new + batch.rows_duplicate + batch.rows_known + batch.rows_without_url
        )
        assert batch.rows_new == sum(file.rows for file in batch.shards.values())
    return outcome.record


def rows_of(config: CapfiltConfig) -> list[dict[str, Any]]:
    """Return the rows of all url shards in order, checked against their records."""
    records, rows = records_of(config), []
    for (source, shard), record in sorted(records.url_shards().items()):
        table = pq.read_table(records.storage.open(record.outputs["parquet"].path))
        assert table.schema.equals(URLS)
        assert table.num_rows == record.rows_out > 0
        assert set(table["shard"].to_pylist()) == {shard}
        assert set(table["source"].to_pylist()) == {source}
        assert len(set(table["key"].to_pylist())) == table.num_rows
        rows += table.to_pylist()
    return rows


# -- lists ---------------------------------------------------------------------------------------------------


def test_url_is_taken_once_with_all_its_captions(folder: Path) -> None:
    write_list(
        folder, "a.parquet", [("http://a/1", "x"), ("http://a/2", "y"), (None, "z"), ("http://a/1", "w")]
    )
    write_list(
        folder, "b.parquet", [("  ", "q"), ("http://a/1", "x"), ("not a url", None), ("http://ü/3", " ")]
    )
    config = configured(folder)
    batch = take_in(config)
    assert batch is not None
    assert (
        batch.rows_in,
        batch.rows_new,
        batch.rows_duplicate,
        batch.rows_known,
        batch.rows_without_url,
    ) == (8, 4, 2, 0, 2)
    rows = rows_of(config)
    assert [(row["url"], row["captions"], row["input_rows"]) for row in rows] == [
        ("http://a/1", ["x", "w"], 3),
        ("http://a/2", ["y"], 1),
        ("not a url", [], 1),
        ("http://ü/3", [], 1),
    ]
    assert [row["key"] for row in rows] == ["0000000000", "0000000001", "0000000002", "0000100000"]
    assert [row["uid"] for row in rows] == [sample_uid("s", row["url"]) for row in rows]
    assert {(row["extra"], row["retry_of"]) for row in rows} == {(None, None)}


def test_lists_of_captions_and_extra_columns(folder: Path) -> None:
    lines = [
        {"url": "http://a/1", "caption": ["x", "y", "x", "", None], "width": 3, "tags": {"é": [1.5]}},
        {"url": "http://a/2", "width": float("nan")},
        {"url": "http://a/1", "caption": ["z", "y"], "width": 9},
    ]
    (folder / "lists/a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = configured(folder, 'extra_columns = ["width", "tags"]')
    take_in(config)
    first, second = rows_of(config)
    assert first["captions"] == ["x", "y", "z"]
    assert json.loads(first["extra"]) == {"width": 3, "tags": {"é": [1.5]}}
    assert (second["captions"], json.loads(second["extra"])) == ([], {"width": None, "tags": None})


def write_lines(folder: Path, name: str, *lines: str) -> None:
    (folder / "lists" / name).write_text("".join(f"{line}\n" for line in lines))


def test_json_captions_may_be_numbers_or_missing(folder: Path) -> None:
    """JSON has no type for a column: pandas writes NaN for a missing text, and digits alone as a number."""
    captions = ['"a"', "2019", "NaN", "null", "-1.5", "Infinity", '["b", 7, NaN, null, " ", "b"]', "[]"]
    write_lines(
        folder, "a.jsonl", *(f'{{"url": "http://a/{n}", "caption": {c}}}' for n, c in enumerate(captions))
    )
    config = configured(folder, samples_per_shard=99)
    take_in(config)
    assert [row["captions"] for row in rows_of(config)] == [
        ["a"],
        ["2019"],
        [],
        [],
        ["-1.5"],
        [],
        ["b", "7"],
        [],
    ]


@pytest.mark.parametrize(
    ("cell", "expected_message"),
    [
        ("true", "line 2: caption is True (bool) where text is expected"),
        ('["x", false]', "line 2: caption is False (bool) where text is expected"),
        ('{"en": "x"}', "line 2: caption is {'en': 'x'} (dict) where text is expected"),
        ('[["x"]]', "line 2: caption is ['x'] (list) where text is expected"),
    ],
)
def test_captions_that_are_not_text_are_named_by_their_line(
    folder: Path, cell: str, expected_message: str
) -> None:
    write_lines(folder, "a.jsonl", '{"url": "http://a/1"}', f'{{"url": "http://a/2", "caption": {cell}}}')
    with pytest.raises(CapfiltError) as error:
        take_in(configured(folder))
    assert str(error.value).endswith(f"a.jsonl: {expected_message}")


def test_places_are_right_behind_rows_that_are_left_out(folder: Path) -> None:
    write_lines(
        folder, "a.jsonl", '{"url": null}', "", '{"url": " "}', '{"url": "http://a/1", "caption": true}'
    )
    with pytest.raises(CapfiltError, match=r"a\.jsonl: line 4: caption is True"):
        take_in(configured(folder))


CAPTION_COLUMNS = [
    pa.array([["x", "y", "x", None, ""], None]),
    pa.array([["x", "y"], []], pa.large_list(pa.large_string())),
    pa.array([[b"x", b"y"], []], pa.list_(pa.binary())),
    pa.array([["x", "y"], [None, " "]], pa.list_(pa.string(), 2)),
    pa.ListArray.from_arrays([0, 2, 2], pa.array(["x", "y"]).dictionary_encode()),
]


@pytest.mark.parametrize("captions", CAPTION_COLUMNS, ids=lambda column: str(column.type)[:20])
def test_parquet_lists_of_captions(folder: Path, captions: pa.Array) -> None:
    urls = pa.array([b"http://a/1", b"http://a/2"], pa.large_binary())
    pq.write_table(pa.table({"url": urls, "caption": captions}), folder / "lists/a.parquet")
    config = configured(folder)
    take_in(config)
    assert [(row["url"], row["captions"]) for row in rows_of(config)] == [
        ("http://a/1", ["x", "y"]),
        ("http://a/2", []),
    ]


_BLANK = ["", " ", "\t\n", "\u00a0", "\u2003\u3000", "\x1c\x1f", "\x85"]
_ODD_TEXTS = [None, *_BLANK, "\u200b", "\u732b", "\U0001f408", " a ", "0", "\x00"]


@pytest.mark.parametrize(
    "dtype", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_texts_that_stay_in_arrow_give_the_shards_that_objects_give(folder: Path, dtype: pa.DataType) -> None:
    """What is a missing or a blank URL or caption, and what is hashed, is the same on both ways."""
    urls = [text and f"http://h/{number % 9}{text}" for number, text in enumerate(_ODD_TEXTS)] + _ODD_TEXTS
    captions = _ODD_TEXTS[::-1] + _ODD_TEXTS
    columns = {name: pa.array(cells, pa.string()) for name, cells in (("url", urls), ("caption", captions))}
    pq.write_table(
        pa.table(
            {
                name: cells.dictionary_encode() if pa.types.is_dictionary(dtype) else cells.cast(dtype)
                for name, cells in columns.items()
            }
        ),
        folder / "lists" / "a.parquet",
    )
    in_arrow = configured(folder, inputs="lists/a.parquet")
    # A further column takes the rows through Python.
    pq.write_table(pa.table(columns | {"more": columns["url"]}), folder / "lists" / "b.parquet")
    as_objects = configured(folder, 'extra_columns = ["more"]', inputs="lists/b.parquet")
    as_objects = as_objects.model_copy(
        update={"corpus": as_objects.corpus.model_copy(update={"path": str(folder / "other")})}
    )
    for config in (in_arrow, as_objects):
        take_in(config)
    shards, others = (
        [
            pq.read_table(
                file.path if "://" in file.path else f"{config.corpus.path}/{file.path}"
            ).drop_columns("extra")
            for batch in records_of(config).intakes()
            for file in batch.shards.values()
        ]
        for config in (in_arrow, as_objects)
    )
    assert shards == others and len(shards) > 3
    counted = [records_of(config).intakes()[0].rows_without_url for config in (in_arrow, as_objects)]
    assert counted[0] == counted[1] > 6


def test_parquet_column_without_any_caption(folder: Path) -> None:
    """What pandas writes of a column of missing texts: NaN, or no type at all."""
    for name, captions in (("a", pa.array([float("nan"), None])), ("b", pa.nulls(2))):
        urls = [f"http://{name}/1", f"http://{name}/2"]
        pq.write_table(pa.table({"url": urls, "caption": captions}), folder / f"lists/{name}.parquet")
    config = configured(folder)
    take_in(config)
    assert [row["captions"] for row in rows_of(config)] == [[], [], [], []]


def test_extra_columns_hold_json_whatever_is_in_them(folder: Path) -> None:
    write_lines(
        folder,
        "a.jsonl",
        '{"url": "http://a/1", "caption": "x", "tags": {"a": [NaN, 1e999, {"b": -Infinity}]}}',
    )
    config = configured(folder, 'extra_columns = ["tags"]')
    take_in(config)

    def raise_error(constant: str) -> None:
        raise AssertionError(constant)

    (row,) = rows_of(config)
    assert json.loads(row["extra"], parse_constant=raise_error) == {"tags": {"a": [None, None, {"b": None}]}}


@pytest.mark.parametrize("lines", [("url\tcaption", "a red ball\thttp://a/1"), ("url", "a cat", "a dog")])
def test_lists_without_any_url_are_refused(folder: Path, lines: tuple[str, ...]) -> None:
    """A header over the wrong columns would make every caption a URL, for good."""
    write_lines(folder, "a.tsv", *lines)
    config = configured(folder, "" if "caption" in lines[0] else 'caption_column = ""')
    with pytest.raises(
        CapfiltError, match=r"a\.tsv: line 2: url is 'a (red ball|cat)', which is not a URL, and no"
    ):
        take_in(config)
    assert not (folder / "corpus").exists()


def test_lists_that_a_run_would_refuse_are_refused_by_a_plan(folder: Path) -> None:
    """The second list lacks the column: nobody should learn it from the crawl."""
    write_list(folder, "a.parquet", [("http://a/1", "x")])
    for name, lines in {
        "b.csv": ("url,text", "http://a/2,x"),
        "b.jsonl": ('{"url": "http://a/2", "text": "x"}',),
        "b.json": ('[{"url": "http://a/2", "text": "x"}]',),
        "b.tsv": ("http://a/2\tx",),
    }.items():
        write_lines(folder, name, *lines)
        config, messages = configured(folder), []
        for refused in (unread_rows, lambda config, records: read_lists(config, records, "run")):
            with pytest.raises(CapfiltError, match=rf"{re.escape(name)}: no column '(caption|url)'") as error:
                refused(config, records_of(config))
            messages.append(str(error.value))
        assert messages[0] == messages[1]
        (folder / "lists" / name).unlink()
    assert not (folder / "corpus").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("url,caption",), "the lists have no rows"),
        (("url,caption", "a cat,http://a/1"), "line 2: url is 'a cat', which is not a URL"),
    ],
)
def test_a_plan_refuses_the_lists_that_a_run_refuses(
    folder: Path, lines: tuple[str, ...], message: str
) -> None:
    write_lines(folder, "a.csv", *lines)
    config = configured(folder)
    for refused in (unread_rows, lambda config, records: read_lists(config, records, "run")):
        with pytest.raises(CapfiltError, match=message):
            refused(config, records_of(config))


def test_captions_in_a_file_of_their_own_belong_to_the_list(folder: Path) -> None:
    """A glob names both files of SBU's; a caption must not become a URL."""
    write_lines(folder, "sbu_urls.txt", "http://a/1", "http://a/2")
    write_lines(folder, "sbu_captions.txt", "one", "two")
    config = configured(folder)
    assert unread_rows(config, records_of(config)) == {"s": 2}
    take_in(config)
    assert [(row["url"], row["captions"]) for row in rows_of(config)] == [
        ("http://a/1", ["one"]),
        ("http://a/2", ["two"]),
    ]
    assert take_in(config) is None
    write_lines(folder, "sbu_captions.txt", "one", "zwei")
    batch = take_in(config)
    assert batch is not None and batch.rows_known == 2


def test_unchanged_lists_are_not_read_and_grown_ones_add_shards(folder: Path) -> None:
    write_list(folder, "a.parquet", [(f"http://a/{n}", "x") for n in range(5)])
    config = configured(folder)
    assert unread_rows(config, records_of(config)) == {"s": 5}
    take_in(config)
    before = rows_of(config)
    assert take_in(config) is None
    assert unread_rows(config, records_of(config)) == {}

    write_list(folder, "b.parquet", [(f"http://a/{n}", "other") for n in range(3, 9)])
    grown = configured(folder, samples_per_shard=2)
    assert unread_rows(grown, records_of(grown)) == {"s": 6}
    batch = take_in(grown)
    assert batch is not None
    assert (batch.batch, batch.rows_known, list(batch.shards)) == (1, 7, ["00002", "00003"])
    rows = rows_of(grown)
    assert rows[:5] == before
    assert [row["url"] for row in rows] == [f"http://a/{n}" for n in range(9)]
    assert [row["key"] for row in rows[5:]] == ["0000200000", "0000200001", "0000300000", "0000300001"]

    # The same files under another date: read once more, nothing new, and then known as they are.
    (folder / "lists/a.parquet").touch()
    batch = take_in(config)
    assert batch is not None
    assert (batch.rows_known, batch.shards) == (11, {})
    assert take_in(config) is None
    assert rows_of(config) == rows


def test_shuffled_lists_spread_each_host_over_all_shards_the_same_way_each_time(tmp_path: Path) -> None:
    rows = [(f"http://host{host}.example/{number}", "a") for host in range(10) for number in range(30)]
    taken = []
    for name in ("first", "again"):
        folder = tmp_path / name
        (folder / "lists").mkdir(parents=True)
        write_list(folder, "a.parquet", rows[:200])
        write_list(folder, "b.parquet", rows[100:])
        config = configured(folder, samples_per_shard=30)
        config = config.model_copy(update={"corpus": config.corpus.model_copy(update={"order": "shuffled"})})
        batch = take_in(config)
        assert batch is not None and (batch.rows_new, batch.rows_duplicate) == (300, 100)
        shards: dict[str, list[str]] = {}
        for row in rows_of(config):
            shards.setdefault(row["shard"], []).append(row["url"])
        assert len(shards) == 10
        taken.append(list(shards.values()))
        write_list(folder, "c.parquet", [("http://later.example/1", "b")])
        later = take_in(config)
        assert later is not None and list(later.shards) == ["00010"]
    assert taken[0] == taken[1]
    assert sorted(url for shard in taken[0] for url in shard) == sorted(url for url, _ in rows)
    # In the lists' order each shard has one host.
    assert all(len({url.split("/")[2] for url in shard}) >= 6 for shard in taken[0])


@pytest.mark.slow
def test_a_list_larger_than_the_memory_it_begins_with_is_taken_in_whole(folder: Path) -> None:
    texts = [f"{number} " + "x" * 2000 for number in range(40_000)]
    # Each URL in two rows, far from each other, with a caption each: joined, grouped and sorted.
    write_list(
        folder, "a.parquet", [(f"http://a.example/{n % 20_000}", text) for n, text in enumerate(texts)]
    )
    batch = take_in(configured(folder, samples_per_shard=10_000))
    assert batch is not None and (batch.rows_new, batch.rows_duplicate) == (20_000, 20_000)
    rows = rows_of(configured(folder, samples_per_shard=10_000))
    assert [row["url"] for row in rows] == [f"http://a.example/{number}" for number in range(20_000)]
    assert all(row["captions"] == [texts[n], texts[n + 20_000]] for n, row in enumerate(rows))


def test_the_sorted_reading_goes_on_with_more_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streamed: list[int] = []
    batches = dedup._Tables.batches

    def noted(tables: Any, sql: str, **values: str) -> Any:
        tables._take(4)
        streamed.append(tables._megabytes)
        yield from batches(tables, sql, **values)
        streamed.append(tables._megabytes)

    monkeypatch.setattr(dedup._Tables, "batches", noted)
    monkeypatch.setattr(dedup, "_STREAM_MB", 4)
    texts = [f"{number} " + "x" * 700 for number in range(30_000)]
    write_list(folder, "a.parquet", [(f"http://a.example/{n}", text) for n, text in enumerate(texts)])
    config = configured(folder, samples_per_shard=10_000)
    batch = take_in(config)
    assert batch is not None and batch.rows_new == 30_000
    assert streamed[0] == 4 < streamed[1]
    rows = rows_of(config)
    assert [row["url"] for row in rows] == [f"http://a.example/{n}" for n in range(30_000)]
    assert all(row["captions"] == [text] for row, text in zip(rows, texts, strict=True))


def test_sources_do_not_share_identities(folder: Path) -> None:
    write_list(folder, "a.parquet", [("http://a/1", "x")])
    config = configured(folder, '[[source]]\nname = "t"\ninput = ["lists/*"]\ncaption_column = ""')
    outcomes = read_lists(config, records_of(config), "run")
    assert [outcome.source for outcome in outcomes] == ["s", "t"]
    first, second = rows_of(config)
    assert first["uid"] != second["uid"]
    assert (first["captions"], second["captions"]) == (["x"], [])


def test_own_identity(folder: Path) -> None:
    table = {"id": [7, 8, 7], "url": ["http://a/1", "http://a/1", "http://a/1"], "caption": ["x", "y", "z"]}
    pq.write_table(pa.table(table), folder / "lists/a.parquet")
    config = configured(folder, 'uid_column = "id"')
    take_in(config)
    assert [(row["uid"], row["captions"]) for row in rows_of(config)] == [
        (sample_uid("s", "7"), ["x", "z"]),
        (sample_uid("s", "8"), ["y"]),
    ]


@pytest.mark.parametrize(
    ("table", "source", "expected_message"),
    [
        ({"url": ["http://a/1"], "text": ["x"]}, "", r"a\.parquet: no column 'caption' \(it has url, text\)"),
        ({"url": [1], "caption": ["x"]}, "", r"a\.parquet: row 1: url is 1 \(int\) where text is expected"),
        (
            {"url": ["http://a/1"], "caption": [1.5]},
            "",
            r"a\.parquet: row 1: caption is 1\.5 \(float\) where text is expected",
        ),
        (
            {"url": [None, ""], "caption": ["x", "y"]},
            "",
            r"source\.s\.input: no row has a URL in 'url' \(.*a\.parquet\)",
        ),
        (
            {"url": pa.array([], pa.string()), "caption": pa.array([], pa.string())},
            "",
            "the lists have no rows",
        ),
        (
            {"url": ["http://a/1", "http://a/2"], "caption": ["x", "y"], "id": ["7", "7"]},
            'uid_column = "id"',
            r"two URLs share one id: http://a/1 and http://a/2",
        ),
        (
            {"url": ["http://a/1"], "caption": ["x"], "id": pa.array([None], pa.string())},
            'uid_column = "id"',
            r"id is None where url is http://a/1; an identity is text or a whole number",
        ),
    ],
)
def test_useless_lists_are_refused_and_leave_nothing(
    folder: Path, table: dict[str, Any], source: str, expected_message: str
) -> None:
    pq.write_table(pa.table(table), folder / "lists/a.parquet")
    config = configured(folder, source)
    with pytest.raises(CapfiltError, match=expected_message):
        take_in(config)
    assert not (folder / "corpus").exists()


def test_a_missing_list_of_any_source_stops_before_the_first_is_read(folder: Path) -> None:
    write_list(folder, "a.parquet", [("http://a/1", "x")])
    config = configured(folder, '[[source]]\nname = "t"\ninput = ["none/*.csv"]')
    with pytest.raises(CapfiltError, match=r"source\.t\.input: no file matches .*/none/\*\.csv"):
        read_lists(config, records_of(config), "run")
    assert not (folder / "corpus").exists()


def test_a_list_that_changes_while_it_is_read_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_list(folder, "a.parquet", [("http://a/1", "x")])
    config = configured(folder)
    put = Storage.put

    def put_and_touch(self: Storage, local: Path, path: str) -> None:
        put(self, local, path)
        (folder / "lists/a.parquet").touch()

    monkeypatch.setattr(Storage, "put", put_and_touch)
    with pytest.raises(CapfiltError, match="changed while they were read; run again"):
        take_in(config)
    assert records_of(config).intakes() == []
    assert records_of(config).storage.list("urls") == []


URLS_ST = st.one_of(st.none(), st.sampled_from(["", " ", *(f"http://a/{n}" for n in range(12))]))
CAPTIONS_ST = st.one_of(st.none(), st.sampled_from(["x", "y", "é", " "]), st.text(max_size=3))
LIST_ST = st.lists(st.tuples(URLS_ST, CAPTIONS_ST), max_size=25)


@settings(max_examples=40, deadline=None)
@given(
    lists=st.lists(LIST_ST, min_size=1, max_size=4), sizes=st.lists(st.integers(1, 7), min_size=4, max_size=4)
)
def test_any_lists_give_every_url_once_with_all_its_captions(
    tmp_path_factory: pytest.TempPathFactory,
    lists: list[list[tuple[str | None, str | None]]],
    sizes: list[int],
) -> None:
    """The lists come one after another; each batch has shards of another size."""
    folder = tmp_path_factory.mktemp("any")
    (folder / "lists").mkdir()
    write_list(folder, "anchor.parquet", [("http://anchor/", "x")])
    known: dict[str, list[str]] = {"http://anchor/": ["x"]}
    earlier: list[dict[str, Any]] = []
    for number, (rows, size) in enumerate(zip(lists, sizes, strict=False)):
        schema = pa.schema([("url", pa.string()), ("caption", pa.string())])
        table = pa.Table.from_pylist(
            [{"url": url, "caption": caption} for url, caption in rows], schema=schema
        )
        pq.write_table(table, folder / f"lists/{number}.parquet", row_group_size=4)
        config = configured(folder, samples_per_shard=size)
        take_in(config)
        fresh: dict[str, list[str]] = {}
        for url, caption in rows:
            if url and url.strip() and url not in known:
                captions = fresh.setdefault(url, [])
                if caption and caption.strip() and caption not in captions:
                    captions.append(caption)
        known |= fresh
        current_rows = rows_of(config)
        assert {row["url"]: row["captions"] for row in current_rows} == known
        assert len(current_rows) == len(known)
        assert current_rows[: len(earlier)] == earlier
        earlier = current_rows


def test_a_crash_before_the_commit_leaves_only_orphans(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_list(folder, "a.parquet", [(f"http://a/{n}", "x") for n in range(5)])
    config = configured(folder)
    with monkeypatch.context() as crashing:
        crashing.setattr(Records, "commit_intake", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            take_in(config)
    assert records_of(config).url_shards() == {}
    assert take_in(config) is not None
    assert [row["url"] for row in rows_of(config)] == [f"http://a/{n}" for n in range(5)]
    assert len(records_of(config).storage.list("urls")) == 4


# -- two drivers ---------------------------------------------------------------------------------------------


def _drive(config: CapfiltConfig, barrier: Any, retry: bool) -> None:
    records = records_of(config)
    barrier.wait()
    if retry:
        queue_retries(config, records, "run")
    else:
        read_lists(config, records, "run")


def drive_at_once(config: CapfiltConfig, count: int, retry: bool = False) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(count)
    drivers = [context.Process(target=_drive, args=(config, barrier, retry)) for _ in range(count)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
        assert driver.exitcode == 0


def test_two_drivers_at_once_make_one_batch(folder: Path) -> None:
    write_list(folder, "a.parquet", [(f"http://a/{n % 50}", str(n)) for n in range(80)])
    config = configured(folder)
    drive_at_once(config, 2)
    write_list(folder, "b.parquet", [(f"http://b/{n}", str(n)) for n in range(30)])
    drive_at_once(config, 3)

    assert Counter(row["url"] for row in rows_of(config)) == Counter(
        [f"http://a/{n}" for n in range(50)] + [f"http://b/{n}" for n in range(30)]
    )
    records = records_of(config)
    assert [batch.batch for batch in records.intakes("s")] == [0, 1]
    committed = {file.path for batch in records.intakes() for file in batch.shards.values()}
    assert {info.path for info in records.storage.list("urls")} == committed  # the losers cleaned up


# -- retries -------------------------------------------------------------------------------------------------


def crawl(config: CapfiltConfig, shard: str, reasons: dict[str, str]) -> None:
    """Commit a crawl of one url shard in which the given URLs failed, and the others are fine."""
    records = records_of(config)
    urls = records.url_shards()["s", shard]
    task = ShardTask(
        corpus=config.corpus.path,
        stage="crawl",
        source="s",
        kind="web",
        shard=shard,
        run_id="run",
        fingerprint="f",
        inputs={"urls": urls},
    )
    rows = pq.read_table(records.storage.open(urls.outputs["parquet"].path)).to_pylist()
    with ShardCommit(records, task) as commit:
        for row in rows:
            row["reason"] = reasons.get(row["url"])
            row["status"] = "failed" if row["reason"] else "ok"
            commit.stats.count(row["status"], row["reason"])
        write_parquet(commit.folder / "x", rows, SAMPLES)
        (commit.folder / "no-images").touch()
        commit.publish({"parquet": (commit.folder / "x", len(rows)), "tar": (commit.folder / "no-images", 0)})


def queue(config: CapfiltConfig) -> IntakeRecord | None:
    (outcome,) = queue_retries(config, records_of(config), "run")
    return outcome.record


def test_transient_failures_are_queued_until_they_end(folder: Path) -> None:
    write_list(folder, "a.parquet", [(f"http://a/{n}", f"caption {n}") for n in range(6)])
    config = configured(folder)
    take_in(config)
    assert queue(config) is None  # nothing is crawled yet

    crawl(config, "00000", {"http://a/0": "timeout", "http://a/1": "http_4xx", "http://a/2": "dns"})
    crawl(config, "00001", {"http://a/3": "rate_limited", "http://a/5": "http_5xx"})
    before = rows_of(config)
    batch = queue(config)
    assert batch is not None
    assert (batch.kind, batch.rows_in, batch.rows_new, list(batch.shards)) == (
        "retry",
        4,
        4,
        ["00002", "00003"],
    )
    rows = rows_of(config)
    assert rows[:6] == before
    assert [(row["url"], row["captions"], row["shard"], row["key"], row["retry_of"]) for row in rows[6:]] == [
        ("http://a/0", ["caption 0"], "00002", "0000200000", "00000"),
        ("http://a/2", ["caption 2"], "00002", "0000200001", "00000"),
        ("http://a/3", ["caption 3"], "00002", "0000200002", "00001"),
        ("http://a/5", ["caption 5"], "00003", "0000300000", "00001"),
    ]
    assert {row["uid"] for row in rows[6:]} <= {row["uid"] for row in before}
    assert queue(config) is None  # they wait already

    # One succeeds, one fails for good, one fails again; the last is not tried yet.
    crawl(config, "00002", {"http://a/2": "http_4xx", "http://a/3": "connect"})
    batch = queue(config)
    assert batch is not None
    assert [(row["url"], row["retry_of"]) for row in rows_of(config)[10:]] == [("http://a/3", "00002")]
    crawl(config, "00003", {})
    crawl(config, "00004", {})
    assert queue(config) is None
    assert take_in(config) is None  # the lists are as they were

    write_list(folder, "b.parquet", [("http://a/0", "x"), ("http://b/1", "x")])
    assert take_in(config) is not None
    assert [(row["url"], row["shard"]) for row in rows_of(config)[11:]] == [("http://b/1", "00005")]


def test_a_retried_row_leaves_the_decision_to_its_retry(folder: Path) -> None:
    """Shard 0 is crawled anew after its failures went to shard 1: what became of them there counts."""
    write_list(folder, "a.parquet", [(f"http://a/{n}", "x") for n in range(3)])
    config = configured(folder)
    records = records_of(config)
    take_in(config)
    crawl(config, "00000", {"http://a/0": "timeout", "http://a/1": "connect"})
    assert retried_elsewhere(records, "s", "00000") == set()
    assert queue(config) is not None
    retried = {sample_uid("s", f"http://a/{n}") for n in range(2)}
    assert retried_elsewhere(records, "s", "00000") == retried
    assert retried_elsewhere(records, "s", "00001") == retried_elsewhere(records, "other", "00000") == set()

    def crawl_anew(shard: str, reasons: dict[str, str]) -> None:
        committed = records.read("crawl", "s", shard)
        assert committed is not None
        records.retire(committed)
        crawl(config, shard, reasons)

    # Whether the retry waits, has failed or is well; http://a/2, fine at first, fails now and is queued itself.
    crawl_anew("00000", {"http://a/0": "retried", "http://a/1": "retried", "http://a/2": "dns"})
    assert queue(config) is not None
    crawl(config, "00001", {"http://a/1": "host_down"})
    assert queue(config) is not None
    assert queue(config) is None
    assert [(row["url"], row["shard"], row["retry_of"]) for row in rows_of(config)[3:]] == [
        ("http://a/0", "00001", "00000"),
        ("http://a/1", "00001", "00000"),
        ("http://a/2", "00002", "00000"),
        ("http://a/1", "00003", "00001"),
    ]
    assert retried_elsewhere(records, "s", "00000") == {sample_uid("s", f"http://a/{n}") for n in range(3)}
    assert retried_elsewhere(records, "s", "00001") == {sample_uid("s", "http://a/1")}
    crawl(config, "00002", {})
    crawl(config, "00003", {})
    crawl_anew("00001", {"http://a/1": "retried"})
    assert queue(config) is None


class CountedOpens(Storage):
    """Counts the files that are opened."""

    opens = 0

    def open(self, path: str):
        self.opens += 1
        return super().open(path)


def test_a_batch_of_retries_says_which_shards_it_takes_over(folder: Path) -> None:
    write_list(folder, "a.parquet", [(f"http://a/{n}", "x") for n in range(12)])
    config = configured(folder)
    take_in(config)
    for number in range(4):
        crawl(
            config, f"{number:05d}", {f"http://a/{n}": "timeout" for n in range(3 * number, 3 * number + 2)}
        )
    batch = queue(config)
    assert batch is not None and batch.taken_over == {
        "00000": ("00004",),
        "00001": ("00004", "00005"),
        "00002": ("00005",),
        "00003": ("00006",),
    }
    assert batch.signature == digest_json(
        [
            [row["uid"] for row in rows_of(config)[12:]],
            [row["retry_of"] for row in rows_of(config)[12:]],
        ]
    )
    storage = CountedOpens(config.corpus.path)
    retries = [f"{number:05d}" for number in range(4, 7)]
    assert [retried_elsewhere(Records(storage), "s", shard) for shard in retries] == [set()] * 3
    assert storage.opens == 0
    assert len(retried_elsewhere(Records(storage), "s", "00001")) == 2 and storage.opens == 2
    state = CorpusState(Records(storage))
    assert state.retried == {("s", f"{number:05d}") for number in range(4)}

    # A batch of an earlier version does not say it: every file of it may have any URL.
    path = batch.path
    older = {name: value for name, value in json.loads(storage.read(path)).items() if name != "taken_over"}
    storage.write(path, json.dumps(older).encode())
    assert len(retried_elsewhere(Records(storage), "s", "00001")) == 2 and storage.opens == 2 + 3


@pytest.mark.parametrize("retries", [5, 20])
def test_retry_shards_are_crawled_without_opening_one_another(folder: Path, retries: int) -> None:
    urls = [f"http://127.0.0.1:1/{number}" for number in range(3 * retries)]
    write_list(folder, "a.parquet", [(url, "x") for url in urls])
    config = configured(folder)
    take_in(config)
    for number in range(retries):
        crawl(config, f"{number:05d}", dict.fromkeys(urls, "timeout"))
    batch = queue(config)
    assert batch is not None and len(batch.shards) == retries
    storage = CountedOpens(config.corpus.path)
    records, retried = Records(storage), CorpusState(records_of(config)).retried
    worker = CrawlWorker(config, records)
    for (source, shard), record in records.url_shards().items():
        if shard in batch.shards:
            task = ShardTask(
                corpus=config.corpus.path, stage="crawl", source=source, kind="web", shard=shard, run_id="run",
                fingerprint="f", inputs={"urls": record}, has_retries=(source, shard) in retried,
            )  # fmt: skip
            assert worker(task).counts == {"refused": 3, "refused/forbidden_address": 3}
    assert storage.opens <= 3 * retries


def test_drivers_that_queue_at_once_queue_once(folder: Path) -> None:
    write_list(folder, "a.parquet", [(f"http://a/{n}", "x") for n in range(3)])
    config = configured(folder)
    take_in(config)
    crawl(config, "00000", {"http://a/0": "timeout", "http://a/1": "connect"})
    drive_at_once(config, 3, retry=True)
    assert [row["url"] for row in rows_of(config)[3:]] == ["http://a/0", "http://a/1"]


# -- img2dataset's folders -----------------------------------------------------------------------------------


def write_img2dataset(folder: Path, name: str, urls: Sequence[str]) -> None:
    folder.mkdir(exist_ok=True)
    keys = [f"{name}{n:04d}" for n in range(len(urls))]
    table = {
        "url": urls,
        "caption": [f"about {url}" for url in urls],
        "key": keys,
        "status": ["success"] * len(urls),
    }
    pq.write_table(pa.table(table), folder / f"{name}.parquet", row_group_size=100)
    (folder / f"{name}.tar").write_bytes(b"tar " * (len(urls) + 1))
    (folder / f"{name}_stats.json").write_text("{}")


def test_img2dataset_shards_are_imported_where_they_lie(folder: Path) -> None:
    img2dataset_folder = folder / "img2dataset"
    write_img2dataset(img2dataset_folder, "00000", ["http://a/1", "http://a/2", "http://a/1"])
    write_img2dataset(img2dataset_folder, "00001", ["http://a/2"])
    write_img2dataset(img2dataset_folder, "00002", ["http://a/3"])
    config = configured(folder, 'format = "img2dataset"', inputs="img2dataset")
    batch = take_in(config)
    assert batch is not None
    assert (batch.kind, batch.rows_in, batch.rows_new, batch.rows_duplicate) == ("img2dataset", 5, 3, 2)
    shards = records_of(config).url_shards()
    assert {shard: Path(record.outputs["adopted"].path).name for (_, shard), record in shards.items()} == {
        "00000": "00000.tar",
        "00001": "00002.tar",
    }
    tar = img2dataset_folder / "00002.tar"
    adopted = shards["s", "00001"].outputs["adopted"]
    assert (adopted.path, adopted.bytes) == (str(tar), tar.stat().st_size)
    assert [(row["url"], row["key"], row["input_rows"]) for row in rows_of(config)] == [
        ("http://a/1", "000000000", 2),
        ("http://a/2", "000000001", 2),
        ("http://a/3", "000020000", 1),
    ]
    assert take_in(config) is None

    write_img2dataset(img2dataset_folder, "00003", ["http://a/3", "http://a/4"])
    batch = take_in(config)
    assert batch is not None
    assert (batch.rows_in, batch.rows_known, batch.adopted) == (
        2,
        1,
        {"00002": str(img2dataset_folder / "00003.tar")},
    )
    assert take_in(config) is None


@pytest.mark.parametrize(
    ("spoil", "expected_message"),
    [
        ("00000.parquet", r"00000\.tar has no 00000\.parquet beside it"),
        ("00000.tar", r"no \*\.tar in .*img2dataset; run img2dataset with --output_format webdataset"),
    ],
)
def test_incomplete_img2dataset_folders_are_refused(folder: Path, spoil: str, expected_message: str) -> None:
    write_img2dataset(folder / "img2dataset", "00000", ["http://a/1"])
    (folder / "img2dataset" / spoil).unlink()
    with pytest.raises(CapfiltError, match=expected_message):
        take_in(configured(folder, 'format = "img2dataset"', inputs="img2dataset"))
    with pytest.raises(CapfiltError, match=r"source\.s\.input: .*nowhere is not a folder"):
        take_in(configured(folder, 'format = "img2dataset"', inputs="nowhere"))
