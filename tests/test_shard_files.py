"""Tars that the pipeline writes: byte for byte those of Python's tarfile in the ustar format."""

import io
import tarfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.shards.shard_files import write_tar

# Short names as crawls have them, names that need the prefix field, and names outside ASCII.
KEYS = st.one_of(
    st.from_regex(r"[0-9]{9}", fullmatch=True),
    st.builds(lambda folder, name: f"{'d' * folder}/{'n' * name}", st.integers(1, 150), st.integers(1, 90)),
    st.text("aé水.", min_size=1, max_size=20),
)
CONTENTS = st.one_of(st.binary(max_size=40), st.sampled_from([bytes(size) for size in (511, 512, 513, 9000)]))
SAMPLES = st.lists(
    st.tuples(KEYS, st.dictionaries(st.sampled_from(["jpg", "txt", "json"]), CONTENTS, min_size=1)),
    max_size=8,
)


def with_tarfile(samples: list[tuple[str, dict[str, bytes]]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size, info.mode = len(content), 0o644
                tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


@settings(max_examples=60)
@given(SAMPLES)
def test_bytes_are_those_of_tarfile(tmp_path_factory, samples: list[tuple[str, dict[str, bytes]]]) -> None:
    path: Path = tmp_path_factory.getbasetemp() / "written.tar"
    offsets = write_tar(path, samples)
    data = path.read_bytes()
    assert data == with_tarfile(samples)
    last_of_key = dict(samples)
    for key, offset in offsets.items():
        first = next(iter(last_of_key[key].values()))
        assert data[offset : offset + len(first)] == first
