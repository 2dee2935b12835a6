"""A capfilt command as a job on a Ray cluster, through Ray's Jobs API.

What travels is a working directory: the capfilt packages and the resolved config. Lists, corpus and weights must
be where every node can reach them (shared folders, S3, the hub).
"""

import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.cluster.job_environment import (
    CONFIG_NAME,
    Config,
    make_working_directory,
    require_pinned_weights,
    runtime_environment,
)
from jobs.cluster.jobs_api import jobs_client, require_closed, show_log
from pipeline.config import dump_config, load_config
from pipeline.digests import digest_json
from pipeline.storage.storage import Storage
from schemas.config import CapfiltConfig
from schemas.errors import CapfiltError
from schemas.pretrain import PretrainConfig
from schemas.stages import STAGES

_COMMANDS = ("run", *STAGES, "pretrain", "verify", "doctor")
_AGENT_WAIT_S = 60.0


def load_job(config_path: str, overrides: Sequence[str], arguments: Sequence[str]) -> Config:
    """Return the config of ``capfilt ARGUMENTS``. Raises CapfiltError for what cannot run as a job."""
    if not arguments or arguments[0] not in _COMMANDS:
        raise CapfiltError(
            f"submit -- {' '.join(arguments)}: the command must be one of {', '.join(_COMMANDS)}"
        )
    if {"-c", "--config"} & set(arguments):
        raise CapfiltError("submit: give the config before --, as capfilt submit -c FILE -- COMMAND")
    if arguments[0] == "pretrain":
        return load_config(config_path, overrides, PretrainConfig)
    config = load_config(config_path, overrides, CapfiltConfig)
    require_pinned_weights(config, STAGES if arguments[0] in ("run", "doctor") else (arguments[0],))
    return config


def submit_job(
    config: Config,
    arguments: Sequence[str],
    address: str,
    headers: Sequence[str],
    *,
    allow_open: bool,
    follow: bool,
) -> int:
    """Submit ``capfilt ARGUMENTS`` for a config; follow its log and return its exit code.

    The submission id is made from the config and the arguments: while such a job is pending or running, a
    second submission attaches to it; after its end, the same command runs again under the next number, and
    does only what is missing. Raises CapfiltError for a cluster that refuses us, or that refuses nobody.
    """
    if isinstance(config, CapfiltConfig):
        Storage(config.corpus.path).require_place("corpus.path")
    client = jobs_client(address, headers)
    if not allow_open:
        require_closed(client)
    job_id, attached = _start(client, config, list(arguments))
    print(f"{'attached to' if attached else 'submitted'} {job_id}", file=sys.stderr)
    return show_log(client, job_id, follow=True) if follow else 0


def submission_id(config: Config, arguments: Sequence[str]) -> str:
    """Return the id of a submission: equal configs and arguments give equal ids."""
    digest = digest_json({"config": dump_config(config), "arguments": list(arguments)})
    return f"capfilt-{arguments[0]}-{digest[:16]}"


def job_of(
    config: Config, arguments: Sequence[str], job_id: str, folder: Path, *, to_show: bool = False
) -> dict[str, Any]:
    """Return what is sent to the Jobs API; ``folder`` holds the working directory. ``to_show``: without secrets."""
    corpus = config.data.corpus[0].path if isinstance(config, PretrainConfig) else config.corpus.path
    cluster = config.cluster
    return {
        "entrypoint": entrypoint(arguments, CONFIG_NAME),
        "submission_id": job_id,
        "runtime_env": runtime_environment(config, folder, to_show=to_show),
        "metadata": {"corpus": corpus},
        "entrypoint_num_cpus": cluster.driver_cpus or None,
        "entrypoint_memory": int(cluster.driver_memory_gb * 1e9) or None,
    }


def entrypoint(arguments: Sequence[str], config_file: str) -> str:
    """Return the command that a job runs."""
    return shlex.join(["python", "-m", "jobs.cli", arguments[0], "-c", config_file, *arguments[1:]])


def _start(client: Any, config: Config, arguments: list[str]) -> tuple[str, bool]:
    """Return the job's id, and whether it was there already."""
    base = submission_id(config, arguments)
    jobs: Mapping[str, Any] = {
        job.submission_id: job for job in client.list_jobs() if (job.submission_id or "").startswith(base)
    }
    for name, job in jobs.items():
        if not job.status.is_terminal():
            return name, True
    job_id = base if not jobs else f"{base}-{len(jobs) + 1}"
    with tempfile.TemporaryDirectory(prefix="capfilt-submit-") as folder:
        job = job_of(config, arguments, job_id, Path(folder))
        make_working_directory(config, Path(folder), job_id)
        deadline = time.monotonic() + _AGENT_WAIT_S
        while True:
            try:
                client.submit_job(**job)
                return job_id, False
            except RuntimeError as error:
                # The same job was submitted since the jobs were listed: attach to it.
                if "already exists" in str(error):
                    return job_id, True
                # A head node answers before the agent that starts jobs is up.
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise CapfiltError(f"the cluster refused the job: {error}") from error
                time.sleep(1)
