"""Training runs through the command line and on real models: exact resume, restarts, refusals, lineage."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.cli.main import main
from jobs.pretrain import TrainingFailedError, pretrain
from pipeline.digests import sha256_file
from pipeline.lineage.checkpoint_trace import trace_checkpoint
from pipeline.lineage.sample_trace import trace
from pipeline.manifest.manifest import Manifest
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError
from schemas.pretrain import PretrainConfig
from tests.corpora import make_corpus
from tests.processes import cli_here, descendants, kill, meanwhile, start_cli
from tests.ranks import start
from tests.tiny_training import tiny_config
from training.checkpoint import Checkpoints, State, read_model
from training.trainer.metrics import FILE

pytestmark = pytest.mark.training

Make = Callable[..., PretrainConfig]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a corpus of 36 curated images and, once a config asked for them, tiny models."""
    folder = tmp_path_factory.mktemp("made")
    make_corpus(str(folder / "corpus"), shards=2, images=24)
    return folder


@pytest.fixture
def make(workspace: Path, tmp_path: Path) -> Make:
    """Return configs of runs that write below ``tmp_path``; the corpus is shared, and its manifest grows."""

    def tiny(**sections: dict[str, Any]) -> PretrainConfig:
        sections["run"] = {"output": str(tmp_path / "out")} | sections.get("run", {})
        stage = sections["run"].pop("stage", 1)
        corpus = sections.pop("corpus", workspace / "corpus")
        return tiny_config(workspace, corpus, stage, **sections)

    return tiny


def in_file(config: PretrainConfig, folder: Path) -> str:
    path = folder / f"{config.run.name}.json"
    path.write_text(json.dumps(config.model_dump(mode="json")))
    return str(path)


def folder_of(config: PretrainConfig) -> Path:
    return Path(config.run.output) / f"stage{config.run.stage}" / config.run.name


def metrics(config: PretrainConfig) -> list[dict]:
    return [json.loads(line) for line in (folder_of(config) / FILE).read_text().splitlines()]


def losses(config: PretrainConfig) -> list[tuple]:
    names = ("step", "samples", "loss", "itc", "itm", "itg", "gradient_norm")
    return [tuple(line.get(name) for name in names) for line in metrics(config)]


def last_state(config: PretrainConfig) -> State:
    return read_model(str(folder_of(config)))[1]


def assert_equal(state: State, other: State) -> None:
    assert state.progress.samples == other.progress.samples
    for part in ("model", "optimizer"):
        tensors, others = getattr(state, part), getattr(other, part)
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[name], others[name]) for name in tensors)


def wait_for_steps(config: PretrainConfig, steps: int, process: subprocess.Popen | None = None) -> None:
    path = folder_of(config) / FILE
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < steps:
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def pretrain_meanwhile(
    config: PretrainConfig, folder: Path, act: Callable[[], None]
) -> subprocess.CompletedProcess:
    """Run the command in this process, and a function in a thread beside it."""
    with meanwhile(act):
        return cli_here("pretrain", "-c", in_file(config, folder), "--json")


@pytest.fixture(scope="module")
def whole_of_two(workspace: Path) -> PretrainConfig:
    """Return a run of two ranks that nothing disturbed: 30 steps, a checkpoint each 5."""
    config = tiny_config(
        workspace,
        workspace / "corpus",
        run={"name": "whole", "output": str(workspace / "whole-of-two")},
        optim={"steps": 30},
        checkpoint={"every_steps": 5},
        cluster={"cpu_ranks": 2},
    )
    pretrain(config)
    return config


def like(whole: PretrainConfig, tmp_path: Path, name: str, **cluster: Any) -> PretrainConfig:
    """Return the same run under another name and folder."""
    run = whole.run.model_copy(update={"name": name, "output": str(tmp_path / "out")})
    return whole.model_copy(update={"run": run, "cluster": whole.cluster.model_copy(update=cluster)})


# -- what a run leaves ---------------------------------------------------------------------------------------


def test_a_run_leaves_checkpoints_metrics_and_rows(make: Make, workspace: Path) -> None:
    config = make(run={"name": "whole"}, probe={"every_steps": 4, "images": 4}, data={"held_out": 8})
    summary = pretrain(config)
    assert (summary.outcome, summary.step, summary.samples) == ("done", 8, 64)
    steps = [line["step"] for line in metrics(config) if "loss" in line]
    assert steps == list(range(1, 9))
    assert {line["step"] for line in metrics(config) if "probe_itm_accuracy" in line} == {4, 8}
    resolved = json.loads((folder_of(config) / "config.json").read_text())
    assert (resolved["optim"]["min_lr"], resolved["optim"]["betas"]) == (0.0, [0.9, 0.98])
    manifest = Manifest(Storage(str(workspace / "corpus")))
    rows = manifest.query(
        f"SELECT * FROM checkpoints WHERE run_id = '{summary.run_id}' ORDER BY step"
    ).dicts()
    assert [row["step"] for row in rows] == [4, 8]
    record, state = read_model(str(folder_of(config)))
    assert rows[1]["path"] == str(folder_of(config) / record.path)
    assert rows[1]["snapshot"] == record.snapshot == state.progress.snapshot
    (run,) = manifest.query(f"SELECT command, outcome FROM runs WHERE run_id = '{summary.run_id}'").dicts()
    assert run == {"command": "pretrain", "outcome": "done"}


def test_checkpoints_lie_in_the_corpus_unless_told(make: Make, tmp_path: Path) -> None:
    make_corpus(str(tmp_path / "corpus"))
    config = make(run={"output": ""}, corpus=tmp_path / "corpus")
    summary = pretrain(config)
    assert summary.folder == str(tmp_path / "corpus" / "checkpoints" / "stage1" / "tiny")
    manifest = Manifest(Storage(str(tmp_path / "corpus")))
    (path,) = manifest.query("SELECT path FROM checkpoints WHERE step = 8").rows[0]
    assert path == f"checkpoints/stage1/tiny/{summary.checkpoint}"


def test_a_checkpoint_is_traced_to_lists_runs_and_models(make: Make, workspace: Path) -> None:
    config = make(run={"name": "traced"})
    summary = pretrain(config)
    actual = trace_checkpoint(f"{summary.folder}/{summary.checkpoint}")
    assert actual["checkpoint"]["step"] == 8
    (source,) = actual["sources"]
    assert (source["source"], source["shards"], source["images"], source["urls"]) == ("cc", 2, 36, 48)
    assert {shard["tar"] for shard in actual["shards"]} == {"curated/cc/00000.tar", "curated/cc/00001.tar"}
    assert [row["stage"] for row in actual["stages"]][:5] == ["urls", "crawl", "caption", "rank", "select"]
    assert [model["kind"] for model in actual["models"]] == ["captioner", "ranker"]
    assert len(actual["runs"]) == 1
    loaded = {model["kind"]: model for model in actual["loaded"]}
    assert list(loaded) == ["vision", "tokenizer", "qformer"]
    assert loaded["qformer"]["name"] == config.qformer.weights and loaded["qformer"]["parameters"] > 0
    assert set(loaded["qformer"]["files"]) == {"config.json", "model.safetensors"}
    joined = Manifest(Storage(str(workspace / "corpus"))).query(
        "SELECT m.digest FROM checkpoints AS c, UNNEST(c.models) AS used (digest) JOIN models AS m USING (digest) "
        f"WHERE c.run_id = '{summary.run_id}' AND c.step = 8"
    )
    assert {digest for (digest,) in joined.rows} == {model["digest"] for model in actual["loaded"]}
    # From the image to the checkpoint it is the same, in the trace and in SQL.
    manifest, path = Manifest(Storage(str(workspace / "corpus"))), actual["checkpoint"]["path"]
    eaten = manifest.query(f"SELECT uid, shard FROM trained_on WHERE '{path}' LIKE '%' || checkpoint").rows
    assert len(eaten) == source["images"] and {shard for _, shard in eaten} == {"00000", "00001"}
    [traced] = trace(manifest, eaten[0][0])
    assert summary.checkpoint in {row["path"].rpartition("/")[2] for row in traced["checkpoints"]}
    printed = cli_here("trace", f"{summary.folder}/{summary.checkpoint}.json")
    assert printed.returncode == 0 and "curated/cc/00001.tar" in printed.stdout
    assert trace_checkpoint(summary.folder) == actual
    refused = cli_here("trace", f"{summary.folder}/step-00000001.000000000000")
    assert refused.returncode == 2 and "no checkpoint there" in refused.stderr
    with pytest.raises(CapfiltError, match="is a corpus: name one of its uids or URLs"):
        trace_checkpoint(str(workspace / "corpus"))


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_stage_2_goes_on_from_stage_1(make: Make, family: str) -> None:
    first = make(run={"name": "first"}, optim={"steps": 4})
    pretrain(first)
    second = make(
        run={"name": f"second-{family}", "stage": 2, "init_from": str(folder_of(first))},
        language={"family": family},
        optim={"steps": 4},
    )
    assert pretrain(second).step == 4
    assert all(line["loss"] > 0 for line in metrics(second))
    before, after = last_state(first).model, last_state(second).model
    assert f"{family}_proj.weight" in after and "itm_head.weight" not in after
    assert after.keys() - before.keys() == {f"{family}_proj.weight", f"{family}_proj.bias"}
    models = {model.kind: model for model in last_state(second).progress.models}
    assert list(models) == ["vision", "language", "qformer"]
    record, _ = read_model(str(folder_of(first)))
    assert models["qformer"].name == str(folder_of(first)) and models["qformer"].files == record.sha256
    assert models["language"].parameters == sum(
        tensor.numel() for tensor in load_file(Path(second.language.model) / "model.safetensors").values()
    )


@pytest.mark.slow
def test_a_language_model_spread_over_the_ranks_is_probed_by_all(make: Make) -> None:
    first = make(run={"name": "first"}, optim={"steps": 1})
    pretrain(first)
    config = make(
        run={"name": "spread", "stage": 2, "init_from": str(folder_of(first))},
        optim={"steps": 2},
        data={"held_out": 8},
        probe={"every_steps": 1, "images": 4},
        performance={"shard_language": True},
        cluster={"cpu_ranks": 2},
    )
    assert pretrain(config).step == 2
    assert [line["step"] for line in metrics(config) if "probe_cider" in line] == [1, 2]


def test_a_corpus_that_may_only_be_read_is_trained_on_without_rows(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus"
    make_corpus(str(corpus))
    (corpus / "records" / "runs").rename(corpus / "records" / "elsewhere")
    (corpus / "records" / "runs").write_text("no folder")
    config = make(run={"name": "reader"}, corpus=corpus)
    assert pretrain(config).outcome == "done"
    assert f"{corpus} takes no records" in capsys.readouterr().err
    assert not (corpus / "records" / "checkpoints").exists()


def test_a_run_on_s3_resumes_there(make: Make, s3_root: str) -> None:
    config = make(run={"name": "remote", "output": s3_root}, optim={"steps": 8})
    pretrain(config)
    folder = f"{s3_root}/stage1/remote"
    checkpoints = Checkpoints(folder)
    *_, last = checkpoints.committed()
    checkpoints.storage.delete(f"{last.path}.json")
    summary = pretrain(config)
    assert (summary.resumed_from, summary.step) == (4, 8)
    lines = checkpoints.storage.read(FILE).decode().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 9))


# -- resume --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_twenty_kill_twenty_is_forty(make: Make) -> None:
    settings = {"optim": {"steps": 40}, "checkpoint": {"every_steps": 10, "asynchronous": True}}
    whole, killed = make(run={"name": "whole"}, **settings), make(run={"name": "killed"}, **settings)
    process = start(pretrain, killed)
    wait_for_steps(killed, 23)
    # Written beside the next steps.
    while not any(folder_of(killed).glob("step-00000020.*.json")):
        assert process.is_alive()
        time.sleep(0.01)
    assert kill(process.pid)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    pretrain(whole)
    assert pretrain(killed).resumed_from in (20, 30)
    assert losses(killed) == losses(whole)
    assert len(losses(whole)) == 40
    assert_equal(last_state(killed), last_state(whole))


def test_asked_to_stop_it_makes_a_checkpoint_first(make: Make) -> None:
    config = make(run={"name": "asked"}, optim={"steps": 4000}, checkpoint={"every_steps": 4000})

    def ask() -> None:
        wait_for_steps(config, 5)
        os.kill(os.getpid(), signal.SIGTERM)

    with meanwhile(ask):
        assert pretrain(config).outcome == "interrupted"
    assert last_state(config).progress.step == len(losses(config)) >= 5


def test_after_its_hours_it_ends_with_a_checkpoint_and_the_same_command_goes_on(
    make: Make, tmp_path: Path
) -> None:
    config = make(run={"name": "hours"}, optim={"steps": 2})
    command = ("pretrain", "-c", in_file(config, tmp_path), "--json")
    ended = cli_here(*command, "--max-hours", "1e-9")
    assert (ended.returncode, json.loads(ended.stdout)["step"]) == (3, 1), ended.stderr
    done = cli_here(*command)
    summary = json.loads(done.stdout)
    assert (done.returncode, summary["resumed_from"], summary["step"]) == (0, 1, 2), done.stderr


def test_an_output_that_is_not_a_folder_is_one_line(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("/nowhere/at/all")
    for place, message in (
        ("file", "is a file"),
        ("file/below", "is a file"),
        ("link", "is a link to /nowhere"),
    ):
        with pytest.raises(CapfiltError, match=f"run\\.output .*{message}"):
            pretrain(make(run={"name": "x", "output": str(tmp_path / place)}))


@pytest.mark.slow
def test_control_c_reaches_all_processes_and_waits_for_the_step(make: Make, tmp_path: Path) -> None:
    config = make(
        run={"name": "control-c"},
        optim={"steps": 4000},
        checkpoint={"every_steps": 4000},
        cluster={"cpu_ranks": 2},
    )
    process = start_cli("pretrain", "-c", in_file(config, tmp_path))
    wait_for_steps(config, 5, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 130 and "the same command goes on" in output, errors
    assert last_state(config).progress.step == len(losses(config)) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_stops_after_the_step_and_a_second_one_at_once(
    make: Make, tmp_path: Path, ranks: int
) -> None:
    settings = {
        "optim": {"steps": 40_000},
        "checkpoint": {"every_steps": 40_000},
        "cluster": {"cpu_ranks": ranks},
    }
    config = make(run={"name": "asked"}, **settings)

    def ask_once() -> None:
        wait_for_steps(config, 3)
        os.kill(os.getpid(), signal.SIGTERM)

    ended = pretrain_meanwhile(config, tmp_path, ask_once)
    assert ended.returncode == 143 and json.loads(ended.stdout)["outcome"] == "interrupted", ended.stderr
    assert ended.stderr.count("SIGTERM: stopping") == 1 and "Traceback" not in ended.stderr
    step = last_state(config).progress.step

    def ask_twice() -> None:
        wait_for_steps(config, step + 3)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    ended = pretrain_meanwhile(config, tmp_path, ask_twice)
    assert ended.returncode == 143 and "Traceback" not in ended.stderr, ended.stderr
    assert last_state(config).progress.step >= step


@pytest.mark.slow
def test_sigterm_while_weights_are_read_ends_at_once_and_trains_nothing(make: Make, tmp_path: Path) -> None:
    config = make(run={"name": "early"}, optim={"steps": 40_000}, cluster={"cpu_ranks": 2})

    def ask() -> None:
        deadline = time.monotonic() + 60
        while len(_ranks(os.getpid())) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    ended = pretrain_meanwhile(config, tmp_path, ask)
    assert ended.returncode == 143, ended.stderr
    assert "SIGTERM: stopping" in ended.stderr and "Traceback" not in ended.stderr
    assert not (folder_of(config) / FILE).exists()


@pytest.mark.slow
def test_ranks_whose_parent_was_killed_stop_with_a_checkpoint(make: Make) -> None:
    config = make(
        run={"name": "orphans"},
        optim={"steps": 4000},
        checkpoint={"every_steps": 4000},
        cluster={"cpu_ranks": 2},
    )
    process = start(pretrain, config)
    wait_for_steps(config, 5)
    ranks = _ranks(process.pid)
    assert len(ranks) == 2 and kill(process.pid)
    process.join()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{rank}").exists() for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    assert last_state(config).progress.step == len(losses(config)) >= 5


def _take_back_to(config: PretrainConfig, step: int) -> None:
    """Undo a run's checkpoints after a step."""
    for record in Checkpoints(str(folder_of(config))).committed():
        if record.step > step:
            (folder_of(config) / f"{record.path}.json").unlink()


@pytest.mark.slow
def test_another_number_of_ranks_sees_the_same_samples(make: Make) -> None:
    settings = {"qformer": {"dropout": 0.0}, "run": {"name": "one"}}
    single = make(**settings)
    pretrain(single)
    two = make(**settings | {"run": {"name": "two"}}, cluster={"cpu_ranks": 2})
    pretrain(two)
    _take_back_to(two, 4)
    assert pretrain(two.model_copy(update={"cluster": single.cluster})).resumed_from == 4
    actual, expected = losses(two), losses(single)
    assert [row[:2] for row in actual] == [row[:2] for row in expected]
    for row, other in zip(actual, expected, strict=True):
        assert row[2:] == pytest.approx(other[2:], rel=2e-3)


def test_a_damaged_checkpoint_is_passed_over(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    config = make(run={"name": "damaged"})
    pretrain(config)
    before, newest = last_state(config), Checkpoints(str(folder_of(config))).committed()[-1]
    path = folder_of(config) / newest.path / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert pretrain(config).resumed_from == 4
    assert f"{path} has another sha256 than its record; taking the one before" in capsys.readouterr().err
    assert_equal(last_state(config), before)
    assert [line[0] for line in losses(config)] == list(range(1, 9))


def test_a_finished_run_is_left_as_it_is(make: Make) -> None:
    config = make(run={"name": "finished"})
    pretrain(config)
    files = {path: path.stat().st_mtime_ns for path in folder_of(config).rglob("*")}
    summary = pretrain(config)
    assert (summary.outcome, summary.step, summary.resumed_from) == ("done", 8, 8)
    assert {path: path.stat().st_mtime_ns for path in folder_of(config).rglob("*")} == files


def test_a_grown_corpus_does_not_change_a_run(make: Make, tmp_path: Path) -> None:
    whole = make(run={"name": "as-it-was"})
    pretrain(whole)
    corpus = make_corpus(str(tmp_path / "corpus"), shards=2, images=24)
    config = make(run={"name": "grown"}, corpus=tmp_path / "corpus")
    pretrain(config)
    _take_back_to(config, 4)
    corpus.add_urls("cc", ["00002"], 12, batch=1)
    corpus.make("cc", "00002")
    assert pretrain(config).resumed_from == 4
    assert losses(config) == losses(whole)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("optim", "peak_lr", 0.01), ("run", "seed", 8), ("data", "flip", False), ("qformer", "dropout", 0.2)],
)
def test_a_key_that_changes_what_is_learnt_is_refused(make: Make, section: str, key: str, value: Any) -> None:
    config = make(run={"name": "changed"})
    pretrain(config)
    changed = getattr(config, section).model_copy(update={key: value})
    with pytest.raises(
        CapfiltError, match=rf"began with another config \({section}\.{key}: .* -> {value!r}\)"
    ):
        pretrain(config.model_copy(update={section: changed}))


def test_a_frozen_model_that_changed_is_refused(make: Make, tmp_path: Path) -> None:
    """The same name may hold other weights: what is compared on resume is the files."""
    config = make(run={"name": "other-weights"})
    vision = tmp_path / "vision"
    shutil.copytree(config.vision.model.removeprefix("local-dir:"), vision)
    config = config.model_copy(
        update={"vision": config.vision.model_copy(update={"model": f"local-dir:{vision}"})}
    )
    pretrain(config)
    _take_back_to(config, 4)
    file = vision / "open_clip_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, file)
    before = sorted(folder_of(config).rglob("*"))
    with pytest.raises(
        CapfiltError, match=r"the vision files of .* began with \(open_clip_model\.safetensors\)"
    ):
        pretrain(config)
    assert sorted(folder_of(config).rglob("*")) == before
    save_file(tensors, file)
    assert pretrain(config).resumed_from == 4


def test_what_a_run_began_from_need_not_stay(make: Make, tmp_path: Path) -> None:
    config = make(run={"name": "begun"})
    bert = tmp_path / "bert"
    shutil.copytree(config.qformer.weights, bert)
    config = config.model_copy(update={"qformer": config.qformer.model_copy(update={"weights": str(bert)})})
    pretrain(config)
    began = last_state(config).progress.models
    _take_back_to(config, 4)
    shutil.rmtree(bert)
    assert pretrain(config).resumed_from == 4
    assert last_state(config).progress.models == began


def test_a_run_that_was_moved_goes_on(tmp_path: Path) -> None:
    """Corpus, models, checkpoints and the run that it began from lie elsewhere; their digests are as before."""
    before, after = tmp_path / "before", tmp_path / "after"
    make_corpus(str(before / "corpus"), shards=1, images=24)
    first, other = (
        tiny_config(
            before, before / "corpus", run={"name": name, "output": str(before / "out"), "seed": seed},
            optim={"steps": 1},
        )
        for seed, name in enumerate(("first", "other"))
    )  # fmt: skip
    pretrain(first)
    pretrain(other)
    run = {"name": "second", "output": str(before / "out"), "init_from": str(folder_of(first))}
    config = tiny_config(before, before / "corpus", 2, run=run)
    pretrain(config)
    whole = last_state(config)
    _take_back_to(config, 4)
    before.rename(after)
    moved = PretrainConfig.model_validate_json(config.model_dump_json().replace(str(before), str(after)))
    changed = moved.run.model_copy(update={"init_from": str(folder_of(other)).replace("before", "after")})
    with pytest.raises(
        CapfiltError, match="the qformer files of .*/other' are not those that run.name 'second'"
    ):
        pretrain(moved.model_copy(update={"run": changed}))
    assert pretrain(moved).resumed_from == 4
    assert_equal(last_state(moved), whole)


# What training.json and a checkpoint's record had in the first version that trained.
FIRST_CONFIG = {
    "checkpoint": ("asynchronous", "every_steps", "keep_last"),
    "cluster": ("address", "cpu_ranks", "cpus_per_gpu", "gpus", "max_restarts", "requirements"),
    "data": (
        "captions_per_image", "corpus", "flip", "held_out", "image_size_px", "max_words", "min_scale", "read_ahead",
        "shuffle_shards", "workers",
    ),
    "metrics": ("every_steps", "tensorboard", "wandb_project"),
    "objective": ("itc", "itg", "itm", "label_smoothing", "temperature"),
    "optim": (
        "batch_size", "betas", "clip_norm", "eps", "min_lr", "peak_lr", "preset", "steps", "warmup_lr", "warmup_steps",
        "weight_decay",
    ),
    "performance": ("compile", "micro_batch_size", "precision", "shard_language"),
    "probe": ("every_steps", "images"),
    "qformer": (
        "cross_attention_every", "dropout", "ffn_width", "heads", "initializer_range", "layers", "max_positions",
        "max_text_tokens", "num_queries", "projection_width", "tokenizer", "vocab_size", "weights", "width",
    ),
    "run": ("init_from", "name", "output", "seed", "stage"),
    "vision": ("drop_blocks", "model", "pretrained"),
}  # fmt: skip
FIRST_PROGRESS = ("config", "models", "samples", "snapshot", "step", "world_size")


def test_a_checkpoint_of_the_first_version_goes_on(make: Make) -> None:
    config = make(run={"name": "older"}, optim={"steps": 8})
    pretrain(config)
    whole = last_state(config)
    _take_back_to(config, 4)
    [record] = folder_of(config).glob("step-00000004.*.json")
    path = record.with_suffix("") / "training.json"
    progress = {name: json.loads(path.read_bytes())[name] for name in FIRST_PROGRESS}
    values = progress["config"]
    progress["config"] = {
        section: {name: values[section][name] for name in names} for section, names in FIRST_CONFIG.items()
    } | {"language": None}
    for corpus in progress["config"]["data"]["corpus"]:
        del corpus["captions"]
    path.write_text(json.dumps(progress))
    written = json.loads(record.read_bytes())
    written["sha256"]["training.json"] = sha256_file(path)
    record.write_text(json.dumps(written))
    assert pretrain(config).resumed_from == 4
    assert_equal(last_state(config), whole)


def test_keys_of_speed_may_change(make: Make) -> None:
    config = make(run={"name": "faster"}, optim={"steps": 8})
    pretrain(config)
    _take_back_to(config, 4)
    changed = make(run={"name": "faster"}, performance={"micro_batch_size": 4}, checkpoint={"keep_last": 1})
    assert pretrain(changed).resumed_from == 4
    assert [record.step for record in Checkpoints(str(folder_of(config))).committed()] == [8]


# -- ranks that die ------------------------------------------------------------------------------------------


def _ranks(pid: int) -> list[int]:
    """Return the processes of the ranks, which a server forks, in the order of their start."""
    servers = _commands(pid, "forkserver")
    return [child for server in servers for child in servers if _parent(child) == server]


def _commands(pid: int, text: str) -> list[int]:
    """Return the processes below another whose command line has a text, in the order of their start."""
    actual = []
    for child in sorted(descendants(pid)):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if text in Path(f"/proc/{child}/cmdline").read_text():
                actual.append(child)
    return actual


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


@pytest.mark.slow
def test_a_dead_rank_restarts_all_from_the_checkpoint(whole_of_two: PretrainConfig, tmp_path: Path) -> None:
    config = like(whole_of_two, tmp_path, "restarted")

    def kill_one() -> None:
        wait_for_steps(config, 7)
        assert kill(_ranks(os.getpid())[1])

    done = pretrain_meanwhile(config, tmp_path, kill_one)
    assert done.returncode == 0, done.stderr
    assert "restart 1 of 3, from the last checkpoint" in done.stderr
    assert json.loads(done.stdout)["step"] == 30
    assert losses(config) == losses(whole_of_two)
    assert_equal(last_state(config), last_state(whole_of_two))


@pytest.mark.slow
def test_without_restarts_a_dead_rank_ends_the_run_in_words(make: Make, tmp_path: Path) -> None:
    cluster = {"cpu_ranks": 2, "max_restarts": 0}
    config = make(run={"name": "dead"}, optim={"steps": 400}, checkpoint={"every_steps": 5}, cluster=cluster)
    ranks: list[int] = []

    def kill_one() -> None:
        wait_for_steps(config, 12)
        ranks.extend(_ranks(os.getpid()))
        assert kill(ranks[1])

    ended = pretrain_meanwhile(config, tmp_path, kill_one)
    assert ended.returncode == 1
    assert "another rank has died" in ended.stderr or "rank 1 was killed (SIGKILL)" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert last_state(config).progress.step >= 5
    assert not Path(f"/proc/{ranks[0]}").exists()


@pytest.mark.slow
def test_ray_train_does_the_same_and_survives_a_killed_worker(
    whole_of_two: PretrainConfig, tmp_path: Path
) -> None:
    """And a signal to the command reaches the ranks: they save after their step. Without Ray it goes on."""
    config = like(whole_of_two, tmp_path, "ray", address="local")
    process = start_cli("pretrain", "-c", in_file(config, tmp_path), "--json")
    wait_for_steps(config, 7, process)
    assert kill(_commands(process.pid, "ray::RayTrainWorker")[-1])
    wait_for_steps(config, 12, process)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 143, errors
    assert "resuming after step" in errors
    summary = json.loads(output)
    assert summary["outcome"] == "interrupted" and summary["step"] == len(losses(config)) >= 12
    assert summary["resumed_from"] >= 5
    here = config.model_copy(update={"cluster": whole_of_two.cluster})
    assert pretrain(here).resumed_from == summary["step"]
    assert losses(config) == losses(whole_of_two)
    assert_equal(last_state(config), last_state(whole_of_two))


@pytest.mark.slow
def test_a_refusal_of_the_ranks_is_the_users_message(make: Make) -> None:
    config = make(run={"name": "few"}, optim={"batch_size": 1}, cluster={"cpu_ranks": 2})
    with pytest.raises(CapfiltError, match=r"optim\.batch_size.*2 ranks"):
        pretrain(config)
    assert not folder_of(config).exists()


def test_numbers_that_are_none_stop_with_the_step_and_the_checkpoint(make: Make) -> None:
    optim = {"steps": 30, "peak_lr": 1e20, "warmup_steps": 3, "warmup_lr": 0.0, "eps": 1e-30}
    config = make(run={"name": "wild"}, optim=optim, checkpoint={"every_steps": 1, "asynchronous": True})
    with pytest.raises(TrainingFailedError) as failed:
        pretrain(config)
    line = str(failed.value)
    kept = Checkpoints(str(folder_of(config))).committed()[-1]
    assert f"step {kept.step + 1}: " in line and (" is nan" in line or " is inf" in line)
    assert f"{folder_of(config)}/{kept.path}" in line
    read_model(str(folder_of(config)))


# -- refusals ------------------------------------------------------------------------------------------------


def _broken_shard(corpus: Path) -> None:
    path = corpus / "curated" / "cc" / "00000.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision": {"model": "local-dir:/nowhere/clip"}}, "/nowhere/clip"),
        ({"qformer": {"weights": "/nowhere/bert"}}, "qformer.weights"),
        ({"qformer": {"layers": 6}}, "qformer.weights"),
        ({"data": {"corpus": [{"path": "/nowhere/corpus"}]}}, "/nowhere/corpus"),
        ({"run": {"init_from": "/nowhere/run"}}, "/nowhere/run: no checkpoint there"),
        ({"run": {"init_from": "other"}}, "lacks|shape|missing|no checkpoint of this stage 1 model"),
        ({"run": {"stage": 2}}, "run.init_from: not set; stage 2 begins from a stage 1"),
        (
            {"probe": {"every_steps": 4}},
            "probe.every_steps: there are no images for the probe; set data.held_out",
        ),
        (
            {"checkpoint": {"keep_best": "probe_cider"}},
            "checkpoint.keep_best: there are no images for the probe; set data.held_out",
        ),
        ({"cluster": {"gpus": 64}}, "cluster.gpus = 64, and this machine has"),
        ({"run": {"output": "/proc/capfilt"}}, "run.output: cannot write to /proc/capfilt/stage1/"),
        ({"corpus": "broken"}, "00000.tar"),
        ({"corpus": "empty"}, "has no curated shards"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_one_line_and_nothing_is_written(
    make: Make,
    tmp_path: Path,
    change: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if change.get("run", {}).get("init_from") == "other":
        other = make(
            run={"name": "other", "output": str(tmp_path / "before")}, qformer={"projection_width": 8}
        )
        pretrain(other)
        change = {"run": {"init_from": str(folder_of(other))}}
    if kind := change.get("corpus"):
        corpus = tmp_path / "corpus"
        make_corpus(
            str(corpus), stages=("crawl",) if kind == "empty" else ("crawl", "caption", "rank", "select")
        )
        if kind == "broken":
            _broken_shard(corpus)
        change = {"corpus": corpus}
    config = make(
        **{name: dict(value) if isinstance(value, dict) else value for name, value in change.items()}
    )
    roots = [Path(slice_.path) for slice_ in config.data.corpus]
    before = {path: path.stat().st_mtime_ns for root in roots for path in root.rglob("*") if path.is_file()}
    monkeypatch.setattr(sys, "argv", ["capfilt", "pretrain", "-c", in_file(config, tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    errors = capsys.readouterr().err
    assert ended.value.code == 2, errors
    (line,) = [line for line in errors.splitlines() if line.startswith("capfilt: ")]
    assert any(part in line for part in message.split("|")), line
    assert "Traceback" not in errors
    assert not Path(config.run.output).exists()
    after = {path: path.stat().st_mtime_ns for root in roots for path in root.rglob("*") if path.is_file()}
    assert after == before
