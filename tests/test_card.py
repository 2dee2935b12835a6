"""``capfilt card``: its metadata is the Hub's, its figures are SQL's, and ``datasets`` reads the corpus by it alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard, DatasetCardData
from typer.testing import CliRunner

from jobs.cli.main import app
from pipeline.manifest.card import dataset_card
from pipeline.marks.marking import Verdict, mark
from tests.corpora import Corpus, make_corpus

# Reads each config of a folder without network, and prints its columns, samples and first captions.
_LOAD = """
import json, sys, datasets
folder, *names = sys.argv[1:]
answer = {}
for name in names:
    rows = datasets.load_dataset(folder, name, split="train")
    answer[name] = [sorted(rows.column_names), len(rows), rows[0]["json"], rows[0]["txt"], rows[0]["jpg"].size]
print(json.dumps(answer))
"""


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return make_corpus(str(tmp_path / "corpus"), sources=("cc", "laion"))


def test_the_metadata_is_read_back_and_the_figures_are_those_of_sql(corpus: Corpus) -> None:
    uid = corpus.manifest.query("SELECT uid FROM curated ORDER BY uid LIMIT 1").rows[0][0]
    mark(corpus.records, Verdict(what="drop", named_by="uid", values=(uid,), reason="a | <b>bad</b> `one`"))
    text = dataset_card(corpus.manifest)
    card = DatasetCard(text)
    data = card.data.to_dict()
    # The Hub's own class takes every field of the card, and writes them as they were.
    assert card.content.startswith(f"---\n{DatasetCardData(**data).to_yaml()}\n---\n")
    assert data["size_categories"] == "n<1K" and data["pretty_name"] == "corpus"
    assert [(config["config_name"], config["data_files"][0]["path"]) for config in data["configs"]] == [
        ("default", ["curated/cc/*.tar", "curated/laion/*.tar"]),
        ("cc", ["curated/cc/*.tar"]),
        ("laion", ["curated/laion/*.tar"]),
    ]
    [(urls,)] = corpus.manifest.query("SELECT count(*) FROM samples").rows
    [(images,)] = corpus.manifest.query("SELECT count(*) FROM samples WHERE status = 'ok'").rows
    [(curated,)] = corpus.manifest.query("SELECT count(*) FROM curated").rows
    assert f"{urls:,} URLs gave {images:,} images, of which {curated:,} are curated" in text
    for source, reason, rows in corpus.manifest.query(
        "SELECT source, reason, count(*) FROM samples WHERE status <> 'ok' GROUP BY ALL"
    ).rows:
        status = {"timeout": "failed", "http_4xx": "failed", "not_an_image": "invalid"}[reason]
        assert f"| {source} | crawl | {status} | {reason} | {rows} |".replace("_", "\\_") in text
    for source, origin, captions in corpus.manifest.query(
        "SELECT source, origin, count(*) FROM kept_captions GROUP BY ALL"
    ).rows:
        assert f"| {source} | {origin} | {captions} |" in text
    assert "blip-tiny" in text and "clip-tiny" in text and '"min_score": 0.1' in text
    assert "a \\| \\<b\\>bad\\</b\\> \\`one\\`" in text and "## Opt-outs\n\nNo image" in text


def test_licences_of_a_column_are_counted(tmp_path: Path) -> None:
    corpus = Corpus(str(tmp_path / "corpus"))
    corpus.start_run()
    corpus.add_urls("cc", ["00000"], 12)
    corpus.make("cc", "00000")
    assert "Licences" not in dataset_card(corpus.manifest)
    other = Corpus(str(tmp_path / "other"))
    other.start_run()
    other.add_urls("cc", ["00000"], 12, extra=json.dumps({"license": "CC BY 4.0"}))
    other.make("cc", "00000")
    text = dataset_card(other.manifest)
    assert "## Licences (column license of the lists)" in text and "| CC BY 4.0 | 9 |" in text


def test_a_source_with_an_empty_shard_names_its_tars(tmp_path: Path) -> None:
    corpus = make_corpus(str(tmp_path / "corpus"), shards=1)
    corpus.config = corpus.config.model_copy(
        update={"select": corpus.config.select.model_copy(update={"min_score": 1.0})}
    )
    corpus.add_urls("cc", ["00001"], 12, batch=1)
    corpus.make("cc", "00001")
    [config] = DatasetCard(dataset_card(corpus.manifest)).data.to_dict()["configs"]
    assert config["data_files"][0]["path"] == ["curated/cc/00000.tar"]


@pytest.mark.slow
def test_datasets_loads_the_corpus_through_the_card_alone(corpus: Corpus, tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed: make setup installs it")
    written = CliRunner().invoke(app, ["card", corpus.root, "--write"])
    assert written.exit_code == 0, written.output
    assert CliRunner().invoke(app, ["card", corpus.root]).output == corpus.storage.read("README.md").decode()
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    names = ("default", "cc", "laion")
    loaded = subprocess.run(
        [sys.executable, "-c", _LOAD, corpus.root, *names], capture_output=True, text=True, env=offline
    )
    assert loaded.returncode == 0, loaded.stderr
    answer = json.loads(loaded.stdout)
    first = corpus.manifest.query(
        "SELECT * FROM curated WHERE source = 'cc' ORDER BY shard, key LIMIT 1"
    ).dicts()[0]
    for name in names:
        where = f"WHERE source = '{name}'" if name != "default" else ""
        [(images,)] = corpus.manifest.query(f"SELECT count(*) FROM curated {where}").rows
        columns, rows, captions, caption, size = answer[name]
        assert {"jpg", "json", "txt"} <= set(columns) and rows == images and size == [16, 16]
        if name != "laion":
            assert (captions, caption) == (first["captions"], first["caption"])
