"""What was recognised as a ``[[source]]`` of a config, and the sentences that say what was found and what guessed."""

import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from jobs.init.config_text import Key, SourceText
from pipeline.corpus.storage import Storage
from pipeline.images.decode import ImageError, check, read_header
from pipeline.intake.dedup import SourcePairs
from pipeline.intake.guess_columns import GuessedColumns, guess_caption, guess_columns
from pipeline.intake.lists.preview import PREVIEW_ROWS, ListPreview
from pipeline.intake.recognise import KIND_NAMES, FoundInput, described_suffixes, recognise
from schemas.config import CrawlConfig, SourceConfig
from schemas.errors import CapfiltError
from schemas.names import printable, shown

# Images whose headers are read, tar members and columns that are named.
_IMAGES_LOOKED_AT, _MEMBERS_LOOKED_AT, _COLUMNS_NAMED = 64, 300, 12
_HUMAN: Key = ("kind", "human", "keep its captions as they are; none is sampled")


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribedSource:
    """A source with what was found and what was guessed, a sentence each."""

    source: SourceText
    found: tuple[str, ...]
    guessed: tuple[str, ...]


def describe(arguments: Sequence[str], base: Path) -> DescribedSource:
    """Look at the arguments, which are one source together, and describe it.

    Args:
        base: the config's folder: paths below it are written relative to it.

    Raises:
        CapfiltError: an argument cannot be used, or they are of two kinds.
    """
    storage = Storage(str(base))
    inputs = [recognise(argument, storage) for argument in arguments]
    for argument, each in zip(arguments, inputs, strict=True):
        if each.kind != inputs[0].kind:
            raise CapfiltError(
                f"{arguments[0]} is {KIND_NAMES[inputs[0].kind]}, {argument} is {KIND_NAMES[each.kind]}: one source "
                "has one kind; write a config for one, and add a [[source]] for the other"
            )
    whole = FoundInput(
        kind=inputs[0].kind,
        inputs=tuple(dict.fromkeys(path for each in inputs for path in each.inputs)),
        files=tuple(dict.fromkeys(path for each in inputs for path in each.files)),
        suffixes=sum((each.suffixes for each in inputs), Counter()),
        captions=sum(each.captions for each in inputs),
        metadata=next((each.metadata for each in inputs if each.metadata), ""),
        preview=inputs[0].preview,
    )
    head = [("name", _name(arguments[0]), "in every table; for good")]
    written = [_written(path, base) for path in whole.inputs]
    match whole.kind:
        case "list":
            keys = [*head, ("input", written, "files or globs, local or remote")]
            return _list(whole, storage, keys, _written(whole.files[0], base))
        case "imagefolder":
            return _image_folder(whole, storage, head, written)
        case "img2dataset":
            return _img2dataset(whole, head, written)
        case "webdataset":
            return _webdataset(whole, storage, head, written)
        case "huggingface":
            return _huggingface(whole, head, written)


def _name(argument: str) -> str:
    """Return a source's name made of a path's: of a folder its own, of a file that before its endings."""
    name = PurePosixPath(argument.rstrip("/")).name.partition(".")[0].lower()
    return re.sub(r"[^a-z0-9_-]+", "-", name).strip("-_")[:64] or "mine"


def _written(path: str, base: Path) -> str:
    return path if "://" in path or not Path(path).is_relative_to(base) else str(Path(path).relative_to(base))


def _list(found: FoundInput, storage: Storage, keys: list[Key], first: str) -> DescribedSource:
    preview = found.preview
    assert preview is not None
    columns = guess_columns(preview)
    if columns is None:
        raise CapfiltError(f"{first}: no column holds URLs or paths of images (it has {_columns(preview)})")
    if preview.format == "tsv-quoted":
        keys.append(("format", "tsv-quoted", "its first line has quotes"))
    keys += [
        ("url_column", columns.url, "rows without one are counted and left out"),
        ("caption_column", columns.caption, 'a text or a list of texts; "": none'),
    ]
    source = SourceConfig.model_validate({name: value for name, value, _ in keys})
    SourcePairs(source, storage, found.files).check()
    hints = [_HUMAN] if columns.caption else []
    if columns.others:
        hints.append(("extra_columns", columns.others, "carried along in samples.extra"))
    own = columns.own_hosts
    return DescribedSource(
        source=SourceText(
            keys=tuple(keys),
            hints=tuple(hints),
            crawl_hints=(("allow_hosts", own, "addresses of your own network"),) if own else (),
            samples=_rows(found, preview),
        ),
        found=(_list_sentence(found, preview, first),),
        guessed=tuple(_guesses(columns, preview)),
    )


def _rows(found: FoundInput, preview: ListPreview) -> int | None:
    """Return how many rows all files have; None where only reading them would tell."""
    if len(found.files) > 1:
        return None
    if preview.num_rows is not None:
        return preview.num_rows
    return len(preview.rows) if len(preview.rows) < PREVIEW_ROWS else None


def _list_sentence(found: FoundInput, preview: ListPreview, first: str) -> str:
    kinds = {"jsonl": "JSON", "txt": "plain list of URLs", "tsv-quoted": "quoted TSV", "parquet": "Parquet"}
    packed = f", {preview.compression}" if preview.compression else ""
    form = f"{kinds.get(preview.format, preview.format.upper())}{packed}"
    rows = _rows(found, preview)
    files = f"{len(found.files):,} files, the first is " if len(found.files) > 1 else ""
    count = f"; {rows:,} rows" if rows is not None else ""
    return f"{files}{printable(first)}: {form}; columns {_columns(preview)}{count}"


def _columns(preview: ListPreview) -> str:
    names = [shown(name) for name in preview.names[:_COLUMNS_NAMED]]
    more = len(preview.names) - len(names)
    return (", ".join(names) or "none") + (f" and {more} more" if more > 0 else "")


def _guesses(columns: GuessedColumns, preview: ListPreview) -> Iterator[str]:
    kind = "paths of images" if columns.holds_paths else "URLs"
    yield f"{columns.url} has the {kind}, such as {_example(preview, columns.url)}"
    if columns.caption:
        yield f"{columns.caption} has the captions, such as {_example(preview, columns.caption)}"
    else:
        yield "no column has captions: the sampled ones compete alone"
    if columns.own_hosts:
        hosts = ", ".join(columns.own_hosts[:3])
        yield f"{hosts}: addresses of your own network are refused until [crawl] allow_hosts names them"


def _example(preview: ListPreview, name: str) -> str:
    return next((shown(row[name]) for row in preview.rows if row.get(name)), "nothing in the first rows")


def _image_folder(
    found: FoundInput, storage: Storage, head: list[Key], written: list[str]
) -> DescribedSource:
    keys = [*head, ("format", "imagefolder", ""), ("input", written, "folders, or globs of images")]
    images = len(found.files)
    sentences = [
        f"{images:,} images in {printable(', '.join(written))} ({described_suffixes(found.suffixes)})"
    ]
    if found.metadata:
        guessed = f"{PurePosixPath(found.metadata).name} has the captions, by its column file_name"
    elif found.captions:
        guessed = f"NAME.txt beside an image is its caption: {found.captions:,} images have one"
    else:
        guessed = "there are no captions: the sampled ones compete alone"
    sentences += _image_sentences(found.files, storage)
    return DescribedSource(
        source=SourceText(
            keys=tuple(keys),
            hints=(_HUMAN,) if found.metadata or found.captions else (),
            is_fetched=False,
            samples=images,
        ),
        found=tuple(sentences),
        guessed=(guessed,),
    )


def _image_sentences(files: Sequence[str], storage: Storage) -> Iterator[str]:
    """Say what becomes of a sample of images, by their headers."""
    config = CrawlConfig()
    chosen = files[:: -(-len(files) // _IMAGES_LOOKED_AT)]
    sides: list[int] = []
    reasons: Counter[str] = Counter()
    for file in chosen:
        try:
            with storage.open(file) as content:
                header = read_header(content.read(config.max_body_bytes))
            check(
                header,
                formats=config.formats,
                max_pixels=config.max_pixels,
                min_size_px=config.min_size_px,
                max_aspect_ratio=config.max_aspect_ratio,
            )
            sides.append(min(header.width, header.height))
        except ImageError as error:
            reasons[error.reason] += 1
        except OSError:
            reasons["unreadable"] += 1
    looked = f"of {len(chosen):,} whose headers were read"
    if reasons:
        lost = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
        yield f"{looked}, {reasons.total():,} would be dropped: {lost}"
    if sides:
        yield f"{looked}, the shorter side is {min(sides):,} to {max(sides):,} px"


def _img2dataset(found: FoundInput, head: list[Key], written: list[str]) -> DescribedSource:
    keys = [
        *head,
        ("format", "img2dataset", "its tars are used where they lie"),
        ("input", written, "folders"),
    ]
    return DescribedSource(
        source=SourceText(keys=tuple(keys), hints=(_HUMAN,), is_fetched=False),
        found=(f"{len(found.files):,} shards of img2dataset in {printable(', '.join(written))}",),
        guessed=("each NNNNN.tar with its NNNNN.parquet becomes a shard; url and caption are its columns",),
    )


def _webdataset(found: FoundInput, storage: Storage, head: list[Key], written: list[str]) -> DescribedSource:
    keys = [*head, ("format", "webdataset", ""), ("input", written, "tars, globs or folders")]
    try:
        with storage.open(found.files[0]) as content, tarfile.open(fileobj=content, mode="r|") as tar:
            names = [member.name for member, _ in zip(tar, range(_MEMBERS_LOOKED_AT), strict=False)]
    except (tarfile.TarError, OSError) as error:
        raise CapfiltError(f"{found.files[0]}: is not a tar that can be read: {error}") from error
    inside = Counter(PurePosixPath(name).suffix.lower() for name in names)
    first = f"the first {len(names):,} members of the first: {described_suffixes(inside)}"
    return DescribedSource(
        source=SourceText(keys=tuple(keys), hints=(_HUMAN,), is_fetched=False),
        found=(f"{len(found.files):,} tars in {printable(', '.join(written))}; {first}",),
        guessed=("members of one name are a sample: an image, and its caption in .txt, .caption or .json",),
    )


def _huggingface(found: FoundInput, head: list[Key], written: list[str]) -> DescribedSource:
    keys = [*head, ("format", "huggingface", ""), ("input", written, "a folder, or Parquet files")]
    sentences, guessed, samples = (
        [f"{len(found.files):,} files of a dataset in {printable(', '.join(written))}"],
        [],
        None,
    )
    if preview := found.preview:
        samples = preview.num_rows if len(found.files) == 1 else None
        texts = {
            name: [row[name] for row in preview.rows if isinstance(row[name], str)]
            for name in preview.names
            if name not in preview.image_names
        }
        caption = guess_caption(texts)
        keys.append(("caption_column", caption, 'a text or a list of texts; "": none'))
        sentences.append(f"columns {_columns(preview)}; {preview.num_rows or 0:,} rows in the first file")
        guessed.append(f"{preview.image_names[0]} has the images")
        guessed.append(
            f"{caption} has the captions, such as {_example(preview, caption)}"
            if caption
            else "no column has captions"
        )
    return DescribedSource(
        source=SourceText(keys=tuple(keys), hints=(_HUMAN,), is_fetched=False, samples=samples),
        found=tuple(sentences),
        guessed=tuple(guessed),
    )
