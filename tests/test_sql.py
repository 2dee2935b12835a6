"""The sandbox of ``capfilt sql``: what it answers, and every way out that it must not have."""

import itertools
import socket
import time
import tracemalloc
from pathlib import Path

import pytest
from raw_shards import commit_crawl, config_of, encoded, picture, task_of
from tiny_models import save_captioner, save_ranker

from pipeline.corpus.records import Records
from pipeline.manifest.manifest import Manifest
from pipeline.manifest.sandbox import stream_answer
from pipeline.stages.caption import CaptionWorker
from pipeline.stages.rank import RankWorker
from pipeline.stages.selection import SelectWorker
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError
from tests.corpora import Corpus, make_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    new_corpus = make_corpus(str(tmp_path_factory.mktemp("sql") / "corpus"))
    new_corpus.manifest.compact()
    return new_corpus


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
        "SELECT [x for x in range(3)] FROM samples",
        "FROM samples SELECT uid UNION ALL BY NAME FROM curated SELECT uid",
        "SHOW ALL TABLES",
        "SHOW samples",
        "SELECT comment FROM duckdb_columns() WHERE comment IS NOT NULL",
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
    with pytest.raises(
        CapfiltError, match=r"read-only: one SELECT .* this is COPY; to take rows out, .*--csv"
    ):
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


def test_a_memory_that_is_none_is_refused(corpus: Corpus) -> None:
    with pytest.raises(CapfiltError, match=r"--memory 'foo': .*4GB or 50%"):
        corpus.manifest.query("SELECT 1", memory="foo")


def test_rows_are_streamed(corpus: Corpus) -> None:
    """Of ten billion rows a part is taken, in memory that does not grow with it."""
    with corpus.manifest.stream("SELECT range, 'x' || range AS x FROM range(10000000000)") as stream:
        assert stream.columns == ("range", "x")
        assert next(stream.rows) == (0, "x0")
        tracemalloc.start()
        try:
            taken = sum(1 for _ in itertools.islice(stream.rows, 100_000))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert (taken, peak < 4_000_000) == (100_000, True)
    with (
        pytest.raises(CapfiltError, match=r"over 0.5 s.*--timeout"),
        corpus.manifest.stream("FROM range(10000000000)", timeout_s=0.5) as stream,
    ):
        for _ in stream.rows:
            pass


def test_a_pivot_is_refused_with_what_to_write_instead(corpus: Corpus) -> None:
    with pytest.raises(CapfiltError, match=r"PIVOT samples ON status IN \('ok', 'failed'\)"):
        corpus.manifest.query("PIVOT samples ON status USING count(*)")


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM duckdb_settings()",
        "FROM duckdb_settings",
        "FROM system.main.duckdb_settings()",
        'SELECT * FROM "DuckDB_Settings"()',
        "WITH x AS (FROM duckdb_settings()) FROM x",
        "SELECT (SELECT max(value) FROM duckdb_settings())",
        "EXPLAIN SELECT * FROM duckdb_settings()",
        "DESCRIBE FROM duckdb_settings()",
        "SUMMARIZE FROM pragma_database_size()",
        "FROM query('FROM duckdb_settings()')",
        "FROM query_table('duckdb_settings')",
        "FROM pg_catalog.pg_settings",
        "SELECT current_setting('memory_limit')",
        "SELECT 'secret_directory'.current_setting()",
        "FROM samples WHERE uid = current_setting('temp_directory')",
        "FROM pragma_platform()",
        "FROM pragma_user_agent()",
        "FROM duckdb_extensions()",
        "FROM duckdb_extension_repositories()",
        "FROM duckdb_memory()",
        "FROM duckdb_databases()",
        "FROM duckdb_temporary_files()",
        "FROM duckdb_external_file_cache()",
        "FROM duckdb_secrets()",
        "FROM duckdb_logs",
        "SHOW threads",
        "SHOW memory_limit",
        "SHOW secrets",
        "PIVOT duckdb_settings() ON name IN ('threads') USING max(value)",
    ],
)
def test_nothing_tells_about_the_machine(corpus: Corpus, sql: str) -> None:
    with pytest.raises(CapfiltError, match=r"not answered here"):
        corpus.manifest.query(sql)


@pytest.mark.parametrize(
    "sql",
    ["FROM '~/x.csv'", "FROM read_csv('~/x')", "FROM read_xlsx('x.xlsx')", "SELECT st_point(1, 2)", "FROM 'x.duckdb'",
     "FROM iceberg_scan('s3://bucket/x')", "SELECT * FROM sqlite_scan('x', 'y')",],
)  # fmt: skip
def test_a_refusal_tells_no_folder_of_the_host(corpus: Corpus, sql: str) -> None:
    with pytest.raises(CapfiltError) as refused:
        corpus.manifest.query(sql)
    assert str(Path.home()) not in str(refused.value) and ".duckdb" not in str(refused.value).replace(
        "x.duckdb", ""
    )


def test_every_table_function_of_the_database_is_known(corpus: Corpus) -> None:
    """What the database can tell of itself is refused, or holds nothing that tells where it runs."""
    functions = "SELECT DISTINCT function_name FROM duckdb_functions() WHERE function_type = 'table'"
    home = str(Path.home())
    with corpus.manifest.open() as query:
        sealed = query.sealed()

        def rows_of(sql: str) -> list[tuple]:
            with stream_answer(sealed, sql, timeout_s=60) as stream:
                return list(stream.rows)

        for (name,) in rows_of(functions):
            try:
                rows = rows_of(f"SELECT * FROM {name}()")
            except CapfiltError as refused:
                assert home not in str(refused) and socket.gethostname() not in str(refused)
                continue
            for value in itertools.chain.from_iterable(rows):
                assert home not in str(value) and corpus.root not in str(value), name
                assert socket.gethostname() not in str(value), name


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
    def value_of(sql: str) -> int:
        return corpus.manifest.query(sql).rows[0][0]

    assert value_of("SELECT sum(\"rows\") FROM outcomes WHERE stage = 'crawl'") == value_of(
        "SELECT count(*) FROM samples"
    )
    assert value_of("SELECT count(*) FROM failures") == value_of(
        "SELECT count(*) FROM samples WHERE status <> 'ok'"
    )
    assert value_of("SELECT sum(\"count\") FROM histogram_of('kept_score')") == value_of(
        "SELECT count(*) FROM kept_captions"
    )
    assert value_of("SELECT count(*) FROM kept_captions WHERE place = 1") == value_of(
        "SELECT count(*) FROM curated"
    )
    assert value_of("SELECT sum(images) FROM throughput WHERE stage = 'crawl'") == 18
    hosts = corpus.manifest.query("SELECT DISTINCT host FROM failures ORDER BY host").rows
    assert hosts == [("host0.example",), ("host1.example",), ("host2.example",)]


_SUMS = """
    SELECT stage, sum("rows")::BIGINT AS "rows", (
        SELECT sum(rows_in)::BIGINT FROM shards WHERE shards.stage = outcomes.stage AND state = 'committed')
    FROM outcomes WHERE kind = 'status' GROUP BY stage ORDER BY stage"""
_NOTES = "SELECT DISTINCT stage, status, reason FROM outcomes WHERE kind = 'note' ORDER BY ALL"


def test_statuses_sum_up_to_the_rows_that_came_in(corpus: Corpus) -> None:
    assert corpus.manifest.query(_SUMS).rows == [
        ("caption", 18, 18),
        ("crawl", 24, 24),
        ("rank", 72, 72),
        ("select", 18, 18),
    ]
    assert corpus.manifest.query(_NOTES).rows == [
        ("select", "captions", "synthetic"),
        ("select", "captions", "web"),
    ]
    reasons = "SELECT status, reason, \"rows\" FROM outcomes WHERE stage = 'crawl' ORDER BY ALL"
    assert corpus.manifest.query(reasons).rows == [
        ("failed", "http_4xx", 2),
        ("failed", "timeout", 2),
        ("invalid", "not_an_image", 2),
        ("ok", None, 18),
    ]


def test_what_the_workers_count_sums_up_too(tmp_path: Path) -> None:
    """Real models, an image that does not decode, a caption too long, and texts that are empty or alike."""
    config = config_of(
        tmp_path / "corpus",
        caption={"model": str(save_captioner(tmp_path / "captioner")), "num_captions": 4},
        rank={"model": f"local-dir:{save_ranker(tmp_path / 'ranker')}", "pretrained": ""},
    )
    storage = Storage(config.corpus.path)
    records = Records(storage)
    images = {key: {"jpg": encoded(picture(index))} for index, key in enumerate("abc")}
    images["d"] = {"jpg": encoded(picture(3))[:200]}
    captions = {"a": ["A red circle", "  "], "b": [" ".join(["dog"] * 40)], "d": ["broken"]}
    crawl = commit_crawl(config, images, captions)
    caption = CaptionWorker(config, records)(task_of(config, "caption", crawl=crawl))
    rank = RankWorker(config, records)(task_of(config, "rank", crawl=crawl, caption=caption))
    SelectWorker(config, records)(task_of(config, "select", crawl=crawl, rank=rank))
    manifest = Manifest(storage)
    assert manifest.query(_SUMS).rows == [("caption", 4, 4), ("rank", 16, 16), ("select", 4, 4)]
    statuses = """
        SELECT stage, status, reason, "rows" FROM outcomes
        WHERE kind = 'status' AND stage <> 'select' ORDER BY ALL"""
    assert manifest.query(statuses).rows == [
        ("caption", "failed", "undecodable", 1),
        ("caption", "ok", None, 3),
        ("rank", "scored", None, 14),
        ("rank", "unscored", "empty", 1),
        ("rank", "unscored", "undecodable", 1),
    ]
    notes = {(stage, name) for stage, name, _ in manifest.query(_NOTES).rows}
    assert {("rank", "truncated"), ("select", "captions")} <= notes
    assert notes <= {("caption", "duplicate"), ("rank", "truncated"), ("select", "captions")}


def test_urls_that_differ_in_spelling_alone_have_one_canonical_url(corpus: Corpus) -> None:
    spellings = [
        "http://host0.example/00000/0.jpg",
        "HTTP://Host0.Example:80/a/../00000/./0.jpg#top",
        "http://user@host0.example/0000%30/%30.jpg?",
    ]
    others = [
        "https://host0.example/00000/0.jpg",
        "http://host0.example/%2F%c3%a4",
        "nonsense",
        "file:///etc/passwd",
    ]
    query = "SELECT canonical_url(url) FROM (SELECT unnest(?) AS url)"
    with corpus.manifest.open() as opened:
        rows = opened.rows(query, [[*spellings, *others, None]])
    answers = [row["canonical_url(url)"] for row in rows]
    assert answers == [spellings[0]] * 3 + [others[0], "http://host0.example/%2F%C3%A4", None, None, None]
    # In the sandbox, beside the corpus's own URLs.
    found = corpus.manifest.query(
        "SELECT count(*), count(DISTINCT spelling) FROM ("
        "SELECT url AS spelling FROM samples UNION ALL SELECT replace(url, 'http://h', 'HTTP://H') FROM samples) "
        "GROUP BY canonical_url(spelling) HAVING count(DISTINCT spelling) > 1 LIMIT 1"
    )
    assert found.rows == [(2, 2)]
    with pytest.raises(CapfiltError, match="canonical_url"):
        corpus.manifest.query("SELECT canonical_url(1, 2)")


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
