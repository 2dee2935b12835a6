"""Folders that img2dataset's command line made: their shards are imported as they are, without copying the tars."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from pipeline.storage.file_info import FileInfo
from pipeline.storage.filesystem import filesystem_of
from pipeline.storage.storage import Storage
from schemas.config import SourceConfig
from schemas.errors import CapfiltError
from schemas.records import ShardRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Img2datasetShard:
    """A tar of img2dataset's, and the Parquet beside it that has a row for every URL."""

    tar: FileInfo
    parquet: FileInfo


def require_named_folders(
    sources: Sequence[SourceConfig], urls: Mapping[tuple[str, str], ShardRecord], storage: Storage
) -> None:
    """Reject a corpus on a bucket that imported tars of this machine's disk which its config does not name.

    Whoever wrote such a corpus could have pictures of this user's own captioned, and copied to the bucket. A tar
    lies in a named folder itself, as the intake found it: below one, a ``..`` or a link could lead anywhere.

    Args:
        sources: the config's.
        urls: the url shards' records, by source and shard.
        storage: the corpus's.

    Raises:
        CapfiltError: names the first such tar.
    """
    if storage.is_local:
        return
    named = {source.name: set(map(_local_path, source.input)) for source in sources}
    for (source, shard), record in urls.items():
        tar = record.outputs.get("adopted")
        if source not in named or tar is None or not Storage(tar.path).is_local:
            continue
        if _local_path(tar.path).parent not in named[source]:
            raise CapfiltError(
                f"shard {source}/{shard} of {storage.root} is {tar.path} on this machine's own disk, and "
                f"source.{source}.input does not name its folder; name it if it is yours, else do not use this corpus"
            )


def _local_path(text: str) -> PurePosixPath:
    """Return what the local filesystem opens for a path or a file:// URL; ``..`` stays, a link may be before it."""
    return PurePosixPath(filesystem_of(text)[1])


def find_img2dataset_shards(folders: Sequence[str], storage: Storage, key: str) -> list[Img2datasetShard]:
    """Return the shards of img2dataset's output folders, in the order given, then by name.

    Raises CapfiltError, naming the config's ``key``, where a folder has no tar or a tar has no Parquet.
    """
    shards = []
    for folder in folders:
        paths = set(_files(folder, key))
        tars = sorted(path for path in paths if path.endswith(".tar"))
        if not tars:
            raise CapfiltError(
                f"{key}: no *.tar in {folder}; run img2dataset with --output_format webdataset"
            )
        for tar in tars:
            parquet = tar.removesuffix("tar") + "parquet"
            if parquet not in paths:
                raise CapfiltError(
                    f"{key}: {tar} has no {parquet.rpartition('/')[2]} beside it; img2dataset writes one "
                    "with --output_format webdataset, once the shard is complete"
                )
            shards.append(Img2datasetShard(tar=storage.info(tar), parquet=storage.info(parquet)))
    return shards


def _files(folder: str, key: str) -> list[str]:
    try:
        fs, path = filesystem_of(folder)
        fs.invalidate_cache()
        if not fs.isdir(path):
            raise CapfiltError(f'{key}: {folder} is not a folder, as format = "img2dataset" needs')
        files = fs.ls(path, detail=False)
    except (OSError, ValueError, ImportError) as error:
        raise CapfiltError(f"{key}: {folder} cannot be listed: {error}") from error
    return [fs.unstrip_protocol(file) if "://" in folder else file for file in files]
