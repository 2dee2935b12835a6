"""The selection run shard by shard with a worker that a test may tamper with."""

from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.corpus.records import Records
from pipeline.runs.progress import ShardOutcome
from pipeline.runs.runner import Node, RunSettings, ShardRunner, load_worker
from schemas.config import CapfiltConfig
from schemas.records import ShardRecord, ShardTask
from schemas.stages import Stage
from tests.corpora import Corpus

Work = Callable[[ShardTask], ShardRecord]


@dataclass
class Selected:
    """What came of each shard, which ones the worker was called with, and how often it was loaded."""

    outcomes: list[ShardOutcome] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    loads: int = 0

    @property
    def states(self) -> list[str]:
        return [outcome.state for outcome in self.outcomes]


def select_shards(
    corpus: Corpus,
    tampered: Callable[[Work], Work] = lambda work: work,
    records: Records | None = None,
    node: Node | None = None,
) -> Selected:
    """Select every shard of the source ``cc``; ``tampered`` returns what is called in the place of a loaded worker."""
    selected = Selected()

    def load(stage: Stage, config: CapfiltConfig, records: Records) -> Work:
        selected.loads += 1
        work = tampered(load_worker(stage, config, records))
        return lambda task: selected.calls.append(task.shard) or work(task)

    runner = ShardRunner(
        "select",
        RunSettings(config=corpus.config, models={}, run_id="20260102T000000-test", load=load),
        note=selected.outcomes.append,
        report_state=lambda stage, state: None,
        node=node or Node(),
        pauses_s=(0.01,),
        retry_pauses_s=(0.0,),
    )
    runner.records = records or runner.records
    for _, urls in sorted(corpus.records.url_shards().items()):
        runner.run_shard("web", urls)
    return selected
