"""The folder that a model's name in a config means: a local one, or one of the hub."""

from collections.abc import Iterable
from pathlib import Path

from pipeline.models.files.bucket import bucket_folder, is_bucket
from pipeline.models.files.model_files import FirstMissingFile
from schemas.errors import CapfiltError


def model_folder(
    name: str, revision: str, patterns: Iterable[str], first_missing_file: FirstMissingFile, where: str
) -> Path:
    """Return the folder that ``name`` means, a local one, one on object storage, or a hub id; it may lack files.

    Raises:
        CapfiltError: no such folder, hub id or revision, or the hub cannot be reached and the cache lacks a file.
    """
    if is_bucket(name):
        return bucket_folder(name, patterns, where)
    folder = local_folder(name, where)
    if folder is not None:
        return folder
    # Imported where the hub is asked: its client takes longer to import than a small corpus to plan.
    from pipeline.models.files.hub import hub_folder

    return hub_folder(name, revision, patterns, first_missing_file, where)


def local_folder(name: str, where: str) -> Path | None:
    """Return the local folder that ``name`` means, or None for a hub id. Raises CapfiltError where it is neither."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path.absolute()
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise CapfiltError(
            f"{where} = {name!r}: no such folder, and neither a hub id (ORG/NAME) nor s3://, gs:// or az://"
        )
    return None
