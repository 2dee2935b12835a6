"""The tables by the files that their rows lie in, and the columns of these files."""

import pyarrow as pa

from schemas.stages import STAGE_FOLDERS, STAGES, Stage
from schemas.tables import STAGE_SCHEMAS, TABLES

# Tables whose rows come from records; their Parquet parts lie under manifest/<table>/.
RECORD_TABLES: dict[str, pa.Schema] = {
    name: TABLES[name]
    for name in ("shards", "lost_attempts", "runs", "models", "checkpoints", "snapshots", "marks")
}

# Tables whose rows lie in the shards' own Parquet files: folder -> schema, and the stage that writes them.
DATA_TABLES: dict[str, pa.Schema] = {STAGE_FOLDERS[stage]: STAGE_SCHEMAS[stage] for stage in STAGES}
DATA_STAGES: dict[str, Stage] = {STAGE_FOLDERS[stage]: stage for stage in STAGES}

# The catalog's file in a corpus.
CATALOG = "manifest.duckdb"

# Columns of the parts of shards alone.
HISTOGRAM_BINS, HISTOGRAM_COUNTS = "histogram_bins", "histogram_counts"


def record_row_schema(table: str) -> pa.Schema:
    """Return a part's columns: a table's, the record that each row was read from, and that file's version.

    Of shards also columns that SQL does not show, and that old parts lack: bytes and rows of each output as JSON
    (``files``), and the histograms as the names and edges of their bins, which most records share, and a list of all
    counts.
    """
    hidden = [pa.field("files", pa.string()), pa.field(HISTOGRAM_BINS, pa.string()),
              pa.field(HISTOGRAM_COUNTS, pa.list_(pa.int64()))]  # fmt: skip
    more = [
        *(hidden if table == "shards" else ()),
        *(pa.field(name, pa.string()) for name in ("record", "version")),
    ]
    return pa.schema([*(field.remove_metadata() for field in RECORD_TABLES[table]), *more])
