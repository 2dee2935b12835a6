"""``capfilt look``: what the page and the file show is what SQL says, text is text, and nothing else is served."""

import functools
import re
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.bench.fixtures.s3 import S3Server
from jobs.look.page import overview_file
from jobs.look.snapshot import Snapshot
from jobs.look.view import FILTERS, PAGE_CARDS, SORTS, View
from pipeline.manifest.manifest import Manifest, Query
from pipeline.marks.marking import Verdict, mark
from pipeline.shards.shard_files import write_parquet
from pipeline.storage.scratch import temporary_folder
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError
from schemas.tables import CANDIDATES, CAPTIONS, SAMPLES_FILE
from tests.corpora import Corpus, make_corpus
from tests.hostile_texts import HOSTILE
from tests.pages import Page, Part, Site, looking
from tests.processes import cli
from tests.test_verify import replace_file

PARTS = {"funnel", "losses", "row", "chart", "hosts"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(
        str(tmp_path_factory.mktemp("look") / "corpus"),
        sources=("cc", "laion"),
        shards=2,
        images=60,
        places=True,
    )


@pytest.fixture(scope="module")
def site(corpus: Corpus):
    with looking(corpus.root) as site:
        yield site


@functools.cache
def sandbox(corpus: str) -> Query:
    """Return the connection in which ``capfilt sql`` would answer, kept open for a corpus that stays as it is."""
    query = Manifest(Storage(corpus)).open()
    query.sealed()
    return query


def answers(corpus: Corpus, sql: str, *, now: bool = False) -> list[dict]:
    """Return what ``capfilt sql`` answers; ``now``: anew, of a corpus that changes."""
    return corpus.manifest.query(sql).dicts() if now else sandbox(corpus.root).rows(sql)


def numbers_of(rows: list[dict], names: tuple[str, ...]) -> list[float]:
    return [row[name] for row in rows for name in names if row[name] is not None]


def assert_numbers_are_sqls(corpus: Corpus, part: Part) -> None:
    first = answers(corpus, part.sql[0])
    names = {
        "funnel": ("urls", "images", "captioned", "curated"),
        "losses": ("rows",),
        "row": ("samples",),
        "chart": ("count",),
        "hosts": ("images", "urls", "p95_s"),
        "grid": ("samples",),
    }
    assert part.numbers == numbers_of(first, names[part.name]), part.sql[0]


def test_every_number_of_the_first_screen_is_that_of_the_sql_beside_it(corpus: Corpus, site: Site) -> None:
    page = site.page()
    assert {part.name for part in page.parts} == PARTS
    assert [part.name for part in page.parts].count("row") == 8
    for part in page.parts:
        assert part.numbers and part.sql
        assert_numbers_are_sqls(corpus, part)


def test_the_file_shows_the_same_numbers_and_asks_for_nothing(corpus: Corpus) -> None:
    html = overview_file(Snapshot(Manifest(corpus.storage)), corpus.root, images=96)
    page = Page(html)
    for part in page.parts:
        assert_numbers_are_sqls(corpus, part)
    assert {part.name for part in page.parts} == PARTS
    assert all(link.startswith("data:image/jpeg;base64,") for link in page.links()) and len(page.links()) > 40
    assert "script" not in {tag for tag, _ in page.tags}
    assert (
        "http://" not in html.replace("http://host", "") and "https://" not in html and "@import" not in html
    )


SHOWN = [
    "",
    "source=cc",
    "source=cc&shard=00001",
    "host=host1.example",
    "status=kept&sort=-score",
    "status=failed&reason=timeout",
    "image=yes&sort=random&seed=7",
    "image=no",
    "origin=web&sort=-lead",
    "words=caption&sort=length",
    "said=web%20words&sort=margin",
    "score=0.2..0.3&sort=score",
    "web=..0.1",
    "synthetic=0.3..",
    "kept=0.25..0.26",
    "human=..",
    "lead=0..&sort=-lead",
    "margin=..0.05&sort=margin",
    "texts=..3&sort=texts",
    "length=3..",
    "lengths=4..5",
    "side=16..17&sort=-side",
    "same=yes&sort=sha256",
    "page=2",
    "sha256=none",
    "marked=yes",
    "marked=no&status=kept",
]  # fmt: skip


@pytest.mark.parametrize("query", SHOWN)
def test_a_grid_shows_the_rows_of_its_sql(corpus: Corpus, site: Site, query: str) -> None:
    page = site.page(f"grid?{query}")
    count_sql, rows_sql = page.parts[0].sql
    rows = answers(corpus, rows_sql)
    cards = [values["id"][1:] for tag, values in page.tags if tag == "article"]
    assert cards == [row["uid"] for row in rows]
    assert_numbers_are_sqls(corpus, page.parts[0])
    [counted] = answers(corpus, count_sql)
    assert len(cards) == min(PAGE_CARDS, max(0, counted["samples"] - PAGE_CARDS * ("page=2" in query)))


def test_every_filter_and_sort_is_shown_above() -> None:
    queries = "&".join(SHOWN)
    assert [name for name in FILTERS if f"{name}=" not in queries] == []
    assert [name for name in SORTS if f"sort={name}" not in queries and f"sort=-{name}" not in queries] == [
        "uid"
    ]


def test_a_card_has_all_captions_those_that_were_kept_first(corpus: Corpus, site: Site) -> None:
    page = site.page("grid?status=kept&source=cc&shard=00000")
    [row, *_] = answers(corpus, page.parts[0].sql[1])
    candidates = answers(
        corpus, f"SELECT text, score, origin FROM candidates WHERE uid = '{row['uid']}' ORDER BY score DESC"
    )
    card = page.text[page.text.index(row["status"]) :].split(row["url"])[0]
    assert all(text in card for text in {candidate["text"] for candidate in candidates})
    for number, text in enumerate(row["captions"], start=1):
        assert f"kept {number}" in card and card.index(text) < card.index(f"kept {number}")
    assert "×2" in card and "web" in card


def test_what_gave_no_image_says_why(site: Site) -> None:
    text = site.page("grid?status=failed").text
    assert "http_4xx" in text and "HTTP 404" in text and "a client error; http_status has the code" in text


def test_images_are_those_that_were_stored(corpus: Corpus, site: Site) -> None:
    addresses = [link for link in site.page("grid?image=yes").links() if "/image/" in link]
    assert len(addresses) == PAGE_CARDS
    status, headers, body = site.get(addresses[0])
    assert status == 200 and headers["Content-Type"] == "image/jpeg" and body.startswith(b"\xff\xd8\xff")


def test_a_sample_shows_its_trace(corpus: Corpus, site: Site) -> None:
    [row] = answers(corpus, "SELECT * FROM curated ORDER BY uid LIMIT 1")
    page = site.page(f"sample/{row['uid']}")
    assert row["url"] in page.text and "kept as number 1" in page.text and "blip-tiny" in page.text
    assert any(f"/image/{row['source']}/{row['shard']}/{row['key']}" in link for link in page.links())


def test_runs_are_shown_with_their_sql(corpus: Corpus, site: Site) -> None:
    text = site.page("runs").text
    assert "20260101T000000-test" in text and "FROM throughput" in text


def test_every_link_leads_to_a_page(site: Site) -> None:
    links = {
        link
        for path in ("", "grid", "runs")
        for link in site.page(path).links()
        if "/image/" not in link and not link.endswith("/mark")
    }
    assert len(links) > 40
    # Of the bars of a chart, and of the samples, one.
    one_of_each = {
        re.sub(r"[-.0-9]+\.\.[-.0-9]+|sample/\w+", "", link): link for link in sorted(links)
    }.values()
    statuses = {link: site.get(link)[0] for link in one_of_each}
    assert {link: status for link, status in statuses.items() if status != 200} == {} and len(statuses) > 20


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_what_is_not_the_page_is_refused(corpus: Corpus, site: Site) -> None:
    token = site.address.split("/")[3]
    assert len(token) >= 32
    port = site.address.split(":")[2].split("/")[0]
    assert site.get("", Host=f"evil.example:{port}")[0] == 403
    assert site.get("", Host=f"localhost:{port}")[0] == 200
    secret = Path(corpus.root).parent / "secret"
    secret.write_text("secret")
    asked = [
        "/",
        "/grid",
        "/x/",
        f"/{token[:-1]}/",
        f"/{token}x/grid",
        f"/{token}/../secret",
        f"/{token}/../../etc/passwd",
    ]
    asked += [f"/{token}/image/{name}" for name in (
        "cc/00000/nothing", "cc/99999/0000000000", "../../secret", "cc/../0000000000", "cc/00000/..",
        "%2e%2e/%2e%2e/secret", "..%2f..%2fsecret/00000/x", "cc/00000/%2e%2e%2fsecret", "cc/00000/%00",
    )]  # fmt: skip
    asked += [f"/{token}/sample/{uid}" for uid in ("..", "%27%20OR%201=1", "x" * 65)]
    answered = {path: site.get(path) for path in asked}
    assert {path: status for path, (status, _, _) in answered.items() if status != 404} == {}
    assert not any(b"secret" in body for _, _, body in answered.values())


def test_every_answer_says_what_a_page_may_load(site: Site) -> None:
    for path in ("", "grid", "style.css", "keys.js", "grid?score=x", "/nowhere"):
        headers = site.get(path)[1]
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "same-origin"


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("score=high", "is not a range"),
        ("score=0.1..0.2;DROP", "is not a range"),
        ("status=kept&sort=size", "sort=size: one of"),
        ("page=0", "a number from 1"),
        ("page=999999999", "a number from 1"),
        ("hots=x", "did you mean host?"),
        ("image=maybe", "one of yes, no"),
        (f"words={'x' * 301}", "more than 300 characters"),
    ],
)
def test_a_wrong_address_is_said(site: Site, query: str, message: str) -> None:
    status, _, body = site.get(f"grid?{query}")
    assert status == 400 and message in Page(body.decode()).text


@given(
    filters=st.dictionaries(
        st.sampled_from(["source", "host", "words", "reason"]), st.text(min_size=1, max_size=40)
    ),
    page=st.integers(1, 99),
    sort=st.sampled_from(list(SORTS)),
)
def test_the_address_holds_the_whole_state(filters: dict[str, str], page: int, sort: str) -> None:
    try:
        view = View.parse([*filters.items(), ("page", str(page)), ("sort", sort)])
    except CapfiltError:
        return
    assert View.parse(parse_qsl(view.query())) == view


# -- somebody else's texts ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Return a corpus whose every text, URL, host and detail is hostile."""
    return hostile_corpus(str(tmp_path_factory.mktemp("hostile") / "corpus"), HOSTILE)


def hostile_corpus(root: str, texts: list[str]) -> Corpus:
    corpus = make_corpus(
        root, shards=1, images=len(texts) + 12, places=True, stages=("crawl", "caption", "rank")
    )
    with temporary_folder() as folder:
        for stage, schema in (("crawl", SAMPLES_FILE), ("caption", CAPTIONS), ("rank", CANDIDATES)):
            rows = corpus.read(stage, "cc", "00000")
            for number, row in enumerate(rows):
                text = texts[number % len(texts)]
                if stage == "crawl":
                    row |= {"url": f"http://{text}/{text}", "captions": [text], "detail": text[:200]}
                else:
                    row |= {"text": text, "raw_text": text}
            path = folder / f"{stage}.parquet"
            replace_file(corpus, stage, "parquet", path, write_parquet(path, rows, schema))
    corpus.make("cc", "00000", ("select",))
    return corpus


_NEVER = {"iframe", "svg", "object", "embed", "base", "textarea", "video", "audio", "frame", "math"}


def assert_is_text(page: Page, base: str) -> None:
    tags = [tag for tag, _ in page.tags]
    assert not _NEVER & set(tags) and tags.count("script") == (base != "data:") and tags.count("style") <= 1
    for _, values in page.tags:
        assert not [
            name for name in values if name.startswith("on") or name in ("style", "srcdoc", "autofocus")
        ]
    assert [link for link in page.links() if not link.startswith((base, "data:image/jpeg;base64,"))] == []
    assert all(letter.isprintable() or letter in "\n\xa0" for letter in page.text)


def test_hostile_texts_are_text_on_every_page(hostile: Corpus) -> None:
    assert len(HOSTILE) >= 40
    with looking(hostile.root) as site:
        base = "/" + site.address.split("/")[3] + "/"
        uids = [row["uid"] for row in answers(hostile, "SELECT uid FROM samples")]
        pages = [
            site.page(path)
            for path in ("", "grid", "grid?image=no", "runs", *(f"sample/{uid}" for uid in uids[:12]))
        ]
        pages += [
            site.page("grid?" + urlencode({"words": text[:200], "host": text[:200]})) for text in HOSTILE
        ]
    for page in pages:
        assert_is_text(page, base)
    assert "<script>alert(1)</script>" in pages[1].text
    assert max(len(page.text) for page in pages) < 400_000


def test_hostile_texts_are_text_in_the_file(hostile: Corpus) -> None:
    assert_is_text(Page(overview_file(Snapshot(Manifest(hostile.storage)), hostile.root, images=96)), "data:")


# -- a large corpus ----------------------------------------------------------------------------------------------------


def test_of_a_large_corpus_a_sample_is_shown_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.look.snapshot.SAMPLED_SHARDS", 2)
    corpus = make_corpus(str(tmp_path / "corpus"), shards=8, images=12, places=True)
    with looking(corpus.root, max_images=10) as site:
        first, page = site.page(), site.page("grid?sort=score")
        assert "A sample: 2 of 8 shards" in first.text and "A sample: 2 of 8 shards" in page.text
        for part in [*first.parts, *page.parts]:
            assert_numbers_are_sqls(corpus, part)
        [everything] = [link for link in page.links() if "all=yes" in link]
        assert f"{8 * 12} samples" in site.page("grid?" + everything.partition("?")[2]).text
        assert "One shard of 8" in site.page("grid?source=cc&shard=00003").text
        selection = site.page("selection?top_k=1")
        assert "A sample: 2 of 8 shards" in selection.text and "cc1818" in selection.text.replace("\n", "")


def test_the_file_is_written_by_the_command(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    done = cli("look", corpus.root, "--html", str(tmp_path / "x.html"), "--images", "16")
    assert done.returncode == 0, done.stderr
    assert Page((tmp_path / "x.html").read_text()).parts
    wrong = cli("look", corpus.root, "--html", str(tmp_path / "no" / "x.html"))
    assert wrong.returncode == 2 and "cannot be written" in wrong.stderr


# -- on object storage -------------------------------------------------------------------------------------------------


def test_a_page_of_images_on_s3_is_a_range_read_each(s3_root: str, s3_server: S3Server) -> None:
    corpus = make_corpus(s3_root, shards=2, images=60, places=True)
    s3_server.requests.clear()

    def tars_read() -> list[str]:
        return [request.range for request in s3_server.requests if request.key.endswith(".tar")]

    with looking(corpus.root) as site:
        for part in site.page().parts:
            assert_numbers_are_sqls(corpus, part)
        images = [link for link in site.page("grid?image=yes").links() if "/image/" in link]
        assert tars_read() == []
        assert {site.get(link)[0] for link in images} == {200} and len(images) == len(
            tars_read()
        ) == PAGE_CARDS
    sizes = [
        int(end) - int(start)
        for start, end in (place.removeprefix("bytes=").split("-") for place in tars_read())
    ]
    assert max(sizes) < 2000


# -- while a run writes ------------------------------------------------------------------------------------------------


def test_the_page_follows_a_run(tmp_path: Path) -> None:
    corpus = Corpus(str(tmp_path / "corpus"), places=True)
    corpus.start_run()
    corpus.add_urls("cc", ["00000", "00001"], 12)
    with looking(corpus.root, max_age_s=0.0) as site:
        first = site.page()
        assert "A run is under way" in first.text and first.parts[0].numbers == [24.0]
        corpus.make("cc", "00000")
        assert _eventually(lambda: site.page().parts[0].numbers == [24.0, 9.0, 9.0, 9.0])
        assert "1 of 2 shards" in site.page().text
        for stage in ("crawl", "caption"):
            corpus.make("cc", "00001", (stage,))
        corpus.start_run(outcome="interrupted", shards_done=6)
        assert _eventually(lambda: site.page().parts[0].numbers == [24.0, 18.0, 18.0, 9.0])
        assert "A run is under way" not in site.page().text
        assert site.page("grid?status=ok").parts[0].numbers == [9.0]


def _eventually(holds: Callable[[], bool]) -> bool:
    """Tell whether something holds within a minute; the page is made anew in the background."""
    deadline = time.monotonic() + 60
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.1)
    return holds()


def test_a_corpus_of_an_earlier_version_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    corpus = make_corpus(str(tmp_path / "corpus"), shards=1)
    before = {info.path: info.version for info in corpus.storage.list("")}
    with looking(corpus.root) as site:
        images = [link for link in site.page("grid?image=yes").links() if "/image/" in link]
        assert len(images) == 9 and {site.get(link)[0] for link in images} == {200}
    assert {info.path: info.version for info in corpus.storage.list("")} == before


def test_an_empty_corpus_is_said(tmp_path: Path) -> None:
    corpus = Corpus(str(tmp_path / "corpus"))
    corpus.start_run(outcome="done", shards_done=0)
    with looking(corpus.root) as site:
        assert (
            "Nothing is committed yet" in site.page().text
            and "No sample is like this" in site.page("grid").text
        )
    assert "Nothing is committed yet" in overview_file(
        Snapshot(Manifest(corpus.storage)), corpus.root, images=8
    )


# -- marks -------------------------------------------------------------------------------------------------------------


def test_a_mark_is_made_and_taken_back(tmp_path: Path) -> None:
    corpus = make_corpus(str(tmp_path / "corpus"), shards=2, images=24, places=True)
    [row] = answers(corpus, "SELECT uid, source, shard, captions FROM curated ORDER BY uid LIMIT 1")
    uid = row["uid"]
    form = {name: row[name] for name in ("uid", "source", "shard")}
    holding = "SELECT what, value, caption, reason FROM marks WHERE undone_at IS NULL"
    with looking(corpus.root) as site:
        assert site.page("grid?marked=yes").parts[0].numbers == [0.0]
        status, headers, _ = site.post("mark", form | {"what": "drop", "back": "status=kept&sort=-score"})
        assert (status, headers["Location"]) == (303, f"grid?status=kept&sort=-score#u{uid}")
        assert answers(corpus, holding, now=True) == [
            {"what": "drop", "value": uid, "caption": None, "reason": "seen on the page"}
        ]
        page = site.page("grid?marked=yes")
        assert page.parts[0].numbers == [1.0] and "marked: drop" in page.text and "Take back" in page.text
        assert "marked: drop" in site.page(f"sample/{uid}").text
        assert site.post("mark", form | {"what": "drop", "undo": "yes"})[0] == 303
        assert (
            answers(corpus, holding, now=True) == [] and "marked: drop" not in site.page(f"sample/{uid}").text
        )
        other = form | {"what": "not-this-caption", "reason": "<b>wrong</b>"}
        assert site.post("mark", other)[1]["Location"] == f"sample/{uid}"
        assert answers(corpus, holding, now=True)[0]["caption"] == row["captions"][0]
        assert "<b>wrong</b>" in site.page(f"sample/{uid}").text


@pytest.mark.parametrize("named_by", ["host", "url", "sha256"])
def test_a_mark_by_another_name_is_taken_back_once_it_is_said_what_that_frees(
    tmp_path: Path, named_by: str
) -> None:
    corpus = make_corpus(str(tmp_path / "corpus"), shards=2, images=12, places=True)
    [row] = answers(
        corpus,
        "SELECT uid, source, shard, url, host, sha256 FROM cards WHERE status = 'kept' ORDER BY uid LIMIT 1",
    )
    for what, text in (("drop", "not ours"), ("not-this-caption", "a lie")):
        caption = "some words" if what == "not-this-caption" else None
        values = (row[named_by],)
        mark(
            corpus.records, Verdict(what=what, named_by=named_by, values=values, reason=text, caption=caption)
        )
    with looking(corpus.root) as site:
        marked = site.page("grid?marked=yes")
        offers = [link for link in marked.links() if f"unmark?uid={row['uid']}" in link]
        assert len(offers) == 2 == site.page(f"sample/{row['uid']}").text.count("Take back…")
        [drop] = [link for link in offers if "what=drop" in link]
        said = site.page(drop)
        assert "not ours" in said.text and "a lie" not in said.text and row[named_by] in said.text
        assert_numbers_are_sqls(corpus, said.parts[0])
        assert said.parts[0].numbers == marked.parts[0].numbers == [{"host": 8.0}.get(named_by, 1.0)]
        form = {
            values["name"]: values["value"]
            for tag, values in said.tags
            if tag == "input" and "value" in values
        }
        assert site.post("mark", form)[1]["Location"] == f"grid?marked=yes#u{row['uid']}"
        holding = answers(corpus, "SELECT what, value FROM marks WHERE undone_at IS NULL", now=True)
        assert holding == [{"what": "not-this-caption", "value": row[named_by]}]
        assert site.post("mark", form)[0] == 400 and site.get(drop)[0] == 400


def test_a_mark_from_elsewhere_is_refused(tmp_path: Path) -> None:
    corpus = make_corpus(str(tmp_path / "corpus"), shards=1, images=12, places=True)
    [form] = answers(corpus, "SELECT uid, source, shard, 'drop' AS what FROM curated ORDER BY uid LIMIT 1")
    with looking(corpus.root) as site:
        for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
            assert site.post("mark", form, Origin=origin)[0] == 403
        assert site.post("/wrong/mark", form)[0] == 404
        for wrong in (
            {"uid": "x"},
            {"what": "keep"},
            {"uid": "0" * 32},
            {"source": "..", "shard": "../records"},
        ):
            assert site.post("mark", form | wrong)[0] == 400, wrong
        assert site.post("mark", form | {"reason": "x" * 70_000})[0] == 413
    assert answers(corpus, "SELECT * FROM marks", now=True) == []


# -- another selection -------------------------------------------------------------------------------------------------


def test_another_selection_is_shown_before_it_is_made(corpus: Corpus, site: Site) -> None:
    first = site.page("selection")
    assert "capfilt select -c CONFIG --recompute --set select.top_k=2" in first.text
    [kept] = answers(corpus, "SELECT count(*) AS n FROM curated WHERE source = 'cc'")
    assert f"{kept['n']}" in first.text
    strict = site.page("selection?min_score=0.3&top_k=1&web_caption=never")
    above, below = (answers(corpus, part.sql[0]) for part in strict.parts)
    assert min(row["score"] for row in above) >= 0.3 > max(row["score"] for row in below)
    assert "below_min_score" in strict.text and "--set select.min_score=0.3" in strict.text
    assert "0.0%" in strict.text


@pytest.mark.parametrize("query", ["min_score=9", "min_score=x", "top_k=0", "web_caption=sometimes"])
def test_a_wrong_selection_is_said(site: Site, query: str) -> None:
    status, _, body = site.get(f"selection?{query}")
    assert status == 400 and "[select]" in Page(body.decode()).text
