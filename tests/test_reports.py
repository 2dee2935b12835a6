"""The reading commands: tables and JSON, exit codes, and messages that say what to do."""

import json
import os
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from jobs.cli.main import app
from jobs.doctor import check_compiler, check_storage
from jobs.output.values import cell
from pipeline.manifest.status import quantiles
from schemas.catalog.views import VIEWS
from schemas.errors import CapfiltError
from schemas.tables import SAMPLES, TABLES, column_doc
from tests.corpora import RUN, Corpus, make_corpus
from tests.processes import ROOT, start_cli


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    new_corpus = make_corpus(str(tmp_path_factory.mktemp("reads") / "corpus"), sources=("cc", "laion"))
    new_corpus.add_retry("cc", of="00000", shard="00002", batch=1)
    new_corpus.make("cc", "00002")
    new_corpus.manifest.compact()
    return new_corpus


def capfilt(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def answer(*arguments: str) -> object:
    result = capfilt(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    "command",
    [
        ("status",),
        ("stats",),
        ("runs",),
        ("failures",),
        ("failures", "--hosts"),
        ("shards",),
        ("verify",),
        ("verify", "--quick"),
        ("gc", "--dry-run"),
    ],
)
def test_every_read_answers_as_a_table_and_as_json(corpus: Corpus, command: tuple[str, ...]) -> None:
    result = capfilt(command[0], corpus.root, *command[1:])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()
    assert answer(command[0], corpus.root, *command[1:]) is not None


def test_status(corpus: Corpus) -> None:
    report = answer("status", corpus.root)
    stages = {
        (row["source"], row["stage"]): (row["done"], row["total"], row["images"]) for row in report["stages"]
    }
    assert stages["cc", "crawl"] == (3, 3, 19)
    assert stages["laion", "select"] == (2, 2, 18)
    assert {row["source"]: (row["urls"], row["retried"], row["images"]) for row in report["sources"]} == {
        "cc": (24, 1, 19),
        "laion": (24, 0, 18),
    }
    assert (report["last_run"]["run_id"], report["last_run"]["outcome"]) == (RUN, "done")
    assert report["attempts"] == []


def test_status_of_a_run_under_way(tmp_path: Path) -> None:
    new_corpus = make_corpus(str(tmp_path / "corpus"), shards=2, stages=())
    new_corpus.make("cc", "00000", ("crawl",))
    new_corpus.records.attempts("crawl", "cc", "00001", RUN).begin(is_retry=False)
    report = answer("status", new_corpus.root)
    rows = {row["stage"]: (row["done"], row["total"]) for row in report["stages"]}
    assert rows == {"crawl": (1, 2), "caption": (0, 2), "rank": (0, 2), "select": (0, 2)}
    assert [(row["stage"], row["shard"], row["run_id"]) for row in report["attempts"]] == [
        ("crawl", "00001", RUN)
    ]


def test_stats_are_sums_of_the_records(corpus: Corpus) -> None:
    report = answer("stats", corpus.root)
    ok = sum(row["rows"] for row in report["outcomes"] if (row["stage"], row["status"]) == ("crawl", "ok"))
    assert ok == 37
    scores = next(row for row in report["histograms"] if (row["source"], row["name"]) == ("cc", "kept_score"))
    crawled = [row for row in report["outcomes"] if row["stage"] == "crawl"]
    assert {row["kind"] for row in crawled} == {"status"}
    assert sum(row["rows"] for row in crawled) == 49
    assert scores["p05"] <= scores["p50"] <= scores["p95"]
    assert (
        scores["values"]
        == corpus.manifest.query("SELECT sum(len(captions)) FROM curated WHERE source = 'cc'").rows[0][0]
    )
    assert {row["stage"] for row in report["throughput"]} == {"crawl", "caption", "rank", "select"}


def test_runs_are_listed_newest_first(tmp_path: Path) -> None:
    new_corpus = make_corpus(str(tmp_path / "corpus"), shards=1)
    new_corpus.start_run("20260102T000000-next")
    rows = answer("runs", new_corpus.root)
    assert [(row["run_id"], row["command"], row["outcome"], row["shards_done"]) for row in rows] == [
        ("20260102T000000-next", "run", None, 0),
        (RUN, "run", "done", 4),
    ]
    assert list(rows[0]) == [
        "run_id", "command", "started_at", "finished_at", "outcome",
        "shards_done", "shards_skipped", "shards_failed", "gpu_hours", "cost", "host",
    ]  # fmt: skip
    assert len(answer("runs", new_corpus.root, "--limit", "1")) == 1


def test_quantiles_of_a_histogram() -> None:
    report = quantiles([0.0, 1.0, 2.0], [1.0, 2.0, 3.0], [50, 0, 50])
    assert report == {"p05": 0.1, "p25": 0.5, "p50": 1.0, "p75": 2.5, "p95": 2.9}
    assert set(quantiles([0.0], [1.0], [0]).values()) == {None}


def test_failures_count_each_url_once(corpus: Corpus) -> None:
    rows = answer("failures", corpus.root)
    assert {(row["source"], row["reason"]): row["samples"] for row in rows} == {
        ("cc", "timeout"): 1,  # of two, one was retried with success
        ("cc", "http_4xx"): 2,
        ("cc", "not_an_image"): 2,
        ("laion", "timeout"): 2,
        ("laion", "http_4xx"): 2,
        ("laion", "not_an_image"): 2,
    }
    assert {row["reason"] for row in rows if row["transient"]} == {"timeout"}
    hosts = answer("failures", corpus.root, "--hosts", "--source", "laion", "--limit", "1")
    assert len(hosts) == 1
    assert hosts[0]["host"] in hosts[0]["example"]


def test_shards_can_be_chosen(corpus: Corpus) -> None:
    rows = answer("shards", corpus.root, "--stage", "rank", "--source", "cc")
    assert [(row["stage"], row["shard"], row["state"]) for row in rows] == [
        ("rank", f"0000{number}", "committed") for number in range(3)
    ]
    assert answer("shards", corpus.root, "--state", "quarantined") == []


def test_sql_prints_tables_json_and_csv(corpus: Corpus) -> None:
    ask = "SELECT source, count(*) AS n, NULL AS nothing FROM samples GROUP BY source ORDER BY source"
    assert answer("sql", corpus.root, ask) == [
        {"source": "cc", "n": 24, "nothing": None},
        {"source": "laion", "n": 24, "nothing": None},
    ]
    assert capfilt("sql", corpus.root, ask).stdout.splitlines()[0].split() == ["source", "n", "nothing"]
    assert capfilt("sql", corpus.root, ask, "--csv").stdout.split() == [
        "source,n,nothing",
        "cc,24,",
        "laion,24,",
    ]
    assert "first 3 rows" in capfilt("sql", corpus.root, "FROM samples", "--limit", "3").stderr
    endless = capfilt("sql", corpus.root, "FROM range(10000000000)", "--limit", "3", "--json")
    assert json.loads(endless.stdout) == [{"range": 0}, {"range": 1}, {"range": 2}]
    assert "first 3 rows" in endless.stderr
    assert "first" not in capfilt("sql", corpus.root, "FROM range(3)", "--limit", "3", "--csv").stderr
    assert answer("sql", corpus.root, "FROM samples WHERE false") == []
    odd = "SELECT 'NaN'::FLOAT a, [1, 2] b, MAP {'k': 1.5} c, DATE '2026-01-01' d, 1.5::DECIMAL e"
    assert answer("sql", corpus.root, odd)[0] == {
        "a": None,
        "b": [1, 2],
        "c": {"k": 1.5},
        "d": "2026-01-01",
        "e": 1.5,
    }


def test_sql_takes_its_statement_from_a_file_or_from_standard_input(corpus: Corpus, tmp_path: Path) -> None:
    statement = "-- how many of 猫\nSELECT count(*) AS n\nFROM samples;\n-- that is all\n"
    (tmp_path / "question.sql").write_bytes(b"\xef\xbb\xbf" + statement.encode())
    assert answer("sql", corpus.root, "--file", str(tmp_path / "question.sql")) == [{"n": 48}]
    for arguments in ((), ("--file", "-")):
        given = CliRunner().invoke(app, ["sql", corpus.root, *arguments, "--csv"], input=statement)
        assert given.stdout == "n\n48\n", given.exception


@pytest.mark.parametrize(
    ("arguments", "given", "message"),
    [
        (("SELECT 1", "--file", "question.sql"), "", "give one of them"),
        (("--file", "nowhere.sql"), "", "nowhere.sql: cannot be read"),
        (("--file", "/"), "", "/: cannot be read"),
        ((), " \n", "standard input: no statement"),
        ((), b"SELECT '\xff'", "not UTF-8 text at byte 8"),
    ],
)
def test_a_statement_that_cannot_be_read_is_one_line(
    corpus: Corpus, arguments: tuple[str, ...], given: str | bytes, message: str
) -> None:
    result = CliRunner().invoke(app, ["sql", corpus.root, *arguments], input=given)
    assert isinstance(result.exception, CapfiltError)
    assert message in str(result.exception)


@pytest.mark.parametrize("statement", ["SHOW TABLES", "show all tables ;", "-- which\n/* all */ SHOW TABLES"])
def test_show_tables_lists_what_people_ask_and_says_what_it_holds(corpus: Corpus, statement: str) -> None:
    rows = corpus.manifest.query(statement).dicts()
    assert [row["name"] for row in rows] == [*TABLES, *VIEWS]
    assert all(row["comment"] for row in rows)


def test_describe_says_what_each_column_means(corpus: Corpus) -> None:
    for statement in ("DESCRIBE samples", 'desc "SAMPLES";', "DESCRIBE TABLE samples", "SHOW samples"):
        rows = corpus.manifest.query(statement).dicts()
        assert [(row["column_name"], row["comment"]) for row in rows] == [
            (field.name, column_doc(field)) for field in SAMPLES
        ]
    assert {row["column_type"] for row in rows} >= {"VARCHAR", "VARCHAR[]", "INTEGER"}
    assert corpus.manifest.query("DESCRIBE failures").columns == ("column_name", "column_type", "comment")
    assert corpus.manifest.query("DESCRIBE SELECT 1 AS one").dicts()[0]["column_name"] == "one"
    with pytest.raises(CapfiltError, match="sample"):
        corpus.manifest.query("DESCRIBE sampels")


@pytest.mark.parametrize("format_", ["--csv", "--json"])
def test_a_reader_that_has_seen_enough_is_not_an_error(corpus: Corpus, format_: str) -> None:
    asked = start_cli("sql", corpus.root, "FROM range(3000000)", format_)
    first = asked.stdout.readline()
    asked.stdout.close()
    assert asked.wait(60) == 0, asked.stderr.read()
    assert first and not asked.stderr.read()
    asked.stderr.close()


def test_verify_does_not_say_that_all_is_well_to_a_closed_pipe(corpus: Corpus) -> None:
    verify = start_cli("verify", corpus.root)
    verify.stdout.close()
    assert verify.wait(60) == 141
    assert not verify.stderr.read()
    verify.stderr.close()


def test_json_and_csv_hold_every_letter_and_no_control_sequence(corpus: Corpus) -> None:
    ask = "SELECT 'a' || chr(155) || '2J' || chr(27) || chr(8238) || '猫' || chr(128576) AS text"
    text = "a\x9b2J\x1b\u202e猫🙀"
    printed = capfilt("sql", corpus.root, ask, "--json").stdout
    assert json.loads(printed) == [{"text": text}]
    assert printed.replace("\n", "").isprintable() and "猫🙀" in printed
    assert capfilt("sql", corpus.root, ask, "--csv").stdout == f"text\n{text}\n"  # in a pipe as it is


def test_sql_refuses_with_the_users_exit_code(corpus: Corpus) -> None:
    result = capfilt("sql", corpus.root, "DROP VIEW samples")
    assert isinstance(result.exception, CapfiltError)
    assert "read-only" in str(result.exception)
    copy = str(capfilt("sql", corpus.root, "COPY samples TO 'x.csv'").exception)
    assert "--csv or --json" in copy and "manifest.duckdb (READ_ONLY)" in copy
    assert "--memory" in str(capfilt("sql", corpus.root, "SELECT 1", "--memory", "foo").exception)
    slow = capfilt("sql", corpus.root, "FROM range(10000000000)", "--csv", "--timeout", "0.5")
    assert "--timeout" in str(slow.exception)


def test_trace_prints_the_whole_way(corpus: Corpus) -> None:
    curated = corpus.manifest.query(
        "SELECT uid, url, caption FROM curated WHERE source = 'cc' LIMIT 1"
    ).dicts()[0]
    result = capfilt("trace", corpus.root, curated["uid"])
    for word in (
        curated["url"],
        curated["caption"],
        "kept as number 1",
        "blip-tiny",
        "clip-tiny",
        RUN,
        "curated/cc/",
    ):
        assert word in result.stdout
    assert answer("trace", corpus.root, curated["uid"])[0]["url"] == curated["url"]


def test_verify_exits_with_1_where_something_differs(tmp_path: Path) -> None:
    new_corpus = make_corpus(str(tmp_path / "corpus"), shards=1)
    new_corpus.storage.delete("curated/cc/00000.tar")
    result = capfilt("verify", new_corpus.root)
    assert result.exit_code == 1
    assert "curated/cc/00000.tar  missing" in result.stdout
    assert json.loads(capfilt("verify", new_corpus.root, "--json").stdout)["differences"] == [
        {"path": "curated/cc/00000.tar", "what": "missing"}
    ]


def test_gc_lists_then_removes(tmp_path: Path) -> None:
    new_corpus = make_corpus(str(tmp_path / "corpus"), shards=1)
    path = tmp_path / "corpus" / "raw" / "cc" / "00000.0123456789ab.tar"
    path.write_bytes(b"x" * 1000)
    os.utime(path, (0, 0))
    assert answer("gc", new_corpus.root, "--dry-run")["bytes"] == 1000
    assert path.exists()
    report = answer("gc", new_corpus.root, "--older-than", "7d")
    assert [file["path"] for file in report["files"]] == ["raw/cc/00000.0123456789ab.tar"]
    assert not path.exists()
    assert "--older-than" in str(capfilt("gc", new_corpus.root, "--older-than", "soon").exception)


def test_manifest_is_compacted_and_rebuilt(tmp_path: Path) -> None:
    new_corpus = make_corpus(str(tmp_path / "corpus"), shards=1)
    assert answer("manifest", "compact", new_corpus.root) == {"rows": 9}
    assert answer("manifest", "compact", new_corpus.root) == {"rows": 0}
    assert answer("manifest", "rebuild", new_corpus.root) == {
        "shards": 5,
        "lost_attempts": 0,
        "runs": 1,
        "models": 2,
        "checkpoints": 0,
        "snapshots": 0,
        "marks": 0,
    }
    assert (tmp_path / "corpus" / "manifest.duckdb").exists()


@pytest.mark.parametrize("command", ["status", "stats", "runs", "failures", "shards", "verify", "gc"])
def test_a_folder_that_is_not_a_corpus_is_refused(tmp_path: Path, command: str) -> None:
    result = capfilt(command, str(tmp_path / "nowhere"))
    assert isinstance(result.exception, CapfiltError)
    assert "is not a corpus" in str(result.exception)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.slow
def test_doctor_checks_machine_and_storage(tmp_path: Path) -> None:
    result = capfilt("doctor", str(tmp_path / "corpus"), "--json")
    checks = {check["name"]: check for check in json.loads(result.stdout)}
    assert {"python", "torch", "dataclasses", "import", "gpu", "scratch", "storage"} <= checks.keys()
    assert checks["storage"]["state"] == "ok"
    assert result.exit_code == 0, result.stdout
    assert not (tmp_path / "corpus").exists()
    assert "importing torch" in result.stderr


@pytest.mark.slow
def test_doctor_says_first_what_stops_the_next_command(tmp_path: Path) -> None:
    config = tmp_path / "a corpus.toml"
    config.write_text(
        '[corpus]\npath = "corpus"\n[[source]]\nname = "s"\ninput = ["u.csv"]\n[caption]\nmodel = "./nowhere"\n'
        f'[rank]\nmodel = "local-dir:{ROOT}/jobs/demo/weights/ranker"\npretrained = ""\n'
    )
    result = capfilt("doctor", "-c", str(config))
    first, second, third, *rest = result.stdout.splitlines()
    assert re.fullmatch(rf"2 checks would stop \S*capfilt run -c '{config}'", first) and result.exit_code == 2
    assert re.match(r"fail  lists .*no file matches .*u\.csv", second)
    assert re.match(r"fail  captioner .*no such folder", third)
    assert any(line.startswith("ok    ranker") for line in rest) and "fail" not in "".join(rest)


def test_doctor_names_what_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    report = check_storage(str(tmp_path / "file" / "corpus"))
    assert (report.name, report.state) == ("storage", "fail")
    assert report.mend


@pytest.mark.parametrize(
    ("compiler", "report"),
    [
        (None, "neither gcc nor clang"),
        (
            "#!/bin/sh\necho '<stdin>:1: fatal error: Python.h: No such file' >&2\nexit 1\n",
            "Python.h: No such file",
        ),
        ("no program", "Exec format error"),
    ],
)
def test_doctor_says_what_torch_compile_would_miss(
    compiler: str | None, report: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    if compiler is not None:
        (tmp_path / "gcc").write_text(compiler)
        (tmp_path / "gcc").chmod(0o755)
    check = check_compiler(asked=True)
    assert (check.name, check.state) == ("compiler", "fail") and report in check.found
    assert "apt-get install" in check.mend
    # Where no worker is to have a GPU, nothing fails.
    assert check_compiler(asked=False).state == "warn"


def test_doctor_tries_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cc").write_text('#!/bin/sh\nread line\n[ "$line" = "#include <Python.h>" ]\n')
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    assert check_compiler(asked=True).state == "ok"


def test_cells_are_safe_and_readable() -> None:
    assert cell("\x1b[31mred\x07\n") == " [31mred  "
    assert cell(1_234_567, "bytes") == "1.2 MB"
    assert cell(0.1234, "success_share") == "12.3%"
    assert cell(None) == "-"
    assert cell(9455060818151941823, "seed") == "9455060818151941823"
