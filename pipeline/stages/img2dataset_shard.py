"""Import of a shard that img2dataset's own command line made: its tar stays where it is and counts as crawled."""

import re
import tarfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.digests import sha256_file
from pipeline.images.decode import ImageError, read_header
from pipeline.intake.lists.parquet_rows import ParquetList, cells_of
from pipeline.shards.shard_files import image_members
from pipeline.storage.storage import Storage
from schemas.errors import CorruptShardError
from schemas.names import is_one_part
from schemas.records import OutputFile
from schemas.statuses import REASONS
from schemas.tables import MAX_DETAIL_CHARS

# Longer than any key, digest, or part of a message that says why a download failed.
_CELL_CHARS = 4096

# Messages of img2dataset, urllib and OpenCV, and the reason that each means here; the first match counts.
_MESSAGES = tuple(
    (re.compile(pattern, re.IGNORECASE), reason)
    for pattern, reason in (
        (r"HTTP Error 429", "rate_limited"),
        (r"HTTP Error 4\d\d", "http_4xx"),
        (r"HTTP Error 5\d\d", "http_5xx"),
        (r"redirect error that would lead to an infinite loop", "redirect_loop"),
        (r"HTTP Error 30\d: .*not allowed", "bad_scheme"),
        (r"HTTP Error", "http_other"),
        (r"X-Robots-Tag", "x_robots_tag"),
        (r"timed out", "timeout"),
        (r"SSL|certificate", "tls"),
        (r"Errno -\d+\]|Name or service not known|name resolution|No address associated", "dns"),
        (r"IncompleteRead", "body_truncated"),
        (r"Remote end closed|Connection|Errno 1\d\d\]|unreachable|No route", "connect"),
        (
            r"unknown url type: '|no host given|codec can't|nonnumeric port|URL can't|label (empty|too)",
            "bad_url",
        ),
        (r"unknown url type|file not on local host|ftp error", "bad_scheme"),
        (r"got more than \d+ (headers|bytes)", "header_too_large"),
        (r"image too small", "too_small"),
        (r"image area too large|CV_IO_MAX_IMAGE_PIXELS", "too_many_pixels"),
        (r"aspect ratio too large", "aspect_ratio"),
        (r"buf\.empty", "empty_body"),
        (r"Image decoding error", "not_an_image"),
    )
)
_HTTP_STATUS = re.compile(r"HTTP Error (\d{3})")

_COLUMNS = ("key", "status", "error_message", "sha256", "original_width", "original_height")


# What a sample's row says of its image in the tar: width, height, image_bytes and offset.
StoredImage = dict[str, int]


def import_shard(
    rows: Sequence[Mapping[str, Any]], listed_tar: OutputFile, storage: Storage, max_pixels: int
) -> tuple[list[dict[str, Any]], OutputFile]:
    """Return the samples of an img2dataset shard, and its tar as a committed file.

    Args:
        rows: the shard's URLS; their keys are img2dataset's.
        listed_tar: absolute path or URL of the tar, and its size when it was listed; the Parquet lies beside it.

    Raises:
        CorruptShardError: the files are not what the rows were read from.
    """
    tar_url = listed_tar.path
    parquet_url = tar_url.removesuffix(".tar") + ".parquet"
    try:
        with storage.local_copy(parquet_url) as path:
            img2dataset_rows = _read_rows(path, parquet_url, {row["key"] for row in rows})
        with storage.local_copy(tar_url) as path:
            images = read_images(path)
            tar = OutputFile(
                path=tar_url, bytes=path.stat().st_size, sha256=sha256_file(path), rows=len(images)
            )
    except (FileNotFoundError, tarfile.ReadError, pa.ArrowException) as error:
        raise CorruptShardError(f"{tar_url}: {error}; restore the folder that img2dataset made") from error
    if tar.bytes != listed_tar.bytes:
        raise CorruptShardError(f"{tar_url} has {tar.bytes} bytes, and {listed_tar.bytes} when it was read")
    if strange := [row["key"] for row in rows if not (row["key"] and is_one_part(row["key"]))]:
        raise CorruptShardError(f"{parquet_url} has the key {strange[0]!r}, which cannot be a file's name")
    if missing := [row["key"] for row in rows if row["key"] not in img2dataset_rows]:
        raise CorruptShardError(
            f"{parquet_url} has no row with key {missing[0]!r}: it changed after it was read"
        )
    return [
        import_row(row, img2dataset_rows[row["key"]], images.get(row["key"]), max_pixels) for row in rows
    ], tar


def _read_rows(path: Path, url: str, keys: Collection[str]) -> dict[str, dict[str, Any]]:
    """Return what img2dataset recorded of the samples with these keys, by key; long texts are cut."""
    rows: dict[str, dict[str, Any]] = {}
    with path.open("rb") as file:
        parquet = ParquetList(file, url)
        if lacking := {"key", "status", "error_message"} - set(parquet.names):
            raise CorruptShardError(f"{url} has no column {min(lacking)}, which img2dataset writes")
        columns, first_row = [name for name in _COLUMNS if name in parquet.names], 1
        for piece in parquet.pieces(columns):
            # A column at a time: each may decode to as much as fits in memory once.
            cells = [[_cut(cell) for cell in cells_of(piece, name, url, first_row)] for name in columns]
            piece_rows = (dict(zip(columns, values, strict=True)) for values in zip(*cells, strict=True))
            rows |= {row["key"]: row for row in piece_rows if row["key"] in keys}
            first_row += piece.num_rows
    return rows


def _cut(cell: Any) -> Any:
    return cell[:_CELL_CHARS] if isinstance(cell, str) else cell


def import_row(
    row: Mapping[str, Any],
    img2dataset_row: Mapping[str, Any],
    image: StoredImage | ImageError | None,
    max_pixels: int,
) -> dict[str, Any]:
    """Return the sample of one URL: what img2dataset recorded, checked against the image in its tar.

    Args:
        img2dataset_row: the row of img2dataset's Parquet; columns that it was not told to write are missing.
        image: the header of the image in the tar, why it has none, or None where the tar has no such image.
    """
    detail = str(img2dataset_row["error_message"] or "")
    code = _HTTP_STATUS.search(detail)
    sample = {
        **row,
        "status": "ok",
        "reason": None,
        "detail": detail[:MAX_DETAIL_CHARS] or None,
        "http_status": int(code[1]) if code else None,
        "sha256": img2dataset_row.get("sha256"),
        "original_width": img2dataset_row.get("original_width"),
        "original_height": img2dataset_row.get("original_height"),
    }
    reason: str | None = None
    if img2dataset_row["status"] != "success":
        reason = reason_of(img2dataset_row["status"], detail)
    elif image is None:
        reason, sample["detail"] = "missing_member", "status success, and no such image in the tar"
    elif isinstance(image, ImageError):
        reason, sample["detail"] = image.reason, image.detail[:MAX_DETAIL_CHARS]
    elif image["width"] * image["height"] > max_pixels:
        reason, sample["detail"] = "too_many_pixels", f"{image['width']} x {image['height']}"
    else:
        sample |= image
    if reason is not None:
        sample |= {"status": REASONS[reason].status, "reason": reason}
    return sample


def reason_of(status: str, message: str) -> str:
    """Return the reason, of ``schemas.statuses``, for a failure that img2dataset reports as text."""
    for pattern, reason in _MESSAGES:
        if pattern.search(message):
            return reason
    return "image_truncated" if status == "failed_to_resize" else "bad_response"


def read_images(path: Path) -> dict[str, StoredImage | ImageError]:
    """Return the size of each image of a tar from its header, or why it has none, by key. Raises tarfile.ReadError."""
    images: dict[str, StoredImage | ImageError] = {}
    with path.open("rb") as tar:
        for member in image_members(path):
            tar.seek(member.offset)
            data = tar.read(member.size)
            try:
                header = read_header(data)
            except ImageError as error:
                images[member.key] = error
            else:
                images[member.key] = {
                    "width": header.width,
                    "height": header.height,
                    "image_bytes": len(data),
                    "offset": member.offset,
                }
    return images
