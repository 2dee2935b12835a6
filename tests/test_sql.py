"""The sandbox of ``capfilt sql``: what it answers, and every way out that it must not have."""

import time
from pathlib import Path

import pytest

from pipeline.manifest import Manifest
from pipeline.storage import Storage
from schemas.errors import CapfiltError
from tests.corpora import Corpus, make_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    made = make_corpus(str(tmp_path_factory.mktemp("sql") / "corpus"))
    made.manifest.compact()
    return made


def files(corpus: Corpus) -> dict[str, str]:
    return {info.path: info.version for info in corpus.storage.list("")}


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT 1;",
        "FROM samples LIMIT 1",
        "WITH x AS (SELECT * FROM candidates) SELECT count(*) FROM x",
        "VALUES (1)",
        "DESCRIBE samples",
        "SUMMARIZE curated",
        "SHOW TABLES",
        "EXPLAIN SELECT * FROM samples",
        "-- why\nSELECT 1",
        "PIVOT samples ON status IN ('ok', 'failed') USING count(*) GROUP BY source",
        "SELECT list_transform([1, 2], lambda x: x + 1)",
        "SELECT * FROM histogram_of('kept_score')",
        "SELECT * FROM sample('http://host0.example/00000/0.jpg')",
    ],
)
def test_reads_are_answered(corpus: Corpus, sql: str) -> None:
    assert corpus.manifest.query(sql).rows


@pytest.mark.parametrize(
    "sql",
    [
        "COPY samples TO '{free}'",
        "COPY samples TO '{target}' (USE_TMP_FILE false)",
        "WITH x AS (COPY samples TO '{free}') SELECT * FROM x",
        "WITH x AS (COPY samples TO '{target}' (USE_TMP_FILE false)) SELECT * FROM x",
        "FROM query('WITH x AS (COPY samples TO ''{target}'') SELECT * FROM x')",
        "EXPLAIN COPY samples TO '{free}'",
        "EXPLAIN ANALYZE COPY samples TO '{free}'",
        "EXPLAIN /* */ ANALYZE COPY samples TO '{free}'",
        "EXPLAIN (ANALYZE) COPY samples TO '{free}'",
        "EXPLAIN ANALYZE SELECT 1",
        "EXPORT DATABASE '{free}'",
        "ATTACH '{free}' AS other",
        "ATTACH '{root}/manifest.duckdb' AS other (READ_ONLY)",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SELECT 1; SELECT 2",
        "SELECT 1; COPY samples TO '{free}'",
        "",
        "-- nothing",
        "CREATE TABLE mine AS SELECT 1",
        "CREATE TEMP TABLE mine AS SELECT 1",
        "CREATE OR REPLACE VIEW samples AS SELECT 1",
        "DROP VIEW samples",
        "INSERT INTO samples SELECT * FROM samples",
        "INSERT INTO shards_data SELECT * FROM shards_data",
        "WITH x AS (INSERT INTO shards_data SELECT * FROM shards_data RETURNING *) SELECT * FROM x",
        "WITH x AS (DELETE FROM shards_data RETURNING *) SELECT * FROM x",
        "UPDATE shards SET state = 'retired'",
        "DELETE FROM shards",
        "TRUNCATE shards",
        "PRAGMA database_list",
        "SET memory_limit = '100GB'",
        "RESET enable_external_access",
        "SET enable_external_access = true",
        "CALL pragma_version()",
        "PREPARE x AS SELECT 1",
        "EXECUTE x",
        "BEGIN",
        "USE memory",
        "VACUUM",
        "CHECKPOINT",
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM read_text('/etc/passwd')",
        "SELECT * FROM read_blob('/etc/passwd')",
        "SELECT * FROM read_json('{record}')",
        "SELECT * FROM read_parquet('{target}')",
        "SELECT * FROM parquet_metadata('{target}')",
        "SELECT * FROM sniff_csv('/etc/passwd')",
        "SELECT * FROM glob('/etc/*')",
        "FROM '{target}'",
        "FROM '/etc/passwd'",
        "FROM 'http://127.0.0.1/x.parquet'",
        "SELECT * FROM read_csv('http://127.0.0.1/x.csv')",
        "SELECT * FROM read_duckdb('{root}/manifest.duckdb')",
        "SELECT * FROM duckdb_secrets()",
        "SELECT * FROM enable_profiling(save_location='{free}')",
        "SELECT * FROM enable_logging(storage='file', storage_path='{free}')",
        "SELECT getenv('HOME')",
        "FROM statements",  # a variable of the code that runs this
        "FROM corpus",
        "SELECT * FROM nowhere",
        "SELEC 1",
    ],
)
def test_everything_else_is_refused(corpus: Corpus, tmp_path: Path, sql: str) -> None:
    target = corpus.storage.url(corpus.records.read("crawl", "cc", "00000").outputs["parquet"].path)
    record = corpus.storage.url("records/crawl/cc/00000.json")
    before = files(corpus)
    free = tmp_path / "written"
    with pytest.raises(CapfiltError) as refused:
        corpus.manifest.query(sql.format(free=free, target=target, record=record, root=corpus.root))
    assert len(str(refused.value)) > 10
    assert list(tmp_path.iterdir()) == []
    assert files(corpus) == before


def test_refusals_say_what_is_allowed(corpus: Corpus) -> None:
    with pytest.raises(CapfiltError, match=r"read-only: one SELECT .* this is COPY"):
        corpus.manifest.query("COPY samples TO 'x'")
    with pytest.raises(CapfiltError, match="one statement at a time: this has 2"):
        corpus.manifest.query("SELECT 1; SELECT 2")
    with pytest.raises(CapfiltError, match=r"only the corpus.s own tables can be read here"):
        corpus.manifest.query("FROM read_csv('/etc/passwd')")
    with pytest.raises(CapfiltError, match=r"SQL: .*statuss.*"):
        corpus.manifest.query("SELECT statuss FROM samples")


def test_a_query_ends_in_time(corpus: Corpus) -> None:
    start = time.monotonic()
    with pytest.raises(CapfiltError, match=r"over 0.5 s.*--timeout"):
        corpus.manifest.query(
            "SELECT sum(a.range * b.range) FROM range(10000000) a, range(1000000) b", timeout_s=0.5
        )
    assert time.monotonic() - start < 10


def test_a_query_keeps_to_its_memory(corpus: Corpus) -> None:
    with pytest.raises(CapfiltError, match="more memory than it may use"):
        corpus.manifest.query("SELECT list(range::VARCHAR || 'x') FROM range(20000000)", memory="100MB")


def test_rows_are_cut_and_columns_kept_apart(corpus: Corpus) -> None:
    answer = corpus.manifest.query("SELECT uid FROM samples", max_rows=5)
    assert (len(answer.rows), answer.truncated) == (5, True)
    assert not corpus.manifest.query("SELECT uid FROM samples", max_rows=24).truncated
    assert corpus.manifest.query("SELECT 1 AS a, 2 AS a, 3 AS a").dicts() == [{"a": 1, "a_1": 2, "a_2": 3}]


def test_the_sandbox_works_on_s3(s3_root: str) -> None:
    corpus = make_corpus(s3_root)
    ask = "SELECT count(*), count(DISTINCT uid), max(score) FROM candidates SEMI JOIN curated USING (uid)"
    rows = Manifest(Storage(s3_root)).query(ask).rows
    assert rows[0][0] > 0
    for sql in (f"FROM read_parquet('{s3_root}/raw/cc/*.parquet')", f"COPY samples TO '{s3_root}/x.parquet'"):
        with pytest.raises(CapfiltError):
            corpus.manifest.query(sql)


def test_views_agree_with_the_tables(corpus: Corpus) -> None:
    def one(sql: str) -> int:
        return corpus.manifest.query(sql).rows[0][0]

    assert one("SELECT sum(\"rows\") FROM outcomes WHERE stage = 'crawl'") == one(
        "SELECT count(*) FROM samples"
    )
    assert one("SELECT count(*) FROM failures") == one("SELECT count(*) FROM samples WHERE status <> 'ok'")
    assert one("SELECT sum(\"count\") FROM histogram_of('kept_score')") == one(
        "SELECT count(*) FROM kept_captions"
    )
    assert one("SELECT count(*) FROM kept_captions WHERE place = 1") == one("SELECT count(*) FROM curated")
    assert one("SELECT sum(images) FROM throughput WHERE stage = 'crawl'") == 18
    hosts = corpus.manifest.query("SELECT DISTINCT host FROM failures ORDER BY host").rows
    assert hosts == [("host0.example",), ("host1.example",), ("host2.example",)]


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://Example.ORG/x", "example.org"),
        ("https://user:word@example.org:8080/x?y@z", "example.org"),
        ("https://[::1]:80/x", "[::1]"),
        ("https://example.org?x", "example.org"),
        ("nonsense", ""),
    ],
)
def test_url_host(corpus: Corpus, url: str, host: str) -> None:
    assert corpus.manifest.query(f"SELECT url_host('{url}')").rows == [(host,)]
