"""Rows of JSON lists: an object a line, or one array of objects, which is streamed however long it is."""

import codecs
import io
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.intake.lists.lines import MAX_ROW_BYTES, UNREADABLE, Lines, not_utf8
from schemas.errors import CapfiltError
from schemas.names import depth_of, shown

# (number of the line or of the array's item, its size, the object)
Row = tuple[int, int, dict[str, Any]]

_CHUNK_BYTES = 1 << 16
# A row's objects and arrays inside one another; each level costs the parsers a call.
_MAX_DEPTH = 64
# The longest token that an end of the buffer may cut so that it looks wrong: \ud83d\ude42 or -Infinity.
_LONGEST_TOKEN = 12
# A name that is spelled with an escape, so that a search for it does not find it: its last escape, and its end.
_ESCAPED_NAME = re.compile(r'\\.[^"\\]*"\s*:')

_DECODER = json.JSONDecoder()


def is_array(content: io.BufferedReader) -> bool:
    """Tell by the first byte that is not white space whether a JSON text is an array."""
    return content.peek(_CHUNK_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def line_rows(lines: Lines, columns: Sequence[str]) -> Iterator[Row]:
    """Yield the object of each line; blank lines are skipped."""
    for line in lines:
        if not line.isspace():
            row = _parse(line.strip(), lines)
            yield lines.number, lines.row_bytes, _checked(row, line, lines, columns)
        lines.end_row()


def _parse(text: str, lines: Lines) -> Any:
    try:
        row, end = _DECODER.raw_decode(text)
    except json.JSONDecodeError as error:
        raise CapfiltError(
            f"{lines.place}: not JSON: {error.msg} at column {error.pos + 1:,}; "
            "a line is an object, or the file an array"
        ) from error
    except (RecursionError, ValueError) as error:
        raise _unusable(lines.place, error) from error
    if end < len(text):
        raise CapfiltError(f"{lines.place}: not JSON: more text after the value at column {end + 1:,}")
    return row


def array_rows(content: io.BufferedReader, path: str, columns: Sequence[str]) -> Iterator[Row]:
    """Yield the objects of an array, numbered from 1; memory holds one of them."""
    text = _Text(content, path)
    text.skip("[")
    more = text.next_character() != "]"
    while more:
        text.number += 1
        row, item = text.value()
        yield text.number, len(item), _checked(row, item, text, columns)
        more = text.next_character() == ","
        if more:
            text.skip(",")
    text.skip("]")
    if text.next_character():
        raise CapfiltError(f"{text.place}: the array ends here, and more text follows")


class _Text:
    """The characters of an array, as many at once as its longest item needs."""

    def __init__(self, content: io.BufferedReader, path: str) -> None:
        self.buffer = ""
        self.at = 0
        self.number = 0
        self._path = path
        self._content = content
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._bytes = 0
        self._broken: UnicodeDecodeError | None = None

    @property
    def place(self) -> str:
        return f"{self._path}: item {self.number:,}"

    def _more(self, size: int) -> bool:
        """Append up to ``size`` bytes of text; tell whether there was any."""
        if self._broken is not None:
            raise not_utf8(self.place, self._broken, self._bytes - len(self._broken.object)) from self._broken
        try:
            data = self._content.read(size)
        except UNREADABLE as error:
            raise CapfiltError(f"{self.place}: cannot be read: {error}") from error
        self._bytes += len(data)
        self.buffer = self.buffer[self.at :] + self._decode(data)
        self.at = 0
        return bool(data)

    def _decode(self, data: bytes) -> str:
        try:
            return self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            # The items before it come first, so that the error names the right one.
            self._broken = error
            return error.object[: error.start].decode().removeprefix("\ufeff")

    def next_character(self) -> str:
        """Return the next character that is not white space, without passing it; empty at the end."""
        while True:
            while self.at < len(self.buffer):
                if self.buffer[self.at] not in " \t\r\n":
                    return self.buffer[self.at]
                self.at += 1
            if not self._more(_CHUNK_BYTES):
                return ""

    def skip(self, character: str) -> None:
        """Pass one character and what white space follows. Raises CapfiltError where it is another."""
        actual = self.next_character()
        if actual != character:
            actual_text = f"found {shown(actual)!r}" if actual else "the file ends"
            raise CapfiltError(f"{self.place}: not JSON: {character!r} is expected after it, {actual_text}")
        self.at += 1
        self.next_character()

    def value(self) -> tuple[Any, str]:
        """Return the object that begins here, parsed and as it is written, and pass it."""
        if self.next_character() != "{":
            raise CapfiltError(
                f"{self.place}: {shown(self.buffer[self.at : self.at + 80])} is not an object with the columns"
            )
        while True:
            try:
                row, end = _DECODER.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                held, place = len(self.buffer) - self.at, error.pos - self.at
                cut = error.msg.startswith("Unterminated") or error.pos > len(self.buffer) - _LONGEST_TOKEN
                if held > MAX_ROW_BYTES:
                    raise CapfiltError(
                        f"{self.place}: has more than {MAX_ROW_BYTES >> 20} MiB, or a quote is missing"
                    ) from error
                # Doubled, so that a long item is not parsed again for every chunk.
                if not cut or not self._more(max(_CHUNK_BYTES, held)):
                    raise CapfiltError(
                        f"{self.place}: not JSON: {error.msg} at its character {place + 1:,}"
                    ) from error
            except (RecursionError, ValueError) as error:
                raise _unusable(self.place, error) from error
            else:
                item, self.at = self.buffer[self.at : end], end
                return row, item


def _unusable(place: str, error: Exception) -> CapfiltError:
    """Explain what Python's parser rejects though it is JSON: deep nesting, numbers of thousands of digits."""
    nested = isinstance(error, RecursionError)
    reason = f"nested more than {_MAX_DEPTH} levels deep" if nested else "a number has thousands of digits"
    return CapfiltError(f"{place}: cannot be used: {reason}")


def _checked(row: Any, text: str, reader: "Lines | _Text", columns: Sequence[str]) -> dict[str, Any]:
    """Return a row whose cells can be stored as text, or reject it."""
    if not isinstance(row, dict):
        raise CapfiltError(f"{reader.place}: {shown(text.strip())} is not an object with the columns")
    escaped = "\\" in text and _ESCAPED_NAME.search(text) is not None
    for name in columns:
        if (escaped or text.count(f'"{name}"') > 1) and name in _repeated_names(text):
            raise CapfiltError(f"{reader.place}: the object has {shown(name)!r} twice")
    if text.count("{") + text.count("[") > _MAX_DEPTH and depth_of(row) > _MAX_DEPTH:
        raise CapfiltError(f"{reader.place}: cannot be used: nested more than {_MAX_DEPTH} levels deep")
    return _encodable(row) if "\\u" in text and "\\ud" in text.lower() else row


def _repeated_names(text: str) -> set[str]:
    """Return the names that an object has twice."""
    names: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> None:
        names[:] = [name for name, _ in pairs]  # the outermost object comes last

    json.loads(text.strip(), object_pairs_hook=note)
    return {name for name in names if names.count(name) > 1}


def _encodable(value: Any) -> Any:
    """Replace lone surrogates, which JSON can spell and UTF-8 cannot."""
    match value:
        case str():
            return value.encode("utf-8", "replace").decode()
        case list():
            return [_encodable(part) for part in value]
        case dict():
            return {_encodable(name): _encodable(part) for name, part in value.items()}
    return value
