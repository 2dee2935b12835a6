"""What a listing says of one file."""

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class FileInfo:
    """One listed file. ``version`` changes when the content does (ETag, or mtime on local disk)."""

    path: str
    bytes: int
    version: str
    modified: datetime
