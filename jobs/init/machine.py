"""This machine: its cores, memory and GPUs, and the workers that fit on it. torch, which takes seconds, stays out."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from schemas.stages import Stage

_CGROUP = Path("/sys/fs/cgroup")
# Of a worker with BLIP-large in fp32: 1.9 GB of weights, and the activations of a batch.
_CAPTION_WORKER_GIB = 6.0
_CAPTION_WORKER_CPUS = 4
_FEW_CORES = 4
_GPU_TIMEOUT_S = 5.0
# Fractions of the cores where a worker of each stage has to share few of them; captioning has the most to do.
_SHARES: dict[Stage, float] = {"crawl": 0.25, "caption": 0.375, "rank": 0.25, "select": 0.125}
# Of each GPU: ten captions take about four times as long as eleven scores.
_CAPTION_GPU, _RANK_GPU = 0.8, 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a local Ray would find here; ``gpus`` holds each one's name."""

    cores: int
    memory_gib: float
    gpus: tuple[str, ...] = ()

    def __str__(self) -> str:
        cores = f"{self.cores} core{'s' if self.cores > 1 else ''}"
        names = {name: self.gpus.count(name) for name in self.gpus}
        gpus = ", ".join(f"{count} x {name}" if count > 1 else name for name, count in names.items())
        return f"{cores}, {self.memory_gib:.0f} GiB of memory, {gpus or 'no GPU'}"


def this_machine() -> Machine:
    """Return what this process may use, limits of its container included. Linux."""
    cores = len(os.sched_getaffinity(0))
    quota, _, period = _cgroup("cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit():
        cores = min(cores, max(int(quota) // int(period), 1))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if (limit := _cgroup("memory.max")).isdigit():
        memory = min(memory, int(limit))
    return Machine(cores=cores, memory_gib=memory / 2**30, gpus=_gpus())


def _cgroup(name: str) -> str:
    try:
        return (_CGROUP / name).read_text().strip()
    except OSError:  # another version of cgroups, or none
        return ""


def _gpus() -> tuple[str, ...]:
    """Return the names of the GPUs that nvidia-smi lists and CUDA_VISIBLE_DEVICES does not hide."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or not shutil.which("nvidia-smi"):
        return ()
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=_GPU_TIMEOUT_S,
        )
    except (OSError, subprocess.SubprocessError):  # a driver that does not answer runs nothing either
        return ()
    names = tuple(line.strip() for line in done.stdout.splitlines() if line.strip())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return names[: len(visible.split(","))] if visible else names


def stage_resources(machine: Machine) -> dict[Stage, dict[str, float]]:
    """Return what [cluster] gives each stage: ``cpus``, ``gpus`` and ``max_workers``, where not the defaults.

    The least workers of all four stages fit on the machine at once: each of them waits until it has its cores.
    """
    gpus = len(machine.gpus)
    if machine.cores <= _FEW_CORES * max(gpus, 1):
        resources: dict[Stage, dict[str, float]] = {
            stage: {"cpus": round(share * machine.cores / max(gpus, 1), 3)}
            for stage, share in _SHARES.items()
        }
    elif gpus:
        cores_a_gpu = machine.cores // gpus
        caption, rank = max(cores_a_gpu // 4, 1), max(cores_a_gpu // 8, 1)
        rest = machine.cores - gpus * (caption + rank) - 1
        resources = {
            "crawl": {"max_workers": max(min(rest, 64), 1)},
            "caption": {"cpus": caption},
            "rank": {"cpus": rank},
            "select": {},
        }
    else:
        crawl, rank = max(machine.cores // 8, 1), max(machine.cores // 8, 1)
        left = int(machine.cores - crawl - rank - 0.5)
        cpus = min(left, _CAPTION_WORKER_CPUS)
        workers = min(left // cpus, machine.memory_gib // _CAPTION_WORKER_GIB)
        resources = {
            "crawl": {"max_workers": crawl},
            "caption": {"cpus": cpus, "max_workers": int(max(workers, 1))},
            "rank": {"cpus": rank},
            "select": {"cpus": 0.5},
        }
    if gpus:
        resources["caption"] |= {"gpus": _CAPTION_GPU, "max_workers": gpus}
        resources["rank"] |= {"gpus": _RANK_GPU, "max_workers": gpus}
    return {
        stage: {name: value for name, value in values.items() if (name, value) != ("max_workers", 1)}
        for stage, values in resources.items()
        if values
    }


def why_resources(machine: Machine) -> str:
    """Return the reason for ``stage_resources`` in a sentence."""
    if machine.gpus:
        each = "GPU" if len(machine.gpus) == 1 else "each GPU"
        return f"captioning takes 0.8 of {each} and ranking 0.2, which are busy about equally long; crawl has the cores"
    if machine.cores <= _FEW_CORES:
        return "the four stages work at once and share the cores; captioning has the most to do"
    return f"no GPU: captioning has most cores, {_CAPTION_WORKER_CPUS} and {_CAPTION_WORKER_GIB:.0f} GiB a worker"
