"""The line of each key of a TOML text: tomllib gives no positions, and error messages name them.

A scanner, not a parser: it is given text that tomllib has accepted already, so it needs to know only where
keys and values begin and end.
"""

import re
import tomllib

# A key's way from the root; the elements of arrays, those of [[tables]] included, go by number.
KeyPath = tuple[str | int, ...]

_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_QUOTED_KEY = re.compile(r'"(?:[^"\\\n]|\\.)*"|' r"'[^'\n]*'")
_STRING = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}|' r"'''.*?'{3,5}|" r'"(?:[^"\\\n]|\\.)*"|' r"'[^'\n]*'", re.DOTALL
)
_PLAIN = re.compile(r"[^,\]}\n#]*")


def key_lines(text: str) -> dict[KeyPath, int]:
    """Return the line, from 1, on which each key and each array element of a valid TOML text begins."""
    return _Scanner(text.replace("\r\n", "\n")).scan()


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[KeyPath, int] = {}
        self.tables: dict[KeyPath, int] = {}  # how many [[...]] of an array of tables were seen
        self._counted = (0, 1)

    def scan(self) -> dict[KeyPath, int]:
        table: KeyPath = ()
        self._skip(_BLANK)
        while self.at < len(self.text):
            if self.text[self.at] == "[":
                table = self._header()
            else:
                self._pair(table)
            self._skip(_BLANK)
        return self.lines

    def _header(self) -> KeyPath:
        """Read [a.b] or [[a.b]]; a name that is an array of tables means its latest element."""
        line = self._line()
        brackets = 2 if self.text.startswith("[[", self.at) else 1
        self.at += brackets
        *parents, last = self._key()
        self.at += brackets
        path: KeyPath = ()
        for name in parents:
            path = self._latest((*path, name))
            self.lines.setdefault(path, line)
        path = (*path, last)
        self.lines.setdefault(path, line)
        if brackets == 2:
            self.tables[path] = self.tables.get(path, 0) + 1
            path = self._latest(path)
            self.lines[path] = line
        return path

    def _latest(self, path: KeyPath) -> KeyPath:
        return (*path, self.tables[path] - 1) if path in self.tables else path

    def _pair(self, table: KeyPath) -> None:
        line = self._line()
        path = table
        for name in self._key():
            path = (*path, name)
            self.lines.setdefault(path, line)
        self.at += 1  # the equals sign
        self._skip(_SPACE)
        self._value(path)

    def _key(self) -> list[str]:
        """Read a dotted key and the blanks around it."""
        names = []
        while True:
            self._skip(_SPACE)
            if match := _BARE_KEY.match(self.text, self.at):
                names.append(match[0])
            else:
                match = _QUOTED_KEY.match(self.text, self.at)
                assert match is not None, f"no key at {self.at}: tomllib accepts what this scanner does not"
                names.append(tomllib.loads(f"key = {match[0]}")["key"])
            self.at = match.end()
            self._skip(_SPACE)
            if not self.text.startswith(".", self.at):
                return names
            self.at += 1

    def _value(self, path: KeyPath) -> None:
        opening = self.text[self.at]
        if opening in "\"'":
            self._skip(_STRING)
        elif opening in "[{":
            self._collection(path, "]" if opening == "[" else "}")
        else:
            self._skip(_PLAIN)

    def _collection(self, path: KeyPath, closing: str) -> None:
        """Read an array or an inline table, members separated by commas."""
        self.at += 1
        index = 0
        while True:
            self._skip(_BLANK)
            if self.text[self.at] == closing:
                self.at += 1
                return
            if self.text[self.at] == ",":
                self.at += 1
            elif closing == "}":
                self._pair(path)
            else:
                self.lines[(*path, index)] = self._line()
                self._value((*path, index))
                index += 1

    def _skip(self, pattern: re.Pattern[str]) -> None:
        match = pattern.match(self.text, self.at)
        assert match is not None, f"{pattern.pattern} does not match at {self.at}"
        self.at = match.end()

    def _line(self) -> int:
        """Return the line of the present place; positions only grow, so each newline is counted once."""
        at, line = self._counted
        line += self.text.count("\n", at, self.at)
        self._counted = (self.at, line)
        return line
