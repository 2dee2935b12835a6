"""Checkpoints: committed last, checked when read, never overwritten, damaged ones passed over, on disk and S3."""

import hashlib
import json
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError
from schemas.records import CheckpointRecord
from tests.ranks import on_ranks
from training.checkpoint import Checkpoints, DamagedCheckpointError, State, TrainingProgress, read_model
from training.distributed import World

FOR_RECORD = {"run_id": "r", "metrics": {"loss": 1.5}}


def state(step: int) -> State:
    values = torch.arange(12.0).reshape(3, 4) + step
    return State(
        progress=TrainingProgress(
            step=step,
            samples=step * 8,
            snapshot="f" * 64,
            config={"run": {"seed": 3, "stage": 1}},
            world_size=1,
        ),
        model={"layer.weight": values, "temp": torch.tensor(0.07)},
        optimizer={"layer.weight.exp_avg": values.mT, "layer.weight.step": torch.tensor(float(step))},
    )


def save(
    checkpoints: Checkpoints, step: int, keep_last: int = 9, asynchronous: bool = False
) -> list[CheckpointRecord]:
    record: list[CheckpointRecord] = []
    options = {"asynchronous": asynchronous, "keep_last": keep_last, "committed": record.append}
    checkpoints.save(state(step), **FOR_RECORD, **options)
    return record


def folders(checkpoints: Checkpoints) -> set[str]:
    return {info.path.partition("/")[0] for info in checkpoints.storage.list("") if "/" in info.path}


def test_what_is_saved_is_read(root: str) -> None:
    checkpoints = Checkpoints(root)
    assert checkpoints.newest_good(print) is None
    (record,) = save(checkpoints, 5)
    assert record == checkpoints.newest_good(print)
    assert (record.stage, record.run_id, record.metrics, record.models) == ("stage1", "r", {"loss": 1.5}, ())
    assert (record.step, record.samples, record.snapshot) == (5, 40, "f" * 64)
    restored, expected = checkpoints.read(record), state(5)
    assert restored.progress == expected.progress
    for part in ("model", "optimizer"):
        tensors, wanted = getattr(restored, part), getattr(expected, part)
        assert tensors.keys() == wanted.keys()
        assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)


def test_the_model_is_a_safetensors_file_of_its_own(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path))
    (record,) = save(checkpoints, 5)
    model = load_file(tmp_path / record.path / "model-00001-of-00002.safetensors")
    assert set(model) == {"model.layer.weight", "model.temp"}
    assert json.loads((tmp_path / record.path / "training.json").read_text())["step"] == 5
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.metadata"))


def test_the_state_is_copied_before_training_goes_on(tmp_path: Path) -> None:
    checkpoints, live = Checkpoints(str(tmp_path)), state(5)
    options = {"asynchronous": True, "keep_last": 2, "committed": lambda record: None}
    checkpoints.save(live, **FOR_RECORD, **options)
    live.model["layer.weight"].zero_()
    live.optimizer["layer.weight.exp_avg"].zero_()
    checkpoints.wait()
    restored = checkpoints.read(checkpoints.committed()[0])
    assert torch.equal(restored.model["layer.weight"], state(5).model["layer.weight"])
    assert torch.equal(restored.optimizer["layer.weight.exp_avg"], state(5).optimizer["layer.weight.exp_avg"])


def test_the_last_k_are_kept(root: str) -> None:
    checkpoints = Checkpoints(root)
    for step in (5, 10, 15, 20):
        save(checkpoints, step, keep_last=2)
    assert [record.step for record in checkpoints.committed()] == [15, 20]
    assert folders(checkpoints) == {record.path for record in checkpoints.committed()}


def test_the_best_one_and_those_of_every_so_many_steps_are_kept(root: str) -> None:
    checkpoints = Checkpoints(root)
    options = {"asynchronous": False, "keep_last": 2, "keep_every": 20, "keep_best": "probe_cider"}
    # The collapse comes behind step 15; step 50 was not probed.
    for step, cider in (
        (5, 1.0),
        (10, 30.0),
        (15, 60.0),
        (20, 40.0),
        (30, 9.0),
        (40, 8.0),
        (50, None),
        (55, 7.0),
    ):
        metrics = {"loss": 1.0 / step} | ({} if cider is None else {"probe_cider": cider})
        checkpoints.save(state(step), run_id="r", metrics=metrics, **options, committed=lambda record: None)
    assert [record.step for record in checkpoints.committed()] == [15, 20, 40, 50, 55]
    assert folders(checkpoints) == {record.path for record in checkpoints.committed()}


def test_a_step_made_again_is_another_attempt(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path))
    (first,), (second,) = save(checkpoints, 5), save(checkpoints, 5)
    assert first.path != second.path
    assert checkpoints.newest_good(print) == second


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "folder gone"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(root: str, damage: str) -> None:
    checkpoints, told = Checkpoints(root), []
    (good,), (bad,) = save(checkpoints, 5), save(checkpoints, 10)
    storage, path = Storage(root), f"{bad.path}/model-00002-of-00002.safetensors"
    data = storage.read(path)
    match damage:
        case "cut":
            storage.write(path, data[:-4])
        case "flipped":
            storage.write(path, data[:-1] + bytes([data[-1] ^ 1]))
        case "gone":
            storage.delete(path)
        case "folder gone":
            for name in bad.sha256:
                storage.delete(f"{bad.path}/{name}")
    assert checkpoints.newest_good(told.append) == good
    assert len(told) == 1 and bad.path in told[0] and "taking the one before" in told[0]
    with pytest.raises(DamagedCheckpointError, match=bad.path):
        checkpoints.read(bad)


def test_a_folder_of_damaged_checkpoints_is_not_a_fresh_start(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path))
    (bad,) = save(checkpoints, 5)
    (tmp_path / bad.path / "training.json").write_text("{}")
    with pytest.raises(CapfiltError, match=r"each of its 1 checkpoints is damaged"):
        checkpoints.newest_good(lambda text: None)


def test_without_its_record_a_checkpoint_is_none(root: str) -> None:
    checkpoints = Checkpoints(root)
    (good,), (torn,) = save(checkpoints, 5), save(checkpoints, 10)
    checkpoints.storage.delete(f"{torn.path}.json")
    checkpoints.storage.write("metrics.jsonl", b"")
    checkpoints.storage.write("config.json", b"{}")
    assert checkpoints.newest_good(print) == good
    checkpoints.remove_unfinished()
    assert folders(checkpoints) == {good.path}
    assert {info.path for info in checkpoints.storage.list("")} >= {
        "metrics.jsonl",
        "config.json",
        f"{good.path}.json",
    }


def test_an_empty_folder_of_a_killed_writer_is_removed(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path))
    (good,) = save(checkpoints, 5)
    (tmp_path / "step-00000010.0123456789ab").mkdir()
    (tmp_path / "mine").mkdir()
    checkpoints.remove_unfinished()
    assert {path.name for path in tmp_path.iterdir()} == {good.path, f"{good.path}.json", "mine"}


def plant(checkpoints: Checkpoints, record: CheckpointRecord, changes: dict) -> str:
    """Rewrite a checkpoint's record as somebody else might; return its file's name."""
    values = json.loads(checkpoints.storage.read(f"{record.path}.json")) | changes
    checkpoints.storage.write(f"{record.path}.json", json.dumps(values).encode())
    return f"{record.path}.json"


@pytest.mark.parametrize(
    "name", ["/tmp/x", "../victim", "../../victim", "a/../../victim", "a/b", "", "s3://b/x", "x\\y"]
)
def test_a_record_names_files_of_its_folder_alone(root: str, name: str) -> None:
    checkpoints = Checkpoints(root)
    (record,) = save(checkpoints, 5)
    checkpoints.storage.write("victim", b"the user's own")
    record_file = plant(checkpoints, record, {"sha256": {**record.sha256, name: "0" * 64}})
    for read in (checkpoints.committed, lambda: checkpoints.newest_good(print), lambda: read_model(root)):
        with pytest.raises(CapfiltError, match=f"{record_file} is not a checkpoint's record"):
            read()
    assert checkpoints.storage.read("victim") == b"the user's own"


@pytest.mark.parametrize(
    "path", ["..", "/tmp", "", ".", "../other", "s3://bucket/x", "step-00000007.0123456789ab"]
)
def test_a_record_commits_the_folder_beside_it_alone(tmp_path: Path, path: str) -> None:
    # ``keep_last`` removes the folders of old records: one that names another folder would remove that.
    checkpoints = Checkpoints(str(tmp_path / "run"))
    (record,) = save(checkpoints, 5)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    plant(checkpoints, record, {"path": path})
    with pytest.raises(CapfiltError, match="is not the folder beside it"):
        save(checkpoints, 10, keep_last=1)
    assert (tmp_path / "other" / "file").exists() and (tmp_path / "run" / record.path).exists()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"null",
        b"{}",
        b"\xff\xfe{",
        b"[" * 100_000,
        b'{"path": 7}',
        b'{"step": ' + b"9" * 5000 + b"}",
    ],
)
def test_a_record_of_another_shape_is_one_line(tmp_path: Path, text: bytes) -> None:
    checkpoints = Checkpoints(str(tmp_path))
    (record,) = save(checkpoints, 5)
    (tmp_path / f"{record.path}.json").write_bytes(text)
    with pytest.raises(CapfiltError) as error:
        read_model(str(tmp_path))
    assert (
        f"{record.path}.json is not a checkpoint's record" in str(error.value)
        and str(error.value).isprintable()
    )


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\x01",
        b"\xff" * 8,
        (2**60).to_bytes(8, "little"),
        (2).to_bytes(8, "little") + b"[]",
        (40).to_bytes(8, "little") + b'{"model.w":{"shape":[1],"dtype":"F32"}} ',
        (9).to_bytes(8, "little") + b"{" * 9,
    ],
)
def test_weights_with_a_false_header_are_one_line(tmp_path: Path, text: bytes) -> None:
    replace_file(tmp_path, "model-00001-of-00002.safetensors", text)


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"step": "five"}'])
def test_progress_of_another_shape_is_one_line(tmp_path: Path, text: bytes) -> None:
    replace_file(tmp_path, "training.json", text)


def replace_file(folder: Path, name: str, text: bytes) -> None:
    """Replace a file and, in the record, its digest: the record of others agrees with what they planted."""
    checkpoints = Checkpoints(str(folder))
    (record,) = save(checkpoints, 5)
    (folder / record.path / name).write_bytes(text)
    plant(checkpoints, record, {"sha256": {**record.sha256, name: hashlib.sha256(text).hexdigest()}})
    with pytest.raises(DamagedCheckpointError) as error:
        read_model(str(folder))
    assert record.path in str(error.value) and str(error.value).isprintable()


def test_files_that_no_record_names_are_not_read(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path))
    (record,) = save(checkpoints, 5)
    save_file({"model.planted": torch.zeros(1)}, tmp_path / record.path / "model-00003.safetensors")
    assert "planted" not in checkpoints.read(record).model


def save_on_a_full_disk(_: World, folder: Path) -> str | None:
    """Save a checkpoint, and another one that finds no room for files of over 100,000 bytes; return the error."""
    checkpoints = Checkpoints(str(folder))
    save(checkpoints, 5)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    large = replace(state(10), model={"w": torch.zeros(100_000)})
    with pytest.raises(OSError) as error:
        checkpoints.save(large, **FOR_RECORD, asynchronous=True, keep_last=1, committed=print)
        checkpoints.wait()
    return error.value.strerror


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    assert on_ranks(1, save_on_a_full_disk, tmp_path) == ["File too large"]
    checkpoints = Checkpoints(str(tmp_path))
    assert [record.step for record in checkpoints.committed()] == [5]
    assert folders(checkpoints) == {checkpoints.committed()[0].path}
    checkpoints.read(checkpoints.committed()[0])


def test_a_model_is_read_by_run_folder_or_record(root: str) -> None:
    checkpoints = Checkpoints(root)
    (first,), (second,) = save(checkpoints, 5), save(checkpoints, 10)
    for path in (f"{root}/{first.path}", f"{root}/{first.path}.json", f"{root}/{first.path}/"):
        restored, held = read_model(path)
        assert (restored, held.progress.step) == (first, 5)
    assert read_model(root)[0] == second
    with pytest.raises(CapfiltError, match="no checkpoint there"):
        read_model(f"{root}/elsewhere")
    with pytest.raises(CapfiltError, match="no checkpoint there"):
        read_model(f"{root}/step-00000005.{'0' * 12}")
