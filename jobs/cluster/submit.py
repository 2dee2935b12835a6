"""A capfilt command as a job on a Ray cluster, through Ray's Jobs API.

What travels is a working directory: the capfilt packages and the resolved config. Lists, corpus and weights must
be where every node can reach them (shared folders, S3, the hub).
"""

import asyncio
import json
import logging
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from jobs.environment import WORKER_ENVIRONMENT, send_token_if_there_is_one
from pipeline.config import dump_config, load_config
from pipeline.digests import digest_json
from pipeline.storage.storage import Storage
from schemas.config import CapfiltConfig
from schemas.errors import CapfiltError
from schemas.pretrain import PretrainConfig
from schemas.stages import STAGES

_COMMANDS = ("run", *STAGES, "pretrain")
_PACKAGES = ("pipeline", "training", "jobs", "schemas")
_DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_CONFIG_NAME = "config.json"
_AGENT_WAIT_S = 60.0

Config = CapfiltConfig | PretrainConfig


def submit_job(
    config_path: str, overrides: Sequence[str], arguments: Sequence[str], address: str, follow: bool
) -> int:
    """Submit ``capfilt ARGUMENTS`` for a config; follow its log and return its exit code.

    The submission id is made from the config and the arguments: while such a job is pending or running, a
    second submission attaches to it; after its end, the same command runs again under the next number, and
    does only what is missing. Raises CapfiltError for a command that cannot be submitted or a cluster that
    refuses us.
    """
    if not arguments or arguments[0] not in _COMMANDS:
        raise CapfiltError(
            f"submit -- {' '.join(arguments)}: the command must be one of {', '.join(_COMMANDS)}"
        )
    if {"-c", "--config"} & set(arguments):
        raise CapfiltError("submit: give the config before --, as capfilt submit -c FILE -- COMMAND")
    config: CapfiltConfig | PretrainConfig
    if arguments[0] == "pretrain":
        config = load_config(config_path, overrides, PretrainConfig)
    else:
        config = load_config(config_path, overrides, CapfiltConfig)
        Storage(config.corpus.path).require_place("corpus.path")
    client = _client(address or os.environ.get("RAY_API_SERVER_ADDRESS", "") or _DEFAULT_ADDRESS)
    job_id, attached = _start(client, config, list(arguments))
    print(f"{'attached to' if attached else 'submitted'} {job_id}", file=sys.stderr)
    if not follow:
        return 0
    try:
        return asyncio.run(_follow(client, job_id))
    except KeyboardInterrupt:
        print(f"{job_id} goes on; submit the same again to follow it", file=sys.stderr)
        return 130


def submission_id(config: Config, arguments: Sequence[str]) -> str:
    """Return the id of a submission: equal configs and arguments give equal ids."""
    digest = digest_json({"config": dump_config(config), "arguments": list(arguments)})
    return f"capfilt-{arguments[0]}-{digest[:16]}"


def pinned_requirements(extras: Collection[str] = ()) -> list[str]:
    """Return capfilt's direct requirements, and those of some extras, at the versions installed here."""
    pins = []
    for requirement in requires("capfilt") or []:
        extra = re.search(r"extra == ['\"](\w+)", requirement)
        if extra and extra[1] not in extras:
            continue
        name = re.match(r"[A-Za-z0-9_.-]+(\[[^]]*\])?", requirement)
        assert name is not None, requirement
        try:
            pins.append(f"{name[0]}=={version(re.sub(r'[[].*', '', name[0]))}")
        except PackageNotFoundError as error:
            raise CapfiltError(f"{name[0]} is not installed here, so its version cannot be pinned") from error
    return pins


def runtime_environment(config: Config, folder: Path) -> dict[str, Any]:
    """Return the job's Ray runtime environment: the working directory and, unless installed there, the pins."""
    environment: dict[str, Any] = {
        "working_dir": str(folder),
        "env_vars": WORKER_ENVIRONMENT,
    }
    if config.cluster.requirements == "pinned":
        stages = () if isinstance(config, PretrainConfig) else (config.caption, config.rank)
        extras = {"fp8"} & {stage.precision for stage in stages}
        environment["pip"] = {"packages": pinned_requirements(extras), "pip_check": False}
    return environment


def make_working_directory(config: Config, folder: Path) -> None:
    """Copy the packages and the resolved config into ``folder``."""
    root = Path(__file__).resolve().parent.parent.parent
    for package in _PACKAGES:
        shutil.copytree(
            root / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
        )
    (folder / _CONFIG_NAME).write_text(json.dumps(dump_config(config), indent=1))


def _corpus(config: Config) -> str:
    return config.data.corpus[0].path if isinstance(config, PretrainConfig) else config.corpus.path


def _client(address: str) -> Any:
    send_token_if_there_is_one()
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    # Its progress lines (uploads, closed sockets) are not the job's.
    logging.getLogger("ray.dashboard").setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise CapfiltError(
            f"--address {address}: the cluster refused us: {str(error).splitlines()[0]}; put its token into "
            "RAY_AUTH_TOKEN, or into a file that RAY_AUTH_TOKEN_PATH names"
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise CapfiltError(f"--address {address}: the Jobs API did not answer: {error}") from error


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
        make_working_directory(config, Path(folder))
        job = {
            "entrypoint": shlex.join(
                ["python", "-m", "jobs.cli", arguments[0], "-c", _CONFIG_NAME, *arguments[1:]]
            ),
            "submission_id": job_id,
            "runtime_env": runtime_environment(config, Path(folder)),
            "metadata": {"corpus": _corpus(config)},
        }
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


async def _follow(client: Any, job_id: str) -> int:
    """Print the job's log as it grows; return the driver's exit code."""
    import aiohttp

    printed = 0
    while True:
        try:
            received = 0
            async for lines in client.tail_job_logs(job_id):
                # After a reconnection the log comes again from its start.
                fresh = lines[max(printed - received, 0) :]
                received += len(lines)
                printed = max(printed, received)
                print(fresh, end="", flush=True)
            info = client.get_job_info(job_id)
        except (RuntimeError, aiohttp.ClientError, ConnectionError):
            await asyncio.sleep(2)  # the connection broke; the job may go on
            info = _job_info(client, job_id)
        if info.status.is_terminal():
            break
        await asyncio.sleep(1)
    if info.driver_exit_code is not None:
        return info.driver_exit_code
    print(f"capfilt: {job_id} ended as {info.status}: {info.message}", file=sys.stderr)
    return 0 if str(info.status) == "SUCCEEDED" else 1


def _job_info(client: Any, job_id: str) -> Any:
    try:
        return client.get_job_info(job_id)
    except (RuntimeError, ConnectionError) as error:
        raise CapfiltError(
            f"{job_id}: the cluster does not answer any more ({error}); submit the same again to attach to the job, or "
            "to go on where it stopped"
        ) from error
