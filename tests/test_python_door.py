"""``import capfilt``: a corpus, a run and the two engines in Python."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

import capfilt
from jobs.output.values import plain
from pipeline.storage.storage import Storage
from schemas.config import CapfiltConfig
from tests.corpora import Corpus, make_corpus
from tests.notebooks import assert_shown, outputs_of
from tests.processes import ROOT, cli_here
from tests.runs import config_file, small_config, with_values

LARGE = ("torch", "ray", "duckdb", "pyarrow", "pandas", "numpy", "pydantic", "PIL", "transformers")


def modules_after(code: str, *arguments: str) -> set[str]:
    """Return what a new process has imported after some lines of Python."""
    done = subprocess.run(
        [sys.executable, "-c", f"import json, sys\n{code}\nprint(json.dumps(sorted(sys.modules)))", *arguments],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_import_loads_no_large_library() -> None:
    code = "import capfilt; assert set(dir(capfilt)) == set(capfilt.__all__)"
    assert modules_after(code) & set(LARGE) == set()


def test_every_name_is_there_and_no_other() -> None:
    assert all(getattr(capfilt, name) for name in capfilt.__all__)
    with pytest.raises(AttributeError, match="'Corpsu'"):
        _ = capfilt.Corpsu


def test_reading_a_corpus_loads_no_torch_and_no_ray(tmp_path: Path) -> None:
    corpus = make_corpus(str(tmp_path / "corpus"), shards=1)
    uid = corpus.read("crawl", "cc", "00000")[0]["uid"]
    code = (
        "import capfilt; corpus = capfilt.Corpus.open(sys.argv[1]); corpus.sql('FROM samples').arrow(); "
        "corpus.show(sys.argv[2]); corpus.stats(); corpus.failures()"
    )
    assert modules_after(code, corpus.root, uid) & {"torch", "ray", "transformers", "img2dataset"} == set()


def test_what_is_not_a_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(capfilt.CapfiltError, match="is not a corpus"):
        capfilt.Corpus.open(tmp_path)


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory: pytest.TempPathFactory) -> capfilt.Corpus:
    """Two sources that list the same URLs, two shards each."""
    root = str(tmp_path_factory.mktemp("made") / "corpus")
    make_corpus(root, sources=("cc", "laion"))
    return capfilt.Corpus.open(root)


def test_sql_gives_arrow_pandas_and_dicts(two_sources: capfilt.Corpus) -> None:
    answer = two_sources.sql(
        "SELECT uid, shard, scores, finished_at, 1 AS x, 2 AS x FROM curated, runs ORDER BY uid"
    )
    table = answer.arrow()
    # Types of the tables, not guesses from the values; names once each.
    assert table.schema.field("scores").type == pa.list_(pa.float32())
    assert pa.types.is_timestamp(table.schema.field("finished_at").type)
    assert (
        table.column_names[:5] == ["uid", "shard", "scores", "finished_at", "x"]
        and len(set(table.column_names)) == 6
    )
    assert len(answer) == table.num_rows == len(answer.pandas()) == len(list(answer)) > 20
    assert answer.rows() == table.to_pylist()
    # What takes Arrow's C stream, as polars.DataFrame does, takes the answer itself.
    assert pa.table(answer) == table


def test_sql_takes_parameters(two_sources: capfilt.Corpus) -> None:
    by_place = two_sources.sql(
        "SELECT count(*) AS images FROM curated WHERE source = ? AND shard = ?", ["cc", "00000"]
    )
    by_name = two_sources.sql("SELECT count(*) AS images FROM curated WHERE source = $of", {"of": "cc"})
    assert 0 < by_place.rows()[0]["images"] < by_name.rows()[0]["images"]
    assert two_sources.sql("SELECT ? AS text", ["'; DROP TABLE samples --"]).rows() == [
        {"text": "'; DROP TABLE samples --"}
    ]
    with pytest.raises(capfilt.CapfiltError, match="SQL:"):
        two_sources.sql("SELECT ?, ?", ["one"])


@pytest.mark.parametrize(
    "query",
    [
        "COPY curated TO 'out.csv'", "SELECT * FROM read_csv('/etc/passwd')", "SELECT 1; SELECT 2",
        "SELECT * FROM duckdb_settings()", "SELECT * FROM query('SELECT 1')", "ATTACH 'x.db'",
    ],
)  # fmt: skip
def test_sql_reads_and_does_nothing_else(query: str, two_sources: capfilt.Corpus) -> None:
    with pytest.raises(capfilt.CapfiltError):
        two_sources.sql(query)


def test_a_query_ends_in_time(two_sources: capfilt.Corpus) -> None:
    with pytest.raises(capfilt.CapfiltError, match=r"took over 0\.2 s"):
        two_sources.sql("SELECT sum(a.range) FROM range(10000000) a, range(10000000) b", timeout_s=0.2)


def test_an_answer_is_shown_as_text_and_as_html(two_sources: capfilt.Corpus) -> None:
    answer = two_sources.sql(
        "SELECT '<b>bold</b>' || chr(27) || '[31m' AS text, {'a': 1} AS parts, NULL AS nothing"
    )
    assert repr(answer).splitlines()[1].split() == ["<b>bold</b>", "[31m", "a=1", "-"]
    assert "&lt;b&gt;bold&lt;/b&gt; [31m" in answer._repr_html_() and "<b>" not in answer._repr_html_()
    assert repr(two_sources.sql("SELECT range FROM range(25)")).splitlines()[-1] == "... and 5 more rows"
    assert repr(two_sources.sql("SELECT 1 AS one, 2 AS two LIMIT 0")) == "one  two"


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_a_library_that_is_missing_is_named(
    library: str, two_sources: capfilt.Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(capfilt.CapfiltError, match=f"pip install {library}"):
        getattr(two_sources.sql("SELECT 1"), library)()


def test_samples_are_those_of_the_table(root: str) -> None:
    make_corpus(root, sources=("cc", "laion"))
    corpus = capfilt.Corpus.open(root)
    rows = corpus.sql("SELECT * FROM curated ORDER BY source, shard, key").rows()
    samples = list(corpus.samples())
    assert len(samples) == len(rows) > 0
    for sample, row in zip(samples, rows, strict=True):
        assert (sample.uid, sample.key, sample.url) == (row["uid"], row["key"], row["url"])
        assert (list(sample.captions), list(sample.scores)) == (row["captions"], row["scores"])
        assert sample.image.size == (row["width"], row["height"]) and sample.image.mode == "RGB"
    places = {(sample.source, sample.shard) for sample in corpus.samples(source="laion", shard="00001")}
    assert places == {("laion", "00001")}
    assert {sample.source for sample in corpus.samples(shard="00000")} == {"cc", "laion"}


def test_a_source_that_is_not_there_is_no_empty_one(two_sources: capfilt.Corpus) -> None:
    with pytest.raises(capfilt.CapfiltError, match=r"no curated source 'loain'; did you mean laion\?"):
        two_sources.samples(source="loain")
    with pytest.raises(capfilt.CapfiltError, match="no curated shard '00009'"):
        two_sources.samples(shard="00009")


@pytest.mark.parametrize("cut", [True, False], ids=["cut at a member", "another content"])
def test_samples_stream_up_to_a_damaged_shard(cut: bool, tmp_path: Path) -> None:
    make_corpus(str(tmp_path / "corpus"))
    corpus, storage = capfilt.Corpus.open(tmp_path / "corpus"), Storage(str(tmp_path / "corpus"))
    expected = [sample.uid for sample in corpus.samples(shard="00000")]
    path = "curated/cc/00001.tar"
    data = storage.read(path)
    storage.write(path, data[:5120] if cut else data.replace(b"caption", b"CAPTION"))
    read_uids = []
    with pytest.raises(capfilt.CapfiltError, match=path):
        for sample in corpus.samples():
            read_uids.append(sample.uid)
    assert read_uids == expected


def test_a_sample_is_shown_with_its_candidates(two_sources: capfilt.Corpus) -> None:
    row = two_sources.sql("SELECT * FROM curated WHERE source = 'cc' ORDER BY uid LIMIT 1").rows()[0]
    view = two_sources.show(row["uid"])
    assert view.image.size == (row["width"], row["height"])
    lines = repr(view).splitlines()
    assert lines[0].split() == [row["uid"], f"cc/{row['shard']}", row["url"]] and lines[1] == "kept"
    assert row["captions"][0] in lines[2] and "kept as number 1" in lines[2]
    assert len(lines) == 2 + len(view.trace["candidates"])
    html = view._repr_html_()
    assert html.count("data:image/jpeg;base64,") == 1 and html.count("font-weight: bold") == len(
        row["captions"]
    )


def test_a_sample_without_an_image_says_why(two_sources: capfilt.Corpus) -> None:
    row = two_sources.sql("SELECT * FROM samples WHERE reason = 'http_4xx' ORDER BY uid LIMIT 1").rows()[0]
    view = two_sources.show(row["uid"])
    assert view.image is None and "no image, failed, http_4xx" in repr(view)
    assert "<img" not in view._repr_html_() and "<table" not in view._repr_html_()


def test_captions_of_others_are_shown_as_text(tmp_path: Path) -> None:
    corpus = Corpus(str(tmp_path / "corpus"))
    corpus.start_run()
    corpus.add_urls("cc", ["00000"], 1, path="<i>", caption="<script>alert(1)</script>\x1b[31m")
    corpus.make("cc", "00000")
    [sample] = corpus.read("crawl", "cc", "00000")
    view = capfilt.Corpus.open(tmp_path / "corpus").show(sample["uid"])
    html = view._repr_html_()
    assert (
        "&lt;script&gt;alert(1)" in html
        and "&lt;i&gt;" in html
        and "<script" not in html
        and "<i>" not in html
    )
    assert "<script>" in repr(view) and "\x1b" not in repr(view)


def test_a_url_of_two_sources_is_shown_by_its_source(two_sources: capfilt.Corpus) -> None:
    url = "http://host0.example/00000/0.jpg"
    assert [trace["source"] for trace in two_sources.trace(url)] == ["cc", "laion"]
    assert two_sources.show(url, source="laion").trace["source"] == "laion"
    for source in (None, "other"):
        with pytest.raises(capfilt.CapfiltError, match="is listed by cc, laion"):
            two_sources.show(url, source=source)


def test_a_trace_is_what_the_command_prints(two_sources: capfilt.Corpus) -> None:
    uid = two_sources.sql("SELECT min(uid) AS uid FROM curated").rows()[0]["uid"]
    printed = cli_here("trace", two_sources.path, uid, "--json")
    assert json.loads(printed.stdout) == plain(two_sources.trace(uid))
    assert set(two_sources.trace(uid)[0]) == set(capfilt.SampleTrace.__annotations__)


def test_statistics_and_failures_are_what_the_commands_print(two_sources: capfilt.Corpus) -> None:
    assert json.loads(cli_here("stats", two_sources.path, "--json").stdout) == plain(two_sources.stats())
    printed = cli_here("failures", two_sources.path, "--json", "--source", "cc")
    assert json.loads(printed.stdout) == plain(two_sources.failures(source="cc"))


# -- a run, and the engines beside it ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(base_url: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[CapfiltConfig, Path, capfilt.Run]:
    """A corpus of 20 URLs that ``Corpus.run`` made in this process."""
    folder = tmp_path_factory.mktemp("ran")
    config = small_config(str(folder / "corpus"), folder / "urls.parquet", base_url, 20, 10)
    config = with_values(config, caption={"num_captions": 4})
    file = config_file(config, folder / "c.json")
    return config, file, capfilt.Corpus.run(file, local=True)


def test_a_run_is_that_of_the_command(ran: tuple[CapfiltConfig, Path, capfilt.Run]) -> None:
    config, file, run = ran
    assert (run.outcome, run.exit_code, run.summary["shards_done"]) == ("done", 0, 8)
    assert run.corpus.path == config.corpus.path
    assert repr(run).startswith("done: 8 shards in ") and f"run {run.run_id}" in repr(run)
    assert len(list(run.corpus.samples())) == run.summary["kept"] > 0
    printed = cli_here("run", "-c", str(file), "--local", "--json")
    again = capfilt.Corpus.run(config, local=True)
    assert {**again.summary, "run_id": "", "seconds": 0} == {
        **json.loads(printed.stdout), "run_id": "", "seconds": 0, "next": again.summary["next"]
    }  # fmt: skip
    assert repr(again).startswith("nothing to do")


def test_a_run_takes_what_the_command_takes(
    ran: tuple[CapfiltConfig, Path, capfilt.Run], tmp_path: Path
) -> None:
    _, file, _ = ran
    elsewhere = [f"corpus.path={tmp_path / 'corpus'}"]
    crawled = capfilt.Corpus.run(file, overrides=elsewhere, local=True, stages=["crawl"], limit=1)
    assert (crawled.outcome, crawled.summary["shards_done"]) == ("done", 1)
    for wrong, message in (
        ({"overrides": "select.top_k=1"}, "overrides: a list is expected"),
        ({"stages": "crawl"}, "stages: a list is expected"),
        ({"stages": []}, "stages: there is none"),
        ({"limit": 0}, "limit: 0: at least 1"),
    ):
        with pytest.raises(capfilt.CapfiltError, match=message):
            capfilt.Corpus.run(file, local=True, **wrong)
    with pytest.raises(capfilt.CapfiltError, match="stages: weigh is not of crawl, caption, rank, filter"):
        capfilt.Corpus.run(file, stages=["weigh"])
    with pytest.raises(capfilt.CapfiltError, match=r"no section \[filter\]"):
        capfilt.Corpus.run(file, stages=["filter"])
    with pytest.raises(capfilt.CapfiltError, match=r"crawl\.threads"):
        capfilt.Corpus.run(file, overrides=["crawl.threads=0"])
    with pytest.raises(capfilt.CapfiltError, match="overrides are of a config file"):
        capfilt.Corpus.run(CapfiltConfig.model_validate_json(file.read_text()), overrides=elsewhere)


@pytest.fixture(scope="module")
def images(ran: tuple[CapfiltConfig, Path, capfilt.Run]) -> dict[str, bytes]:
    """The stored images by uid."""
    return {sample.uid: sample.image_bytes for sample in ran[2].corpus.samples()}


def candidates(corpus: capfilt.Corpus, column: str) -> dict[str, list]:
    """Return a column of the synthetic candidates by uid, in their order."""
    rows = corpus.sql(
        f"SELECT uid, list({column} ORDER BY candidate) AS c FROM candidates WHERE origin = 'synthetic' GROUP BY uid"
    )
    return {row["uid"]: row["c"] for row in rows}


def test_captions_are_those_of_the_stage(
    ran: tuple[CapfiltConfig, Path, capfilt.Run], images: dict[str, bytes]
) -> None:
    config, _, run = ran
    captions = capfilt.caption(
        images.values(), uids=images, seed=config.corpus.seed, **config.caption.model_dump(exclude={"batch_size"}),
        batch_size=3,
    )  # fmt: skip
    assert dict(zip(images, captions, strict=True)) == {
        uid: texts for uid, texts in candidates(run.corpus, "text").items() if uid in images
    }


def test_scores_are_those_of_the_stage(
    ran: tuple[CapfiltConfig, Path, capfilt.Run], images: dict[str, bytes]
) -> None:
    config, _, run = ran
    texts, stored = candidates(run.corpus, "text"), candidates(run.corpus, "score")
    scores = capfilt.rank(
        images.values(), [texts[uid] for uid in images], model=config.rank.model, batch_size=3
    )
    for uid, row in zip(images, scores, strict=True):
        assert row == pytest.approx(stored[uid], abs=1e-6)


def test_an_image_has_the_same_captions_in_every_form(
    ran: tuple[CapfiltConfig, Path, capfilt.Run], images: dict[str, bytes], tmp_path: Path
) -> None:
    sample = next(ran[2].corpus.samples())
    path = tmp_path / "image.jpg"
    path.write_bytes(sample.image_bytes)
    forms = [sample.image_bytes, str(path), path, sample.image, np.asarray(sample.image)]
    options = ran[0].caption.model_dump()
    captions = capfilt.caption([*forms, b"not an image", *images.values()], **options)
    assert captions[: len(forms)] == [captions[0]] * len(forms) and len(captions[0]) == 4
    # The default identity is that of the pixels: what else is in the list has no influence.
    assert capfilt.caption([path], **options) == captions[:1]
    assert captions[len(forms)] is None
    other_seed = capfilt.caption([path], seed=1, **options)
    assert other_seed != captions[:1]
    scores = capfilt.rank([*forms, b""], [captions[0]] * 5 + [["a cat"]], model=ran[0].rank.model)
    assert scores[-1] is None and all(row == pytest.approx(scores[0], abs=1e-6) for row in scores[:5])


def test_pil_images_of_every_kind_are_captioned(ran: tuple[CapfiltConfig, Path, capfilt.Run]) -> None:
    image = next(ran[2].corpus.samples()).image
    grey_16_bit = Image.fromarray(np.asarray(image.convert("L")).astype(np.int32) * 257)
    assert grey_16_bit.mode == "I"
    kinds = [image.convert(mode) for mode in ("1", "LA", "P", "RGBA", "CMYK", "YCbCr", "F", "L")]
    captions = capfilt.caption([*kinds, grey_16_bit], **ran[0].caption.model_dump())
    assert None not in captions and captions[-1] == captions[-2]


def test_a_pil_image_is_taken_upright_and_a_damaged_one_has_no_captions(
    ran: tuple[CapfiltConfig, Path, capfilt.Run],
) -> None:
    image = next(ran[2].corpus.samples()).image
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(turned, "PNG", exif=exif)
    damaged = io.BytesIO()
    image.save(damaged, "JPEG")
    forms = [image, turned.getvalue(), Image.open(turned), Image.open(io.BytesIO(damaged.getvalue()[:900]))]
    upright, *others, last = capfilt.caption(forms, **ran[0].caption.model_dump())
    assert others == [upright, upright] and last is None


def test_a_wrong_use_is_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    for call, message in (
        (lambda: capfilt.caption([b""], modle="x"), r"caption has no option 'modle'; did you mean model\?"),
        (lambda: capfilt.caption([b""], top_p=2), "caption: top_p = 2: "),
        (lambda: capfilt.caption(b"image"), "a list of images is expected"),
        (lambda: capfilt.caption([b""], model=tmp_path), "caption.model"),
        (lambda: capfilt.rank([b""], [["a"]], model="ViT-L-41"), "not an architecture of open_clip"),
        (lambda: capfilt.rank([b""], [["a"]], rerank={"model": "x"}), "second CLIP"),
    ):
        with pytest.raises(capfilt.CapfiltError, match=message):
            call()


def test_a_wrong_list_is_told(ran: tuple[CapfiltConfig, Path, capfilt.Run], images: dict[str, bytes]) -> None:
    data, *_ = images.values()
    captioner, ranker = {"model": ran[0].caption.model}, {"model": ran[0].rank.model}
    for call, message in (
        (lambda: capfilt.caption(["nowhere.jpg"], **captioner), "nowhere.jpg: cannot be read"),
        (lambda: capfilt.caption([3], **captioner), "int is not an image"),
        (
            lambda: capfilt.caption([data], uids=["a", "b"], **captioner),
            "images and uids: their numbers differ",
        ),
        (lambda: capfilt.caption([np.zeros((0, 9, 3), np.uint8)], **captioner), "is expected"),
        (lambda: capfilt.rank([data], ["a cat"], **ranker), "not 'a cat' alone"),
        (lambda: capfilt.rank([data], [["a cat", None]], **ranker), "None is not a text"),
        (lambda: capfilt.rank([data], [["a"], ["b"]], **ranker), "images and texts: their numbers differ"),
    ):
        with pytest.raises(capfilt.CapfiltError, match=message):
            call()


def test_batches_of_ray_data_get_a_column_more(
    ran: tuple[CapfiltConfig, Path, capfilt.Run], images: dict[str, bytes]
) -> None:
    """docs/python.md has both classes in ``map_batches``, and tests/test_demo.py runs it."""
    config, _, run = ran
    batch = {
        "id": np.array([*images, "none"], object),
        "jpg": np.array([*images.values(), b"damaged"], object),
    }
    options = config.caption.model_dump()
    captioner = capfilt.Captioner(image_column="jpg", uid_column="id", captions_column="texts", **options)
    captioned = captioner(batch)
    assert list(captioned) == ["id", "jpg", "texts"] and captioned["texts"][-1] is None
    texts, stored = candidates(run.corpus, "text"), candidates(run.corpus, "score")
    assert captioned["texts"][:-1] == [texts[uid] for uid in images]
    ranked = capfilt.Ranker(image_column="jpg", captions_column="texts", model=config.rank.model)(captioned)
    assert list(ranked) == ["id", "jpg", "texts", "scores"] and ranked["scores"][-1] is None
    for uid, row in zip(images, ranked["scores"], strict=False):
        assert row == pytest.approx(stored[uid], abs=1e-6)


# -- the notebook --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_notebook_shows_what_comes(tmp_path: Path) -> None:
    notebook = ROOT / "docs" / "notebooks" / "first-corpus.ipynb"
    outputs = outputs_of(notebook, tmp_path)
    assert_shown(notebook, outputs)
    shown = [output for cell in outputs for output in cell]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 1
    assert any(
        "data:image/jpeg;base64," in "".join(output.get("data", {}).get("text/html", "")) for output in shown
    )
