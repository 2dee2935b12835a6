"""The rows of the records as they were at one moment, for all connections that ask: columns are read once, on demand.

Of the shards there are 52,000 rows in a corpus of 129M images, and most questions read few of their columns.
"""

import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.catalog.table_schemas import record_row_schema
from schemas.catalog.tables import standing_rows

# What tells which rows count.
_LIGHT_COLUMNS = ("stage", "source", "shard", "attempt", "state", "finished_at")
_SCHEMA = record_row_schema("shards")

# Returns the rows of some parts of the shards, with these columns alone.
ReadParts = Callable[[Sequence[str], Sequence[str]], list[pa.Table]]


class RecordTables:
    """The rows of the records by table. Thread-safe.

    Args:
        others: the tables but for the shards.
        parts: the parts of the shards.
        new_shards: the rows of shards that none of the parts holds.
        read: see ``ReadParts``. Raises FileNotFoundError where parts were merged and swept, or made anew, since.
    """

    def __init__(
        self, others: dict[str, pa.Table], parts: list[str], new_shards: pa.Table, read: ReadParts
    ) -> None:
        self.others = others
        self.parts = parts
        self.new_shards = new_shards
        self._read = read
        self._lock = threading.Lock()
        self._columns: dict[str, pa.ChunkedArray] = {}
        self.fill(_LIGHT_COLUMNS)

    @property
    def filled(self) -> frozenset[str]:
        """The columns of the shards that were read."""
        return frozenset(self._columns)

    def fill(self, names: Iterable[str]) -> None:
        """Read those of some columns of the shards that were not read yet. Raises as ``read`` does."""
        with self._lock:
            missing = [name for name in _SCHEMA.names if name in set(names) - self._columns.keys()]
            if missing:
                rows = pa.concat_tables([*self._read(self.parts, missing), self.new_shards.select(missing)])
                self._columns = self._columns | {name: rows[name] for name in missing}

    def events(self) -> pa.Table:
        """Return the rows of all records of shards, in the order of the parts; columns that were not read are NULL."""
        return completed(self._columns, len(self._columns["stage"]))

    def shards(self) -> pa.Table:
        """Return the table of shards: of each commit the row that stands, in its state."""
        if self._standing is None:
            return self.events()
        places, states = self._standing["place"].to_numpy(), self._standing["state"]
        columns = {name: column.take(pa.array(places)) for name, column in self._columns.items()}
        return completed(columns | {"state": states}, len(places))

    def shards_of(self, places: Collection[tuple[str, str]]) -> pa.Table:
        """Return those rows of ``shards`` that are of some shards (source, shard)."""
        rows = self.shards()
        names = pc.binary_join_element_wise(rows["source"], rows["shard"], "/")
        wanted = pa.array([f"{source}/{shard}" for source, shard in places], pa.string())
        return rows.filter(pc.is_in(names, value_set=wanted))

    @cached_property
    def _standing(self) -> pa.Table | None:
        """``place`` and ``state`` of the rows that stand; None where all do, as they are: no shard has two rows."""
        events = pa.table({name: self._columns[name] for name in _LIGHT_COLUMNS})
        shards = events.group_by(["stage", "source", "shard"], use_threads=False).aggregate([])
        if shards.num_rows == events.num_rows:
            return None
        with duckdb.connect(config={"python_enable_replacements": False}) as connection:
            connection.register("events", events.append_column("place", pa.array(np.arange(len(events)))))
            return connection.sql(standing_rows("events")).to_arrow_table().combine_chunks()

    @cached_property
    def is_committed(self) -> np.ndarray:
        """Of each row of ``events``, whether it is the one that stands for a commit."""
        if self._standing is None:
            return pc.equal(self._columns["state"], "committed").to_numpy()
        is_committed = np.zeros(len(self._columns["state"]), bool)
        is_committed[self._standing["place"]] = pc.equal(self._standing["state"], "committed")
        return is_committed


def completed(columns: Mapping[str, Any], length: int, schema: pa.Schema = _SCHEMA) -> pa.Table:
    """Return columns, perhaps of an earlier version, as a schema has them; those that are missing are NULL."""
    values = [
        columns[field.name] if field.name in columns else pa.nulls(length, field.type) for field in schema
    ]
    return pa.table(values, names=schema.names).cast(schema)
