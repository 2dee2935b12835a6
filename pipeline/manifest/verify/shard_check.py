"""The files of one shard compared with its records: size, sha256, rows or samples, and each stage with the others."""

import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.digests import sha256_file
from pipeline.manifest.verify.progress import Discrepancy, ShardFindings
from pipeline.manifest.verify.sql_checks import COLUMNS, TAR_COLUMNS, ShardTables
from pipeline.regular_files import NotRegularFileError
from pipeline.shards.shard_files import IMAGE_EXTENSIONS, read_tar, schema_mismatch
from pipeline.shards.uids import pack_uids
from pipeline.storage.storage import Storage
from schemas.catalog.table_schemas import DATA_TABLES
from schemas.errors import CorruptShardError, first_line
from schemas.names import is_outside_tar
from schemas.records import MARKS_INPUT, OutputFile, ShardRecord
from schemas.stages import STAGE_FOLDERS, STAGES, Stage
from schemas.tables import URLS

_SCHEMAS = {"urls": URLS, **DATA_TABLES}


def needed_columns(number_of_formats: int) -> dict[str, list[str]]:
    """Return the columns that each table's files must have; of an earlier format some lack what no check needs."""
    return COLUMNS if number_of_formats > 1 else {name: schema.names for name, schema in _SCHEMAS.items()}


class ShardCheck:
    """The files of one shard, all stages; ``needed`` are the columns that a table's file must have."""

    def __init__(
        self, storage: Storage, records: Mapping[Stage, ShardRecord], needed: Mapping[str, list[str]]
    ) -> None:
        self.needed = needed
        self.storage = storage
        self.records = records
        self.findings = ShardFindings()

    def report(self, path: str, what: str) -> None:
        self.findings.discrepancies.append(Discrepancy(path=path, what=what))

    def sizes(self, listed: Mapping[str, int]) -> None:
        """Compare the sizes of the files with those of the listed ones, by path."""
        for file in self._outputs().values():
            size = self._outside_size(file.path) if is_outside_tar(file.path) else listed.get(file.path)
            if size is None:
                self.report(file.path, "missing")
            else:
                self._compare_size(file, size)

    def _outside_size(self, path: str) -> int | None:
        try:
            return self.storage.info(path).bytes
        except FileNotFoundError:
            return None

    def contents(self) -> None:
        """Read every file, then compare the stages with one another."""
        outputs = self._outputs()
        read = {name: self._read(name, file) for name, file in outputs.items()}
        tables = {name: rows for name, rows in read.items() if rows is not None}
        self._compare_inputs()
        if "select" in self.records:
            read_by_select = "matches" if "filter.parquet" in self.records["select"].inputs else "scores"
            tables |= {"judged": tables[read_by_select]} if read_by_select in tables else {}
        with ShardTables(tables) as shard:
            for name, difference in shard.discrepancies():
                self.report(outputs[name].path, difference)
            for stage in STAGES:
                if stage in self.records and (what := shard.miscount(stage, self.records[stage].counts)):
                    self.report(self.records[stage].path, what)
        if "urls" in tables:
            self.findings.uids["listed"] = _uids(tables["urls"], pc.field("retry_of").is_null())
        if "raw" in tables:
            self.findings.uids["stored"] = _uids(tables["raw"], pc.field("status") == "ok")

    def _outputs(self) -> dict[str, OutputFile]:
        """Return the committed files by the names of their tables: ``urls``, ``raw``, ``raw_tar``, ..."""
        return {
            STAGE_FOLDERS[stage] + ("_tar" if name == "tar" else ""): file
            for stage in ("urls", *STAGES)
            if stage in self.records
            for name, file in sorted(self.records[stage].outputs.items())
            # An imported tar is checked with the crawl's record, which has its digest.
            if name != "adopted"
        }

    def _compare_size(self, file: OutputFile, size: int) -> bool:
        self.findings.files += 1
        self.findings.bytes += size
        if size != file.bytes:
            self.report(file.path, f"{size:,} bytes, its record says {file.bytes:,}")
        return size == file.bytes

    def _read(self, name: str, file: OutputFile) -> pa.Table | None:
        """Return a file's rows or samples, or None where it cannot be read."""
        try:
            with self.storage.local_copy(file.path) as path:
                if self._compare_size(file, path.stat().st_size) and sha256_file(path) != file.sha256:
                    self.report(file.path, "another sha256 than its record says")
                is_tar = name.endswith("_tar")
                rows = self._samples(name, file, path) if is_tar else self._rows(name, file, path)
                if rows is not None and rows.num_rows != file.rows:
                    unit = "samples" if is_tar else "rows"
                    self.report(file.path, f"{rows.num_rows:,} {unit}, its record says {file.rows:,}")
                return rows
        except FileNotFoundError:
            self.report(file.path, "missing")
        except NotRegularFileError as error:
            self.report(file.path, error.strerror or "")
        except CorruptShardError as error:
            self.report(file.path, str(error))
        except (OSError, pa.ArrowInvalid, EOFError, tarfile.TarError) as error:
            self.report(file.path, f"cannot be read: {first_line(error)}")
        return None

    def _rows(self, name: str, file: OutputFile, path: Path) -> pa.Table | None:
        if mismatch := schema_mismatch(pq.read_schema(path), _SCHEMAS[name], self.needed[name]):
            self.report(file.path, mismatch)
            return None
        return pq.read_table(path, columns=COLUMNS.get(name), memory_map=False)

    def _samples(self, name: str, file: OutputFile, path: Path) -> pa.Table:
        """Return the key of each sample, and of a curated tar its texts. Pixels are covered by the sha256."""
        samples: dict[str, dict[str, object]] = {}
        if path.stat().st_size == 0 and file.rows == 0:  # img2dataset's shard without a single image
            return TAR_COLUMNS.empty_table()
        with path.open("rb") as tar:
            for key, members in read_tar(tar):
                if not IMAGE_EXTENSIONS & members.keys():
                    continue
                if key in samples:
                    self.report(file.path, f"two samples with the key {key}")
                samples[key] = {"key": key, **(_texts(members) if name == "curated_tar" else {})}
        return pa.Table.from_pylist(list(samples.values()), schema=TAR_COLUMNS)

    def _compare_inputs(self) -> None:
        """Compare what each stage was made from with what is committed now."""
        for stage, record in self.records.items():
            for name, sha256 in record.inputs.items():
                if name == MARKS_INPUT:  # whether they still hold, a plan says
                    continue
                upstream, _, output = name.partition(".")
                source = self.records.get(cast(Stage, upstream))
                if source is None or output not in source.outputs:
                    self.report(record.path, f"made from {name}, which is not committed")
                elif source.outputs[output].sha256 != sha256:
                    self.report(
                        record.path, f"stale: {upstream} was made anew since; run {stage} --recompute"
                    )


def _texts(members: Mapping[str, bytes]) -> dict[str, object]:
    """Return what KEY.json and KEY.txt of a curated sample say; captions that are not a list of texts are none."""
    try:
        captions, caption = json.loads(members["json"]), members["txt"].decode()
    except (KeyError, ValueError) as error:
        return {"error": repr(error)}
    is_list = isinstance(captions, list) and all(isinstance(text, str) for text in captions)
    return {"captions": captions if is_list else None, "caption": caption}


def _uids(rows: pa.Table, which: pc.Expression) -> np.ndarray:
    return pack_uids(rows.filter(which)["uid"].to_pylist())
