"""A model's folder from the Hugging Face hub: the snapshot of a repository in the local cache."""

from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    # The HTTP client's base error; which client it is changes between versions.
    HTTPError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import REGEX_COMMIT_HASH

from pipeline.models.files.model_files import FirstMissingFile
from schemas.errors import CapfiltError

# The hub's client waits for ever; a firewall that swallows packets must not look like a download.
_TIMEOUT_S = 10.0


def hub_folder(
    repository: str, revision: str, patterns: Iterable[str], first_missing_file: FirstMissingFile, where: str
) -> Path:
    """Return the snapshot of a hub repository in the local cache, fetched where that is needed.

    A commit that the cache has whole is not asked for again. A branch or tag is looked up, so that it may
    move, unless the hub does not answer: then the cache's state of it stands.
    """
    patterns = list(patterns)
    cached = _cached_snapshot(repository, revision, patterns, where)
    complete = cached if cached is not None and first_missing_file(cached) is None else None
    if complete and REGEX_COMMIT_HASH.fullmatch(revision):
        return complete
    what = f"{where}: {repository} at revision {revision!r}"
    try:
        if constants.HF_HUB_OFFLINE:
            raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
        # Asked first, under a time limit: the download itself has none.
        HfApi().model_info(repository, revision=revision, timeout=_TIMEOUT_S)
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except RevisionNotFoundError as error:
        raise CapfiltError(f"{what}: the hub has no such revision") from error
    except RepositoryNotFoundError as error:
        raise CapfiltError(f"{what}: the hub has no such model, or it needs a login (HF_TOKEN)") from error
    except (OSError, HTTPError) as error:
        if complete:
            return complete
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        if cached is not None:
            have = f"the cache lacks its {first_missing_file(cached)} ({cached})"
        else:
            known = ", ".join(_cached_revisions(repository))
            have = (
                f"the cache in {constants.HF_HUB_CACHE} has {f'only {known}' if known else 'nothing of it'}"
            )
        raise CapfiltError(
            f"{what} cannot be fetched ({reason}), and {have}; fetch it where there is a network, or name a local "
            "folder"
        ) from error


def cached_folder(
    repository: str, revision: str, patterns: Iterable[str], first_missing_file: FirstMissingFile, where: str
) -> Path | None:
    """Return the snapshot of a hub repository if the local cache has it whole; sends no request."""
    folder = _cached_snapshot(repository, revision, list(patterns), where)
    return folder if folder is not None and first_missing_file(folder) is None else None


def cache_and_offline() -> tuple[str, bool]:
    """Return the folder of the hub's cache, and whether HF_HUB_OFFLINE forbids to ask the hub."""
    return str(constants.HF_HUB_CACHE), bool(constants.HF_HUB_OFFLINE)


def _cached_snapshot(repository: str, revision: str, patterns: list[str], where: str) -> Path | None:
    """Return what the cache has of a revision, whole or not."""
    try:
        folder = snapshot_download(
            repository, revision=revision, allow_patterns=patterns, local_files_only=True
        )
    except IncompleteSnapshotError as error:
        folder = error.snapshot_path
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise CapfiltError(f"{where} = {repository!r} is neither a folder nor a hub id (ORG/NAME)") from error
    return Path(folder)


def _cached_revisions(repository: str) -> list[str]:
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    names = [
        path.relative_to(folder / "refs").as_posix()
        for path in (folder / "refs").rglob("*")
        if path.is_file()
    ]
    return sorted(names) + sorted(path.name for path in folder.glob("snapshots/*"))
