"""``canonical_url(url)`` in SQL: a function in Python, since DuckDB reads no URLs as browsers do."""

import duckdb
import pyarrow as pa
from duckdb.func import ARROW, SPECIAL

from pipeline.web.urls import canonical_url


def add_canonical_url(connection: duckdb.DuckDBPyConnection) -> None:
    """Let a connection's statements call ``canonical_url``."""
    connection.create_function(
        "canonical_url", _canonical_urls, ["VARCHAR"], "VARCHAR", type=ARROW, null_handling=SPECIAL
    )


def _canonical_urls(urls: pa.Array) -> pa.Array:
    return pa.array([None if url is None else canonical_url(url) for url in urls.to_pylist()], pa.string())
