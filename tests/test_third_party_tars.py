"""Tars that others made, as tar, macOS, img2dataset and broken copies leave them: read, or told in one line."""

import gzip
import hashlib
import io
import json
import logging
import tarfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.corpus.records import Records
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError
from schemas.pretrain import DataConfig
from schemas.records import SnapshotShard
from tests.raw_shards import encoded, picture
from training.data.shard_index import index_tar, open_shard
from training.data.snapshot import take_snapshot

JPG = encoded(picture(1))
Members = Iterable[tuple[str, bytes]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def sample(key: str, image: str = "jpg", text: str = "txt") -> list[tuple[str, bytes]]:
    return [(f"{key}.{image}", JPG), (f"{key}.{text}", f"words of {key}".encode())]


def write(folder: Path, members: Members, name: str = "x.tar", format: int = tarfile.PAX_FORMAT) -> Path:
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / name, "w", format=format) as tar:
        for member, content in members:
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return folder / name


def captions(folder: Path) -> list[str]:
    """Return the captions of every sample that a folder trains on, in the order of its tars."""
    snapshot = take_snapshot(DataConfig(corpus=[{"path": str(folder)}]))
    read_captions = []
    for ref in snapshot.shards:
        with open_shard(Records(Storage(ref.corpus)), ref) as shard:
            for number in range(len(shard)):
                read = shard.sample(number)
                assert read.image == JPG
                read_captions += read.captions
    return read_captions


def words(*keys: str) -> list[str]:
    return [f"words of {key}" for key in keys]


ORDERS: dict[str, tuple[Members, list[str]]] = {
    "images, then texts": (
        [(f"{key}.jpg", JPG) for key in "abc"]
        + [(f"{key}.txt", f"words of {key}".encode()) for key in "abc"],
        words("a", "b", "c"),
    ),
    "texts, then images in another order": (
        [(f"{key}.txt", f"words of {key}".encode()) for key in "abc"]
        + [(f"{key}.jpg", JPG) for key in "cab"],
        words("a", "b", "c"),
    ),
    "some apart, some not": (
        [("a.jpg", JPG), *sample("b"), ("a.txt", b"words of a"), *sample("c")],
        words("a", "b", "c"),
    ),
    "folders by kind of the same key": (
        [("d/a.jpg", JPG), ("d/b.jpg", JPG), ("d/a.txt", b"words of a"), ("d/b.txt", b"words of b")],
        words("a", "b"),
    ),
    "dots in half of the names": (
        [*sample("00000"), *sample("img_2.0"), *sample("img_2.1"), *sample("v1.2/c"), *sample("v1.2/d.e")],
        words("00000", "img_2.0", "img_2.1", "v1.2/c", "v1.2/d.e"),
    ),
    "macOS": (
        [
            ("._a.jpg", b"x"),
            ("a.jpg", JPG),
            ("._a.txt", b"x"),
            ("a.txt", b"words of a"),
            ("__MACOSX/b.jpg", b"x"),
        ],
        words("a"),
    ),
    "macOS in a folder": (
        [
            ("./d/._a.jpg", b"x"),
            ("./d/a.jpg", JPG),
            ("./d/._a.txt", b"x"),
            ("./d/a.txt", b"words of a"),
            ("d/.DS_Store", b""),
        ],
        words("a"),
    ),
    "capitals": (
        [*sample("a", "JPG", "TXT"), *sample("b", "JPEG"), *sample("c", "Jpeg", "Txt")],
        words("a", "b", "c"),
    ),
    "other members": ([("README.md", b""), *sample("a"), ("a.mask.jpg", b"x"), ("a.cls", b"1")], words("a")),
    "long names": (
        [*sample("d" * 90 + "/" + "k" * 120), *sample("é" * 70)],
        words("d" * 90 + "/" + "k" * 120, "é" * 70),
    ),
}


@pytest.mark.parametrize("case", ORDERS)
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_sample_is_found_wherever_its_members_stand(tmp_path: Path, case: str, format: int) -> None:
    members, expected = ORDERS[case]
    if case == "long names" and format == tarfile.USTAR_FORMAT:
        members, expected = sample("d" * 90 + "/" + "k" * 80), words("d" * 90 + "/" + "k" * 80)
    write(tmp_path / "f", members, format=format)
    assert captions(tmp_path / "f") == expected


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"caption": "one", "url": "u"}, ["one"]),
        ({"captions": ["one", "two", 3]}, ["one", "two"]),
        ({"text": "one"}, ["one"]),
        ({"TEXT": "one", "caption": None}, ["one"]),
        (["one", None, "two"], ["one", "two"]),
        ("one", ["one"]),
    ],
)
def test_captions_in_a_json_without_a_txt(tmp_path: Path, told: object, expected: list[str]) -> None:
    write(tmp_path / "f", [("a.jpg", JPG), ("a.json", json.dumps(told).encode())])
    assert captions(tmp_path / "f") == expected


@pytest.mark.parametrize(
    "told", [b"{}", b"7", b"null", b"", b"\xff", b"[" * 100_000, b'{"caption": {"a": 1}}']
)
def test_a_json_without_captions_has_none(tmp_path: Path, told: bytes) -> None:
    write(tmp_path / "f", [("a.jpg", JPG), ("a.json", told), *sample("b")])
    assert captions(tmp_path / "f") == words("b")


def test_the_txt_stands_before_an_object(tmp_path: Path) -> None:
    write(tmp_path / "f", [*sample("a"), ("a.json", b'{"caption": "no"}')])
    assert captions(tmp_path / "f") == words("a")


def test_samples_that_repeat_a_key_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(
        tmp_path / "f", [*sample("a"), ("b.jpg", JPG), *sample("a"), ("b.jpg", JPG), ("b.txt", b"words of b")]
    )
    assert captions(tmp_path / "f") == words("a", "b")
    assert "2 with a key seen before" in caplog.text


def test_a_dotted_name_of_a_whole_samples_key_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members = [*sample("a"), ("a.mask.png", b"x"), *sample("a.small"), *sample("b"), ("b.mask.png", b"x")]
    write(tmp_path / "f", members)
    assert captions(tmp_path / "f") == words("a", "b")
    assert (
        "samples left out: 1 with the key of another (a key ends at the first dot of a name)" in caplog.text
    )


def test_links_and_devices_are_never_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "secret.jpg").write_bytes(JPG)
    with tarfile.open(tmp_path / "f" / "x.tar", "w") as tar:
        for key, kind in (
            ("a", tarfile.SYMTYPE),
            ("b", tarfile.LNKTYPE),
            ("c", tarfile.CHRTYPE),
            ("d", tarfile.FIFOTYPE),
        ):
            link = tarfile.TarInfo(f"{key}.jpg")
            link.type, link.linkname = kind, str(tmp_path / "secret.jpg")
            tar.addfile(link)
            text = tarfile.TarInfo(f"{key}.txt")
            text.size = 5
            tar.addfile(text, io.BytesIO(b"words"))
        for name, content in sample("e"):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert captions(tmp_path / "f") == words("e")
    assert "4 with no image" in caplog.text


def test_a_sparse_member_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "f", [*sample("a"), *sample("b")], format=tarfile.GNU_FORMAT)
    data = bytearray(path.read_bytes())
    data[156:157] = tarfile.GNUTYPE_SPARSE  # its first header's type; the map of its pieces is empty
    data[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(data[:512]))[0]
    path.write_bytes(data)
    assert captions(tmp_path / "f") == words("b")
    assert "1 with no image" in caplog.text


@pytest.mark.parametrize("cut", [0, 512])
def test_a_tar_without_its_end_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture, cut: int) -> None:
    path = write(tmp_path / "f", [*sample("a"), *sample("b"), *sample("c")])
    with tarfile.open(path) as tar:
        end = tar.getmembers()[4].offset  # before the third sample
    data = path.read_bytes()[:end]
    path.write_bytes(data + b"\0" * cut)
    assert captions(tmp_path / "f") == words("a", "b")
    assert ("may have been cut" in caplog.text) == (cut == 0)
    caplog.clear()
    assert captions(tmp_path / "f") == words("a", "b")  # from the cache
    assert ("may have been cut: samples may be missing: x.tar" in caplog.text) == (cut == 0)


def test_tars_behind_one_another_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = write(tmp_path / "f", sample("a")), write(tmp_path / "g", sample("b"))
    first.write_bytes(first.read_bytes() + second.read_bytes())
    assert captions(tmp_path / "f") == words("a")
    assert "continue after their end mark" in caplog.text


def spoiled(path: Path, spoil: str) -> None:
    """Damage a tar of three samples."""
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2].offset
    match spoil:
        case "a damaged header in the middle":
            data[third : third + 100] = b"\xff" * 100
        case "a size that lies":
            data[third + 124 : third + 136] = b"77777777777\0"
        case "a negative size":
            data[third + 124 : third + 136] = b"\xff" * 10 + b"\xfc\x00"
        case "cut inside a member":
            data = data[: third + 700]
        case "cut inside a header":
            data = data[: third + 100]
    if spoil in ("a size that lies", "a negative size"):
        header = bytes(data[third : third + 512])
        data[third + 148 : third + 156] = b"%06o\0 " % tarfile.calc_chksums(header)[0]
    path.write_bytes(data)


@pytest.mark.parametrize(
    "spoil",
    [
        "a damaged header in the middle",
        "a size that lies",
        "a negative size",
        "cut inside a member",
        "cut inside a header",
    ],
)
def test_a_damaged_tar_is_one_line(tmp_path: Path, spoil: str) -> None:
    spoiled(write(tmp_path / "f", [*sample("a"), *sample("b"), *sample("c")]), spoil)
    with pytest.raises(CapfiltError, match=r"f/x\.tar is (damaged|not a readable tar)") as error:
        captions(tmp_path / "f")
    assert str(error.value).isprintable()


def test_a_compressed_tar_is_called_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "f", sample("a"))
    packed = gzip.compress(path.read_bytes(), mtime=0)
    path.write_bytes(packed)
    with pytest.raises(CapfiltError, match="it is compressed by gzip: decompress it"):
        captions(tmp_path / "f")
    path.rename(path.with_name("x.tar.gz"))
    with pytest.raises(
        CapfiltError, match="1 compressed tars cannot be read, such as x.tar.gz: decompress them"
    ):
        captions(tmp_path / "f")
    write(tmp_path / "f", sample("b"), name="y.tar")
    with caplog.at_level(logging.WARNING):
        assert captions(tmp_path / "f") == words("b")
    assert "x.tar.gz and are left out" in caplog.text


def test_an_empty_tar_among_others_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "f", [], name="empty.tar")
    (tmp_path / "f" / "nothing.tar").touch()
    write(tmp_path / "f", sample("a"))
    assert captions(tmp_path / "f") == words("a")
    with pytest.raises(CapfiltError, match="nothing to train on"):
        write(tmp_path / "g", [])
        captions(tmp_path / "g")


def test_names_that_are_not_utf8_are_read(tmp_path: Path) -> None:
    write(tmp_path / "f", [("\udcff.jpg", JPG), ("\udcff.txt", b"words")], format=tarfile.GNU_FORMAT)
    assert captions(tmp_path / "f") == ["words"]


def test_a_run_of_0_1_0_goes_on_with_the_samples_that_it_began_with(tmp_path: Path) -> None:
    path = write(tmp_path / "f", [*sample("a"), *sample("img.0"), *sample("img.1"), *sample("b")])
    (ref,) = take_snapshot(DataConfig(corpus=[{"path": str(tmp_path / "f")}])).shards
    assert (ref.tar.rows, index_tar(path, adjacent=True).keys) == (4, ["a", "b"])
    before: SnapshotShard = replace(ref, tar=replace(ref.tar, rows=2))
    with open_shard(Records(Storage(ref.corpus)), before) as shard:
        assert [shard.sample(number).captions[0] for number in range(2)] == words("a", "b")


def test_an_index_of_an_earlier_rule_is_not_believed(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "f", [*sample("img.0"), *sample("img.1"), *sample("b")])
    stat = path.stat()
    # The name and content that 0.1.0 gave the entry of this file.
    signature = json.dumps([1, str(path), stat.st_size, str(stat.st_mtime)])
    entry = cache / "capfilt" / "shards" / f"{hashlib.sha256(signature.encode()).hexdigest()[:32]}.json"
    entry.parent.mkdir(parents=True)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    entry.write_text(json.dumps({"sha256": digest, "samples": 1, "left_out": {"no image": 1}}))
    assert captions(tmp_path / "f") == words("img.0", "img.1", "b")


def test_a_tar_on_s3_that_the_scratch_space_cannot_hold_is_refused_before_it_is_fetched(
    tmp_path: Path, s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = write(tmp_path / "f", sample("a"))
    Storage(s3_root).put(tar, "all.tar")
    data = DataConfig(corpus=[{"path": s3_root}])
    monkeypatch.setattr("training.data.webdataset_folder.free_scratch", lambda: 1000)
    with pytest.raises(
        CapfiltError, match=r"all\.tar has 0\.0 GB, .* Split it into tars of some thousand samples"
    ):
        take_snapshot(data)
    monkeypatch.undo()
    assert take_snapshot(data).num_images == 1
