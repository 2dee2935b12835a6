"""Pictures in files as a source: folders of images, tars, tables with images inside, img2dataset's shards."""

import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

import pyarrow as pa

from jobs.init.lists import column_names
from jobs.init.source_text import HUMAN, Key, SourceText
from pipeline.images.decode import ImageError, check, read_header
from pipeline.intake.guess_columns import guess_caption
from pipeline.intake.lists.columns import Wanted
from pipeline.intake.lists.preview import PREVIEW_ROWS, preview_list
from pipeline.intake.pictures.tables import ImageTables, is_image_struct, table_schema
from pipeline.intake.recognise import RecognisedInput, described_suffixes
from pipeline.storage.storage import Storage
from schemas.config import CrawlConfig
from schemas.errors import CapfiltError
from schemas.names import printable, shown

# Images whose headers are read, members of a tar that are counted.
_IMAGES_LOOKED_AT, _MEMBERS_LOOKED_AT = 64, 300
_NO_CAPTIONS = "there are no captions: the sampled ones compete alone"
_CAPTION_COMMENT = 'a text or a list of texts; "": none'


def describe_image_folder(recognised: RecognisedInput, storage: Storage, keys: list[Key]) -> SourceText:
    """Describe folders of images: where captions come from, and what the headers of some say."""
    guessed, has_captions = _NO_CAPTIONS, True
    if recognised.metadata:
        preview = preview_list(storage, recognised.metadata)
        texts = {
            name: [row.get(name) for row in preview.rows] for name in preview.names if name != "file_name"
        }
        caption = guess_caption({name: _texts(cells) for name, cells in texts.items()})
        keys.append(("caption_column", caption, _CAPTION_COMMENT))
        name = PurePosixPath(recognised.metadata).name
        guessed = f"{caption} of {name} has the captions" if caption else f"{name} has no column of captions"
    elif recognised.captions:
        guessed = f"NAME.txt beside an image is its caption: {recognised.captions:,} images have one"
    else:
        has_captions = False
    count = f"{_counted(len(recognised.files), 'image')} ({described_suffixes(recognised.suffixes)})"
    return SourceText(
        keys=tuple(keys),
        hints=(HUMAN,) if has_captions else (),
        is_fetched=False,
        samples=len(recognised.files),
        facts=(f"{_places(keys)}: {count}", *_header_sentences(recognised.files, storage)),
        guessed=(guessed,),
    )


def _header_sentences(files: Sequence[str], storage: Storage) -> Iterator[str]:
    """Say what becomes of a sample of images, by their headers."""
    config = CrawlConfig()
    chosen = files[:: -(-len(files) // _IMAGES_LOOKED_AT)]
    sides: list[int] = []
    reasons: Counter[str] = Counter()
    for file in chosen:
        try:
            with storage.open(file) as content:
                header = read_header(content.read(config.max_body_bytes))
            check(header, config)
            sides.append(min(header.width, header.height))
        except ImageError as error:
            reasons[error.reason] += 1
        except OSError:
            reasons["unreadable_file"] += 1
    if sides:
        yield f"of {len(chosen):,} looked at, the shorter side is {min(sides):,} to {max(sides):,} px"
    if reasons:
        lost = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
        yield f"of {len(chosen):,} looked at, {reasons.total():,} will be dropped: {lost}"


def describe_tars(recognised: RecognisedInput, storage: Storage, keys: list[Key]) -> SourceText:
    """Describe tars by the members that the first begins with. Raises CapfiltError where it cannot be read."""
    first = recognised.files[0]
    try:
        with storage.open(first) as content, tarfile.open(fileobj=content, mode="r|") as tar:
            names = [member.name for member, _ in zip(tar, range(_MEMBERS_LOOKED_AT), strict=False)]
    except (tarfile.TarError, OSError) as error:
        raise CapfiltError(f"{first}: is not a tar that can be read: {error}") from error
    inside = described_suffixes(Counter(PurePosixPath(name).suffix.lower() for name in names))
    return SourceText(
        keys=tuple(keys),
        hints=(HUMAN,),
        is_fetched=False,
        facts=(
            f"{_places(keys)}: {_counted(len(recognised.files), 'tar')}",
            f"the first {len(names):,} members of {printable(PurePosixPath(first).name)}: {inside}",
        ),
        guessed=("members of one name are a sample: an image, and its caption in .txt, .caption or .json",),
    )


def describe_dataset(recognised: RecognisedInput, storage: Storage, keys: list[Key]) -> SourceText:
    """Describe tables with images inside by the first: its column of images, and its likeliest one of captions."""
    key = f"source.{keys[0][1]}.input"
    tables = ImageTables(recognised.inputs, key, storage)
    first = tables.lists[0]
    with storage.local_copy(first) as path:
        schema = table_schema(path, first)
    images = [field.name for field in schema if is_image_struct(field.type)]
    if len(images) > 1:
        keys.append(("url_column", images[0], f"the column of images, of {', '.join(images)}"))
    texts = [field.name for field in schema if _is_text(field.type)]
    url = images[0] if images else "url"
    rows = next(tables.rows(first, Wanted(url=url, columns=(url, *texts))), None) if texts else None
    cells = {name: rows.columns[name][:PREVIEW_ROWS] for name in texts} if rows else {}
    caption = guess_caption({name: _texts(column) for name, column in cells.items()})
    keys.append(("caption_column", caption, _CAPTION_COMMENT))
    guessed = [f"{images[0]} has the images"] if images else []
    guessed.append(
        f"{caption} has the captions, such as {_first(cells[caption])}" if caption else _NO_CAPTIONS
    )
    hints = [HUMAN] if caption else []
    if others := [name for name in schema.names if name not in (*images, caption)]:
        hints.append(("extra_columns", others, "carried along in samples.extra"))
    return SourceText(
        keys=tuple(keys),
        hints=tuple(hints),
        is_fetched=False,
        samples=tables.count(first) if len(tables.lists) == 1 else None,
        facts=(
            f"{_places(keys)}: {_counted(len(tables.lists), 'table')} with images inside; "
            f"columns {column_names(schema.names)}",
        ),
        guessed=tuple(guessed),
    )


def describe_img2dataset(recognised: RecognisedInput, keys: list[Key]) -> SourceText:
    """Describe img2dataset's output folders."""
    return SourceText(
        keys=tuple(keys),
        hints=(HUMAN,),
        is_fetched=False,
        facts=(f"{_places(keys)}: {_counted(len(recognised.files), 'shard')} of img2dataset",),
        guessed=("each NNNNN.tar with its NNNNN.parquet becomes a shard; url and caption are its columns",),
    )


def _places(keys: Sequence[Key]) -> str:
    """Return a source's inputs as its config names them."""
    return printable(", ".join(next(value for name, value, _ in keys if name == "input")))


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _texts(cells: Sequence[object]) -> list[str]:
    firsts = (cell[0] if isinstance(cell, list) and cell else cell for cell in cells)
    return [cell for cell in firsts if isinstance(cell, str) and cell.strip()]


def _first(cells: Sequence[object]) -> str:
    return next(map(shown, _texts(cells)), "nothing in the first rows")
