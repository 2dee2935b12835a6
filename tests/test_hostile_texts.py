"""Texts of a corpus are text in the terminal, whatever they hold, in every command that prints stored text."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from jobs.cli.main import app
from pipeline.marks.marking import Verdict, mark
from pipeline.shards.shard_files import write_parquet
from pipeline.storage.scratch import temporary_folder
from schemas.json_record import utc_now
from schemas.marks import MAX_REASON_CHARS
from schemas.records import QuarantineRecord, RunRecord
from schemas.tables import CANDIDATES
from tests.corpora import Corpus
from tests.hostile_texts import HOSTILE
from tests.test_look import hostile_corpus
from tests.test_verify import replace_file

# A table is as wide as its longest text: a megabyte a row would be of no use here.
TEXTS = [text[:2000] for text in HOSTILE]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Return a corpus whose every text is hostile: those of the web and of captions, of marks, errors and hosts."""
    corpus = hostile_corpus(str(tmp_path_factory.mktemp("terminal") / "corpus"), TEXTS)
    give_to_one_sample(corpus, TEXTS)
    for number, text in enumerate(TEXTS):
        corpus.records.quarantine(
            QuarantineRecord(
                stage="crawl",
                source="cc",
                shard=f"{number + 1:05}",
                run_id="r",
                attempts=3,
                error=text,
                finished_at=utc_now(),
            )
        )
        run: RunRecord = corpus.records.runs()[0]
        corpus.records.write_run(replace(run, run_id=f"r{number}", host=text, outcome=None, finished_at=None))
    return corpus


def give_to_one_sample(corpus: Corpus, texts: list[str]) -> None:
    """Make each text a candidate of the first sample, and the reason of a mark on it."""
    rows = corpus.read("rank", "cc", "00000")
    own = [
        rows[0] | {"origin": "synthetic", "candidate": number, "text": text}
        for number, text in enumerate(texts)
    ]
    with temporary_folder() as folder:
        path = folder / "rank.parquet"
        others = [row for row in rows if row["uid"] != rows[0]["uid"]]
        replace_file(corpus, "rank", "parquet", path, write_parquet(path, own + others, CANDIDATES))
    for text in texts:
        reason = text[:MAX_REASON_CHARS]
        verdict = Verdict(what="drop", named_by="uid", values=(rows[0]["uid"],), reason=reason)
        mark(corpus.records, verdict, within=[("cc", "00000")])


def commands(corpus: Corpus) -> Iterator[tuple[str, ...]]:
    for table in ("samples", "candidates", "cards", "kept_captions", "failures", "marks", "runs", "shards"):
        yield "sql", corpus.root, f"SELECT * FROM {table}", "--limit", "1000"
    yield "failures", corpus.root
    yield "failures", corpus.root, "--hosts", "--limit", "1000"
    yield "shards", corpus.root, "--limit", "1000"
    yield "runs", corpus.root, "--limit", "1000"
    yield "status", corpus.root
    yield "stats", corpus.root
    yield "card", corpus.root
    yield "trace", corpus.root, corpus.read("rank", "cc", "00000")[0]["uid"]


def test_every_text_is_text_in_every_command(corpus: Corpus) -> None:
    printed = ""
    for command in commands(corpus):
        for options in ((), ("--json",)) if command[0] != "card" else ((),):
            done = CliRunner().invoke(app, [*command, *options])
            assert done.exit_code == 0, done.output
            steering = {letter for letter in set(done.output) if not letter.isprintable() and letter != "\n"}
            assert not steering, (command, options, steering)
            printed += done.output
    # They are shown, not left out; a long one is shown in part.
    assert [text for text in TEXTS if text.isprintable() and text[:40] not in printed] == []
