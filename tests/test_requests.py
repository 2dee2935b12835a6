"""How often object storage is asked: of a corpus by its size, and by one commit."""

from collections import Counter
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from jobs.bench.fixtures.many_shards import make_many_shards, recipe_options
from jobs.bench.fixtures.s3 import S3Request, S3Server
from pipeline.manifest.manifest import Manifest
from pipeline.storage.storage import Storage
from tests.corpora import ranked_corpus
from tests.processes import cli_here
from tests.runners import select_shards

RUN = "20260102T000000-test"
FEW, MANY = 3, 25
STAGES = 4


@pytest.fixture(scope="module")
def recipes(
    s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, tuple[str, list[str]]]:
    """Two corpora, all stages done and compacted: by shards, the URL and the options that name its recipe."""
    made = {}
    for shards in (FEW, MANY):
        folder, corpus = tmp_path_factory.mktemp(f"lists-{shards}"), f"s3://scale-{shards}/corpus"
        urlopen(Request(f"{s3_server.url}/scale-{shards}", method="PUT")).close()
        make_many_shards(folder, corpus, shards)
        made[shards] = corpus, recipe_options(folder, corpus)
    return made


@pytest.mark.parametrize("command", ["plan", "run", "status", "runs", "stats", "sql", "verify"])
def test_questions_to_the_records_ask_nothing_for_each_record(
    recipes: dict[int, tuple[str, list[str]]], s3_server: S3Server, command: str
) -> None:
    """Of so few, a run would read the records themselves: from 64 on they come from the parts."""
    numbers = {}
    for shards, (corpus, recipe) in recipes.items():
        arguments = {
            "plan": recipe,
            "run": [*recipe, "--local", "--json"],
            "sql": [corpus, "SELECT * FROM progress"],
            "verify": [corpus, "--quick"],
        }
        s3_server.requests.clear()
        done = cli_here(command, *arguments.get(command, [corpus]))
        assert done.returncode == 0, done.stderr
        numbers[shards] = len(s3_server.requests)
        of_data = [
            request.key for request in s3_server.requests if f"{request.key}/".startswith("corpus/raw/")
        ]
        assert len(of_data) == (command == "verify"), of_data
    records = STAGES * MANY
    assert numbers[MANY] <= 60 + records / 200, Counter(request.kind for request in s3_server.requests)


def test_a_question_to_the_samples_asks_once_for_each_file_that_it_opens(
    recipes: dict[int, tuple[str, list[str]]], s3_server: S3Server
) -> None:
    asked = {}
    for shards, (corpus, _) in recipes.items():
        s3_server.requests.clear()
        done = cli_here("sql", corpus, "SELECT status, count(*) FROM samples GROUP BY status")
        assert done.returncode == 0, done.stderr
        asked[shards] = sum("/raw/" in request.key for request in s3_server.requests)
    assert asked == {FEW: FEW, MANY: MANY}


def test_a_trace_opens_the_files_of_the_samples_shard_alone(
    recipes: dict[int, tuple[str, list[str]]], s3_server: S3Server
) -> None:
    corpus, _ = recipes[MANY]
    with Manifest(Storage(corpus)).open() as query:
        row = query.rows("SELECT url, uid, shard FROM base.raw WHERE shard = '00017' LIMIT 1")[0]
    for name in (row["url"], row["uid"]):
        s3_server.requests.clear()
        done = cli_here("trace", corpus, name)
        assert done.returncode == 0 and row["shard"] in done.stdout
        opened = {request.key for request in s3_server.requests if request.key.endswith(".parquet")}
        of_shards = {
            key.split("/")[3][:5] for key in opened if "/manifest/" not in key and "~empty" not in key
        }
        assert of_shards == {row["shard"]}


def test_a_commit_takes_few_requests_and_no_listing(s3_root: str, s3_server: S3Server) -> None:
    corpus = ranked_corpus(s3_root, shards=1)
    s3_server.requests.clear()
    selected = select_shards(corpus)
    assert selected.states == ["done"]
    # The first are the test's own: the url shards.
    kinds = Counter(
        request.kind
        for request in s3_server.requests
        if "/records/" in request.key and "/records/intake" not in request.key
    )
    assert kinds["LIST"] == kinds["HEAD"] == 0 and kinds["PUT"] <= 2 and kinds["DELETE"] <= 1, kinds
    assert kinds.total() <= 9, kinds


def test_one_error_in_twenty_requests_changes_nothing(
    s3_root: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm, disturbed = ranked_corpus(str(tmp_path / "corpus"), shards=4), ranked_corpus(s3_root, shards=4)
    seen: list[str] = []

    def refuse(request: S3Request) -> str | None:
        seen.append(request.kind)
        return "503 Slow Down" if len(seen) % 20 == 7 else None

    monkeypatch.setattr(s3_server, "refuse", refuse)
    selected = select_shards(disturbed)
    monkeypatch.undo()
    assert len(seen) > 40
    assert selected.states == ["done"] * 4
    assert selected.calls == ["00000", "00001", "00002", "00003"], (
        "no worker works twice on a committed shard"
    )
    select_shards(calm)
    digests = [
        {place: record.input_digests() for place, record in corpus.records.shards(("select",)).items()}
        for corpus in (calm, disturbed)
    ]
    assert digests[0] == digests[1]
