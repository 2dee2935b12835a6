"""Folders that img2dataset's command line made: their shards are taken as they are, where they lie."""

from collections.abc import Sequence
from dataclasses import dataclass

import fsspec

from pipeline.storage import FileInfo, Storage
from schemas.errors import CapfiltError


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignShard:
    """A tar of img2dataset's, and the Parquet beside it that has a row for every URL."""

    tar: FileInfo
    parquet: FileInfo


def find_foreign_shards(folders: Sequence[str], storage: Storage, key: str) -> list[ForeignShard]:
    """Return the shards of img2dataset's output folders, in the order given, then by name.

    Raises CapfiltError, naming the config's ``key``, where a folder has no tar or a tar has no Parquet.
    """
    shards = []
    for folder in folders:
        if not storage.is_local and Storage(folder).is_local:
            raise CapfiltError(
                f"{key}: {folder} is a folder of this machine, and the corpus is {storage.root}: whoever reads the "
                "corpus elsewhere would miss its images. Copy the folder to the bucket"
            )
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
            shards.append(ForeignShard(tar=storage.info(tar), parquet=storage.info(parquet)))
    return shards


def _files(folder: str, key: str) -> list[str]:
    try:
        fs, path = fsspec.core.url_to_fs(folder)
        fs.invalidate_cache()
        if not fs.isdir(path):
            raise CapfiltError(f'{key}: {folder} is not a folder, as format = "img2dataset" needs')
        found = fs.ls(path, detail=False)
    except (OSError, ValueError, ImportError) as error:
        raise CapfiltError(f"{key}: {folder} cannot be listed: {error}") from error
    return [fs.unstrip_protocol(file) if "://" in folder else file for file in found]
