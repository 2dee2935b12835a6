"""What a listing says of one file."""

from datetime import datetime
from typing import NamedTuple


class FileInfo(NamedTuple):
    """One listed file. ``version`` changes when the content does (ETag, or mtime on local disk).

    A tuple: a listing makes 52,000 of them.
    """

    path: str
    bytes: int
    version: str
    modified: datetime
