"""File names that others wrote stay inside their folder; what is printed does nothing to a terminal."""

import os.path
import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from schemas.errors import CapfiltError
from schemas.names import confined_name, is_hidden, printable

_PARTS = st.text(string.ascii_letters + string.digits + "._- é", min_size=1, max_size=12).filter(
    lambda part: part not in (".", "..")
)
_PIECES = st.sampled_from(
    ["..", ".", "", "/", "a", "step-1", "\\", "C:", "s3:", "\x1b[2J", "\x00", "\n", "~"]
)


@given(st.lists(_PARTS, min_size=1, max_size=4).map("/".join))
def test_names_inside_a_folder_pass_unchanged(name: str) -> None:
    assert confined_name(name, "record.json") == name


@given(st.one_of(st.text(max_size=40), st.lists(_PIECES, max_size=6).map("/".join)))
@example("/etc/passwd")
@example("../x")
@example("a/../../x")
@example("s3://bucket/x")
@example("C:\\x")
@example("a\x00b")
def test_what_passes_stays_inside_its_folder(name: str) -> None:
    try:
        passed = confined_name(name, "record.json")
    except CapfiltError as error:
        assert "record.json" in str(error) and str(error).isprintable()
        return
    joined = os.path.normpath(os.path.join("/folder", passed))
    assert joined.startswith("/folder/") and joined == f"/folder/{passed}"


@pytest.mark.parametrize("name", [None, 7, ["a"], {"a": 1}, b"a", "", "x" * 5000])
def test_what_is_not_a_name_is_refused(name: object) -> None:
    with pytest.raises(CapfiltError, match=r"index\.json"):
        confined_name(name, "index.json")


@given(st.text())
def test_printable_text_is_printable(text: str) -> None:
    assert printable(text).isprintable() and len(printable(text)) == len(text)


@pytest.mark.parametrize(
    ("name", "in_folder", "in_tar"),
    [
        ("a.jpg", False, False),
        ("pets/a.b.jpg", False, False),
        ("./a.jpg", True, False),
        (".git/a.jpg", True, False),
        ("pets/._a.jpg", True, True),
        ("__MACOSX/pets/a.jpg", True, True),
    ],
)
def test_hidden_files_of_folders_and_of_tars(name: str, in_folder: bool, in_tar: bool) -> None:
    assert (is_hidden(name), is_hidden(name, by_folder=False)) == (in_folder, in_tar)
