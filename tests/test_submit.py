"""What is sent to a cluster: the job's environment, its manifest for Kubernetes, and what is refused before."""

import gzip
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from jobs.cluster.actors import placement
from jobs.cluster.job_environment import pinned_requirements, runtime_environment
from jobs.cluster.jobs_api import parse_headers, require_closed
from jobs.cluster.kubernetes import rayjob
from jobs.cluster.submit import load_job, submission_id
from schemas.config import CapfiltConfig, StageResources
from schemas.errors import CapfiltError
from tests.processes import cli_here
from tests.runs import small_config, with_values

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "jobs" / "recipes"
COMMIT = "0" * 40
# Names and types of a RayJob, version v1, as KubeRay's operator publishes them.
RAYJOB_SCHEMA = json.loads(gzip.decompress((ROOT / "tests" / "kuberay" / "rayjob_v1.json.gz").read_bytes()))
CORPORA = {"blip2": "caption", "laion-coco": "caption", "blip-capfilt": "filter"}
TRAININGS = sorted(RECIPES.glob("blip*-*vit*.toml"))


@pytest.fixture(scope="module")
def is_rayjob() -> Callable[[Any], None]:
    """Return what raises for anything but a RayJob."""
    return jsonschema.Draft202012Validator(without_unknown_keys(RAYJOB_SCHEMA)).validate


@pytest.fixture
def config(tmp_path: Path) -> CapfiltConfig:
    return small_config(str(tmp_path / "corpus"), tmp_path / "urls.parquet", "http://127.0.0.1:1", 8, 4)


def without_unknown_keys(schema: Any) -> Any:
    """Return the schema with unknown keys refused; Kubernetes would drop them in silence."""
    if isinstance(schema, list):
        return [without_unknown_keys(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: without_unknown_keys(value) for key, value in schema.items()}
    return closed | ({"additionalProperties": False} if "properties" in schema and "type" in schema else {})


def printed(recipe: str, command: str, *settings: str, queue: str = "") -> list[dict[str, Any]]:
    words = [word for setting in settings for word in ("--set", setting)]
    queue_words = ["--queue", queue] if queue else []
    ended = cli_here(
        "submit",
        "-c",
        str(RECIPES / f"{recipe}.toml"),
        *words,
        "--print",
        "rayjob",
        *queue_words,
        "--",
        command,
    )
    assert ended.returncode == 0, ended.stderr
    return list(yaml.safe_load_all(ended.stdout))


# -- Kubernetes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", CORPORA)
def test_the_shipped_corpora_print_valid_rayjobs(recipe: str, is_rayjob: Callable[[Any], None]) -> None:
    config_map, job = printed(
        recipe,
        "run",
        "cluster.image='registry.example/capfilt:1'",
        "cluster.env=['AWS_SECRET_ACCESS_KEY']",
        f"caption.revision='{COMMIT}'",
        *([f"filter.revision='{COMMIT}'"] if CORPORA[recipe] == "filter" else []),
        queue="night",
    )
    is_rayjob(job)
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "night"}
    spec = job["spec"]
    assert spec["entrypoint"] == "python -m jobs.cli run -c /etc/capfilt/config.json"
    assert spec["shutdownAfterJobFinishes"] and spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    groups = {group["groupName"]: group for group in spec["rayClusterSpec"]["workerGroupSpecs"]}
    assert set(groups) == {"cpu", "gpu"}
    [container] = groups["gpu"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    [secret] = [entry for entry in container["env"] if "valueFrom" in entry]
    assert secret["name"] == secret["valueFrom"]["secretKeyRef"]["key"] == "AWS_SECRET_ACCESS_KEY"
    sent = CapfiltConfig.model_validate_json(config_map["data"]["config.json"])
    assert sent.caption.revision == COMMIT and config_map["metadata"]["name"] == job["metadata"]["name"]
    # All workers have room: what the pools ask for at most is what the pods have.
    pools = [sent.cluster.crawl, sent.cluster.caption, sent.cluster.rank, sent.cluster.select]
    pools += [sent.cluster.filter] if sent.filter else []
    wanted = sum(pool.gpus * pool.max_workers for pool in pools)
    assert wanted <= groups["gpu"]["maxReplicas"] < wanted + 1


def test_the_shipped_trainings_make_valid_rayjobs(is_rayjob: Callable[[Any], None]) -> None:
    settings = ["cluster.image='registry.example/capfilt:1'", "cluster.gpus=8"]
    for recipe in TRAININGS:
        _, job = rayjob(load_job(str(recipe), settings, ["pretrain"]), ["pretrain"])
        is_rayjob(job)
        [group] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        assert (group["minReplicas"], group["maxReplicas"]) == (8, 8)


def test_stages_of_other_labels_get_pods_of_their_own() -> None:
    _, job = printed(
        "blip2",
        "run",
        "cluster.image='registry.example/capfilt:1'",
        "cluster.crawl.labels={zone='outside'}",
        "cluster.crawl.memory_gb=9",
        f"caption.revision='{COMMIT}'",
    )
    groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    [outside] = [group for group in groups if "labels" in group]
    assert outside["labels"] == {"zone": "outside"} and outside["groupName"] == "cpu-0"
    # 32 workers of one CPU and 9 GB, sixteen a pod.
    assert (outside["maxReplicas"], outside["template"]["spec"]["containers"][0]["resources"]["limits"]) == (
        2,
        {"cpu": "16", "memory": "144G"},
    )


def test_a_rayjob_needs_an_image_and_a_training_its_gpus(config: CapfiltConfig) -> None:
    words = ["submit", "-c", str(RECIPES / "blip2-stage1-vitl.toml"), "--print", "rayjob", "--", "pretrain"]
    assert "cluster.image: name a container image" in cli_here(*words).stderr
    words[3:3] = ["--set", "cluster.image='x'", "--set", "cluster.gpus=0"]
    assert "cluster.gpus: say how many GPUs" in cli_here(*words).stderr


# -- the Jobs API ----------------------------------------------------------------------------------------------


def test_submission_id_follows_config_and_arguments(config: CapfiltConfig) -> None:
    ids = {
        submission_id(config, ["run"]),
        submission_id(config, ["crawl"]),
        submission_id(config, ["run", "--limit", "1"]),
        submission_id(with_values(config, select={"top_k": 1}), ["run"]),
    }
    assert len(ids) == 4 and submission_id(config, ["run"]) in ids
    assert all(job_id.startswith("capfilt-") for job_id in ids)


def test_pinned_requirements_are_those_of_the_constraints(config: CapfiltConfig, tmp_path: Path) -> None:
    installed = with_values(config, cluster={"requirements": "installed"})
    assert "pip" not in runtime_environment(installed, tmp_path)
    environment = runtime_environment(config, tmp_path)
    packages = environment["pip"]["packages"]
    assert packages == pinned_requirements() and environment["config"]["setup_timeout_seconds"] >= 3600
    constraints = dict(
        line.split(";")[0].strip().lower().replace("_", "-").split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    pins = dict(pin.lower().replace("_", "-").split("==") for pin in packages)
    # Each library at the version of the constraints, those that libraries bring along too; pip does not write down its
    # own tools.
    pins.pop("setuptools", None)
    assert {name: constraints.get(name) for name in pins} == pins
    assert {"torch", "ray", "tokenizers", "aiohttp", "urllib3"} <= pins.keys()
    eight_bits = with_values(config, rank={"precision": "fp8"})
    added = set(runtime_environment(eight_bits, tmp_path)["pip"]["packages"]) - set(packages)
    assert added == {f"torchao=={version('torchao')}"}


def test_chosen_variables_travel_and_are_never_printed(
    config: CapfiltConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUB_TOKEN_OF_TEST", "s3cret")
    named = with_values(config, cluster={"env": ["HUB_TOKEN_OF_TEST"], "requirements": "installed"})
    assert runtime_environment(named, tmp_path)["env_vars"]["HUB_TOKEN_OF_TEST"] == "s3cret"
    file = tmp_path / "corpus.json"
    file.write_text(named.model_dump_json())
    shown = cli_here("submit", "-c", str(file), "--print", "job", "--", "run")
    assert shown.returncode == 0, shown.stderr
    job = json.loads(shown.stdout)
    assert (
        "s3cret" not in shown.stdout
        and job["runtime_env"]["env_vars"]["HUB_TOKEN_OF_TEST"] == "$HUB_TOKEN_OF_TEST"
    )
    assert job["entrypoint"] == "python -m jobs.cli run -c config.json"
    monkeypatch.delenv("HUB_TOKEN_OF_TEST")
    with pytest.raises(CapfiltError, match=r"cluster\.env: HUB_TOKEN_OF_TEST is not set here"):
        runtime_environment(named, tmp_path)


def test_weights_that_can_move_are_refused_where_a_job_reads_them() -> None:
    for command in ("run", "caption"):
        with pytest.raises(CapfiltError, match=r"caption\.revision = 'main' of Salesforce/"):
            load_job(str(RECIPES / "laion-coco.toml"), [], [command])
    assert load_job(str(RECIPES / "laion-coco.toml"), [], ["crawl"])
    assert load_job(str(RECIPES / "laion-coco.toml"), [f"caption.revision='{COMMIT}'"], ["run"])


@contextmanager
def answering(status: int, body: bytes) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Client:
    def __init__(self, address: str) -> None:
        self.address = address

    def get_address(self) -> str:
        return self.address


def test_a_cluster_that_refuses_nobody_is_refused() -> None:
    with answering(200, b"[]") as address, pytest.raises(CapfiltError, match="takes jobs from anybody"):
        require_closed(Client(address))
    with answering(401, b"token") as address:
        require_closed(Client(address))
    with answering(200, b"<html>log in</html>") as address:
        require_closed(Client(address))


def test_headers_are_names_and_values() -> None:
    assert parse_headers(["X-Token=a=b", "Cookie=c"]) == {"X-Token": "a=b", "Cookie": "c"}
    with pytest.raises(CapfiltError, match="--header: give NAME=VALUE"):
        parse_headers(["X-Token"])


def test_placement_says_what_ray_places_workers_by() -> None:
    assert placement(StageResources()) == {}
    pool = StageResources(memory_gb=1.5, labels={"zone": "in(a, b)"})
    assert placement(pool) == {"memory": 1_500_000_000, "label_selector": {"zone": "in(a, b)"}}


def test_the_sample_of_a_ray_cluster_is_one_by_rays_own_schema() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    sample = yaml.safe_load((ROOT / "docs" / "cluster" / "ray-cluster.yaml").read_text())
    jsonschema.validate(sample, without_unknown_keys(schema))
    assert sample["head_node_type"] in sample["available_node_types"]
    started = [*sample["head_start_ray_commands"], *sample["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in command for command in started if "ray start" in command)
