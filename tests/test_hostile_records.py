"""A corpus of somebody else: its records write, read and delete nothing but the corpus's own files."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from jobs.cli.main import app
from pipeline.corpus.record_files import parse_record
from pipeline.corpus.records import Records
from pipeline.digests import sha256_file
from pipeline.intake.img2dataset_folders import require_named_folders
from pipeline.marks.rules import rules_by_shard
from pipeline.shards.shard_files import write_parquet
from pipeline.shards.shard_reader import open_crawled
from pipeline.storage.storage import Storage
from schemas.catalog.table_schemas import record_row_schema
from schemas.config import SourceConfig
from schemas.errors import CapfiltError, CorruptShardError
from schemas.json_record import Json
from schemas.marks import MarkRecord, MarkSearchRecord
from schemas.names import is_outside_tar
from schemas.records import (
    CheckpointRecord,
    IntakeRecord,
    ModelRecord,
    OutputFile,
    QuarantineRecord,
    RunRecord,
    ShardRecord,
)
from schemas.tables import SAMPLES
from tests.corpora import Corpus, make_corpus

OUTSIDE = [
    "/etc/passwd",
    "../../victim",
    "curated/cc/../../victim",
    "file:///etc/passwd",
    "s3://another/x.tar",
    "simplecache::http://127.0.0.1/x.tar",
    "records/crawl/cc/00000.json",
    "raw/other/00000.a.tar",
    "raw/cc/00001.a.tar",
    "",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(str(tmp_path_factory.mktemp("made") / "corpus"), shards=1, images=4)


@pytest.fixture
def corpus(made: Corpus, tmp_path: Path) -> Corpus:
    return made.copy(str(tmp_path / "corpus"))


def plant(corpus: Corpus, path: str, change: Callable[[dict], object]) -> None:
    """Change a record as somebody else might."""
    values = json.loads(corpus.storage.read(path))
    change(values)
    corpus.storage.write(path, json.dumps(values).encode())


def refused(corpus: Corpus, *arguments: str) -> str:
    """Run a command that must end with exit code 2 and one printable line; return the line."""
    result = CliRunner().invoke(app, [arguments[0], corpus.root, *arguments[1:]])
    assert isinstance(result.exception, CapfiltError), result.output
    assert str(result.exception).isprintable()
    return str(result.exception)


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize(
    ("stage", "output"), [("crawl", "tar"), ("crawl", "parquet"), ("rank", "parquet"), ("select", "tar")]
)
def test_outputs_are_the_shards_own_files(corpus: Corpus, stage: str, output: str, path: str) -> None:
    record = f"records/{stage}/cc/00000.json"
    plant(corpus, record, lambda values: values["outputs"][output].update(path=path))
    for command in (("verify",), ("verify", "--quick"), ("gc", "--dry-run")):
        assert record in refused(corpus, *command)
    with pytest.raises(CapfiltError, match=record):
        corpus.records.read(stage, "cc", "00000")


@pytest.mark.parametrize("path", OUTSIDE[:5])
def test_url_shards_are_the_sources_own_files(corpus: Corpus, path: str) -> None:
    record = "records/intake/cc/00000.json"
    plant(corpus, record, lambda values: values["shards"]["00000"].update(path=path))
    for command in (("verify",), ("status",), ("gc", "--dry-run")):
        assert record in refused(corpus, *command)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../x.tar", "x.tar", "ftp://host/x.tar", "zip://x.tar::/etc/a.zip", 7]
)
def test_only_a_tar_where_it_lies_is_imported(corpus: Corpus, path: object) -> None:
    def set_adopted(values: dict) -> None:
        values |= {"kind": "img2dataset", "adopted": {"00000": path}, "adopted_bytes": {"00000": 1}}

    plant(corpus, "records/intake/cc/00000.json", set_adopted)
    assert "records/intake/cc/00000.json" in refused(corpus, "verify")


def test_a_tar_outside_that_no_intake_imported_is_not_opened(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "own.tar").write_bytes(
        corpus.storage.read(corpus.records.shards()["crawl", "cc", "00000"].outputs["tar"].path)
    )
    plant(
        corpus,
        "records/crawl/cc/00000.json",
        lambda values: values["outputs"]["tar"].update(path=str(tmp_path / "own.tar")),
    )
    for command in (("verify",), ("gc", "--dry-run")):
        assert "that no intake imported" in refused(corpus, *command)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stage", "../select"),
        ("source", "../../other"),
        ("source", "/etc"),
        ("source", "laion"),
        ("shard", "../00001"),
        ("shard", "00001"),
        ("shard", "first"),
        ("attempt", "../../x"),
        ("run_id", "a/b"),
        ("rows_in", "12"),
        ("rows_in", -1),
        ("rows_in", 2**63),
        ("counts", {"ok": "many"}),
        ("outputs", {}),
        ("outputs", []),
        ("finished_at", 7),
        ("models", "abc"),
        ("host", "\x1b[2J"),
    ],
)
def test_records_have_the_declared_types_and_their_own_names(corpus: Corpus, key: str, value: object) -> None:
    path = "records/rank/cc/00000.json"
    plant(corpus, path, lambda values: values.update({key: value}))
    if key == "host":  # text of others is kept; printing it is another matter
        assert corpus.records.shards()
        return
    for command in (("status",), ("verify",), ("gc",), ("sql", "SELECT 1")):
        assert path in refused(corpus, *command)


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"null", b"{}", b"7", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b'{"stage": "crawl"}'],
)
@pytest.mark.parametrize(
    "path",
    [
        "records/crawl/cc/00000.json",
        "records/retired/crawl/cc/00000.a.json",
        "records/quarantine/crawl/cc/00001.json",
        "records/intake/cc/00001.json",
        "records/runs/x.end.json",
        "records/models/x.json",
        "records/checkpoints/x.json",
    ],
)
def test_what_is_not_a_record_is_named(corpus: Corpus, path: str, text: bytes) -> None:
    corpus.storage.write(path, text)
    assert path in refused(corpus, "status")


def test_a_huge_record_is_not_read(corpus: Corpus) -> None:
    with Path(corpus.root, "records/crawl/cc/00000.json").open("r+b") as file:
        file.truncate(10 * 2**30)
    for command in (("status",), ("verify",)):
        assert "10,737,418,240 bytes" in refused(corpus, *command)


@pytest.mark.parametrize("path", ["/etc/passwd", "../x.parquet", "raw/other/00000.a.parquet", None])
def test_the_manifests_parts_name_the_shards_own_files(corpus: Corpus, path: str | None) -> None:
    corpus.manifest.compact()
    [part] = Path(corpus.root, "manifest/shards").glob("*.parquet")
    rows = pq.read_table(part).to_pylist()
    for row in rows:
        row["paths"] = [(name, path if row["stage"] == "crawl" else own) for name, own in row["paths"]]
    pq.write_table(pa.Table.from_pylist(rows, schema=record_row_schema("shards")), part)
    for command in (("sql", "SELECT count(*) FROM samples"), ("failures",), ("trace", "http://x/")):
        assert "manifest rebuild" in refused(corpus, *command)
    assert CliRunner().invoke(app, ["status", corpus.root]).exit_code == 0, "it opens no file"
    assert CliRunner().invoke(app, ["manifest", "rebuild", corpus.root]).exit_code == 0
    assert CliRunner().invoke(app, ["sql", corpus.root, "SELECT count(*) FROM samples"]).exit_code == 0


@pytest.mark.parametrize("text", [b"", b"PAR1", b"PAR1" * 9, b"no Parquet at all"])
def test_a_damaged_part_is_named_and_rebuilt(corpus: Corpus, text: bytes) -> None:
    corpus.manifest.compact()
    corpus.storage.write("manifest/shards/20990101T000000-0123.parquet", text)
    corpus.storage.write("manifest/runs/mine.parquet", text)
    assert "manifest/" in (told := refused(corpus, "status")) and "manifest rebuild" in told
    assert CliRunner().invoke(app, ["manifest", "rebuild", corpus.root]).exit_code == 0
    assert CliRunner().invoke(app, ["status", corpus.root]).exit_code == 0


@pytest.mark.parametrize("key", ["../../x", "/etc/x", "a/b", "", None])
def test_keys_are_names_of_files(corpus: Corpus, key: str | None) -> None:
    # The key becomes the name of a member of the curated tar.
    record = corpus.records.shards()["crawl", "cc", "00000"]
    file = record.outputs["parquet"]
    rows = pq.read_table(Path(corpus.root, file.path)).to_pylist()
    changed = [row | {"key": key if row["status"] == "ok" else row["key"]} for row in rows]
    path = Path(corpus.root, file.path)
    write_parquet(path, changed, SAMPLES)
    planted = replace(file, bytes=path.stat().st_size, sha256=sha256_file(path))
    record = replace(record, outputs={**record.outputs, "parquet": planted})
    with (
        pytest.raises(CorruptShardError, match="cannot be a file's name"),
        open_crawled(corpus.records, record),
    ):
        pass


def test_a_corpus_on_a_bucket_imports_of_this_machine_what_the_config_names(
    s3_root: str, tmp_path: Path
) -> None:
    corpus, folder = make_corpus(s3_root, shards=1), tmp_path / "theirs"
    urls = corpus.records.url_shards()
    (shard, record), *_ = urls.items()

    def adopted(path: str) -> dict[tuple[str, str], ShardRecord]:
        tar = OutputFile(path=path, bytes=1, sha256="", rows=0)
        return {shard: replace(record, outputs={**record.outputs, "adopted": tar})}

    def source(place: Path | str) -> SourceConfig:
        return SourceConfig(name="cc", format="img2dataset", input=(str(place),))

    for path in (f"{folder}/00000.tar", f"file://{folder}/00000.tar"):
        require_named_folders([source(folder)], adopted(path), corpus.storage)
        for elsewhere in (tmp_path / "their", "s3://bucket/theirs"):
            with pytest.raises(CapfiltError, match=r"own disk, and source\.cc\.input does not name"):
                require_named_folders([source(elsewhere)], adopted(path), corpus.storage)
    require_named_folders(
        [source("s3://bucket/theirs")], adopted("s3://bucket/theirs/00000.tar"), corpus.storage
    )
    # On one disk, whoever reads the corpus can read the tar.
    require_named_folders([source("/other")], adopted(f"{folder}/00000.tar"), Storage(str(tmp_path)))


@pytest.mark.parametrize(
    ("named", "tar", "refused"),
    [
        ("/data/theirs", "/data/theirs/../own/00000.tar", True),
        ("/data/theirs", "file:///data/theirs/../../home/own.tar", True),
        # A link in the user's folder may lead out of it.
        ("/data/theirs", "/data/theirs/link/00000.tar", True),
        ("/data/theirs", "/data/theirs2/00000.tar", True),
        ("/data/theirs", "/data/theirs/00000.tar", False),
        ("/data/theirs/", "file:///data/theirs/00000.tar", False),
        # As the intake writes it where the config spells it so.
        ("file:///data/x/../theirs", "file:///data/x/../theirs/00000.tar", False),
        ("file:///data//theirs/", "file:///data//theirs/00000.tar", False),
        ("local:///data/theirs", "file:///data/theirs/00000.tar", False),
    ],
)
def test_a_tar_lies_in_a_named_folder_itself(s3_root: str, named: str, tar: str, refused: bool) -> None:
    corpus = make_corpus(s3_root, shards=1)
    (shard, record), *_ = corpus.records.url_shards().items()
    adopted = OutputFile(path=tar, bytes=1, sha256="", rows=0)
    urls = {shard: replace(record, outputs={**record.outputs, "adopted": adopted})}
    sources = [SourceConfig(name="cc", format="img2dataset", input=(named,))]
    with pytest.raises(CapfiltError, match="own disk") if refused else nullcontext():
        require_named_folders(sources, urls, corpus.storage)


def test_a_retired_record_of_another_shard_makes_nothing_garbage(corpus: Corpus) -> None:
    record = corpus.records.shards()["select", "cc", "00000"]
    text = record.to_json().encode()
    corpus.storage.write(f"records/retired/select/cc/00001.{record.attempt}.json", text)
    with pytest.raises(CapfiltError, match="something else than its name says"):
        corpus.records.retired()


# What capfilt 0.1.0 wrote before records were checked, letter by letter: such corpora are read for good.
_FILE = '{"bytes":1566720,"path":"%s","rows":171,"sha256":"82e1"}'
GOLDEN: dict[str, tuple[type[Json], str]] = {
    "records/crawl/world/00000.json": (
        ShardRecord,
        '{"attempt":"00c6ab0d0503","counts":{"failed":14,"failed/http_4xx":12,"ok":171},"device":"cpu",'
        '"fingerprint":"e4bf","finished_at":"2026-11-28T10:58:45.822057+00:00","histograms":{"caption_words":'
        '{"counts":[0,13],"edges":[0.0,1.0,2.0]}},"host":"vm","images":171,"inputs":{"urls.parquet":"4199"},"models":[],'
        f'"outputs":{{"parquet":{_FILE % "raw/world/00000.00c6ab0d0503.parquet"},'
        f'"tar":{_FILE % "raw/world/00000.00c6ab0d0503.tar"}}},"rows_in":200,"rows_out":171,'
        '"run_id":"20261128T105829-1528ef","seconds":{"decode":0.9789,"fetch":3},"shard":"00000","source":"world",'
        '"stage":"crawl","started_at":"2026-11-28T10:58:41.701440+00:00","versions":{"capfilt":"0.1.0"}}',
    ),
    "records/retired/crawl/old/00003.a1.json": (
        ShardRecord,
        '{"attempt":"a1","counts":{},"device":"NVIDIA H200","fingerprint":"e4bf",'
        '"finished_at":"2026-11-28T10:58:45+00:00","histograms":{},"host":"vm","images":0,"inputs":{},"models":["c0ffee"],'
        f'"outputs":{{"parquet":{_FILE % "raw/old/00003.a1.parquet"},"tar":{_FILE % "/data/img2dataset/00003.tar"}}},'
        '"rows_in":0,"rows_out":0,"run_id":"r","seconds":{},"shard":"00003","source":"old","stage":"crawl",'
        '"started_at":"2026-11-28T10:58:41+00:00","versions":{}}',
    ),
    "records/intake/old/00000.json": (
        IntakeRecord,
        '{"adopted":{"00000":"s3://bucket/img2dataset/00000.tar"},"adopted_bytes":{"00000":12},"attempt":"a1","batch":0,'
        '"files":["s3://bucket/img2dataset/00000.parquet"],"finished_at":"2026-11-28T10:58:45+00:00","kind":"img2dataset",'
        '"rows_duplicate":0,"rows_in":171,"rows_known":0,"rows_new":171,"rows_without_url":0,"run_id":"r",'
        f'"shards":{{"00000":{_FILE % "urls/old/00000.a1.parquet"}}},"signature":"ab","source":"old"}}',
    ),
    "records/quarantine/rank/cc3m/00007.json": (
        QuarantineRecord,
        '{"attempts":3,"error":"OSError: no\\nroom","finished_at":"2026-11-28T10:58:45+00:00","run_id":"r",'
        '"shard":"00007","source":"cc3m","stage":"rank"}',
    ),
    "records/runs/r.start.json": (
        RunRecord,
        '{"command":"run","config":{"corpus":{"path":"x"},"source":[{"name":"s"}]},"config_digest":"ab",'
        '"finished_at":null,"host":"vm","outcome":null,"run_id":"r","shards_done":0,"shards_failed":0,"shards_skipped":0,'
        '"started_at":"2026-11-28T10:58:45+00:00","versions":{}}',
    ),
    "records/runs/r.end.json": (
        RunRecord,
        '{"command":"pretrain","config":{},"config_digest":"ab","finished_at":"2026-11-28T10:59:45+00:00","host":"vm",'
        '"outcome":"partial","run_id":"r","shards_done":3,"shards_failed":1,"shards_skipped":0,'
        '"started_at":"2026-11-28T10:58:45+00:00","versions":{}}',
    ),
    "records/models/c0ffee.json": (
        ModelRecord,
        '{"digest":"c0ffee","files":{"model.safetensors":"ab"},"kind":"captioner","name":"Salesforce/blip","parameters":7,'
        '"registered_at":"2026-11-28T10:58:45+00:00","revision":"main"}',
    ),
    "records/checkpoints/r.step-00000450.053441459282.json": (
        CheckpointRecord,
        '{"created_at":"2026-11-28T10:58:45+00:00","metrics":{"loss":NaN,"lr":0},"models":["c0ffee"],'
        '"path":"checkpoints/stage2/t5/step-00000450.053441459282","run_id":"r","samples":14400,'
        '"sha256":{"training.json":"ab"},"snapshot":"c8a1","stage":"stage2","step":450}',
    ),
}


@pytest.mark.parametrize("path", GOLDEN)
def test_records_of_the_first_release_are_read_for_good(path: str) -> None:
    kind, text = GOLDEN[path]
    assert parse_record(kind, path, text.encode()).to_json() == text


def test_imported_tars_of_the_first_release_are_read(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    for path in ("records/retired/crawl/old/00003.a1.json", "records/intake/old/00000.json"):
        storage.write(path, GOLDEN[path][1].encode())
    values = json.loads(GOLDEN["records/retired/crawl/old/00003.a1.json"][1]) | {"shard": "00000"}
    values["outputs"]["parquet"]["path"] = "raw/old/00000.a1.parquet"
    values["outputs"]["tar"]["path"] = "s3://bucket/img2dataset/00000.tar"
    storage.write("records/crawl/old/00000.json", json.dumps(values).encode())
    records = Records(storage)
    assert (
        records.shards()["crawl", "old", "00000"].outputs["tar"].path == "s3://bucket/img2dataset/00000.tar"
    )
    assert records.read("crawl", "old", "00000") is not None
    assert len(records.retired()) == 1


def test_paths_of_imported_tars() -> None:
    fine = ["/data/a b/00000.tar", "s3://b/x.tar", "gs://b/x.tar", "https://host/x.tar", "file:///data/x.tar"]
    fine += [
        "//data/x.tar",
        "/data/a..b/..x.tar",
        "https://host/a%20b/x.tar",
        "/a%2e/x.tar",
        "file:///data/../y/x.tar",
    ]
    assert all(map(is_outside_tar, fine))
    assert not any(
        map(
            is_outside_tar,
            ["x.tar", "../x.tar", "/etc/passwd", "ssh://h/x.tar", "zip://a::/x.tar", "/a\n.tar"],
        )
    )
    leading_out = [
        "/data/../x.tar",
        "/./x.tar",
        "s3://b/a/../../c/x.tar",
        "https://h/a/%2e%2E/x.tar",
        "http://h/..%2fx.tar",
    ]
    # A home folder, and the current one.
    assert not any(map(is_outside_tar, [*leading_out, "file://~/x.tar", "file://x.tar"]))


@pytest.mark.parametrize(
    "change",
    [
        {"histograms": {"score": {"edges": [0.0, 1.0], "counts": [1, 2, 3]}}},
        {"histograms": {"score": {"edges": [1.0], "counts": [1]}}},
        {"histograms": {"score": {"edges": [0.0], "counts": []}}},
        {"histograms": {"score": {"edges": [0.0, float("nan")], "counts": [1]}}},
        {"histograms": {"score": {"edges": [1.0, 0.0], "counts": [5]}}},
        {"seconds": {"total": float("nan")}},
        {"seconds": {"total": 10**400}},
        {"finished_at": "never"},
        {"images": 2**62},
    ],
)
def test_values_that_no_stage_writes_are_refused(corpus: Corpus, change: dict) -> None:
    path = "records/rank/cc/00000.json"
    plant(corpus, path, lambda values: values.update(change))
    for command in ("stats", "status"):
        assert path in refused(corpus, command)


MARK = {
    "mark": "m1",
    "what": "drop",
    "named_by": "uid",
    "values": ["0" * 32],
    "reason": "test",
    "made_at": "2026-01-01T00:00:00+00:00",
    "host": "\x1b[2J",
    "captions": {},
    "undoes": {},
    "searched": ["list0"],
    "shards": {"cc": {"00000": ["0" * 32]}},
}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mark", "../m1"),
        ("mark", "m2"),
        ("what", "delete"),
        ("named_by", "path"),
        ("named_by", "sha256"),
        ("values", "0" * 32),
        ("values", [7]),
        ("values", [""]),
        ("values", ["0" * 100_001]),
        ("values", ["0" * 32] * 100_001),
        ("reason", "x" * 501),
        ("made_at", "yesterday"),
        ("captions", {"0" * 32: "a text of a drop"}),
        ("undoes", {"../m1": []}),
        ("undoes", {"m1": "0" * 32}),
        ("searched", ["../list0"]),
        ("shards", {"../cc": {}}),
        ("shards", {"cc": {"../00000": []}}),
        ("shards", {"cc": {"00000": ["1" * 32]}}),
    ],
)
def test_marks_have_the_declared_types_and_say_nothing_of_other_values(
    corpus: Corpus, key: str, value: object
) -> None:
    path = "records/marks/m1.json"
    corpus.storage.write(path, json.dumps(MARK).encode())
    assert [mark.values for mark in corpus.records.marks()] == [("0" * 32,)]
    plant(corpus, path, lambda values: values.update({key: value}))
    with pytest.raises(CapfiltError, match=path) as refused_record:
        corpus.records.marks()
    assert str(refused_record.value).isprintable()
    for command in (("status",), ("sql", "SELECT 1")):
        assert path in refused(corpus, *command)


def test_a_search_of_somebody_else_adds_no_value_and_no_shard_to_a_mark(corpus: Corpus) -> None:
    mark = MarkRecord.from_json(json.dumps(MARK))
    shards = {"cc": {"00000": ("0" * 32, "1" * 32)}, "none": {"99999": ("1" * 32,)}}
    search = MarkSearchRecord(mark="m1", attempt="a", searched=("x",), shards=shards)
    left = replace(search, mark="deleted")
    assert list(rules_by_shard([mark], [search, left])) == [("cc", "00000")]
    assert {rule.value for rule in rules_by_shard([mark], [search, left])["cc", "00000"]} == {"0" * 32}
    corpus.storage.write("records/mark-searches/m1.b.json", search.to_json().encode())
    with pytest.raises(CapfiltError, match="mark-searches/m1.b.json"):
        corpus.records.mark_searches()
