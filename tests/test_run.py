"""The main job on real HTTP and the demo's weights: chained, repeated, changed, damaged."""

import contextlib
import io
import json
import math
import re
import shutil
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import ray
import torch
from safetensors.torch import load_file, save_file

import jobs.cluster.executor
import jobs.run
from jobs.cli.commands.plan import plan_corpus
from jobs.cli.summary import result_json, result_lines
from jobs.cluster.verify import reading_on_ray
from jobs.demo.world.site import serving
from jobs.executor import StageJob
from pipeline.corpus.records import Records
from pipeline.intake.read_lists import read_lists
from pipeline.intake.url_shard_writer import IntakeOutcome
from pipeline.manifest.manifest import Manifest
from pipeline.manifest.verify.corpus import verify
from pipeline.runs.limits import RunLimits
from pipeline.runs.metrics import METRICS, STORAGE_AWAY
from pipeline.shards.shard_reader import committed_table
from pipeline.storage.storage import Storage
from schemas.config import CapfiltConfig
from schemas.errors import CapfiltError
from schemas.stages import Stage
from tests.corpora import make_corpus, ranked_corpus
from tests.runs import committed_uids, curated_files, do_run, small_config, with_values

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def local_ray() -> Iterator[int]:
    """A Ray with a GPU in name alone; yields the port of its metrics."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init(
        address="local",
        num_cpus=6,
        num_gpus=1,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=128 << 20,
        _metrics_export_port=port,
        _system_config={"metrics_report_interval_ms": 500},
    )
    yield port
    ray.shutdown()


@pytest.fixture(scope="module")
def done(base_url: str, tmp_path_factory: pytest.TempPathFactory) -> CapfiltConfig:
    """A corpus of four small shards, built by one run in this process. Tests must not change it."""
    folder = tmp_path_factory.mktemp("done")
    config = small_config(str(folder / "corpus"), folder / "urls.parquet", base_url)
    result = do_run(config)
    assert result.exit_code == 0, result
    return config


def test_every_url_has_one_row_and_every_image_eleven_scores(done: CapfiltConfig) -> None:
    records = Records(Storage(done.corpus.path))
    samples = candidates = 0
    for (stage, _, _), record in records.shards().items():
        rows = committed_table(records, record.outputs["parquet"]).to_pylist()
        match stage:
            case "crawl":
                samples += sum(row["input_rows"] for row in rows)
                assert all((row["reason"] is None) == (row["status"] == "ok") for row in rows)
            case "caption":
                assert len(rows) == 10 * record.images
            case "rank":
                candidates += len(rows)
                assert len(rows) == 11 * record.images
                assert all(-1 <= row["score"] <= 1 for row in rows)
            case "select":
                assert all(row["status"] == "dropped" or 1 <= len(row["captions"]) <= 2 for row in rows)
    assert samples == 40 and candidates > 200


def test_second_run_does_nothing_and_reads_each_record_once(
    done: CapfiltConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Records(Storage(done.corpus.path)).shards()
    reads: Counter[str] = Counter()
    read = Storage.read

    def counted(storage: Storage, path: str, max_bytes: int | None = None) -> bytes:
        reads[path] += 1
        return read(storage, path, max_bytes)

    monkeypatch.setattr(Storage, "read", counted)
    result = do_run(done)
    assert (result.exit_code, result.record.shards_done) == (0, 0)
    records = [f"records/{'/'.join(shard)}.json" for shard in before]
    assert {path: reads[path] for path in records} == dict.fromkeys(records, 1)
    assert Records(Storage(done.corpus.path)).shards() == before


def test_a_run_whose_lists_another_has_just_read_does_what_that_one_has_not(
    done: CapfiltConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_values(done, corpus={"path": str(tmp_path / "corpus")})

    def read_second(*arguments: Any) -> list[IntakeOutcome]:
        read_lists(*arguments)
        return read_lists(*arguments)

    monkeypatch.setattr("jobs.run.read_lists", read_second)
    result = do_run(config, stages=("crawl",), limit=2)
    assert (result.exit_code, result.record.shards_done) == (0, 2)


def overlapping(corpus: str, stage: Stage) -> int:
    """Return how many shards of a stage began before the one before them had ended."""
    records = Records(Storage(corpus)).shards((stage,)).values()
    times = sorted((record.started_at, record.finished_at) for record in records)
    return sum(later_began < ended for (_, ended), (later_began, _) in pairwise(times))


@pytest.fixture(scope="module")
def on_ray(
    local_ray: int, done: CapfiltConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[CapfiltConfig, list[dict]]:
    """The same corpus stage by stage on Ray, its ranker two workers of 0.2 GPU; and the JSON lines of its log."""
    rankers = {"cpus": 0.5, "gpus": 0.2, "max_workers": 2, "min_workers": 2}
    config = with_values(
        done,
        corpus={"path": str(tmp_path_factory.mktemp("on-ray"))},
        caption={"batch_size": 3},
        cluster={"rank": rankers, "log_format": "json", "prices": {"cpu": 1.0}},
    )
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        for stage in ("crawl", "caption", "rank", "select"):
            assert do_run(config, local=False, command=stage, stages=(stage,)).exit_code == 0
    return config, [json.loads(line) for line in said.getvalue().splitlines() if line.startswith("{")]


def test_every_event_of_a_shard_is_found_by_its_name(on_ray: tuple[CapfiltConfig, list[dict]]) -> None:
    config, lines = on_ray
    of_shard = [line for line in lines if line.get("shard") == "00002"]
    records = Records(Storage(config.corpus.path)).shards()
    assert {(line["stage"], line["event"]) for line in of_shard} == {
        (stage, event) for stage in ("crawl", "caption", "rank", "select") for event in ("start", "commit")
    }
    assert len(of_shard) == 8
    for line in of_shard:
        record = records[line["stage"], line["source"], "00002"]
        assert (line["run_id"], line["attempt"], line["node"]) == (record.run_id, 1, record.host)
        assert line["level"] == "info" and line["time"] >= record.started_at[:10]
    assert {line["event"] for line in lines} >= {"message", "progress"}


def scraped(port: int, corpus: str) -> dict[str, Counter]:
    """Return a corpus's values of capfilt's metrics by name, and by stage and the metric's own label."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    sums: dict[str, Counter] = {}
    for name, labels, value in re.findall(r"^ray_(capfilt_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        label = dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', labels))
        if name == STORAGE_AWAY:
            assert value == "0.0"
            continue
        own = tuple(label[key] for key in METRICS[name].labels)
        if label["corpus"] == corpus:
            sums.setdefault(name, Counter())[label["stage"], *own] += float(value)
    return sums


def sums_of_records(corpus: str) -> dict[str, Counter]:
    """Return the same sums over the records, in SQL where it has them."""
    sums: dict[str, Counter] = {name: Counter() for name in METRICS if "storage" not in name}
    with Manifest(Storage(corpus)).open() as query:
        for row in query.rows("SELECT * FROM outcomes WHERE kind = 'status'"):
            sums["capfilt_rows_total"][row["stage"], row["status"], row["reason"] or ""] += row["rows"]
        for row in query.rows("SELECT * FROM progress WHERE stage <> 'urls'"):
            sums["capfilt_shards_total"][row["stage"], "committed"] += row["shards"]
            sums["capfilt_images_total"][row["stage"],] += row["images"]
            sums["capfilt_written_bytes_total"][row["stage"],] += row["bytes"]
        for row in query.rows("SELECT * FROM costs"):
            sums["capfilt_worker_seconds_total"][row["stage"], "committed"] += 3600 * row["worker_hours"]
            sums["capfilt_gpu_seconds_total"][row["stage"], "committed"] += 3600 * row["gpu_hours"]
    for (stage, _, _), record in Records(Storage(corpus)).shards().items():
        for part in record.seconds.keys() - {"total", "worker"}:
            sums["capfilt_part_seconds_total"][stage, part] += record.seconds[part]
    return sums


def test_the_scraped_metrics_are_the_records_sums(
    local_ray: int, on_ray: tuple[CapfiltConfig, list[dict]]
) -> None:
    config, _ = on_ray
    expected = sums_of_records(config.corpus.path)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = scraped(local_ray, config.corpus.path)
        if found.get("capfilt_shards_total") == expected["capfilt_shards_total"]:
            break
        time.sleep(0.5)
    for name, sums in expected.items():
        wanted = {series: value for series, value in sums.items() if value}
        assert found.get(name, {}) == pytest.approx(wanted, rel=1e-6), name
    assert expected["capfilt_rows_total"]["crawl", "failed", "http_4xx"] > 0
    # The record and the note of each attempt, which is deleted after it.
    calls = found["capfilt_storage_calls_total"]
    assert (calls["select", "create"], calls["select", "delete"]) == (8, 4)


def test_a_worker_of_a_fifth_of_a_gpu_costs_a_fifth(on_ray: tuple[CapfiltConfig, list[dict]]) -> None:
    config, _ = on_ray
    with Manifest(Storage(config.corpus.path)).open() as query:
        costs = {row["stage"]: row for row in query.rows("SELECT * FROM costs")}
    assert costs["rank"]["gpu_hours"] == pytest.approx(0.2 * costs["rank"]["worker_hours"])
    assert costs["rank"]["cpu_hours"] == pytest.approx(0.5 * costs["rank"]["worker_hours"])
    assert costs["caption"]["gpu_hours"] == 0
    assert costs["caption"]["cost"] == pytest.approx(costs["caption"]["cpu_hours"])


def test_a_limit_of_gpu_hours_stops_within_a_shard_a_worker(
    on_ray: tuple[CapfiltConfig, list[dict]], tmp_path: Path
) -> None:
    config, _ = on_ray
    copied = shutil.copytree(config.corpus.path, tmp_path / "corpus")
    for stage in ("rank", "select"):
        shutil.rmtree(copied / "records" / stage)
    one_worker = {"cpus": 0.5, "gpus": 0.2}
    config = with_values(config, corpus={"path": str(copied)}, cluster={"rank": one_worker})
    stopped = do_run(config, local=False, stages=("rank",), limits=RunLimits(gpu_hours=1e-9))
    # A ranker has two shards at once, but not before it is known what one takes.
    assert stopped.record.shards_done == 1
    assert (stopped.exit_code, stopped.record.outcome) == (3, "partial")
    assert stopped.note == "3 shards were left: the run's limit is reached"
    records = Records(Storage(config.corpus.path)).shards(("rank",))
    assert len(records) == stopped.record.shards_done
    gpu_hours = 0.2 * sum(record.seconds["worker"] for record in records.values()) / 3600
    assert stopped.totals.gpu_hours == pytest.approx(gpu_hours)
    assert any(line.endswith(f"; {gpu_hours:,.3g} GPU-hours") for line in result_lines(stopped, "c.toml"))


def test_a_run_in_this_process_begins_no_shard_after_its_hours(done: CapfiltConfig, tmp_path: Path) -> None:
    copied = shutil.copytree(done.corpus.path, tmp_path / "corpus")
    shutil.rmtree(copied / "records" / "select")
    config = with_values(done, corpus={"path": str(copied)})
    stopped = do_run(config, limits=RunLimits(hours=0.0))
    assert (stopped.exit_code, stopped.record.shards_done) == (3, 0)
    assert "the same command goes on where this one stopped" in list(result_lines(stopped, "c.toml"))
    finished = do_run(config, limits=RunLimits(hours=1.0))
    assert (finished.exit_code, finished.record.shards_done) == (0, 4)


def test_stage_by_stage_on_ray_with_overlapping_shards_equals_one_run(
    on_ray: tuple[CapfiltConfig, list[dict]], done: CapfiltConfig
) -> None:
    """One after the other, so that a stage finds all of its shards ready: two of them in an actor, or two actors."""
    config, _ = on_ray
    # Of a crawl or a selection an actor takes one shard at a time, of captions two.
    assert overlapping(config.corpus.path, "caption") > 0
    assert overlapping(config.corpus.path, "crawl") == overlapping(config.corpus.path, "select") == 0
    # The run in this process had one shard at a time.
    assert overlapping(done.corpus.path, "caption") == 0
    assert curated_files(config.corpus.path) == curated_files(done.corpus.path)
    assert len(curated_files(done.corpus.path)) == 8


class BreaksAfter:
    """A dataset whose execution breaks, as when a node dies, once so many rows came out of it."""

    def __init__(self, dataset: ray.data.Dataset, rows: int) -> None:
        self.dataset, self.rows = dataset, rows

    def iter_batches(self, **options: Any) -> Iterator[Any]:
        yield from islice(self.dataset.iter_batches(**options), self.rows)
        raise ray.exceptions.RayError("as if its node had died")


def test_after_a_broken_execution_only_what_is_left_is_passed_on(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken at 90% done, at most 12% of the rows go through the stages once more."""
    shards, passed_on = 20, []
    corpus = ranked_corpus(str(tmp_path / "corpus"), shards)
    build = jobs.cluster.executor.build_dataset

    def breaking_once(job: StageJob, counter: ray.actor.ActorHandle) -> Any:
        passed_on.append(len(job.shards))
        dataset = build(job, counter)
        return BreaksAfter(dataset, shards * 9 // 10) if len(passed_on) == 1 else dataset

    monkeypatch.setattr(jobs.cluster.executor, "build_dataset", breaking_once)
    result = do_run(corpus.config, local=False, command="select", stages=("select",))
    assert (result.exit_code, result.record.shards_done) == (0, shards)
    assert passed_on[0] == shards and sum(passed_on[1:]) <= 0.12 * shards, passed_on


def test_verification_on_ray_finds_what_this_process_finds(local_ray: None, tmp_path: Path) -> None:
    corpus = make_corpus(str(tmp_path / "corpus"), sources=("cc", "laion"), shards=12)
    storage, urls = corpus.storage, corpus.records.url_shards()
    storage.delete(corpus.records.read("rank", "cc", "00003").outputs["parquet"].path)
    first, last = (urls["cc", shard].outputs["parquet"].path for shard in ("00001", "00011"))
    storage.write(last, storage.read(first))
    corpus.manifest.compact()
    here = verify(corpus.manifest)
    assert len(here.differences) > 2 and here.shards == 24
    with reading_on_ray("local") as read:
        assert verify(corpus.manifest, read=read) == here


def test_stage_without_its_input_is_refused(done: CapfiltConfig, tmp_path: Path) -> None:
    config = with_values(done, corpus={"path": str(tmp_path)})
    do_run(config, command="crawl", stages=("crawl",), limit=1)
    with pytest.raises(CapfiltError, match="no shard is ready for rank"):
        do_run(config, stages=("rank",))


def test_changed_selection_is_stale_until_recomputed(base_url: str, tmp_path: Path) -> None:
    config = small_config(str(tmp_path / "corpus"), tmp_path / "urls.parquet", base_url, num_urls=20)
    assert do_run(config).exit_code == 0
    single_caption = with_values(config, select={"top_k": 1})
    with pytest.raises(
        CapfiltError, match=r"2 committed shards are stale .*: select\.top_k 2 -> 1\. .*--recompute"
    ):
        do_run(single_caption)
    result = do_run(single_caption, recompute=True)
    assert (result.exit_code, result.record.shards_done) == (0, 2)
    records = Records(Storage(config.corpus.path))
    for record in records.shards(("select",)).values():
        rows = committed_table(records, record.outputs["parquet"]).to_pylist()
        assert all(len(row["captions"]) <= 1 for row in rows if row["status"] == "kept")
    assert {(record.stage, record.shard) for record in records.retired()} == {
        ("select", "00000"),
        ("select", "00001"),
    }
    nothing = do_run(with_values(config, select={"min_score": 1.0}), recompute=True)
    told = list(result_lines(nothing, "c.toml"))
    assert nothing.exit_code == 3 and "images is kept" in told[-2]
    example = re.search(r'sql \S+ "(SELECT .*)"$', told[-1])
    assert example and {row["reason"] for row in Manifest(records.storage).query(example[1]).dicts()} == {
        "below_min_score"
    }


def test_staleness_names_what_has_changed(done: CapfiltConfig, tmp_path: Path) -> None:
    def because(**sections: dict) -> dict[str, int]:
        return plan_corpus(with_values(done, **sections))["stale_because"]

    assert because() == {}
    assert because(select={"top_k": 3, "min_score": 0.1}) == {
        "select.top_k 2 -> 3": 4,
        "select.min_score None -> 0.1": 4,
    }
    assert because(corpus={"seed": 7}) == {"corpus.seed 0 -> 7": 4}
    assert because(crawl={"threads": 3}) == {}, "a key that changes no output"
    ranker = Path(shutil.copytree(done.rank.model.removeprefix("local-dir:"), tmp_path / "ranker"))
    weights = load_file(ranker / "open_clip_model.safetensors")
    weights["ln_final.weight"] = weights["ln_final.weight"] * 2
    save_file(weights, ranker / "open_clip_model.safetensors")
    [reason] = because(rank={"model": f"local-dir:{ranker}"})
    assert re.fullmatch(r"rank\.model: weights local-dir:.* \([0-9a-f]{12}\) -> [0-9a-f]{12}", reason)


def test_made_anew_inputs_and_sources_that_left_are_named(done: CapfiltConfig, tmp_path: Path) -> None:
    corpus = shutil.copytree(done.corpus.path, tmp_path / "corpus")
    record = corpus / "records" / "caption" / "world" / "00002.json"
    values = json.loads(record.read_text())
    values["outputs"]["parquet"]["sha256"] = (
        "0" * 64
    )  # as a recomputation that was killed before rank leaves it
    record.write_text(json.dumps(values))
    there = with_values(done, corpus={"path": str(corpus)})
    assert plan_corpus(there)["stale_because"] == {"rank: the files of caption were made again since": 1}
    record.unlink()  # as one whose files are damaged
    gone = "rank: made of the caption stage's files, which have no record now"
    assert plan_corpus(there)["stale_because"] == {gone: 1}
    other = there.model_copy(update={"source": (there.source[0].model_copy(update={"name": "another"}),)})
    planned = plan_corpus(other)
    assert planned["left_config"] == {"world": 4} and planned["stale_because"] == {}
    assert plan_corpus(other, only_named=True)["left_config"] == {}


def test_damaged_shard_is_quarantined_and_the_rest_goes_on(base_url: str, tmp_path: Path) -> None:
    config = small_config(str(tmp_path / "corpus"), tmp_path / "urls.parquet", base_url, num_urls=20)
    do_run(config, command="crawl", stages=("crawl",))
    records = Records(Storage(config.corpus.path))
    victim = records.shards(("crawl",))["crawl", "world", "00000"].outputs["tar"]
    path = Path(records.storage.url(victim.path))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 1024 * 512])
    result = do_run(config)
    assert result.exit_code == 3
    assert list(result.quarantined) == ["caption world/00000"]
    assert victim.path in result.quarantined["caption world/00000"]
    assert {shard for _, _, shard in records.shards(("select",))} == {"00001"}
    path.write_bytes(whole)
    assert do_run(config).exit_code == 0
    assert records.quarantined() == {}


@pytest.mark.parametrize("local", [True, False], ids=["local", "ray"])
def test_weights_that_differ_on_a_worker_end_the_run(
    local: bool, local_ray: None, base_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(str(tmp_path / "corpus"), tmp_path / "urls.parquet", base_url, num_urls=10)
    digests_of = jobs.run.digests_of
    # As if the folder, or the hub's main branch, had changed since the driver looked.
    monkeypatch.setattr(
        jobs.run, "digests_of", lambda weights: {**digests_of(weights), "caption": ("0" * 64,)}
    )
    assert do_run(config, stages=("crawl",)).exit_code == 0
    with pytest.raises(CapfiltError, match="other weights for caption than the driver"):
        do_run(config, local=local, stages=("caption",))
    records = Records(Storage(config.corpus.path))
    assert records.shards(("caption",)) == {} == records.quarantined()
    # Of runs that start in one second the order is by chance.
    assert {run.outcome for run in records.runs()} == {"done", "error"}


def test_a_model_that_is_not_finite_curates_nothing(base_url: str, tmp_path: Path) -> None:
    config = small_config(str(tmp_path / "corpus"), tmp_path / "urls.parquet", base_url, num_urls=20)
    ranker = Path(shutil.copytree(config.rank.model.removeprefix("local-dir:"), tmp_path / "ranker"))
    file = ranker / "open_clip_model.safetensors"
    sound = load_file(file)

    def with_text_norm(value: float) -> CapfiltConfig:
        changed = torch.full(sound["ln_final.weight"].shape, value)
        save_file(sound | {"ln_final.weight": changed}, file)
        return with_values(config, rank={"model": f"local-dir:{ranker}"})

    with pytest.raises(
        CapfiltError, match=r"rank\.model = .*1 of \d+ tensors hold values that are not finite"
    ):
        do_run(with_text_norm(math.nan))
    records = Records(Storage(config.corpus.path))
    assert records.shards(("rank", "select")) == {} == records.quarantined()
    # Finite weights, and an embedding whose length overflows: no try can do better, so there is one.
    result = do_run(with_text_norm(1e30))
    assert result.exit_code == 3
    assert list(result.quarantined) == ["rank world/00000", "rank world/00001"]
    assert all("the scores of rank.model" in error for error in result.quarantined.values())
    assert [record.attempts for record in records.quarantined().values()] == [1, 1]
    assert records.shards(("rank", "select")) == {}


def test_sigterm_in_the_last_compaction_ends_the_run_in_order(
    base_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(str(tmp_path / "corpus"), tmp_path / "urls.parquet", base_url, num_urls=10)
    compact, asked = Manifest.compact, []

    def interrupted_once(manifest: Manifest) -> int:
        if Records(manifest.storage).runs()[0].outcome == "done" and not asked:
            asked.append(True)
            signal.raise_signal(signal.SIGTERM)
        return compact(manifest)

    monkeypatch.setattr(Manifest, "compact", interrupted_once)
    result = do_run(config)
    assert asked and result.exit_code == 143
    records = Records(Storage(config.corpus.path))
    [ended] = records.runs()
    assert (ended.outcome, ended.shards_done) == ("interrupted", 4) and len(records.shards()) == 4
    assert do_run(config).exit_code == 0


def test_new_urls_become_further_shards(base_url: str, tmp_path: Path) -> None:
    urls = tmp_path / "urls.parquet"
    config = small_config(str(tmp_path / "corpus"), urls, base_url, num_urls=20)
    do_run(config)
    before = curated_files(config.corpus.path)
    urls.unlink()
    small_config("unused", urls, base_url, num_urls=35)
    result = do_run(config)
    assert result.exit_code == 0
    after = curated_files(config.corpus.path)
    assert before.items() <= after.items() and len(after) > len(before)
    assert len(set(committed_uids(config.corpus.path))) == len(committed_uids(config.corpus.path))


def test_retry_crawls_only_what_may_succeed_now(tmp_path: Path) -> None:
    urls = tmp_path / "urls.parquet"
    with serving(flaky=False) as base_url:
        config = small_config(str(tmp_path / "corpus"), urls, base_url, num_urls=10)
        config = with_values(config, crawl={"max_attempts": 1, "timeout_s": 2.0})
    # The site is down: everything fails to connect, which may be otherwise later.
    nothing = do_run(config, command="crawl", stages=("crawl",))
    assert (nothing.exit_code, nothing.record.outcome) == (3, "done")
    told = result_json(nothing, "c.toml")
    assert (told["images"], told["urls"]) == (0, 10) and told["lost"]["connect"] >= 5
    assert "none of 10 URLs gave an image" in told["warning"]
    assert (
        "for the reason connect" in told["warning"] and "crawl -c c.toml --retry transient" in told["warning"]
    )
    records = Records(Storage(config.corpus.path))
    first = records.shards(("crawl",))
    assert [record.rows_out for record in first.values()] == [0]
    port = int(base_url.rpartition(":")[2])
    with serving(port, flaky=False):
        result = do_run(config, command="crawl", stages=("crawl",), retry="transient")
        assert result.exit_code == 0
    second = records.shards(("crawl",))
    assert second["crawl", "world", "00000"] == first["crawl", "world", "00000"]
    assert second["crawl", "world", "00001"].rows_out >= 5
    with serving(port, flaky=False):
        left = do_run(config, command="crawl", stages=("crawl",), retry="transient")
    assert left.record.shards_done <= 1
