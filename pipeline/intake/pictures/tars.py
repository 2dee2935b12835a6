"""``format = "webdataset"``: each sample of a tar is a row, with the texts of its members.

A sample is what shares a key (see ``pipeline.shards.tar_samples``). One without an image is a row too, which the
crawl ends as ``missing_member``.
"""

import contextlib
import json
import logging
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.intake.lists.columns import Rows, Wanted
from pipeline.intake.lists.files import BATCH_ROWS
from pipeline.intake.lists.lines import MAX_ROW_BYTES
from pipeline.intake.pictures.places import InputFolders, Place
from pipeline.shards.tar_samples import (
    JSON,
    MEMBERS,
    TEXT,
    Places,
    TarSamples,
    find_tar_samples,
    printable_key,
)
from pipeline.storage.file_info import FileInfo
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError
from schemas.names import printable

_log = logging.getLogger(__name__)

FORMAT = "webdataset"
_EXTENSIONS = {**MEMBERS, "caption": TEXT}
# Where a json that has no caption under the configured name has it: img2dataset's and their like; LAION's.
_CAPTIONS = ("caption", "captions", "text", "TEXT")
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class TarFolder:
    """The tars of one source. A "list" of it is one tar."""

    def __init__(self, inputs: Sequence[str], key: str, storage: Storage) -> None:
        self._storage = storage
        folders = InputFolders(inputs, key)
        files = [file for pattern in inputs for file in folders.files(pattern)]
        if packed := [file.relative for file in files if file.relative.lower().endswith(COMPRESSED_TARS)]:
            raise CapfiltError(
                f"{key}: {len(packed):,} compressed tars, such as {printable(packed[0])}, whose members cannot be read "
                "by place; decompress them (gunzip, unzstd) to plain .tar"
            )
        self._tars = {folders.url_of(file): file for file in files if file.relative.lower().endswith(".tar")}
        if not self._tars:
            raise CapfiltError(f"{key}: no *.tar in {', '.join(inputs[:3])}")
        self.lists = tuple(self._tars)

    def files(self) -> list[FileInfo]:
        """Return the tars."""
        return [file.version(FORMAT) for file in self._tars.values()]

    def count(self, tar: str) -> int:
        """Return the samples of a tar."""
        with self._storage.local_copy(tar) as path:
            return len(samples_of(path, tar))

    def rows(self, tar: str, wanted: Wanted) -> Iterator[Rows]:
        """Yield the samples of a tar as rows, in its order.

        The caption is what the sample's json has in the wanted column, else its text, else what the json has under
        a usual name; all other columns are the json's. Raises CapfiltError where the tar cannot be read.
        """
        columns = [name for name in wanted.columns if name != wanted.url]
        file = self._tars[tar]
        with self._storage.local_copy(tar) as path, path.open("rb") as content:
            tar_samples = _tar_samples(path, tar)
            samples = _in_order(tar_samples)
            for start in range(0, len(samples), BATCH_ROWS):
                batch = samples[start : start + BATCH_ROWS]
                cells: dict[str, list[Any]] = {name: [] for name in columns}
                for key, places in batch if columns else ():
                    values = _values(content, places, wanted.caption, f"{tar}#{key}")
                    for name in columns:
                        cells[name].append(values.get(name))
                cells[wanted.url] = [
                    Place(folder=file.folder, relative=file.relative, item=key).url(FORMAT)
                    for key, _ in batch
                ]
                yield Rows(columns=cells, numbers=range(start + 1, start + 1 + len(batch)), unit="item")
        # Said once: at the end of the one reading that takes all rows.
        _warn(tar_samples, tar)


def samples_of(path: Path, name: str) -> list[tuple[str, Places]]:
    """Return the samples of a tar in its order, also those that lack an image or a text.

    Args:
        name: of the tar, for the error message.

    Raises CapfiltError where it cannot be read.
    """
    return _in_order(_tar_samples(path, name))


def _tar_samples(path: Path, name: str) -> TarSamples:
    try:
        tar_samples = find_tar_samples(path, extensions=_EXTENSIONS)
    except tarfile.ReadError as error:
        raise CapfiltError(f"{name} is not a readable tar: {error}") from error
    if tar_samples.follows == "damage":
        raise CapfiltError(
            f"{name}: a header is damaged, and what follows it cannot be read; fetch the tar again"
        )
    return tar_samples


def _in_order(tar_samples: TarSamples) -> list[tuple[str, Places]]:
    samples = [
        *tar_samples.whole.items(),
        *((key, places) for key, places in tar_samples.partial if any(places)),
    ]
    in_order = sorted(samples, key=lambda sample: min(place for place in sample[1] if place))
    return [(printable_key(key), places) for key, places in in_order]


def _warn(tar_samples: TarSamples, name: str) -> None:
    if tar_samples.follows != "end":
        fault = (
            "has no end mark and may have been cut"
            if tar_samples.follows == "nothing"
            else "goes on after its end mark"
        )
        _log.warning("%s %s: samples may be missing", name, fault)
    if tar_samples.left_out:
        reasons = ", ".join(
            f"{count:,} with {reason}" for reason, count in sorted(tar_samples.left_out.items())
        )
        _log.warning("%s: samples left out: %s", name, reasons)


def _values(content: BinaryIO, places: Places, caption: str | None, name: str) -> dict[str, Any]:
    """Return what a sample says, by column."""
    described: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        described = json.loads(_member(content, places[JSON], name) or b"null")
    values = dict(described) if isinstance(described, dict) else {}
    if caption and not values.get(caption):
        text = _member(content, places[TEXT], name)
        if isinstance(described, list):
            values[caption] = [part for part in described if isinstance(part, str)]
        elif text is not None:
            values[caption] = text.decode("utf-8-sig", errors="replace").strip()
        else:
            values[caption] = next((values[other] for other in _CAPTIONS if values.get(other)), None)
    return values


def _member(content: BinaryIO, place: tuple[int, int] | None, name: str) -> bytes | None:
    if place is None:
        return None
    offset, size = place
    if size > MAX_ROW_BYTES:
        raise CapfiltError(f"{name}: its text or json has more than {MAX_ROW_BYTES >> 20} MiB; leave it out")
    content.seek(offset)
    return content.read(size)
