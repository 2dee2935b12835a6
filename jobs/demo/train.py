"""The demo's training: stage 1 on the curated captions and on the web's, then stage 2 with a tiny OPT and a tiny T5.

As with ``capfilt pretrain -c jobs/recipes/demo-stage1.toml``, checkpoints, metrics and manifest rows are those of any
run, and a run that is done is not done again. ``jobs.demo.train_in_pairs`` calls this module in processes of its own.
"""

import contextlib
import signal
import sys
import tarfile
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any, TextIO

import torch

from jobs.demo.evaluate_training import evaluate_language, evaluate_retrieval
from jobs.demo.held_out import held_out_scenes, write_benchmark
from jobs.demo.training_configs import (
    HELD_OUT,
    NUM_HELD_OUT,
    WEB_CAPTIONS,
    Captions,
    Family,
    stage1_config,
    stage2_config,
)
from jobs.pretrain import train_to_end
from jobs.ranks.launcher import stop_without_parent
from pipeline.corpus.checkpoint_files import SavedCheckpoints, run_folder
from pipeline.corpus.records import Records
from pipeline.shards.shard_reader import committed_table
from pipeline.storage.local_files import moved_when_whole
from pipeline.storage.storage import Storage
from schemas.pretrain import PretrainConfig
from training.convert.load import load_trained
from training.data.snapshot import take_snapshot


def begin_process() -> None:
    """Prepare the process of one training: one thread, stopped by its parent alone."""
    # A second thread gains little on models of this size, and waits by spinning.
    torch.set_num_threads(1)
    # A terminal's Ctrl-C reaches every process; the parent passes it on as SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=stop_without_parent, daemon=True).start()


def prepare(corpus: Path) -> None:
    """Write what the trainings and their evaluation read: the web's captions of the images, and new scenes."""
    write_web_captions(corpus)
    write_benchmark(held_out_scenes(NUM_HELD_OUT), corpus / HELD_OUT)


def train_stage1(corpus: Path, captions: Captions) -> dict[str, float]:
    """Train stage 1 on these captions; return what it has learnt, and ``false_negative_share`` of its last step."""
    config = stage1_config(corpus, captions)
    learnt = evaluate_retrieval(_trained(config), held_out_scenes(NUM_HELD_OUT))
    *_, last = SavedCheckpoints(run_folder(config)).committed()
    # A checkpoint of an earlier version has no such figure.
    return learnt | {name: last.metrics[name] for name in ("false_negative_share",) if name in last.metrics}


def train_stage2(corpus: Path, family: Family) -> dict[str, float]:
    """Train stage 2 with this language model; return what it has learnt."""
    return evaluate_language(_trained(stage2_config(corpus, family)), held_out_scenes(NUM_HELD_OUT))


def _trained(config: PretrainConfig) -> Any:
    """Train to the last step. Raises TrainingFailedError where a signal stopped it before."""
    with contextlib.redirect_stderr(_NamedLines(config.run.name, sys.stderr)):
        train_to_end(config)
    return load_trained(run_folder(config))


class _NamedLines:
    """Standard error of one of two trainings: each line begins with the training's name."""

    def __init__(self, name: str, file: TextIO) -> None:
        self._name, self._file = name, file

    def write(self, text: str) -> int:
        if text != "\n":  # print writes it by itself; one write a line keeps the lines of two processes apart
            line = text.removesuffix("\n").removeprefix(f"{self._name}: ")
            self._file.write(f"{self._name}: {line}\n")
        return len(text)

    def flush(self) -> None:
        self._file.flush()


def write_web_captions(corpus: Path) -> None:
    """Copy the crawled shards, whose KEY.txt is the web caption, under the names of the curated ones.

    The folder is a WebDataset as others make them. Equal names of source and shards give both sides the same images
    in the same order, without those that the curated side holds out: all that differs is what is said of them.
    """
    records = Records(Storage(str(corpus)))
    snapshot = take_snapshot(stage1_config(corpus, "curated").data)
    held_out = {uid for shard in snapshot.shards for uid in shard.held_out}
    for (_, source, shard), record in records.shards(("crawl",)).items():
        samples = committed_table(records, record.outputs["parquet"], ("uid", "key")).to_pylist()
        without = {sample["key"] for sample in samples if sample["uid"] in held_out}
        copy = corpus / WEB_CAPTIONS / source / f"{shard}.tar"
        if without or not copy.exists():
            _copy_without(corpus / record.outputs["tar"].path, copy, without)


def _copy_without(tar: Path, copy: Path, keys: Collection[str]) -> None:
    """Copy a tar, the samples of some keys left out; equal input gives equal bytes."""
    with moved_when_whole(copy) as unfinished, tarfile.open(tar) as old, tarfile.open(unfinished, "w") as new:
        for member in old:
            if member.name.partition(".")[0] not in keys:
                new.addfile(member, old.extractfile(member))
