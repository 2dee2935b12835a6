"""Samples as Python objects: the curated ones, streamed shard by shard, and one sample as a notebook shows it."""

import tarfile
from base64 import b64encode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from PIL import Image

from pipeline.corpus.records import Records
from pipeline.images.decode import decode_rgb
from pipeline.shards.shard_files import read_tar
from pipeline.shards.shard_reader import committed_file, committed_table, open_crawled
from schemas.errors import CorruptShardError
from schemas.names import printable
from schemas.records import ShardRecord

_COLUMNS = ("uid", "source", "shard", "key", "url", "status", "captions", "scores", "origins")
_MEDIA_TYPES = {"jpg": "image/jpeg", "jpeg": "image/jpeg", "png": "image/png", "webp": "image/webp"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A curated sample: a stored image and the captions that were kept, best first.

    ``scores`` are CLIP's cosine similarities, and ``origins`` are ``synthetic``, ``web`` or ``human``; both are in the
    order of ``captions``. A caption of a human source may have no score.
    """

    uid: str
    source: str
    shard: str
    key: str
    url: str
    captions: tuple[str, ...]
    scores: tuple[float | None, ...]
    origins: tuple[str, ...]
    image_bytes: bytes

    @property
    def image(self) -> Image.Image:
        """The image, decoded: upright, RGB."""
        return decode_rgb(self.image_bytes)

    def __repr__(self) -> str:
        caption = printable(self.captions[0])
        return (
            f"Sample({self.uid}, {len(self.image_bytes):,} bytes, {len(self.captions)} captions, {caption!r})"
        )


def read_curated(records: Records, record: ShardRecord) -> Iterator[Sample]:
    """Yield the samples of a committed curated shard in order of key; one image at a time is in memory.

    Raises CorruptShardError where the files are not those of the record.
    """
    table = committed_table(records, record.outputs["parquet"], _COLUMNS)
    kept = {row["key"]: row for row in table.to_pylist() if row.pop("status") == "kept"}
    tar = record.outputs["tar"]
    try:
        with committed_file(records, tar) as path, path.open("rb") as file:
            for key, members in read_tar(file):
                row = kept.pop(key)
                [image_bytes] = [members[name] for name in members.keys() & _MEDIA_TYPES.keys()]
                row |= {name: tuple(row[name]) for name in ("captions", "scores", "origins")}
                yield Sample(**row, image_bytes=image_bytes)
    except (tarfile.ReadError, KeyError, ValueError) as error:
        raise CorruptShardError(f"{tar.path} does not agree with its Parquet ({error!r})") from error
    if kept:
        raise CorruptShardError(f"{tar.path} lacks {len(kept):,} samples of its Parquet")


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class SampleView:
    """One sample for display: in a notebook the image beside its candidates, in a terminal the candidates.

    ``trace`` is what ``Corpus.trace`` returns of it. ``image_bytes`` is None where the crawl stored no image.
    """

    trace: Mapping[str, Any]
    image_bytes: bytes | None
    extension: str = "jpg"

    @property
    def image(self) -> Image.Image | None:
        """The stored image, decoded: upright, RGB."""
        return None if self.image_bytes is None else decode_rgb(self.image_bytes)

    def __repr__(self) -> str:
        trace = self.trace
        lines = [f"{trace['uid']}  {trace['source']}/{trace['shard']}  {trace['url']}", self._outcome()]
        width = max((len(row["outcome"]) for row in trace["candidates"]), default=0)
        lines += [
            f"  {_score(row):>6}  {row['origin']:9}  {row['outcome']:{width}}  {row['text']}"
            for row in trace["candidates"]
        ]
        return "\n".join(map(printable, lines))

    def _repr_html_(self) -> str:
        trace = self.trace
        rows = "".join(map(_html_row, trace["candidates"]))
        header = "<tr><th>score</th><th>origin</th><th>outcome</th><th>caption</th></tr>"
        table = f"<table>{header}{rows}</table>" if rows else ""
        image = ""
        if self.image_bytes is not None:
            data = b64encode(self.image_bytes).decode()
            image = f'<img style="max-width: 384px" src="data:{_MEDIA_TYPES[self.extension]};base64,{data}">'
        return (
            '<div style="display: flex; gap: 1em; align-items: flex-start">'
            f"{image}<div><p><code>{escape(trace['uid'])}</code> {escape(trace['source'])}/{escape(trace['shard'])}"
            f"<br>{escape(trace['url'])}<br>{escape(self._outcome())}</p>{table}</div></div>"
        )

    def _outcome(self) -> str:
        """Return how the sample ended so far, in words."""
        last, selection = self.trace["fetches"][-1], self.trace["selection"]
        if last["status"] != "ok":
            return ", ".join(filter(None, ("no image", last["status"], last["reason"], last["detail"])))
        if selection is None:
            return "not selected yet"
        return ", ".join(filter(None, (selection["status"], selection["reason"])))


def view(records: Records, trace: Mapping[str, Any]) -> SampleView:
    """Return a traced sample with its image, out of the tar of its crawled shard, which is checked as a whole first."""
    record = records.read("crawl", trace["source"], trace["shard"])
    if record is None or trace["fetches"][-1]["status"] != "ok":
        return SampleView(trace=trace, image_bytes=None)
    with open_crawled(records, record) as shard:
        key = trace["key"]
        return SampleView(trace=trace, image_bytes=shard.image_bytes(key), extension=shard.extension(key))


def _score(row: Mapping[str, Any]) -> str:
    return "-" if row["score"] is None else f"{row['score']:.3f}"


def _html_row(row: Mapping[str, Any]) -> str:
    cells = (_score(row), row["origin"], row["outcome"], row["text"])
    weight = "bold" if row["outcome"].startswith("kept") else "normal"
    body = "".join(f'<td style="text-align: left">{escape(text)}</td>' for text in cells)
    return f'<tr style="font-weight: {weight}">{body}</tr>'
