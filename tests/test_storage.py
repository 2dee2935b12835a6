"""Storage on local disk and on S3: whole objects, create-if-absent, nothing half-written."""

import errno
import multiprocessing
import os
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.storage.errors import storage_error_message
from pipeline.storage.scratch import sweep_temporary_folders, temporary_folder
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError


def test_write_read_list_delete(root: str, tmp_path: Path) -> None:
    storage = Storage(root)
    assert storage.list("a") == []
    storage.write("a/one", b"1")
    storage.write("a/b/two", b"22")
    storage.write("elsewhere", b"")
    local = tmp_path / "file"
    local.write_bytes(b"333")
    storage.put(local, "a/three")
    assert [(info.path, info.bytes) for info in storage.list("a")] == [
        ("a/b/two", 2),
        ("a/one", 1),
        ("a/three", 3),
    ]
    assert storage.read("a/three") == b"333"
    assert storage.open("a/three").read() == b"333"
    assert storage.exists("a/one") and not storage.exists("a/four")
    storage.delete("a/one")
    storage.delete("a/one")
    assert not storage.exists("a/one")
    with pytest.raises(FileNotFoundError):
        storage.read("a/one")


def test_pickles_and_opens_absolute_paths(root: str) -> None:
    storage = pickle.loads(pickle.dumps(Storage(root)))
    storage.write("x", b"content")
    assert Storage(str(Path("/"))).read(storage.url("x")) == b"content"
    with Storage(root).local_copy(storage.url("x")) as path:
        assert path.read_bytes() == b"content"
    with pytest.raises(ValueError, match="outside the corpus"):
        storage.delete(storage.url("x"))


def test_version_changes_with_content(root: str) -> None:
    storage = Storage(root)
    storage.write("x", b"a")
    before = storage.info("x")
    storage.write("x", b"b")
    assert storage.info("x").version != before.version
    assert storage.list("")[0].version == storage.info("x").version


def test_ranges_end_where_the_file_does(root: str) -> None:
    storage = Storage(root)
    storage.write("ten", b"0123456789")
    storage.write("empty", b"")
    ranges = [(0, 4), (8, 4), (10, 4), (20, 4), (3, 0)]
    assert [storage.read_range("ten", *each) for each in ranges] == [b"0123", b"89", b"", b"", b""]
    assert storage.read_range("empty", 0, 4) == storage.read("empty", 100) == b""
    assert storage.read("ten", 4) == b"01234"


def test_colons_are_part_of_a_path(tmp_path: Path) -> None:
    Storage(str(tmp_path / "a::b")).write("x::y", b"content")
    assert (tmp_path / "a::b" / "x::y").read_bytes() == b"content"
    assert Storage("/").read(f"{tmp_path}/a::b/x::y") == b"content"


def test_a_link_has_its_own_version(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"content")
    (tmp_path / "list.parquet").symlink_to("blob")
    os.utime(tmp_path / "list.parquet", (1000, 1000), follow_symlinks=False)
    (listed,) = (info for info in Storage(str(tmp_path)).list("") if info.path == "list.parquet")
    assert Storage(str(tmp_path)).info("list.parquet") == listed
    # What signatures of lists hold since the first corpora.
    assert (listed.version, listed.bytes) == ("1000.0", 7)


def test_create_is_exclusive(root: str) -> None:
    storage = Storage(root)
    assert storage.create("lock", b"first")
    assert not storage.create("lock", b"second")
    assert storage.read("lock") == b"first"


def _create(root: str, name: int, results: "multiprocessing.Queue") -> None:
    results.put(Storage(root).create("lock", str(name).encode()))


def test_one_of_many_creators_wins(root: str) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    creators = [context.Process(target=_create, args=(root, name, results)) for name in range(6)]
    for creator in creators:
        creator.start()
    won = [results.get(timeout=60) for _ in creators]
    for creator in creators:
        creator.join()
    assert sorted(won) == [False] * 5 + [True]


def test_one_of_many_swaps_wins(root: str) -> None:
    storage = Storage(root)
    storage.write("a/one", b"old")

    def swap(number: int) -> bool:
        return storage.swap("a/one", b"old", b"new %d" % number)

    with ThreadPoolExecutor(8) as pool:
        winners = list(pool.map(swap, range(8)))
    assert sum(winners) == 1
    assert storage.read("a/one") == b"new %d" % winners.index(True)
    assert not storage.swap("a/one", b"old", b"other") and not storage.swap("a/none", b"", b"other")
    assert [info.path for info in storage.list("a")] == ["a/one"]


def test_failed_put_leaves_nothing(root: str, tmp_path: Path) -> None:
    storage = Storage(root)
    with pytest.raises(FileNotFoundError):
        storage.put(tmp_path / "absent", "a/x")
    assert storage.list("") == []


def test_scratch_of_killed_processes_is_swept() -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_hold_scratch, args=(queue,))
    process.start()
    folder = Path(queue.get(timeout=60))
    assert folder.is_dir()
    process.kill()
    process.join()
    with temporary_folder() as mine:
        assert sweep_temporary_folders() >= 1
        assert mine.is_dir()
    assert not folder.exists()


def _hold_scratch(queue: "multiprocessing.Queue") -> None:
    with temporary_folder() as folder:
        queue.put(str(folder))
        multiprocessing.Event().wait()


def test_scratch_of_other_machines_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    with temporary_folder() as other:
        gone = other.rename(other.with_name(other.name.replace(str(os.getpid()), "999999999")))
        monkeypatch.undo()
        sweep_temporary_folders()
        assert gone.is_dir()
        gone.rename(other)


def test_a_listing_that_fails_is_not_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(str(tmp_path))
    storage.write("a/b", b"x")
    scandir = os.scandir

    def stale(path: str) -> object:
        if str(path).endswith("/a"):
            raise OSError(116, "Stale file handle")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", stale)
    with pytest.raises(OSError, match="Stale"):
        storage.list("a")


def test_storage_without_conditional_puts_is_refused() -> None:
    with pytest.raises(CapfiltError, match="create-if-absent"):
        Storage("memory://corpus").require_conditional_puts()


def test_unknown_protocol_is_the_users_error() -> None:
    with pytest.raises(CapfiltError, match="'nosuch://bucket' cannot be opened: .*; name a folder"):
        Storage("nosuch://bucket")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file", "'{root}/file' is a file; name a folder"),
        ("file/below/deeper", "{root}/file above it is a file"),
        ("link", "is a link to /nowhere/at/all, which is not there"),
        ("link/below", "{root}/link above it is a link to"),
    ],
)
def test_a_root_that_cannot_be_a_folder_is_refused(place: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("/nowhere/at/all")
    with pytest.raises(CapfiltError, match=re.escape(message.format(root=tmp_path))):
        Storage(str(tmp_path / place)).require_place("corpus.path")


def test_a_root_that_is_there_or_can_be_made_is_fine(tmp_path: Path, s3_root: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for place in ("folder", "link", "folder/new/newer", "link/new"):
        Storage(str(tmp_path / place)).require_place("corpus.path")
    Storage(s3_root).require_place("corpus.path")
    Storage(s3_root).write("object", b"x")
    Storage(s3_root).require_place("corpus.path")
    with pytest.raises(CapfiltError, match="is an object; name a prefix"):
        Storage(f"{s3_root}/object").require_place("corpus.path")
    assert not (tmp_path / "folder" / "new").exists()


def test_a_folder_that_cannot_be_made_is_one_line() -> None:
    with pytest.raises(NotADirectoryError) as refused:
        Storage("/proc/capfilt").write("file", b"")
    assert storage_error_message(refused.value).startswith("No folder can be made there: /proc/capfilt; ")


def test_a_shared_file_is_the_same_file_and_replaces_another(tmp_path: Path) -> None:
    storage, local = Storage(str(tmp_path / "corpus")), tmp_path / "local"
    local.write_bytes(b"new")
    storage.write("a/x", b"old")
    storage.share(local, "a/x")
    storage.share(local, "a/y")
    for name in ("a/x", "a/y"):
        assert (tmp_path / "corpus" / name).samefile(local)
    local.unlink()
    assert storage.read("a/x") == b"new"
    assert sorted(path.name for path in (tmp_path / "corpus/a").iterdir()) == ["x", "y"]


def test_where_no_link_can_be_made_a_shared_file_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, local = Storage(str(tmp_path / "corpus")), tmp_path / "local"
    local.write_bytes(b"new")

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "another filesystem")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    storage.share(local, "a/x")
    assert storage.read("a/x") == b"new" and not (tmp_path / "corpus/a/x").samefile(local)
