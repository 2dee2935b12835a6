"""Tables on a screen: nothing is broken, and what is not shown whole is named."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from jobs.output.tables import fact_lines, table_lines
from jobs.output.values import cell

_HEX = "0123456789abcdef"
_IDENTIFIERS = st.one_of(
    st.text(_HEX, min_size=32, max_size=32),
    st.builds("20260128T105829-{}".format, st.text(_HEX, min_size=6, max_size=6)),
    st.builds("https://host.example/{}".format, st.text("abc/?&=%", max_size=300)),
    st.builds("s3://bucket/raw/{}/00000.tar".format, st.text("abc", min_size=1, max_size=60)),
    st.builds("/data/my corpora/{}".format, st.text("ab ", max_size=60).map(str.strip)),
)
_TEXTS = st.lists(st.text("abc端", min_size=1, max_size=12), min_size=1, max_size=20).map(" ".join)
_VALUES = st.one_of(_IDENTIFIERS, _TEXTS, st.integers(-(10**9), 10**9), st.none(), st.floats(allow_nan=False))


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[dict], int, tuple[str, ...]]:
    names = [f"column_{number}" for number in range(draw(st.integers(1, 12)))]
    rows = draw(st.lists(st.fixed_dictionaries(dict.fromkeys(names, _VALUES)), min_size=1, max_size=4))
    spare = draw(st.lists(st.sampled_from(names), unique=True))
    return rows, draw(st.integers(30, 220)), tuple(spare)


@settings(deadline=None)
@given(tables())
def test_a_value_is_shown_whole_or_its_column_is_named(case: tuple[list[dict], int, tuple[str, ...]]) -> None:
    rows, width, spare = case
    lines = table_lines(rows, list(rows[0]), width=width, spare=spare)
    printed, note = "\n".join(lines), _note(lines)
    for row in rows:
        for name, value in row.items():
            text = cell(value, name)
            is_text = " " in text and "/" not in text
            if name not in note:
                assert all(word in printed for word in (text.split(" ") if is_text else [text])), (
                    name,
                    lines,
                )


@settings(deadline=None)
@given(tables())
def test_no_line_is_wider_than_the_screen_unless_one_value_is(
    case: tuple[list[dict], int, tuple[str, ...]],
) -> None:
    rows, width, spare = case
    values = [cell(value) for row in rows for value in row.values()]
    for line in table_lines(rows, list(rows[0]), width=width, spare=spare):
        assert cell_len(line) <= width or any(
            cell_len(value) > width and line == value for value in values
        ), line


def _note(lines: list[str]) -> set[str]:
    """Return the columns that the note below a table names."""
    text = " ".join(lines)
    note = text[text.rfind(" (") :] if text.endswith("shows all)") else ""
    return set(re.findall(r"column_\d+", note))


def test_without_a_width_everything_is_whole() -> None:
    rows = [
        {"url": "http://host.example/" + "x" * 3000, "digest": "a" * 64, "text": "word " * 500, "gone": None}
    ]
    (header, line) = table_lines(rows, list(rows[0]), width=None)
    assert header.split() == ["url", "digest", "text", "gone"]
    assert all(cell(value) in line for value in rows[0].values())


def test_digests_have_twelve_digits_and_are_named() -> None:
    rows = [{"run": 1, "models": ["a" * 64, "b" * 64], "files": {"x": "c" * 64}, "uid": "d" * 32}]
    lines = table_lines(rows, list(rows[0]), width=100)
    assert lines[1].split("  ")[-1] == "d" * 32
    assert "a" * 12 + " | " + "b" * 12 in lines[1] and "x=" + "c" * 12 in lines[1]
    assert lines[2] == "(first 12 digits: models, files; --wide shows all)"


def test_columns_go_in_order_the_empty_first() -> None:
    row = {"id": "x" * 10, "none": None, "a": "y" * 30, "b": "z" * 30}
    assert table_lines([row], list(row), width=78, spare=("b", "a"))[2:] == [
        "(empty: none; --wide shows all)"
    ]
    assert table_lines([row], list(row), width=60, spare=("b", "a"), more="--json")[2:] == [
        "(left out: b; empty: none; --json shows all)"
    ]
    many = {f"c{number}": f"{number}" * 20 for number in range(7)}
    assert table_lines([many] * 2, list(many), width=80)[0].split() == ["c0", "c5", "c6"]


def test_a_few_columns_without_room_become_records() -> None:
    url = "http://host.example/" + "x" * 300
    rows = [
        {"uid": "a" * 32, "url": url, "caption": "a cat"},
        {"uid": "b" * 32, "url": url, "caption": "a dog"},
    ]
    assert table_lines(rows, list(rows[0]), width=80) == [
        "uid      " + "a" * 32, "url", url, "caption  a cat", "", "uid      " + "b" * 32, "url", url, "caption  a dog"
    ]  # fmt: skip


def test_facts_wrap_at_spaces_and_put_long_values_below() -> None:
    facts = {"uid": "a" * 32, "caption": "one two three four five six", "sha256": "b" * 38}
    assert fact_lines(facts, 42) == [
        "uid      " + "a" * 32, "caption  one two three four five six", "sha256", "  " + "b" * 38
    ]  # fmt: skip
    assert fact_lines({"caption": "one two three four"}, 20) == ["caption  one two", "         three four"]


def test_control_sequences_of_names_and_texts_are_not_printed() -> None:
    row = {"\x1b[31mname": "\x1b]0;title\x07 text\x9b2J", "m": {"\x1bkey": "\u202evalue"}}
    for width in (20, 80, None):
        assert "".join(table_lines([row], list(row), width=width)).isprintable()


def test_numbers_have_separators_from_a_thousand() -> None:
    values = (999, 1000, -1234, 999.4, 999.6, 1234.5, 12345.6, 0.12345)
    assert [cell(value) for value in values] == [
        "999", "1,000", "-1,234", "999.4", "1,000", "1,234", "12,346", "0.1235"
    ]  # fmt: skip
    assert cell(2_000_000, "seed") == "2000000"
    assert [cell(size, "bytes") for size in (999, 999_960, (5e15).__int__())] == [
        "999 B",
        "1.0 MB",
        "5,000.0 TB",
    ]
