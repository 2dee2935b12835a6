"""The format of a corpus: what a version of capfilt must know to read it right.

A corpus says every format that wrote to it by the name of a file, so that whoever lists its records has read it:

    records/format/<major>.<minor>.json

A field or a column that older versions may leave out raises the minor number: they go on. What they would read wrongly
raises the major number: they refuse the corpus. A corpus that says nothing is of the first format.
"""

import json
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import NamedTuple

from schemas.errors import CapfiltError

FORMAT_FOLDER = "records/format"
_FILE = re.compile(rf"{FORMAT_FOLDER}/(\d{{1,6}})\.(\d{{1,6}})\.json")


class CorpusFormat(NamedTuple):
    """A format of corpora; later ones are greater."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"

    @property
    def path(self) -> str:
        """The file by which a corpus says that this format wrote to it."""
        return f"{FORMAT_FOLDER}/{self}.json"

    def to_json(self, capfilt: str) -> str:
        """Return what stands in that file, for people: the version of capfilt, and since when."""
        return json.dumps(
            {"format": str(self), "capfilt": capfilt, "since": datetime.now(UTC).isoformat()}, sort_keys=True
        )


FIRST_FORMAT = CorpusFormat(1, 0)
# What this version writes.
FORMAT = CorpusFormat(1, 0)


def formats_in(paths: Iterable[str]) -> set[CorpusFormat]:
    """Return the formats that the listed files of a corpus say."""
    matches = (_FILE.fullmatch(path) for path in paths)
    return {CorpusFormat(int(match[1]), int(match[2])) for match in matches if match}


def require_known_format(corpus: str, paths: Iterable[str]) -> None:
    """Raise CapfiltError where the listed files say that a format wrote to a corpus that this version cannot read."""
    newest = max(formats_in(paths), default=FIRST_FORMAT)
    if newest.major > FORMAT.major:
        raise CapfiltError(
            f"{corpus} is a corpus of format {newest}, and this capfilt reads formats up to {FORMAT.major}.x: upgrade "
            "capfilt. Nothing in it was changed"
        )
