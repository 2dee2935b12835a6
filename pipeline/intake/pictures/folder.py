"""``format = "imagefolder"``: each image file of a folder is a row, with its captions from a table or a text beside it.

As in Hugging Face's ImageFolder, ``metadata.jsonl`` or ``metadata.csv`` names images by ``file_name``, relative to the
folder it is in. An image that no table names has the text of ``NAME.txt`` beside ``NAME.jpg`` as its caption, or none.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.intake.lists.columns import Rows, Wanted, column_texts
from pipeline.intake.lists.files import BATCH_ROWS, read_columns
from pipeline.intake.lists.lines import MAX_ROW_BYTES, not_utf8
from pipeline.intake.pictures.places import InputFile, InputFolders, Place
from pipeline.storage.file_info import FileInfo
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError

FORMAT = "imagefolder"
# What is taken for an image by its name; whether it is one, and of an accepted format, the crawl finds out.
PICTURE_EXTENSIONS = frozenset(
    [
        "jpg",
        "jpeg",
        "jpe",
        "jfif",
        "png",
        "webp",
        "gif",
        "bmp",
        "tif",
        "tiff",
        "avif",
        "heic",
        "heif",
        "jxl",
        "jp2",
        "svg",
        "ico",
        "tga",
        "psd",
    ]
)
METADATA_FILES = {"metadata.jsonl": "jsonl", "metadata.csv": "csv"}
_FILE_NAME = "file_name"

Cells = dict[str, Any]


class ImageFolder:
    """The images of one source. A "list" of it is one of its inputs."""

    def __init__(self, inputs: Sequence[str], key: str, storage: Storage) -> None:
        self._folders = InputFolders(inputs, key)
        self._key, self._storage = key, storage
        self.lists = tuple(inputs)

    def files(self) -> list[FileInfo]:
        """Return every file that rows are made of: another size or version of one means that rows may have changed."""
        return [
            file.version(FORMAT)
            for pattern in self.lists
            for file in (*self._images(pattern), *self._beside(pattern).values())
        ]

    def count(self, pattern: str) -> int:
        """Return the images of one input."""
        return len(self._images(pattern))

    def rows(self, pattern: str, wanted: Wanted) -> Iterator[Rows]:
        """Yield the images of one input as rows, sorted by path; last those that a table names and are not there.

        Raises CapfiltError where a table cannot be read or lacks a column.
        """
        columns = [name for name in wanted.columns if name != wanted.url]
        beside = self._beside(pattern)
        described = self._described(beside, columns, wanted)
        images: list[Place] = [*self._images(pattern)]
        if self._folders.is_folder(pattern):  # of a glob, the tables may describe what it does not match
            there = {image.relative for image in images}
            images += [
                Place(folder=images[0].folder, relative=name) for name in described if name not in there
            ]
        for start in range(0, len(images), BATCH_ROWS):
            batch = images[start : start + BATCH_ROWS]
            cells = self._cells(batch, described, beside, wanted.caption if columns else None)
            rows = {name: [cell.get(name) for cell in cells] for name in columns}
            rows[wanted.url] = [image.url(FORMAT) for image in batch]
            yield Rows(columns=rows, numbers=range(start + 1, start + 1 + len(batch)), unit="item")

    def _images(self, pattern: str) -> list[InputFile]:
        images = [
            file for file in self._folders.files(pattern) if _extension(file.relative) in PICTURE_EXTENSIONS
        ]
        if not images:
            raise CapfiltError(f"{self._key}: no image in {pattern} (by extension: .jpg, .png, .webp, ...)")
        return images

    def _beside(self, pattern: str) -> dict[str, InputFile]:
        """Return the tables and texts in the folder of an input, by path."""
        return {
            file.relative: file
            for file in self._folders.files_around(pattern)
            if _name(file.relative) in METADATA_FILES or _extension(file.relative) == "txt"
        }

    def _described(
        self, beside: Mapping[str, InputFile], columns: Sequence[str], wanted: Wanted
    ) -> dict[str, Cells]:
        """Return what the tables say, by the image's path; the table in the nearest folder above an image counts."""
        described: dict[str, Cells] = {}
        tables = [path for path in beside if _name(path) in METADATA_FILES]
        for path in sorted(tables, key=lambda path: path.count("/")):
            url, folder = self._folders.url_of(beside[path]), path.rpartition("/")[0]
            asked = Wanted(url=_FILE_NAME, caption=wanted.caption, columns=(_FILE_NAME, *columns))
            for rows in read_columns(self._storage, url, METADATA_FILES[_name(path)], asked):
                for row, name in enumerate(column_texts(rows, _FILE_NAME, url)):
                    if not name:
                        raise CapfiltError(f"{url}: {rows.place(row)}: {_FILE_NAME} is empty")
                    image = f"{folder}/{name}" if folder else name
                    described[image] = {column: rows.columns[column][row] for column in columns}
        return described

    def _cells(
        self,
        images: Sequence[Place],
        described: Mapping[str, Cells],
        beside: Mapping[str, InputFile],
        caption: str | None,
    ) -> list[Cells]:
        """Return the cells of images: from a table, else the caption alone from the text beside it."""
        texts = [beside.get(f"{image.relative.rpartition('.')[0]}.txt") for image in images]
        uses_text = [
            caption is not None and text is not None and image.relative not in described
            for image, text in zip(images, texts, strict=True)
        ]
        to_read = [text for text, wanted in zip(texts, uses_text, strict=True) if wanted and text is not None]
        read = iter(self._storage.map(self._text, to_read))
        return [
            {str(caption): next(read)} if wanted else described.get(image.relative, {})
            for image, wanted in zip(images, uses_text, strict=True)
        ]

    def _text(self, file: InputFile) -> str:
        url = self._folders.url_of(file)
        if file.info.bytes > MAX_ROW_BYTES:
            raise CapfiltError(f"{url} has more than {MAX_ROW_BYTES >> 20} MiB; it is to hold one caption")
        try:
            return self._storage.read(url, MAX_ROW_BYTES).decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise not_utf8(url, error) from error


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _extension(path: str) -> str:
    return _name(path).rpartition(".")[2].lower()
