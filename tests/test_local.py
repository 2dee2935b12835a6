"""``capfilt run --local``: the corpus of a run on Ray and S3, made in one process that may be stopped and killed."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from jobs.bench.fixtures.s3 import S3Server
from pipeline.corpus.records import Records
from pipeline.manifest.manifest import Manifest
from pipeline.storage.storage import Storage
from schemas.config import CapfiltConfig
from tests.processes import ROOT, cli, cli_here, descendants, meanwhile, start_cli
from tests.ranks import start
from tests.runs import committed_uids, config_file, do_run, small_config, with_values
from tests.tiny_models import save_matcher

pytestmark = pytest.mark.ray

STAGES = ("crawl", "caption", "rank", "filter", "select")


@pytest.fixture(scope="module")
def on_ray(base_url: str, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> CapfiltConfig:
    """A corpus on S3 of six small shards that Ray has made, its captions chosen by CLIP and by the filter."""
    folder = tmp_path_factory.mktemp("on-ray")
    urlopen(Request(f"{s3_server.url}/on-ray", method="PUT")).close()
    config = small_config("s3://on-ray/corpus", folder / "urls.parquet", base_url, 36, 6)
    matcher = save_matcher(folder / "matcher")
    config = CapfiltConfig.model_validate(config.model_dump() | {"filter": {"model": str(matcher)}})
    config = with_values(config, select={"by": "both"})
    done = cli("run", "-c", str(config_file(config, folder / "c.json")))
    assert done.returncode == 0, done.stderr
    return config


def local_config(on_ray: CapfiltConfig, folder: Path) -> tuple[CapfiltConfig, str]:
    config = with_values(on_ray, corpus={"path": str(folder / "corpus")})
    return config, str(config_file(config, folder / "c.json"))


def assert_same(config: CapfiltConfig, on_ray: CapfiltConfig) -> None:
    """Compare every file that a stage commits, byte for byte, and the crawl's rows, which hold seconds, by uid."""
    assert output_digests(config) == output_digests(on_ray)
    assert committed_uids(config.corpus.path, "crawl") == committed_uids(on_ray.corpus.path, "crawl")


def output_digests(config: CapfiltConfig) -> dict[tuple[str, str, str, str], str]:
    return {
        (*shard, name): file.sha256
        for shard, record in Records(Storage(config.corpus.path)).shards().items()
        for name, file in record.outputs.items()
        if (shard[0], name) != ("crawl", "parquet")
    }


def test_a_local_run_gives_the_corpus_of_ray_and_does_not_import_it(
    on_ray: CapfiltConfig, tmp_path: Path
) -> None:
    config, file = local_config(on_ray, tmp_path)
    code = (
        "import capfilt, json, sys; result = capfilt.Corpus.run(sys.argv[1], local=True); "
        "print(json.dumps([result.exit_code, result.summary['shards_done'], 'ray' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code, file], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [0, 30, False]
    assert_same(config, on_ray)
    # What holds in the files holds in SQL and for verify, on local disk and on S3.
    counts = []
    for corpus in (config.corpus.path, on_ray.corpus.path):
        verified = cli_here("verify", corpus)
        assert verified.returncode == 0, verified.stdout + verified.stderr
        counts += Manifest(Storage(corpus)).query("SELECT count(*) FROM curated").rows
    assert counts[0] == counts[1] > (0,)


def test_two_runs_at_once_make_one_corpus(on_ray: CapfiltConfig, tmp_path: Path) -> None:
    config, _ = local_config(on_ray, tmp_path)
    records = Records(Storage(config.corpus.path))
    other = start(do_run, config)
    while not records.shards() and other.is_alive():
        time.sleep(0.01)
    assert do_run(config).exit_code == 0
    other.join()
    assert other.exitcode == 0
    done = [run.shards_done for run in records.runs()]
    assert min(done) > 0 and sum(done) == 30
    assert_same(config, on_ray)


def test_a_stage_runs_locally_by_itself(on_ray: CapfiltConfig, tmp_path: Path) -> None:
    config, file = local_config(on_ray, tmp_path)
    crawl = cli_here("crawl", "-c", file, "--local", "--limit", "2", "--json")
    assert crawl.returncode == 0, crawl.stderr
    told = json.loads(crawl.stdout)
    assert (told["outcome"], told["shards_done"]) == ("done", 2)
    for stage in STAGES[1:]:
        result = do_run(config, command=stage, stages=(stage,))
        assert (result.exit_code, result.record.command, result.record.shards_done) == (0, stage, 2)
    assert {shard for _, _, shard in Records(Storage(config.corpus.path)).shards()} == {"00000", "00001"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_stops_it_and_the_same_command_goes_on(
    number: signal.Signals, on_ray: CapfiltConfig, tmp_path: Path
) -> None:
    config, file = local_config(on_ray, tmp_path)
    records = Records(Storage(config.corpus.path))

    def stop() -> None:
        deadline = time.monotonic() + 120
        while not records.shards(("caption",)) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    with meanwhile(stop):
        stopped = cli_here("run", "-c", file, "--local")
    assert stopped.returncode == 128 + number, stopped.stderr
    assert "the same command goes on" in stopped.stdout and "Traceback" not in stopped.stderr
    [ended] = records.runs()
    assert (ended.outcome, ended.shards_done) == ("interrupted", len(records.shards()))
    assert 0 < ended.shards_done < 30
    again = do_run(config)
    assert (again.exit_code, again.record.shards_done) == (0, 30 - ended.shards_done)
    assert_same(config, on_ray)


class SlowSite(ThreadingHTTPServer):
    """Answers every request with 404, after half a second."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), SlowHandler)
        self.requests = 0


class SlowHandler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.requests += 1
        time.sleep(0.5)
        self.send_error(404)

    def log_message(self, *arguments: object) -> None:
        pass


def test_a_signal_does_not_wait_for_the_urls_that_are_not_fetched_yet(tmp_path: Path) -> None:
    with SlowSite() as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        base_url = f"http://127.0.0.1:{site.server_port}"
        (tmp_path / "urls.csv").write_text(
            "url,caption\n" + "".join(f"{base_url}/{number}.jpg,a cat\n" for number in range(300))
        )
        config = small_config(str(tmp_path / "corpus"), tmp_path / "unused.parquet", base_url, per_shard=300)
        source = config.source[0].model_copy(update={"input": (str(tmp_path / "urls.csv"),)})
        config = with_values(config, crawl={"threads": 2}).model_copy(update={"source": (source,)})
        run = start_cli("crawl", "-c", str(config_file(config, tmp_path / "c.json")), "--local")
        while site.requests < 5 and run.poll() is None:
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        output, errors = run.communicate(timeout=30)  # the rest of the URLs would take over a minute
        site.shutdown()
    assert run.returncode == 130 and "the same command goes on" in output, output + errors
    assert Records(Storage(config.corpus.path)).shards() == {}


def test_kill_9_leaves_no_trace(on_ray: CapfiltConfig, tmp_path: Path) -> None:
    config, _ = local_config(on_ray, tmp_path)
    records, chance = Records(Storage(config.corpus.path)), random.Random(4)
    for shards in (1, 8, 16):
        run = start(do_run, config)
        while run.is_alive() and len(records.shards()) < shards:
            time.sleep(0.02)
        time.sleep(chance.uniform(0.0, 0.5))
        assert run.is_alive()
        assert descendants(run.pid) == [], "it works in one process"
        run.kill()
        run.join()
    assert do_run(config).exit_code == 0
    assert_same(config, on_ray)
