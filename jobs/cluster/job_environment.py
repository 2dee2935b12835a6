"""What a job takes along to a cluster: the packages and the config, the versions to install, chosen variables."""

import json
import os
import re
import shutil
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from jobs.environment import WORKER_ENVIRONMENT
from pipeline.config import dump_config
from pipeline.models.files.bucket import is_bucket
from schemas.config import CapfiltConfig
from schemas.errors import CapfiltError
from schemas.pretrain import PretrainConfig

Config = CapfiltConfig | PretrainConfig
CONFIG_NAME = "config.json"
_PACKAGES = ("pipeline", "training", "jobs", "schemas")
# Ray gives up after ten minutes by default; pip brings some seven gigabytes.
_SET_UP_S = 3600
_COMMIT = re.compile(r"[0-9a-f]{40}")


def make_working_directory(config: Config, folder: Path, job_id: str) -> None:
    """Copy the packages and the resolved config into ``folder``.

    A file with the job's id makes it differ from that of any other job: Ray deletes a package with the last job that
    uses it, also where one that has the same content was just told that it need not upload it.
    """
    root = Path(__file__).resolve().parent.parent.parent
    for package in _PACKAGES:
        shutil.copytree(
            root / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
        )
    (folder / CONFIG_NAME).write_text(json.dumps(dump_config(config), indent=1))
    (folder / "job_id").write_text(job_id)


def runtime_environment(config: Config, folder: Path, *, to_show: bool = False) -> dict[str, Any]:
    """Return the job's Ray runtime environment: working directory, variables and, unless installed there, the pins.

    ``to_show``: of the variables that ``cluster.env`` names, ``$NAME`` stands for the value.
    """
    names = config.cluster.env
    variables = {name: f"${name}" for name in names} if to_show else handed_on(names)
    environment: dict[str, Any] = {
        "working_dir": str(folder),
        "env_vars": WORKER_ENVIRONMENT | variables,
    }
    if config.cluster.requirements == "pinned":
        stages = () if isinstance(config, PretrainConfig) else (config.caption, config.rank)
        extras = {"fp8"} & {stage.precision for stage in stages}
        environment["pip"] = {"packages": pinned_requirements(extras), "pip_check": False}
        environment["config"] = {"setup_timeout_seconds": _SET_UP_S}
    return environment


def handed_on(names: Collection[str]) -> dict[str, str]:
    """Return this process's variables of these names. Raises CapfiltError where one is not set."""
    if missing := sorted(set(names) - os.environ.keys()):
        raise CapfiltError(
            f"cluster.env: {', '.join(missing)} is not set here; export it, or take it out of the list"
        )
    return {name: os.environ[name] for name in names}


def pinned_requirements(extras: Collection[str] = ()) -> list[str]:
    """Return all that capfilt requires, and what those require in turn, at the versions installed here.

    Args:
        extras: of capfilt's, whose requirements are wanted too.
    """
    pins: dict[str, str] = {}
    waiting = [Requirement(f"capfilt[{','.join(sorted(extras))}]" if extras else "capfilt")]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        parent = waiting.pop()
        key = (canonicalize_name(parent.name), frozenset(parent.extras))
        if key in seen:
            continue
        seen.add(key)
        for requirement in map(Requirement, _requires(parent.name)):
            if _applies(requirement, parent.extras):
                waiting.append(requirement)
                name = canonicalize_name(requirement.name)
                pins[name] = f"{requirement.name}=={_version(requirement.name)}"
    return [pins[name] for name in sorted(pins)]


def _applies(requirement: Requirement, extras: Collection[str]) -> bool:
    """Tell whether a requirement holds on this platform, for any of the extras or without them."""
    return requirement.marker is None or any(
        requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)
    )


def _requires(name: str) -> list[str]:
    try:
        return requires(name) or []
    except PackageNotFoundError:
        return []


def _version(name: str) -> str:
    try:
        # Without a local label (``+cpu``), which the index that pip asks may not have.
        return version(name).partition("+")[0]
    except PackageNotFoundError as error:
        raise CapfiltError(f"{name} is not installed here, so its version cannot be pinned") from error


def require_pinned_weights(config: CapfiltConfig, stages: Collection[str]) -> None:
    """Raise CapfiltError for weights of the hub whose revision can move while a job runs."""
    sections = {"caption": config.caption, "filter": config.filter}
    for name, section in sections.items():
        if section is None or name not in stages or is_bucket(section.model):
            continue
        if Path(section.model).expanduser().is_dir():
            continue
        if not _COMMIT.fullmatch(section.revision):
            raise CapfiltError(
                f"{name}.revision = {section.revision!r} of {section.model} may name other weights while the job runs, "
                f"and workers that differ are refused; set {name}.revision to a commit (40 digits, as the hub shows it)"
            )
