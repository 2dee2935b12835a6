"""The rank that this process is where torchrun or srun has started it, one process for each rank of all nodes.

torchrun and its like set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; srun sets variables of its own, of
which the same five are made.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from schemas.errors import CapfiltError

# Ports of the first node where the ranks of a Slurm job meet: below those that Linux gives out by itself.
_FIRST_PORT, _NUM_PORTS = 20_000, 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchedRank:
    """One of ``size`` ranks, the ``local``-th of its node; ``master`` is where rank 0 listens, as host and port."""

    rank: int
    local: int
    size: int
    master: tuple[str, str] | None

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Self | None:
        """Return the rank that the variables describe; None where this process is to start the ranks itself.

        Raises CapfiltError where one of the variables is missing or is not a number.
        """
        if "RANK" in environment:
            names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        elif _is_task_of_srun(environment):
            names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
        else:
            return None
        rank, local, size = (_number(environment, name) for name in names)
        return cls(rank=rank, local=local, size=size, master=_master(environment) if size > 1 else None)

    def variables(self) -> dict[str, str]:
        """Return the variables as torch reads them."""
        variables = {"RANK": str(self.rank), "LOCAL_RANK": str(self.local), "WORLD_SIZE": str(self.size)}
        if self.master is not None:
            variables["MASTER_ADDR"], variables["MASTER_PORT"] = self.master
        return variables


def is_first_rank() -> bool:
    """Return whether this process speaks for all ranks: it is not one of the later ones of torchrun or srun."""
    launched = LaunchedRank.of(os.environ)
    return launched is None or launched.rank == 0


def _is_task_of_srun(environment: Mapping[str, str]) -> bool:
    """Return whether this is a task of ``srun``: a batch script has a number of tasks too, and is one process."""
    is_batch_script = "SLURM_JOB_ID" in environment and "SLURM_STEP_ID" not in environment
    return "SLURM_PROCID" in environment and "SLURM_NTASKS" in environment and not is_batch_script


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    if not value.isdecimal():
        raise CapfiltError(
            f"{name}={value!r} is not a number: start every rank with torchrun or srun, or unset RANK"
        )
    return int(value)


def _master(environment: Mapping[str, str]) -> tuple[str, str]:
    """Return MASTER_ADDR and MASTER_PORT; in a Slurm job without them the first node and a port of the job's own."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    address = environment.get("MASTER_ADDR") or _first_node(nodes)
    port = environment.get("MASTER_PORT", "")
    if not port and "SLURM_PROCID" in environment:
        port = str(_FIRST_PORT + int(environment.get("SLURM_JOB_ID", "0")) % _NUM_PORTS)
    if not address or not port:
        raise CapfiltError(
            "RANK is set, and MASTER_ADDR or MASTER_PORT is not: start every rank with torchrun or srun"
        )
    return address, port


def _first_node(nodes: str) -> str:
    """Return the first host of Slurm's list: ``gpu[007-010,012],login1`` begins with gpu007."""
    first = re.match(r"([^\[,]*)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    return "".join(part or "" for part in first.groups()) if first else ""
