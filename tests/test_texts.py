"""Captions as text."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.text import clean_caption, count_words, mark_duplicates, same_text_key

CASES = {
    "a red car": "a red car",
    "  a\tred \n car  ": "a red car",
    "A Red Car!": "A Red Car!",
    "Tom &amp; Jerry &amp;quot;live&amp;quot;": 'Tom & Jerry "live"',
    "caf&eacute; <b>open</b><br/>now": "café open now",
    "<!-- banner -->sale": "sale",
    "i <3 you and 2 < 3 > 1": "i <3 you and 2 < 3 > 1",
    "cafe\u0301": "caf\u00e9",
    "zero\u200bwidth \ufeffmark \u202ereversed": "zerowidth mark reversed",
    "bell\x07 null\x00 next\x85line": "bell null next line",
    "no\u00a0break\u3000space": "no break space",
    "family \U0001f468\u200d\U0001f469\u200d\U0001f467": "family \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645": "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
    "half a pair \ud83d": "half a pair",
    "一只红色的狗": "一只红色的狗",
    "<p></p>": "",
    "<PERSON> and <PERSON><PERSON>'s hat": "person and person person's hat",
    "portrait of &lt;PERSON&gt;": "portrait of person",
    "by<PERSON>today": "by person today",
    "<Untitled> by <Name of artist>, <Spider-Man>": "Untitled by Name of artist, Spider-Man",
    "<BR>a<IMG SRC=a.png>dog<hr />": "a dog",
    "<p class='x'>a dog</p><o:p></o:p>": "a dog",
    "<my-tag>a dog</my-tag> <custom x=1>": "a dog",
    "<?xml version='1.0'?><!DOCTYPE html>a dog": "a dog",
    "write to <someone@a.example>": "write to someone@a.example",
    "a <!-- b <!-- c --> d": "a <!-- b d",
    "\u200b": "",
    "": "",
}


@pytest.mark.parametrize(("raw", "clean"), CASES.items(), ids=range(len(CASES)))
def test_clean_up(raw: str, clean: str) -> None:
    assert clean_caption(raw) == clean


@pytest.mark.parametrize(
    ("raw", "clean"),
    {
        "a picture of a red car": "a red car",
        "A Picture  of a red car": "a red car",
        "a picture of": "",
        "a picture of, well, a car": ", well, a car",
        "a picture often seen": "a picture often seen",
        "a red car, a picture of it": "a red car, a picture of it",
    }.items(),
)
def test_prompt_is_cut_off_at_the_start_only(raw: str, clean: str) -> None:
    assert clean_caption(raw, "a picture of ") == clean


@given(st.text())
def test_clean_text_can_be_stored_and_is_tidy(raw: str) -> None:
    clean = clean_caption(raw)
    assert clean.encode().decode() == clean
    assert clean == " ".join(clean.split())
    assert not any(unicodedata.category(character) in ("Cc", "Cs", "Co") for character in clean)


@given(st.lists(st.sampled_from(["", "a", "A", "b", "ß", "SS", "ss"])))
def test_duplicates_point_at_the_first_of_their_kind(texts: list[str]) -> None:
    marks = mark_duplicates(texts)
    kinds = [same_text_key(text) for text in texts]
    for index, (text, mark) in enumerate(zip(texts, marks, strict=True)):
        first = kinds.index(kinds[index])
        assert mark == (None if not text or first == index else first)


@pytest.mark.parametrize("piece", ["<!--", "<a", "<PERSON>", "e\u0301\u0323", "&amp;", "</x"])
def test_a_text_without_an_end_is_cut(piece: str) -> None:
    assert len(clean_caption(piece * 1_000_000)) <= 30_000


def test_words() -> None:
    assert [count_words(text) for text in ("", "one", "two  words", "a - b")] == [0, 1, 2, 3]
