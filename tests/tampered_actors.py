"""Actors of a stage, the real ones but for the worker that they load: as on machines that no test has.

In a module of their own, which Ray's workers can import.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from jobs.cluster import actors
from jobs.cluster.actors import StageActor
from pipeline.runs.runner import RunSettings, Worker, load_worker
from schemas.records import ShardRecord, ShardTask
from schemas.stages import Stage
from tests.corpora import Corpus
from tests.processes import ROOT


class Calls:
    """The calls of all workers of a corpus, in order, each with its process: a file beside the corpus."""

    def __init__(self, corpus: str) -> None:
        self._file = Path(corpus).parent / "calls"

    def note(self, shard: str) -> None:
        with self._file.open("a") as file:
            file.write(f"{os.getpid()} {shard}\n")

    def all(self) -> list[tuple[int, str]]:
        """Return process and shard of each call."""
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        return [(int(process), shard) for process, shard in map(str.split, lines)]

    def processes(self) -> set[int]:
        return {process for process, _ in self.all()}


class LosesItsDevice(StageActor):
    """An actor whose device is lost as often as it works on one of the shards."""

    poisoned = "00001"

    def __init__(self, stage: Stage, settings: RunSettings, *arguments: object) -> None:
        super().__init__(stage, settings, *arguments)
        calls = Calls(settings.config.corpus.path)

        def load(*arguments: object) -> Worker:
            from torch import AcceleratorError  # here: of the other actors none needs torch

            work = load_worker(*arguments)

            def call(task: ShardTask) -> ShardRecord:
                calls.note(task.shard)
                if task.shard == self.poisoned:
                    raise AcceleratorError("CUDA error: device-side assert triggered")
                return work(task)

            return call

        self._runner._load = load


class TakesLong(StageActor):
    """An actor that needs so long for each shard, before it does it."""

    seconds = 25.0

    def __init__(self, stage: Stage, settings: RunSettings, *arguments: object) -> None:
        super().__init__(stage, settings, *arguments)

        def load(*arguments: object) -> Worker:
            work = load_worker(*arguments)

            def call(task: ShardTask) -> ShardRecord:
                time.sleep(self.seconds)
                return work(task)

            return call

        if stage == "crawl":
            self._runner._load = load


class WaitsForOthers(StageActor):
    """A captioner on a GPU in name alone. Once a few shards are done, it goes on when so many processes are at work."""

    processes, shards_before, patience_s = 3, 4, 120.0

    def __init__(self, stage: Stage, settings: RunSettings, *arguments: object) -> None:
        super().__init__(stage, settings, *arguments)
        corpus = Corpus(settings.config.corpus.path)
        calls = Calls(corpus.root)

        def caption(task: ShardTask) -> ShardRecord:
            calls.note(task.shard)
            deadline = time.monotonic() + self.patience_s
            while len(calls.all()) > self.shards_before and len(calls.processes()) < self.processes:
                assert time.monotonic() < deadline, "the pool did not grow"
                time.sleep(0.1)
            time.sleep(0.2)
            return corpus.caption(task)

        caption.models = settings.models[stage]  # type: ignore[attr-defined]
        self._runner._load = lambda *_: caption


def start_cli_with(actor: type[StageActor], *arguments: str, **environment: str) -> subprocess.Popen:
    """Start ``capfilt`` as a process of its own, whose stages have such actors."""
    code = f"from tests.tampered_actors import {actor.__name__}, main_with; main_with({actor.__name__})"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def main_with(actor: type[StageActor]) -> None:
    """Be the command line, with such actors."""
    from jobs.cli.main import main

    actors._actor_class = lambda stage: actor
    main()
