"""An actor of a stage as on a GPU that one shard brings down: the real one, with an error of CUDA in its worker.

In a module of its own, which Ray's workers can import.
"""

import os
from pathlib import Path

import torch

from jobs.cluster.actors import StageActor
from pipeline.runs.runner import RunSettings, Worker, load_worker
from schemas.records import ShardRecord, ShardTask
from schemas.stages import Stage


class LosesItsDevice(StageActor):
    """An actor whose device is lost as often as it works on one of the shards, and notes which process it was."""

    poisoned = "00001"

    def __init__(self, stage: Stage, settings: RunSettings, *arguments: object) -> None:
        super().__init__(stage, settings, *arguments)
        notes = Path(settings.config.corpus.path).parent / "calls"

        def load(*arguments: object) -> Worker:
            work = load_worker(*arguments)

            def call(task: ShardTask) -> ShardRecord:
                with notes.open("a") as file:
                    file.write(f"{os.getpid()} {task.shard}\n")
                if task.shard == self.poisoned:
                    raise torch.AcceleratorError("CUDA error: device-side assert triggered")
                return work(task)

            return call

        self._runner._load = load
