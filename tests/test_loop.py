"""The loop on a small stage: resume, checkpoints and metrics, and every way in which training can end."""

import json
import math
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from ranks import on_ranks, start

from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError
from schemas.pretrain import MetricsConfig
from tests.small_stage import BATCH_SIZE, Kept, SmallStage, batches, config, make_loop
from training.distributed import World
from training.trainer.loop import Loop, TrainingStopped
from training.trainer.metrics import FILE, JsonLines, Throughput, require_libraries
from training.trainer.steps.seconds import StepSeconds
from training.trainer.steps.skipped import SkippedSteps

pytestmark = pytest.mark.training


def weights(loop: Loop) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in loop.stage.trainable_state().items()}


def assert_equal(actual: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == other.keys()
    assert all(torch.equal(actual[name], other[name]) for name in actual)


def test_a_run_reports_every_step_and_ends_with_a_checkpoint(tmp_path: Path) -> None:
    sink = Kept()
    loop = make_loop(config(tmp_path), sinks=[sink])
    summary = loop.run(batches())
    assert (summary.outcome, summary.step, summary.samples) == ("done", 10, 10 * BATCH_SIZE)
    assert sink.of("step") == list(range(1, 11))
    assert sink.of("samples") == [BATCH_SIZE * step for step in range(1, 11)]
    for name in ("loss", "temperature", "gradient_norm", "samples_per_s", "peak_memory_gb"):
        assert all(value > 0 for value in sink.of(name)), name
    assert all(0 <= share <= 1 for share in sink.of("data_wait_share"))
    assert sink.of("mfu") == [None] * 10  # of a CPU there is no data sheet
    assert sink.of("lr") == [loop.schedule.lr(step) for step in range(10)]
    for step, rate in zip(sink.of_ranks, sink.of("samples_per_s"), strict=True):
        parts_s = sum(number for name, (number,) in step.items() if name.endswith("_s"))
        assert 0 < step["losses_s"][0] <= parts_s <= BATCH_SIZE / rate + 1e-3
    assert [record.step for record in loop.checkpoints.committed()] == [5, 10]
    assert summary.checkpoint == loop.checkpoints.committed()[-1].path
    assert sink.of("loss")[-1] < sink.of("loss")[0]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_resumed_equals_uninterrupted_to_the_bit(tmp_path: Path, asynchronous: bool) -> None:
    settings = {"checkpoint": {"every_steps": 5, "asynchronous": asynchronous}}
    whole, sink = make_loop(config(tmp_path / "a", **settings)), Kept()
    whole.sinks = [sink]
    whole.run(batches())

    stops = iter([False] * 4 + [True])
    first, before = make_loop(config(tmp_path / "b", **settings), stop_asked=lambda: next(stops)), Kept()
    first.sinks = [before]
    assert first.run(batches()).outcome == "interrupted"
    torch.manual_seed(99)
    second, after = make_loop(config(tmp_path / "b", **settings)), Kept()
    second.sinks = [after]
    record = second.checkpoints.newest_good(print)
    second.resume(second.checkpoints.read(record), record)
    summary = second.run(batches(second.samples))
    assert (summary.resumed_from, summary.step) == (5, 10)
    assert before.of("loss") + after.of("loss") == sink.of("loss")
    assert before.of("gradient_norm") + after.of("gradient_norm") == sink.of("gradient_norm")
    assert_equal(weights(second), weights(whole))
    states = [loop.checkpoints.read(loop.checkpoints.committed()[-1]) for loop in (second, whole)]
    assert_equal(states[0].optimizer, states[1].optimizer)


def test_a_step_whose_loss_is_not_a_number_is_skipped(tmp_path: Path) -> None:
    told: list[str] = []
    sink = Kept()
    loop = make_loop(config(tmp_path), SmallStage(explode_at={8}), sinks=[sink], log=told.append)
    taken: list[dict[str, torch.Tensor]] = []
    loop.stop_asked = lambda: bool(taken.append(weights(loop)))
    summary = loop.run(batches())
    assert (summary.outcome, summary.step, summary.samples) == ("done", 10, 10 * BATCH_SIZE)
    # What step 9 began with is what step 8 began with; step 9 changes it.
    assert_equal(taken[8], taken[7])
    assert not torch.equal(taken[9]["head.weight"], taken[8]["head.weight"])
    assert sink.of("skipped_steps") == [0] * 7 + [1] * 3
    assert [line["step"] for line in sink.lines if line["loss"] is None] == [8]
    # Its samples are named, in the log and whole in a file.
    (line,) = [line for line in told if "skipped" in line]
    uids = [f"{number:032x}" for number in range(7 * BATCH_SIZE, 8 * BATCH_SIZE)]
    assert line.startswith("step 8: loss is nan, gradient_norm is nan; skipped, ") and uids[0] in line
    written = json.loads((tmp_path / "run" / "skipped-00000008.json").read_text())
    assert (written["step"], written["uids"], written["values"]["loss"]) == (8, uids, "nan")


def test_a_checkpoint_of_a_skipped_step_is_as_any_other(tmp_path: Path) -> None:
    """Step 5 is skipped and saved; the count goes on behind it."""
    bad = {3, 5, 7}
    whole, rest = Kept(), Kept()
    make_loop(config(tmp_path / "a"), SmallStage(explode_at=bad), sinks=[whole]).run(batches())
    stops = iter([False] * 4 + [True])
    settings = config(tmp_path / "b")
    make_loop(settings, SmallStage(explode_at=bad), stop_asked=lambda: next(stops)).run(batches())
    second = make_loop(settings, SmallStage(explode_at=bad), sinks=[rest])
    record = second.checkpoints.newest_good(print)
    assert record.step == 5 and "loss" not in record.metrics and record.metrics["lr"] > 0
    second.resume(second.checkpoints.read(record), record)
    second.run(batches(second.samples))
    for name in ("loss", "gradient_norm", "skipped_steps"):
        assert rest.of(name) == whole.of(name)[5:]
    assert rest.of("skipped_steps")[-1] == 3


def test_too_many_skipped_steps_end_the_run_with_their_samples(tmp_path: Path) -> None:
    settings = config(tmp_path, optim={"steps": 40}, checkpoint={"every_steps": 5})
    loop = make_loop(settings, SmallStage(explode_at=range(8, 40)))
    with pytest.raises(
        TrainingStopped, match=r"step 18: loss is nan, .*; stopped.* \(8, 9, .*, 18\)\."
    ) as stopped:
        loop.run(batches())
    assert f"{17 * BATCH_SIZE:032x}" in str(stopped.value)
    last = loop.checkpoints.committed()[-1]
    assert last.step == 15 and loop.checkpoints.storage.url(last.path) in str(stopped.value)
    assert all(tensor.isfinite().all() for tensor in loop.stage.trainable_state().values())


@pytest.mark.parametrize(("step", "too_many"), [(1000, True), (1001, False)])
def test_ten_of_a_thousand_steps_may_be_skipped(tmp_path: Path, step: int, too_many: bool) -> None:
    skipped = SkippedSteps(Storage(str(tmp_path)), range(1, 11))
    skipped.forget(999)
    assert len(skipped.steps) == 10 and not skipped.too_many
    skipped.add(step)
    assert skipped.too_many is too_many


def train_rank(world: World, output: Path) -> tuple[list[int], dict[str, torch.Tensor]]:
    """Train on one of two ranks, the second of which alone meets a number that overflows."""
    stage = SmallStage(explode_at={4} if world.rank else (), world_size=world.size)
    sink = Kept()
    loop = make_loop(config(output), stage, world=world, sinks=[sink])
    loop.run(batches(0, world.rank, world.size))
    return sink.of("skipped_steps"), weights(loop)


def test_all_ranks_skip_a_step_that_overflows_on_one(tmp_path: Path) -> None:
    (first, first_weights), (second, second_weights) = on_ranks(2, train_rank, tmp_path)
    assert first == second == [0] * 3 + [1] * 7
    assert_equal(first_weights, second_weights)
    # Those of both ranks.
    uids = json.loads((tmp_path / "run" / "skipped-00000004.json").read_text())["uids"]
    assert uids == [f"{number:032x}" for number in range(3 * BATCH_SIZE, 4 * BATCH_SIZE)]


def test_a_bug_of_capfilt_keeps_its_traceback(tmp_path: Path) -> None:
    stage = SmallStage()
    stage.training_step = lambda batch, micro: torch.ones(2) @ torch.ones(3)
    with pytest.raises(RuntimeError, match="size") as fault:
        make_loop(config(tmp_path), stage).run(batches())
    assert not isinstance(fault.value, TrainingStopped)


def test_full_memory_names_the_key(tmp_path: Path) -> None:
    def full(batch: object, micro: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    stage = SmallStage()
    stage.training_step = full
    with pytest.raises(TrainingStopped, match=r"memory is full .*performance\.micro_batch_size"):
        make_loop(config(tmp_path), stage).run(batches())


def test_accumulation_gives_the_same_gradient(tmp_path: Path) -> None:
    def norms(micro: int) -> list[float]:
        stage = SmallStage().eval()
        stage.train = lambda mode=True: stage
        sink = Kept()
        settings = config(tmp_path / str(micro), performance={"micro_batch_size": micro})
        make_loop(settings, stage, sinks=[sink]).run(batches())
        return sink.of("gradient_norm")

    assert norms(1) == pytest.approx(norms(0), rel=1e-4)


def test_a_probe_reports_and_changes_nothing(tmp_path: Path) -> None:
    plain, probed = Kept(), Kept()
    make_loop(config(tmp_path / "a"), sinks=[plain]).run(batches())
    settings = config(tmp_path / "b", probe={"every_steps": 4})

    def probe() -> dict[str, float]:
        loop.stage.eval()
        return {"itm_accuracy": torch.rand(()).item()}

    loop = make_loop(settings, sinks=[probed], probe=probe)
    loop.run(batches())
    looks = [line for line in probed.lines if "probe_itm_accuracy" in line]
    assert [line["step"] for line in looks] == [4, 8]
    assert [line["loss"] for line in probed.lines if "loss" in line] == plain.of("loss")


def run_probed(
    output: Path, stop_after: int = -1, **sections: dict
) -> tuple[list[tuple[int, float | None]], list[int]]:
    """Return steps and CIDEr of the checkpoints of ten steps, and the steps of the probes; CIDEr falls from 4 on."""
    sink = Kept()
    loop = make_loop(config(output, **sections), sinks=[sink])
    loop.probe = lambda: {"cider": 10.0 - abs(loop.step - 4)}
    loop.stop_asked = lambda: loop.step == stop_after
    loop.run(batches())
    kept = [(record.step, record.metrics.get("probe_cider")) for record in loop.checkpoints.committed()]
    return kept, [line["step"] for line in sink.lines if "probe_cider" in line]


def test_the_checkpoint_before_a_collapse_stays(tmp_path: Path) -> None:
    often = {"every_steps": 2, "keep_last": 1}
    # Every checkpoint is probed, so the best of all stays.
    assert run_probed(tmp_path / "a", checkpoint=often | {"keep_best": "probe_cider"}) == (
        [(4, 10.0), (10, 4.0)],
        [2, 4, 6, 8, 10],
    )
    # Those that stay for good are probed too, beside the steps of the probe's own.
    kept, probed = run_probed(tmp_path / "b", checkpoint=often | {"keep_every": 4}, probe={"every_steps": 3})
    assert kept == [(4, 10.0), (8, 6.0), (10, None)] and probed == [3, 4, 6, 8, 9]
    assert run_probed(tmp_path / "c", checkpoint=often | {"keep_every": 4}) == (
        [(4, None), (8, None), (10, None)],
        [],
    )


def test_a_checkpoint_that_is_never_written_cannot_be_kept(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"must be a multiple of every_steps \(1000\)"):
        config(tmp_path, checkpoint={"every_steps": 1000, "keep_every": 1500})


def test_a_run_that_is_asked_to_stop_saves_without_a_probe(tmp_path: Path) -> None:
    checkpoint = {"every_steps": 2, "keep_last": 2, "keep_best": "probe_cider"}
    # Asked in the step behind the third one.
    kept, probed = run_probed(tmp_path, stop_after=3, checkpoint=checkpoint)
    assert kept == [(2, 8.0), (4, None)] and probed == [2]


def test_metrics_and_checkpoints_as_seldom_as_told(tmp_path: Path) -> None:
    sink = Kept()
    loop = make_loop(
        config(tmp_path, metrics={"every_steps": 4}, checkpoint={"every_steps": 100}), sinks=[sink]
    )
    loop.run(batches())
    assert sink.of("step") == [4, 8, 10]
    assert [record.step for record in loop.checkpoints.committed()] == [10]


def test_a_finished_run_has_nothing_to_do(tmp_path: Path) -> None:
    loop = make_loop(config(tmp_path))
    loop.run(batches())
    again = make_loop(config(tmp_path))
    record = again.checkpoints.newest_good(print)
    again.resume(again.checkpoints.read(record), record)
    assert again.run(iter(())).step == 10
    assert len(again.checkpoints.committed()) == 2


# -- metrics -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "local" else request.getfixturevalue("s3_root")


def test_json_lines_hold_each_step_once(folder: str) -> None:
    storage = Storage(folder)
    lines = JsonLines(storage, after_step=0)
    for step in range(1, 8):
        lines.write(step, {"loss": 1.0 / step, "mfu": None, "lr": math.inf})
    lines.close()
    storage.write(FILE, storage.read(FILE) + b'{"step": 8, "lo')
    lines = JsonLines(storage, after_step=5)
    for step in range(6, 10):
        lines.write(step, {"loss": 2.0})
    lines.flush()
    rows = [json.loads(line) for line in storage.read(FILE).decode().splitlines()]
    assert [line["step"] for line in rows] == list(range(1, 10))
    assert rows[0] == {"step": 1, "loss": 1.0, "mfu": None, "lr": None}
    assert rows[6]["loss"] == 2.0
    lines.close()


def test_tensorboard_gets_every_value(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import RecordWriter  # noqa: F401 (its format is TFRecord)

    from training.trainer.metrics import TensorBoard

    board = TensorBoard(str(tmp_path))
    board.write(3, {"loss": 0.5, "mfu": None})
    board.close()
    (file,) = tmp_path.glob("events.*")
    data, values = file.read_bytes(), {}
    while data:
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        values |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
        data = data[16 + size :]
    assert values == {(3, "loss"): 0.5}


def test_wandb_offline_takes_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from training.trainer.metrics import Wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    board = Wandb("capfilt-test", "small", "abc123", {"run": {"name": "small"}}, str(tmp_path))
    board.write(1, {"loss": 0.5, "mfu": None})
    board.close()
    assert list(tmp_path.glob("wandb/offline-run-*-abc123/*.wandb"))


@pytest.mark.parametrize(
    ("key", "value", "library"), [("tensorboard", True, "tensorboardX"), ("wandb_project", "mine", "wandb")]
)
def test_a_missing_library_is_named(
    monkeypatch: pytest.MonkeyPatch, key: str, value: object, library: str
) -> None:
    wanted = MetricsConfig.model_validate({key: value})
    require_libraries(wanted)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        CapfiltError, match=rf"metrics\.{key}: {library} is not installed: pip install {library}"
    ):
        require_libraries(wanted)
    require_libraries(MetricsConfig())


def uncounted() -> float:
    """Take the place of a count of operations, which a device without a known peak rate has no use for."""
    raise AssertionError


def test_rates_count_samples_and_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 102.0, 102.0])
    monkeypatch.setattr("training.trainer.metrics.time.perf_counter", lambda: next(clock))
    speed = Throughput(World(), uncounted)
    speed.add(30, 0.5)
    speed.add(30, 0.5)
    report = speed.report()
    assert (report["samples_per_s"], report["data_wait_share"], report["mfu"]) == (30.0, 0.5, None)


def report_of_rank(world: World) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Return a report of ten seconds, two steps in which rank 0 waits one second for data and rank 1 four."""
    clock = iter([100.0, 110.0, 112.0, 113.0, 114.0, 115.0, 115.0])
    time.perf_counter = lambda: next(clock)
    seconds = StepSeconds(world.device)
    speed = Throughput(world, uncounted, seconds)
    seconds.start()
    seconds.done("losses")
    seconds.done("sum")
    seconds.done("losses")
    speed.add(30, 0.0)
    speed.add(30, (1.5, 6.0)[world.rank])
    return speed.report(), speed.of_ranks


def test_the_rank_that_waits_longest_for_data_is_reported_and_each_ranks_parts() -> None:
    (first, of_ranks), (second, as_second) = on_ranks(2, report_of_rank)
    assert first["data_wait_share"] == second["data_wait_share"] == 0.4
    assert first["peak_memory_gb"] == second["peak_memory_gb"] > 0
    memory = of_ranks.pop("peak_memory_gb")
    assert max(memory) == pytest.approx(first["peak_memory_gb"], abs=1e-4) and len(memory) == 2
    # Seconds of a step: the mean over two.
    assert of_ranks == {
        "data_s": [0.75, 3.0],
        "losses_s": [1.5, 1.5],
        "ahead_s": [0, 0],
        "sum_s": [0.5, 0.5],
        "update_s": [0, 0],
    }
    assert as_second["data_s"] == of_ranks["data_s"]


# -- kills ---------------------------------------------------------------------------------------------------


def train(folder: Path, steps: int) -> None:
    """Train from the newest checkpoint to the last step."""
    loop = make_loop(config(folder, optim={"steps": steps}, checkpoint={"every_steps": 20}))
    if record := loop.checkpoints.newest_good(print):
        loop.resume(loop.checkpoints.read(record), record)
    loop.sinks = [JsonLines(loop.checkpoints.storage, after_step=loop.step)]
    loop.checkpoints.remove_unfinished()
    loop.run(batches(loop.samples))


def train_on_a_full_disk(_: World, folder: Path, asynchronous: bool) -> str:
    """Train, no file longer than 100 bytes from step 7 on; return what stopped it."""
    loop = make_loop(config(folder, checkpoint={"every_steps": 5, "asynchronous": asynchronous}))

    def fill_disk() -> bool:
        if loop.step == 7:
            loop.checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        return False

    loop.stop_asked = fill_disk
    with pytest.raises(TrainingStopped) as stopped:
        loop.run(batches())
    return str(stopped.value)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_stops_in_words_and_keeps_the_checkpoint(tmp_path: Path, asynchronous: bool) -> None:
    [stopped] = on_ranks(1, train_on_a_full_disk, tmp_path, asynchronous)
    (kept,) = make_loop(config(tmp_path)).checkpoints.committed()
    assert kept.step == 5
    assert f"cannot write to {tmp_path}/run (File too large" in stopped
    assert f"The last checkpoint is {tmp_path}/run/{kept.path}. Then run the same command" in stopped


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = (folder / "run" / FILE).read_text().splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]


@pytest.mark.slow
def test_kill_minus_nine_costs_only_time(tmp_path: Path) -> None:
    steps = 900
    whole = make_loop(config(tmp_path / "whole", optim={"steps": steps}, checkpoint={"every_steps": 20}))
    whole.sinks = [JsonLines(whole.checkpoints.storage, after_step=0)]
    whole.run(batches())
    kills = 0
    for wait_s in (0.2, 0.4, 0.6):
        process = start(train, tmp_path / "killed", steps)
        metrics = tmp_path / "killed" / "run" / FILE
        while not metrics.exists() or metrics.stat().st_size < 100:
            time.sleep(0.05)
        time.sleep(wait_s)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert kills >= 2
    train(tmp_path / "killed", steps)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    ends = []
    for name in ("whole", "killed"):
        checkpoints = make_loop(config(tmp_path / name)).checkpoints
        ends.append(checkpoints.read(checkpoints.committed()[-1]))
        folders = {path.name for path in (tmp_path / name / "run").iterdir() if path.is_dir()}
        assert folders == {record.path for record in checkpoints.committed()}
    assert_equal(ends[0].model, ends[1].model)
    assert_equal(ends[0].optimizer, ends[1].optimizer)
