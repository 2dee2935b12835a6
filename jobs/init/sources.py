"""What was recognised as a ``[[source]]`` of a config, and the sentences that say what was found and what guessed."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from jobs.init.config_text import Key
from jobs.init.lists import describe_list
from jobs.init.pictures import (
    describe_dataset,
    describe_image_folder,
    describe_img2dataset,
    describe_tars,
)
from jobs.init.source_text import SourceText
from pipeline.intake.recognise import KIND_NAMES, RecognisedInput, recognise
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError


def describe(arguments: Sequence[str], base: Path) -> SourceText:
    """Look at the arguments, which are one source together, and describe it.

    Args:
        base: the config's folder: paths below it are written relative to it.

    Raises:
        CapfiltError: an argument cannot be used, or they are of two kinds.
    """
    storage = Storage(str(base))
    recognised = _merged(arguments, [recognise(argument, storage) for argument in arguments])
    written = [written_path(path, base) for path in recognised.inputs]
    keys: list[Key] = [("name", _name(arguments[0]), "unique; never change it: part of every uid")]
    match recognised.kind:
        case "list":
            return describe_list(
                recognised, storage, base, [*keys, ("input", written, "files or globs, local or remote")]
            )
        case "imagefolder":
            keys += [("format", "imagefolder", ""), ("input", written, "folders, or globs of images")]
            return describe_image_folder(recognised, storage, keys)
        case "webdataset":
            keys += [("format", "webdataset", ""), ("input", written, "tars, globs or folders")]
            return describe_tars(recognised, storage, keys)
        case "huggingface":
            keys += [("format", "huggingface", ""), ("input", written, "a folder, or Parquet or Arrow files")]
            return describe_dataset(recognised, storage, keys)
        case "img2dataset":
            keys += [("format", "img2dataset", "tars are used where they lie"), ("input", written, "folders")]
            return describe_img2dataset(recognised, keys)


def _merged(arguments: Sequence[str], inputs: Sequence[RecognisedInput]) -> RecognisedInput:
    """Return several inputs as one. Raises CapfiltError where they are of two kinds."""
    for argument, each in zip(arguments, inputs, strict=True):
        if each.kind != inputs[0].kind:
            raise CapfiltError(
                f"{arguments[0]} is {KIND_NAMES[inputs[0].kind]}, {argument} is {KIND_NAMES[each.kind]}: one source "
                "has one kind; write a config for one, and add a [[source]] for the other"
            )
    return RecognisedInput(
        kind=inputs[0].kind,
        inputs=tuple(dict.fromkeys(path for each in inputs for path in each.inputs)),
        files=tuple(dict.fromkeys(path for each in inputs for path in each.files)),
        suffixes=sum((each.suffixes for each in inputs), Counter()),
        captions=sum(each.captions for each in inputs),
        metadata=next((each.metadata for each in inputs if each.metadata), ""),
        preview=inputs[0].preview,
    )


def _name(argument: str) -> str:
    """Return a source's name made of a path's: of a folder its own, of a file that before its endings."""
    name = PurePosixPath(argument.rstrip("/")).name.partition(".")[0].lower()
    return re.sub(r"[^a-z0-9_-]+", "-", name).strip("-_")[:64] or "mine"


def written_path(path: str, base: Path) -> str:
    """Return a path as the config has it: relative to the config's folder where it is below that."""
    return path if "://" in path or not Path(path).is_relative_to(base) else str(Path(path).relative_to(base))
