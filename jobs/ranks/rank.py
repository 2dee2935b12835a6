"""One rank of a training, in this process: joins the other ranks, trains, and says how that ended."""

import os
import traceback
from collections.abc import Callable

import torch
from torch import distributed

from jobs.interrupts import Interrupts
from jobs.ranks.launched_rank import LaunchedRank
from jobs.ranks.rank_outcome import TIMEOUT_S, RankOutcome, log
from schemas.errors import CapfiltError
from schemas.pretrain import PretrainConfig
from schemas.records import RunRecord
from training.distributed import World
from training.trainer.loop import LostRankError, TrainingStopped, is_lost_rank
from training.trainer.run import pretrain


def device_of(local_rank: int) -> torch.device:
    """Return the device of a rank of this machine. Raises CapfiltError where there are more ranks than GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # A task of Slurm may be shown one GPU, its own.
    number = local_rank if torch.cuda.device_count() > 1 else 0
    if number >= torch.cuda.device_count():
        raise CapfiltError(
            f"this is rank {local_rank} of this machine, counted from 0, and it has {torch.cuda.device_count()} GPUs; "
            "start one rank for each"
        )
    return torch.device("cuda", number)


def train_launched(
    config: PretrainConfig, run: RunRecord, launched: LaunchedRank, interrupts: Interrupts
) -> RankOutcome:
    """Train as the rank that another launcher has started this process for.

    Raises CapfiltError where the config names another number of GPUs.
    """
    if config.cluster.gpus not in (0, launched.size):
        raise CapfiltError(
            f"cluster.gpus = {config.cluster.gpus}, and {launched.size} ranks were started; set {launched.size}, or 0"
        )
    os.environ |= launched.variables()
    return train_rank(config, run, device_of(launched.local), interrupts)


def train_rank(
    config: PretrainConfig, run: RunRecord, device: torch.device, interrupts: Interrupts
) -> RankOutcome:
    """Train as the rank that the environment describes; return how it ended, whatever happens."""
    try:
        world = World.join(device, TIMEOUT_S)
    except distributed.DistError as error:
        return RankOutcome(kind="lost", text=f"rank {os.environ['RANK']} could not reach the others: {error}")
    try:
        return train_as(world, config, run, interrupts.asked)
    finally:
        world.close()


def train_as(
    world: World,
    config: PretrainConfig,
    run: RunRecord,
    stop_asked: Callable[[], bool] = lambda: False,
    log: Callable[[str], None] = log,
) -> RankOutcome:
    """Train as one rank of a world; return how it ended, whatever happens."""
    try:
        return RankOutcome(kind="ended", summary=pretrain(config, world, run, stop_asked=stop_asked, log=log))
    except KeyboardInterrupt:
        return RankOutcome(kind="interrupted")
    except CapfiltError as error:
        return RankOutcome(kind="refused", text=str(error))
    except LostRankError as error:
        return RankOutcome(kind="lost", text=str(error))
    except TrainingStopped as error:
        return RankOutcome(kind="stopped", text=str(error))
    except Exception as error:
        lost = isinstance(error, RuntimeError) and is_lost_rank(error)
        return RankOutcome(
            kind="lost" if lost else "fault", text=str(error) if lost else traceback.format_exc()
        )
