"""What a checkpoint was trained on, and which checkpoints were trained on an image: in SQL, in traces, in a plan."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.cli.main import app
from pipeline.corpus.corpus_state import CorpusState
from pipeline.corpus.records import Records
from pipeline.lineage.checkpoint_trace import trace_checkpoint
from pipeline.lineage.sample_trace import trace
from pipeline.marks.marking import Verdict, mark
from pipeline.marks.search import marks_of_shards
from pipeline.marks.trained import checkpoints_with_marked
from pipeline.shards.shard_files import write_tar
from pipeline.stages.selection import SelectWorker
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError
from schemas.json_record import utc_now
from schemas.pretrain import DataConfig
from schemas.records import CheckpointRecord, SnapshotRecord
from tests.corpora import RUN, Corpus, make_corpus
from training.data.snapshot import Snapshot, snapshot_file, take_snapshot
from training.trainer.lineage import LineageWriter

FOLDER = "checkpoints/stage1/tiny"


def train(corpus: Corpus, folder: str = FOLDER, held_out: int = 0) -> Snapshot:
    """Leave what a training leaves in its folder and in the corpus's records, but for the weights."""
    snapshot = take_snapshot(DataConfig(corpus=[{"path": corpus.root}], held_out=held_out))
    storage = Storage(folder if folder.startswith("/") else f"{corpus.root}/{folder}")
    storage.write(snapshot_file(snapshot.digest), snapshot.to_json())
    record = CheckpointRecord(
        path=f"{folder}/step-00000001.{0:012x}",
        stage="stage1",
        run_id=f"{RUN}-{Path(folder).name}",
        step=1,
        samples=8,
        snapshot=snapshot.digest,
        sha256={},
        metrics={},
        created_at=utc_now(),
    )
    corpus.records.write_checkpoint(f"{record.run_id}.step-1", record)
    return snapshot


def curated(corpus: Corpus) -> list[dict]:
    return corpus.manifest.query("SELECT * FROM curated ORDER BY uid").dicts()


def uses(corpus: Corpus, uid: str) -> dict[str, str]:
    [traced] = trace(corpus.manifest, uid)
    return {row["path"].rpartition("/")[0]: row["use"] for row in traced["checkpoints"]}


def select_anew(corpus: Corpus, shard: str) -> None:
    """Select a shard with the marks of now, as a run would."""
    marks = marks_of_shards(corpus.records, CorpusState(corpus.records), save=True)
    task = corpus.task("select", "cc", shard, ("crawl", "rank"))
    task = replace(
        task, marks=marks.get(("cc", shard), ()), replaces=corpus.records.read("select", "cc", shard)
    )
    SelectWorker(corpus.config, corpus.records)(task)


def test_sql_and_trace_agree_in_both_directions(root: str) -> None:
    corpus = make_corpus(root)
    snapshot = train(corpus, held_out=3)
    held_out = {uid for shard in snapshot.shards for uid in shard.held_out}
    rows = corpus.manifest.query("SELECT * FROM snapshots ORDER BY shard").dicts()
    assert [(row["digest"], row["folder"], row["source"], row["shard"]) for row in rows] == [
        (snapshot.digest, FOLDER, "cc", shard) for shard in ("00000", "00001")
    ]
    assert sum(row["images"] for row in rows) == snapshot.num_images
    record = corpus.records.read("select", "cc", "00000")
    assert dict(rows[0]["sha256"]) == {name: file.sha256 for name, file in record.outputs.items()}
    eaten = corpus.manifest.query("SELECT checkpoint, uid FROM trained_on").rows
    uids = {row["uid"] for row in curated(corpus)}
    assert {uid for _, uid in eaten} == uids - held_out and len(eaten) == len(uids) - 3
    for uid in (min(held_out), min(uids - held_out)):
        assert uses(corpus, uid) == {FOLDER: "held out" if uid in held_out else "trained on"}
    # A rebuild finds them in the same places; parts that are merged keep each row once.
    before = corpus.manifest.query("SELECT * FROM snapshots ORDER BY ALL").rows
    assert corpus.manifest.rebuild()["snapshots"] == 2
    assert corpus.manifest.query("SELECT * FROM snapshots ORDER BY ALL").rows == before


def test_an_image_that_was_marked_since_is_still_known_to_its_checkpoint(tmp_path: Path) -> None:
    corpus = make_corpus(str(tmp_path / "corpus"))
    train(corpus)
    marked, other = [row for row in curated(corpus) if row["shard"] == "00000"][:2]
    never = corpus.manifest.query("SELECT uid FROM dropped").rows
    verdict = Verdict(what="drop", named_by="uid", values=(marked["uid"],), reason="test")
    mark(corpus.records, verdict)
    marks = marks_of_shards(corpus.records, CorpusState(corpus.records), save=False)
    checkpoint = f"{FOLDER}/step-00000001.{0:012x}"
    assert checkpoints_with_marked(corpus.manifest, marks) == {checkpoint: 1}
    select_anew(corpus, "00000")
    train(corpus, "checkpoints/stage1/later")
    assert marked["uid"] not in {row["uid"] for row in curated(corpus)}
    # The selection that the first training read is computed once more: it has the image, the second has not.
    assert uses(corpus, marked["uid"]) == {FOLDER: "trained on"}
    assert uses(corpus, other["uid"]) == {FOLDER: "trained on", "checkpoints/stage1/later": "trained on"}
    assert all(uses(corpus, uid) == {} for (uid,) in never)
    assert checkpoints_with_marked(corpus.manifest, marks) == {checkpoint: 1}
    printed = CliRunner().invoke(app, ["trace", corpus.root, marked["uid"]]).output
    assert "trained on" in printed and FOLDER in printed
    # Of a selection that obeyed marks, what was kept is not known once it is replaced.
    corpus.records.write_mark(
        replace(
            corpus.records.marks()[0], mark="undo", undoes={corpus.records.marks()[0].mark: (marked["uid"],)}
        )
    )
    select_anew(corpus, "00000")
    assert uses(corpus, marked["uid"]) == {FOLDER: "trained on", "checkpoints/stage1/later": "not known"}


def test_a_training_elsewhere_leaves_its_snapshot_in_the_records(tmp_path: Path) -> None:
    corpus = make_corpus(str(tmp_path / "corpus"))
    elsewhere = str(tmp_path / "runs/stage1/tiny")
    snapshot = train(corpus, elsewhere)
    uid = curated(corpus)[0]["uid"]
    assert uses(corpus, uid) == {}
    writer = LineageWriter(DataConfig(corpus=[{"path": corpus.root}]))
    inside = SnapshotRecord.from_json(snapshot.to_json())
    writer.write_snapshot(RUN, replace(inside, folder=f"{corpus.root}/{FOLDER}"))
    assert corpus.storage.list("records/snapshots") == []
    writer.write_snapshot(RUN, replace(inside, folder=elsewhere))
    assert uses(corpus, uid) == {elsewhere: "trained on"}


def copy_of_the_crawl(corpus: Corpus, folder: Path, left_out: str) -> None:
    """Copy the crawled images of all shards into one tar, as somebody who shuffles them anew."""
    folder.mkdir(parents=True)
    samples = [row for shard in ("00000", "00001") for row in corpus.read("crawl", "cc", shard)]
    images = [row for row in samples if row["status"] == "ok" and row["uid"] != left_out]
    named = [(row, json.dumps({name: row[name] for name in ("uid", "source", "shard")})) for row in images]
    texts = [*(text for _, text in named[:-1]), '["an image that names no uid"]']
    write_tar(
        folder / "mixed.tar",
        (
            (f"{number:04}", {"jpg": b"x", "json": text.encode(), "txt": b"words"})
            for number, text in enumerate(texts)
        ),
    )


def train_on_copy(corpus: Corpus, folder: Path, held_out: int = 0) -> tuple[str, Snapshot]:
    """Leave what a training on a folder in a corpus leaves there; return its run's folder, and what it reads."""
    data = DataConfig(corpus=[{"path": str(folder)}], held_out=held_out)
    snapshot, run = take_snapshot(data), f"{corpus.root}/checkpoints/stage1/{folder.name}"
    Storage(run).write(snapshot_file(snapshot.digest), snapshot.to_json())
    writer, name = LineageWriter(data), f"step-00000001.{0:012x}"
    writer.write_snapshot(f"{RUN}-copy", replace(SnapshotRecord.from_json(snapshot.to_json()), folder=run))
    record = CheckpointRecord(
        path=name,
        stage="stage1",
        run_id=f"{RUN}-copy",
        step=1,
        samples=8,
        snapshot=snapshot.digest,
        sha256={},
        metrics={},
        created_at=utc_now(),
    )
    writer.write_checkpoint(record, f"{run}/{name}")
    Storage(run).write(f"{name}.json", record.to_json().encode())
    Storage(run).write(f"{name}/training.json", b'{"config": {}, "models": []}')
    return run.removeprefix(f"{corpus.root}/"), snapshot


def test_a_training_on_a_copy_of_the_images_is_known_to_them(tmp_path: Path) -> None:
    corpus = make_corpus(str(tmp_path / "corpus"))
    stored = {uid for (uid,) in corpus.manifest.query("SELECT uid FROM samples WHERE status = 'ok'").rows}
    left_out, *_ = sorted(stored)
    copy_of_the_crawl(corpus, Path(corpus.root, "copies/mixed"), left_out)
    run, snapshot = train_on_copy(corpus, Path(corpus.root, "copies/mixed"), held_out=2)
    eaten = {uid for (uid,) in corpus.manifest.query("SELECT uid FROM trained_on").rows}
    # Without the one that is not in the copy, the one that names no uid, and the two that the training holds out.
    assert eaten < stored - {left_out} and len(eaten) == len(stored) - 4
    assert uses(corpus, left_out) == {run: "held out"} and uses(corpus, min(eaten)) == {run: "trained on"}
    rows = corpus.manifest.query("SELECT corpus, source, shard, images FROM snapshots ORDER BY shard").dicts()
    assert [(row["corpus"], row["source"], row["shard"]) for row in rows] == [
        (corpus.root, "cc", shard) for shard in ("00000", "00001")
    ]
    assert sum(row["images"] for row in rows) == len(eaten) == snapshot.num_images - 1
    lineage = trace_checkpoint(f"{corpus.root}/{run}")
    assert [(row["source"], row["images"], row["urls"]) for row in lineage["sources"]] == [
        ("cc", len(eaten), 24)
    ]
    assert {(row["stage"], row["shard"]) for row in lineage["stages"]} == {
        (stage, shard) for stage in ("urls", "crawl") for shard in ("00000", "00001")
    }


def test_a_training_on_a_copy_of_the_curated_tars_is_known_to_their_images(tmp_path: Path) -> None:
    corpus = make_corpus(str(tmp_path / "corpus"))
    copies = Path(corpus.root, "copies/kept")
    shutil.copytree(Path(corpus.root, "curated/cc"), copies)
    run, _ = train_on_copy(corpus, copies)
    kept = {row["uid"] for row in curated(corpus)}
    [(failed,)] = corpus.manifest.query("SELECT min(uid) FROM samples WHERE status <> 'ok'").rows
    assert {uid for (uid,) in corpus.manifest.query("SELECT uid FROM trained_on").rows} == kept
    assert uses(corpus, min(kept)) == {run: "trained on"} and uses(corpus, failed) == {}
    assert "rank" in {row["stage"] for row in trace_checkpoint(f"{corpus.root}/{run}")["stages"]}


@pytest.mark.parametrize(
    "damage",
    [
        {"digest": "../x"},
        {"sources": 7},
        {"sources": [{"name": "cc"}]},
        {"digest": "0" * 64},
    ],
)
def test_a_file_that_is_not_a_snapshot_is_refused_in_the_records_and_passed_over_beside_checkpoints(
    tmp_path: Path, damage: dict
) -> None:
    corpus = make_corpus(str(tmp_path / "corpus"), shards=1)
    snapshot = train(corpus)
    text = json.dumps(json.loads(snapshot.to_json()) | damage).encode()
    corpus.storage.write(f"{FOLDER}/{snapshot_file(snapshot.digest)}", text)
    assert corpus.manifest.query("SELECT * FROM snapshots").rows == []
    path = f"records/snapshots/{RUN}/{snapshot_file(snapshot.digest)}"
    corpus.storage.write(path, text)
    with pytest.raises(CapfiltError, match=path):
        corpus.manifest.query("SELECT * FROM snapshots")
    assert Records(corpus.storage).shards()
