"""Object storage as its own tools find it: credentials, endpoints, proxies, refusals, on S3, GCS and Azure."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from jobs.bench.fixtures.s3 import S3Request, S3Server
from pipeline.intake.lists.files import expand
from pipeline.storage.errors import ObjectStorageError
from pipeline.storage.filesystem import filesystem_of
from pipeline.storage.objects.stores import open_store
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError
from tests.azure_server import serving_azure
from training.lease import Lease, LostLeaseError

_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_S3")


@pytest.fixture(autouse=True)
def _fresh_clients() -> Iterator[None]:
    open_store.cache_clear()
    yield
    open_store.cache_clear()


@pytest.fixture
def no_aws(s3_root: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    for name in _KEYS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return s3_root


# -- S3 as the AWS tools find it -----------------------------------------------------------------------------


def test_a_profile_has_keys_region_and_endpoint(
    no_aws: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config").write_text(
        f"[profile lab]\nregion = eu-west-3\nservices = here\n[services here]\ns3 =\n  endpoint_url = {s3_server.url}\n"
    )
    (tmp_path / "keys").write_text("[lab]\naws_access_key_id = FROMPROFILE\naws_secret_access_key = secret\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    Storage(no_aws).write("x", b"1")
    signed = s3_server.requests[-1].headers["authorization"]
    assert "Credential=FROMPROFILE/" in signed and "/eu-west-3/s3/" in signed


def test_keys_may_come_from_a_process(
    no_aws: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "keys.json").write_text(
        '{"Version": 1, "AccessKeyId": "PROCESS", "SecretAccessKey": "s", "SessionToken": "token"}'
    )
    (tmp_path / "config").write_text(f"[default]\ncredential_process = cat {tmp_path / 'keys.json'}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.url)
    Storage(no_aws).write("x", b"1")
    headers = s3_server.requests[-1].headers
    assert "Credential=PROCESS/" in headers["authorization"] and headers["x-amz-security-token"] == "token"


def test_public_buckets_are_read_without_keys(
    no_aws: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.url)
    with pytest.raises(ObjectStorageError, match="S3 wants credentials and there are none; set AWS_PROFILE"):
        Storage(no_aws).exists("x")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    assert not Storage(no_aws).exists("x")
    assert "authorization" not in s3_server.requests[-1].headers


def test_the_requester_pays(s3_root: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REQUEST_PAYER", "true")
    Storage(s3_root).exists("x")
    assert s3_server.requests[-1].headers["x-amz-request-payer"] == "requester"


def test_a_proxy_is_used(s3_root: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://storage.invalid")
    monkeypatch.setenv("http_proxy", s3_server.url)
    # The server behind the proxy does not know the bucket by that host's name.
    with pytest.raises(ObjectStorageError, match="bucket does not exist"):
        Storage(s3_root).list("")
    assert s3_server.requests[-1].headers["host"] == "storage.invalid"


@pytest.mark.parametrize(
    ("settings", "config", "reason"),
    [
        ({"AWS_PROFILE": "nosuch"}, "", "profile .nosuch. could not be found"),
        ({"AWS_ACCESS_KEY_ID": "alone"}, "", "missing: AWS_SECRET_ACCESS_KEY"),
        ({}, "not a config", "Unable to parse config file"),
        ({}, "[default]\ncredential_process = /nowhere/tool", "No such file or directory: '/nowhere/tool'"),
        ({}, "[default]\ncredential_process = false", "retrieving credentials from custom-process"),
        ({}, "[default]\ncredential_process = echo hello", "Expecting value"),
        ({"AWS_SKIP_SIGNATURE": "true", "AWS_CA_BUNDLE": "/nowhere.pem"}, "", "'/nowhere.pem'"),
        ({"AWS_SKIP_SIGNATURE": "true", "AWS_CA_BUNDLE": os.devnull}, "", "No certificates found"),
        ({"AWS_SKIP_SIGNATURE": "true", "AWS_ENDPOINT_URL": "localhost:9000"}, "", "'localhost:9000' is not"),
    ],
)
def test_settings_that_cannot_be_used_are_no_missing_file(
    no_aws: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    settings: dict[str, str],
    config: str,
    reason: str,
) -> None:
    (tmp_path / "config").write_text(config)
    for name, value in {"AWS_CONFIG_FILE": str(tmp_path / "config"), **settings}.items():
        monkeypatch.setenv(name, value)
    for call in (Storage(no_aws).list, Storage(no_aws).exists):
        with pytest.raises(ObjectStorageError, match=f"^S3 cannot be used: .*{reason}.*; check AWS_"):
            call("x")


# -- what a server refuses -----------------------------------------------------------------------------------


def _first(times: int, status: str) -> Callable[[S3Request], str | None]:
    answers = iter([status] * times)
    return lambda _: next(answers, None)


@pytest.mark.parametrize("status", ["503 Slow Down", "500 Internal Server Error", "429 Too Many Requests"])
def test_a_server_under_load_is_asked_again(
    s3_root: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    storage = Storage(s3_root)
    for call in (
        lambda: storage.create("x", b"1"),
        lambda: storage.read("x"),
        lambda: storage.list(""),
        lambda: storage.info("x"),
        lambda: storage.delete("x"),
    ):
        s3_server.requests.clear()
        monkeypatch.setattr(s3_server, "refuse", _first(2, status))
        call()
        # Threads that earlier tests of this process left may ask for their own buckets.
        assert sum(request.bucket in s3_root for request in s3_server.requests) == 3


def test_a_create_whose_answer_is_lost_was_ours(
    s3_root: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    Storage(s3_root).write("lock", b"mine")
    assert Storage(s3_root).create("lock", b"mine") and not Storage(s3_root).create("lock", b"another")


def test_a_create_beside_another_one_is_tried_again(
    s3_root: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    # S3 answers 409 to all but one of the creates under way, and that one may still fail.
    conflicts = ["409 Conflict"] * 2
    monkeypatch.setattr(
        s3_server, "refuse", lambda request: conflicts.pop() if request.kind == "PUT" and conflicts else None
    )
    assert Storage(s3_root).create("lock", b"mine") and not conflicts
    assert Storage(s3_root).read("lock") == b"mine"


def test_an_upload_that_is_answered_with_404_is_no_missing_file(
    s3_root: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_server, "refuse", lambda _: "404 Not Found")
    for call in (Storage(s3_root).write, Storage(s3_root).create):
        with pytest.raises(ObjectStorageError, match="refused s3://.*404 Not Found"):
            call("x", b"1")


def test_no_permission_is_one_line(
    s3_root: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_server, "refuse", lambda _: "403 Forbidden")
    for call in (Storage(s3_root).list, Storage(s3_root).read, Storage(s3_root).exists):
        with pytest.raises(
            ObjectStorageError, match="S3 refused s3://.*403 Forbidden; check that the bucket exists"
        ):
            call("x")


def test_a_missing_bucket_is_not_an_empty_one(s3_server: S3Server) -> None:
    storage = Storage("s3://no-such-bucket/corpus")
    for call in (storage.list, storage.read, storage.is_corpus):
        with pytest.raises(ObjectStorageError, match="bucket does not exist; check"):
            call(*([] if call == storage.is_corpus else ["x"]))


def test_names_that_urls_are_made_of(s3_root: str) -> None:
    names = ["a b", "ü/ñ", "a%20b", "a+b", "q?x#y", "100%", "[x]*", "a/deep/er/one"]
    storage = Storage(s3_root)
    for name in names:
        storage.write(name, name.encode())
    assert [info.path for info in storage.list("")] == sorted(names)
    assert [storage.read(name).decode() for name in names] == names


@pytest.mark.parametrize("name", ["a//b", "./a", "a/../b"])
def test_names_that_no_object_can_have(s3_root: str, name: str) -> None:
    with pytest.raises(
        ObjectStorageError, match="cannot be the name of an object: .*; name one without empty"
    ):
        Storage(s3_root).read(name)
    with pytest.raises(ObjectStorageError, match="cannot be the name of an object"):
        Storage(f"{s3_root}/{name}").list("x")


@pytest.mark.parametrize(
    "root", ["s3://", "s3:///corpus", "s3://a bucket/corpus", "gs://a?b/corpus", "az://@host"]
)
def test_names_that_no_bucket_can_have(root: str) -> None:
    with pytest.raises(CapfiltError, match="is not the name of a bucket; name a folder, s3://"):
        Storage(root)


def test_two_slashes_after_the_bucket_are_refused() -> None:
    # The client drops one of them, where others do not.
    with pytest.raises(CapfiltError, match="'s3://bucket//corpus' cannot be opened: there are two slashes"):
        Storage("s3://bucket//corpus")
    with pytest.raises(CapfiltError, match=r"s3://bucket//\*.csv cannot be listed: there are two slashes"):
        expand("s3://bucket//*.csv", "source.web.input")


def test_an_object_whose_name_cannot_be_read_is_named(s3_root: str, s3_server: S3Server) -> None:
    _put(s3_server, f"{s3_root}/a//b")
    with pytest.raises(ObjectStorageError, match="here/a//b.*; rename or delete that object"):
        Storage(s3_root).list("")


def test_folders_that_a_console_made_are_not_files(s3_root: str, s3_server: S3Server) -> None:
    storage = Storage(s3_root)
    storage.write("records/crawl/web/00000.json", b"{}")
    storage.write("records/attempts/empty", b"")
    for folder in ("", "records/", "records/crawl/", "records/attempts/"):
        _put(s3_server, f"{s3_root}/{folder}")
    listed = ["records/attempts/empty", "records/crawl/web/00000.json"]
    assert [info.path for info in storage.list("")] == listed
    assert [info.path for info in storage.list("records")] == listed
    files, base = filesystem_of(f"{s3_root}/records")
    assert files.ls(base, detail=False) == [f"{base}/attempts", f"{base}/crawl"]


def _put(server: S3Server, url: str) -> None:
    urlopen(Request(f"{server.url}/{url.removeprefix('s3://')}", method="PUT", data=b"")).close()


def test_globs_and_folders(s3_root: str) -> None:
    storage = Storage(s3_root)
    for name in ("a/1.csv", "a/2.csv", "a/b/3.csv", "ab/4.csv"):
        storage.write(name, b"x" * 10)
    files, base = filesystem_of(f"{s3_root}/a")
    assert [name.removeprefix(base) for name in files.glob(f"{base}/*.csv")] == ["/1.csv", "/2.csv"]
    assert [name.removeprefix(base) for name in files.glob(f"{base}/**/*.csv")] == [
        "/1.csv",
        "/2.csv",
        "/b/3.csv",
    ]
    assert files.isdir(base) and not files.isfile(base) and files.isfile(f"{base}/1.csv")
    assert [info.path for info in storage.list("a")] == ["a/1.csv", "a/2.csv", "a/b/3.csv"]
    with files.open(f"{base}/1.csv") as file:
        assert file.seek(4) == 4 and file.read() == b"x" * 6


# -- GCS and Azure -------------------------------------------------------------------------------------------


@pytest.fixture
def gcs_root(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", s3_server.url)
    urlopen(Request(f"{s3_server.url}/gcsbucket", method="PUT")).close()
    return "gs://gcsbucket/corpus"


@pytest.fixture
def azure_root(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with serving_azure() as url:
        connection = f"AccountName=devstore;AccountKey=a2V5;BlobEndpoint={url}"
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection)
        yield "az://container/corpus"


@pytest.mark.parametrize("name", ["gcs_root", "azure_root"])
def test_a_corpus_may_lie_there(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    storage = Storage(request.getfixturevalue(name))
    storage.require_conditional_puts()
    storage.require_place("corpus.path")
    assert not storage.is_there() and storage.list("") == [] and not storage.is_corpus()
    assert storage.create("records/crawl/x.json", b"first") and not storage.create(
        "records/crawl/x.json", b"second"
    )
    large = tmp_path / "shard.tar"
    large.write_bytes(bytes(range(256)) * (140 << 10))
    storage.put(large, "raw/00000.tar")
    assert [(info.path, info.bytes) for info in storage.list("")] == [
        ("raw/00000.tar", 140 << 18),
        ("records/crawl/x.json", 5),
    ]
    assert storage.is_corpus() and storage.read("records/crawl/x.json") == b"first"
    assert storage.read_range("raw/00000.tar", 256 * 500 + 3, 4) == bytes([3, 4, 5, 6])
    assert storage.read_range("raw/00000.tar", 140 << 18, 4) == b""
    with storage.local_copy("raw/00000.tar") as copy:
        assert copy.read_bytes() == large.read_bytes()
    assert storage.info("raw/00000.tar").version == storage.list("raw")[0].version
    storage.delete("raw/00000.tar")
    storage.delete("raw/00000.tar")
    with pytest.raises(FileNotFoundError):
        storage.read("raw/00000.tar")


@pytest.mark.parametrize("name", ["gcs_root", "azure_root"])
def test_one_driver_of_a_training_writes_there(name: str, request: pytest.FixtureRequest) -> None:
    run = Storage(f"{request.getfixturevalue(name).rpartition('/')[0]}/run")
    first = Lease.take(run, "first", log=print)
    with pytest.raises(CapfiltError, match="another process trains this run"):
        Lease.take(run, "second", log=print)
    first.require()
    first.release()
    second = Lease.take(run, "second", log=print)
    assert second.number == 2
    with pytest.raises(LostLeaseError, match="run second"):
        first.require()
    second.release()


@pytest.mark.parametrize(
    ("root", "advice"),
    [
        ("gs://bucket/x", "set GOOGLE_APPLICATION_CREDENTIALS"),
        ("az://container/x", "set AZURE_STORAGE_ACCOUNT_NAME"),
    ],
)
def test_without_credentials_is_one_line(
    root: str, advice: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GCE_METADATA_HOST", "metadata.invalid")
    with pytest.raises(ObjectStorageError, match=advice):
        Storage(root).list("")
