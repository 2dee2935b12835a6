"""What must hold between the files of one shard, as SQL over their rows: nothing lost, nothing doubled.

Tables: ``urls``, ``raw``, ``captions``, ``scores`` and ``curated`` have the columns of these files; ``raw_tar`` and
``curated_tar`` have a row for each sample of a tar. ``judged`` are the scores or matches that the selection read.
``stored`` are the rows of ``raw`` that are ok, ``kept`` those of ``curated`` that are kept.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import duckdb
import pyarrow as pa

from schemas.stages import STAGE_INFO, Stage
from schemas.statuses import REASONS

# The columns that the checks need, where not all of a table.
COLUMNS: dict[str, list[str]] = {
    "urls": ["uid", "key", "retry_of"],
    "raw": ["uid", "key", "status", "reason", "retry_of"],
    "captions": ["uid", "origin", "candidate", "text"],
    "scores": ["uid", "origin", "candidate", "text", "score"],
    "matches": ["uid", "origin", "candidate", "text", "score", "match_probability"],
    "curated": ["uid", "key", "status", "caption", "captions", "scores", "origins", "candidates"],
}
# Of a curated tar: what KEY.json and KEY.txt say, or why they cannot be read.
TAR_COLUMNS = pa.schema(
    [
        ("key", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("caption", pa.string()),
        ("error", pa.string()),
    ]
)

_VIEWS = {
    "raw": "CREATE VIEW stored AS SELECT uid, key FROM raw WHERE status = 'ok'",
    "curated": "CREATE VIEW kept AS FROM curated WHERE status = 'kept'",
}


class _Check(NamedTuple):
    """A query whose every row is a discrepancy of the first table's file. It needs all the tables."""

    tables: str
    sql: str
    message: str


def _numbered(tables: str, values: str, message: str) -> _Check:
    """Return a check that counts the rows of a query of one column, and names the first."""
    sql = f"SELECT count(*) AS number, min(value) AS example FROM ({values}) AS found (value) HAVING count(*) > 0"
    return _Check(tables, sql, f"{{number:,}} {message}, such as {{example}}")


def _unique(table: str, column: str) -> _Check:
    return _numbered(
        table, f"SELECT {column} FROM {table} GROUP BY ALL HAVING count(*) > 1", f"{column}s twice"
    )


def _same(tables: str, what: str, here: str, where: str, there: str) -> tuple[_Check, _Check]:
    """Two columns hold the same values, each as often."""
    return (
        _numbered(tables, f"SELECT {here} EXCEPT ALL SELECT {there}", f"{what} that {where} do not have"),
        _numbered(tables, f"SELECT {there} EXCEPT ALL SELECT {here}", f"{what} of {where} are not there"),
    )


def _among_stored(table: str) -> _Check:
    uids = f"SELECT DISTINCT uid FROM {table} ANTI JOIN stored USING (uid)"
    return _numbered(f"{table} raw", uids, "uids are not among the stored images")


def _judged(table: str) -> tuple[_Check, ...]:
    """Scores or matches are of stored images, and of each of their captions."""
    candidate = "concat_ws(' ', uid, origin, candidate, text)"
    here, there = f"{candidate} FROM {table} WHERE origin = 'synthetic'", f"{candidate} FROM captions"
    texts = _same(f"{table} captions", "synthetic candidates", here, "the captions", there)
    return _among_stored(table), *texts


_REASONS = ", ".join(f"('{name}', '{reason.status}')" for name, reason in REASONS.items())

_CHECKS = (
    _unique("urls", "uid"),
    _unique("urls", "key"),
    *_same("raw urls", "uids", "uid FROM raw", "its url shard", "uid FROM urls"),
    _unique("raw", "key"),
    _Check(
        "raw",
        f"""SELECT uid, raw.status, reason
        FROM raw LEFT JOIN (VALUES {_REASONS}) AS reasons (reason, status) USING (reason)
        WHERE (reason IS NULL) IS DISTINCT FROM (raw.status = 'ok') OR raw.status <> reasons.status""",
        "{uid} has status {status} with reason {reason}",
    ),
    *_same("raw_tar raw", "keys", "key FROM raw_tar", "the Parquet's rows that are ok", "key FROM stored"),
    _among_stored("captions"),
    _Check(
        "captions",
        """SELECT min(number) AS fewest, max(number) AS most
        FROM (SELECT count(*) AS number FROM captions GROUP BY uid) HAVING min(number) < max(number)""",
        "images have between {fewest} and {most} captions",
    ),
    _Check(
        "captions",
        "SELECT 1 FROM captions GROUP BY uid, candidate HAVING count(*) > 1 LIMIT 1",
        "a candidate twice",
    ),
    *_judged("scores"),
    *_judged("matches"),
    *_same("curated raw", "uids", "uid FROM curated", "the stored images", "uid FROM stored"),
    _unique("curated", "key"),
    _Check(
        "curated judged",
        """SELECT DISTINCT uid FROM (
            SELECT uid, unnest(origins) AS origin, unnest(candidates) AS candidate, unnest(captions) AS text,
                unnest(scores) AS score FROM kept
        ) AS chosen WHERE NOT EXISTS (
            FROM judged WHERE judged.uid = chosen.uid AND judged.origin = chosen.origin
                AND judged.candidate = chosen.candidate AND judged.text = chosen.text
                AND judged.score IS NOT DISTINCT FROM chosen.score)""",
        "{uid} keeps a caption that is not among its scores",
    ),
    *_same("curated_tar curated", "keys", "key FROM curated_tar", "the kept rows", "key FROM kept"),
    _Check(
        "curated_tar curated",
        "SELECT key, error FROM curated_tar SEMI JOIN kept USING (key) WHERE error IS NOT NULL",
        "{key} has no readable json and txt ({error})",
    ),
    _Check(
        "curated_tar curated",
        """SELECT key FROM curated_tar AS tar JOIN kept USING (key)
        WHERE error IS NULL AND (tar.captions IS DISTINCT FROM kept.captions
            OR tar.caption IS DISTINCT FROM kept.captions[1] OR kept.caption IS DISTINCT FROM kept.captions[1])""",
        "{key} has other captions than its row",
    ),
)

# By stage: the tables that its counts need, and the query of (status, rows), where not of the column ``status``.
_COUNTS: dict[Stage, tuple[str, str]] = {
    "caption": (
        "captions raw",
        """SELECT 'ok', count(DISTINCT uid) FROM captions UNION ALL
        SELECT 'failed', (SELECT count(DISTINCT uid) FROM stored) - (SELECT count(DISTINCT uid) FROM captions)""",
    ),
    "filter": (
        "matches",
        "SELECT if(match_probability IS NULL, 'unscored', 'scored'), count(*) FROM matches GROUP BY ALL",
    ),
    "rank": ("scores", "SELECT if(score IS NULL, 'unscored', 'scored'), count(*) FROM scores GROUP BY ALL"),
    "select": (
        "curated",
        "SELECT if(status = 'kept', status, 'dropped'), count(*) FROM curated GROUP BY ALL",
    ),
}


class ShardTables(AbstractContextManager["ShardTables", None]):
    """The rows of one shard's files in a DuckDB of its own; use as a context manager."""

    def __init__(self, tables: Mapping[str, pa.Table]) -> None:
        self._tables = tables
        self._connection = duckdb.connect(config={"threads": 1, "python_enable_replacements": False})
        for name, rows in tables.items():
            self._connection.register(name, rows)
            if name in _VIEWS:
                self._connection.execute(_VIEWS[name])

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def discrepancies(self) -> Iterator[tuple[str, str]]:
        """Yield (table, what is wrong) for everything that does not hold."""
        for check in _CHECKS:
            if self._has(check.tables):
                result = self._connection.execute(check.sql)
                names = [column[0] for column in result.description]
                for row in result.fetchall():
                    yield check.tables.split()[0], check.message.format(**dict(zip(names, row, strict=True)))

    def miscount(self, stage: Stage, counts: Mapping[str, int]) -> str | None:
        """Return how the counts of a stage's record differ from its files, or None where they do not."""
        folder = STAGE_INFO[stage].folder
        tables, sql = _COUNTS.get(stage, (folder, f"SELECT status, count(*) FROM {folder} GROUP BY ALL"))
        if not self._has(tables):
            return None
        rows: dict[Any, int] = dict(self._connection.execute(sql).fetchall())
        statuses = STAGE_INFO[stage].row_statuses
        held = {name: rows[name] for name in (*statuses, *rows) if rows.get(name)}
        recorded = {name: counts[name] for name in statuses if counts.get(name)}
        return None if held == recorded else f"the record counts {recorded}, its files hold {held}"

    def _has(self, tables: str) -> bool:
        return self._tables.keys() >= set(tables.split())
