"""The formats of sources whose pictures lie in files, by name."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from pipeline.intake.lists.columns import Rows, Wanted
from pipeline.intake.pictures import folder, tables, tars
from pipeline.storage.file_info import FileInfo
from pipeline.storage.storage import Storage
from schemas.config import SourceConfig


class PictureSource(Protocol):
    """One source's pictures; ``lists`` are what is read one after the other."""

    lists: tuple[str, ...]

    def files(self) -> list[FileInfo]:
        """Return every file that rows are made of."""
        ...

    def count(self, path: str) -> int:
        """Return the rows of one list."""
        ...

    def rows(self, path: str, wanted: Wanted) -> Iterator[Rows]:
        """Yield the rows of one list; their URLs are places."""
        ...


FORMATS: dict[str, Callable[[Sequence[str], str, Storage], PictureSource]] = {
    folder.FORMAT: folder.ImageFolder,
    tars.FORMAT: tars.TarFolder,
    tables.FORMAT: tables.ImageTables,
}


def picture_source(source: SourceConfig, storage: Storage) -> PictureSource | None:
    """Return the pictures of a source; None where it is lists of URLs, or img2dataset's shards.

    Raises CapfiltError where its input cannot be listed.
    """
    make = FORMATS.get(source.format)
    return make(source.input, f"source.{source.name}.input", storage) if make else None
