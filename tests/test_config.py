"""The config file: every error named with its place and its correction, overrides, paths."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import config_digest, dump_config, load_config, parse_config
from pipeline.toml_lines import key_lines
from schemas.config import CapfiltConfig
from schemas.errors import CapfiltError
from schemas.pretrain import PretrainConfig

MINIMAL = """\
[corpus]
path = "out"

[[source]]
name = "cc3m"
input = ["cc3m.tsv"]
"""


def errors_of(text: str, *overrides: str) -> list[str]:
    with pytest.raises(CapfiltError) as error:
        parse_config(text, "corpus.toml", overrides)
    return str(error.value).splitlines()


def test_minimal_file_has_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "corpus.toml"
    file.write_text(MINIMAL)
    config = load_config(file)
    assert config.caption.num_captions == 10
    assert config.select.top_k == 2
    assert config == load_config(str(file))
    assert CapfiltConfig.model_validate(dump_config(config)) == config


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        (
            "[run]\nstage = 1\n[optim]\nsteps = 3\n[cluster]\ngpus = 8",
            CapfiltConfig,
            "this is the config of a training run, for capfilt pretrain; this command takes the config of a corpus",
        ),
        (MINIMAL, PretrainConfig, "this is the config of a corpus, for capfilt run; this command takes the"),
        ("[select]\nbest = 2", PretrainConfig, "this is the config of a corpus, for capfilt run"),
        ("", CapfiltConfig, "the file is empty; the config of a corpus has [corpus] and [[source]]"),
        ("# nothing yet\n", PretrainConfig, "the file is empty; the config of a training run has [run]"),
    ],
)
def test_a_config_of_another_command_is_one_line(text: str, kind: type, message: str) -> None:
    with pytest.raises(CapfiltError) as error:
        parse_config(text, "x.toml", kind=kind)
    assert str(error.value).startswith(f"x.toml: {message}") and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "[crawl]\nimage_sise_px = 9",
            "8: crawl.image_sise_px: unknown key; did you mean crawl.image_size_px?",
        ),
        ("[crawl]\nimage_size_px = 3", "8: crawl.image_size_px: 3 should be greater than or equal to 16"),
        ('[crawl]\nimage_size_px = "384"', '8: crawl.image_size_px: "384" is not an integer'),
        ("[crawl]\nthreads = true", "8: crawl.threads: true is not an integer"),
        ("[crawl]\nthreads = 1.5", "8: crawl.threads: 1.5 is not an integer"),
        ('[crawl]\ntimeout_s = "1"', '8: crawl.timeout_s: "1" is not a number'),
        ("[crawl]\nrobots_txt = 1", "8: crawl.robots_txt: 1 is not true or false"),
        (
            "[crawl]\nnum_captions = 3",
            "8: crawl.num_captions: unknown key; did you mean caption.num_captions?",
        ),
        (
            "[select]\nquantity = 3",
            "8: select.quantity: unknown key; [select] has top_k, by, min_match, min_score, web_caption",
        ),
        (
            '[select]\nweb_caption = "competed"',
            "8: select.web_caption: \"competed\" is not 'compete', 'never' or 'always'; "
            "did you mean compete?",
        ),
        ("[rank.rerank]\nfirst = 3", "7: rank.rerank.model: missing; as rank.model"),
        ("rank = { rerank = {first=0, model='x'} }", "7: source.cc3m.rank: unknown key; did you mean rank?"),
        ("[captions]\ntop_k = 3", "7: captions: unknown key; did you mean caption?"),
        ("wieght = 1.0\n", "7: source.cc3m.wieght: unknown key; did you mean source.weight?"),
        ("extra_columns = [\n 'a',\n 3]", "9: source.cc3m.extra_columns[1]: 3 is not text; put it in quotes"),
        (
            '[[source]]\nname = "b"\ninput = "b.csv"',
            '9: source.b.input: "b.csv" is not a list; write ["b.csv"]',
        ),
        ('[[source]]\nname = "b"\ninput = []', "9: source.b.input: needs one element at least"),
        (
            '[[source]]\nname = "a b"\ninput = ["b.csv"]',
            '8: source.a b.name: "a b" is not a name: small letters and digits, and . _ - between them',
        ),
        (
            '[[source]]\ninput = ["b.csv"]\n\n[[source]]\nname="cc3m"\ninput=["x"]',
            "7: source.#2.name: missing; unique, and never to be changed: part of every uid and of folder names",
        ),
        (
            '[[source]]\ninput = ["b.csv"]\nname="cc3m"',
            "9: source.#2.name: two [[source]] share the name 'cc3m'",
        ),
        (
            "[cluster.crawl]\nmin_workers = 3",
            "7: cluster.crawl: max_workers (1) is under min_workers (3)",
        ),
        (
            "[cluster]\ncrawl = 3",
            "8: cluster.crawl: 3 is not a section; write [cluster.crawl] and its keys below",
        ),
    ],
)
def test_an_error_is_named_with_its_line_and_its_correction(line: str, message: str) -> None:
    assert errors_of(MINIMAL + line) == [f"corpus.toml:{message}"]


def test_missing_sections_are_named() -> None:
    assert errors_of("[crawl]\n") == [
        "corpus.toml: corpus: missing",
        "corpus.toml: source: missing",
    ]
    assert errors_of('[corpus]\nseed = 1\n[source]\nname = "x"\n') == [
        "corpus.toml:1: corpus.path: missing; folder or URL (s3://bucket/prefix, gs://..., az://...) of the corpus",
        "corpus.toml:3: source: not a list of tables; write [[source]], with double brackets, and its keys "
        "below",
    ]


def test_all_errors_are_reported_in_the_order_of_the_file() -> None:
    text = (
        MINIMAL.replace("[corpus]", '[corpus]\nseed = "a"')
        + "[select]\ntop_k = 0\n[crawl]\nx = 1\nthreads = 0\n"
    )
    messages = errors_of(text, "rank.batch_size=0")
    assert [line.split(": ")[0] for line in messages] == [
        "--set rank.batch_size=0",
        *(f"corpus.toml:{n}" for n in (2, 9, 11, 12)),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[corpus]\npath = out\n", "corpus.toml:2:8: not valid TOML: Invalid value"),
        ('[corpus]\npath = "out', "corpus.toml: at its end: not valid TOML: Unterminated string"),
        ("[corpus]\n[corpus]\n", "corpus.toml:2:8: not valid TOML: Cannot declare ('corpus',) twice"),
    ],
)
def test_syntax_errors_have_line_and_column(text: str, message: str) -> None:
    assert errors_of(text) == [message]


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "corpus.toml").write_text(MINIMAL)
    with pytest.raises(
        CapfiltError, match=r"corpsu\.toml: no such config file; did you mean .*/corpus\.toml\?"
    ):
        load_config(tmp_path / "corpsu.toml")
    with pytest.raises(CapfiltError, match=r"the recipe of this name is /.*/jobs/recipes/blip2\.toml"):
        load_config(tmp_path / "jobs" / "recipes" / "blip2.toml")
    with pytest.raises(CapfiltError, match="Is a directory; a config is one TOML file"):
        load_config(tmp_path)
    (tmp_path / "latin.toml").write_bytes('[corpus]\npath = "é"'.encode("latin-1"))
    with pytest.raises(CapfiltError, match="not UTF-8 at byte 17"):
        load_config(tmp_path / "latin.toml")


_DEEP, _LONG = (
    "cannot be used: nested more than 64 levels deep",
    "cannot be used: a number has thousands of digits",
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[select]\na = " + "[" * 20_000, f"corpus.toml:2: a: {_DEEP}"),
        ("[select]\nb = " + "{x=" * 9_000, f"corpus.toml: {_DEEP}"),
        ("[select]\na = " + "[" * 100 + "]" * 100, f"corpus.toml: select: {_DEEP}"),
        (".".join("a" * 2_000) + " = 1", f"corpus.toml: a: {_DEEP}"),
        ('{"select": ' + "[" * 200_000, f"corpus.toml:1: select: {_DEEP}"),
        ("[select]\n\ntop_k = 1" + "0" * 5_000, f"corpus.toml:3: top_k: {_LONG}"),
        ("[select]\ntop_k = 0x" + "f" * 5_000, f"corpus.toml:2: select.top_k: {_LONG}"),
        ('{"select": {\n"top_k": ' + "9" * 5_000 + "}}", f"corpus.toml:2: top_k: {_LONG}"),
        (
            MINIMAL.replace('"out"', '"a\\u0000b"'),
            "corpus.toml:2: corpus.path: cannot be used: a text has a NUL character (\\u0000); take it out",
        ),
        (
            MINIMAL.replace('"cc3m.tsv"', '"x", "a\\u0000b"'),
            "corpus.toml:6: source.cc3m.input[1]: cannot be used: a text has a NUL character (\\u0000); take it out",
        ),
        (
            '{"corpus": {"path": "\\ud800"}}',
            "corpus.toml: corpus.path: cannot be used: a text has half a surrogate pair, or bytes that are not UTF-8; "
            "take it out",
        ),
    ],
)
def test_what_parsers_and_file_names_cannot_take_is_one_line(text: str, message: str) -> None:
    assert errors_of(text) == [message]


def test_a_training_run_s_output_has_no_nul() -> None:
    with pytest.raises(
        CapfiltError, match=r"^x\.toml:3: run\.output: cannot be used: a text has a NUL character"
    ):
        parse_config('[run]\nstage = 1\noutput = "a\\u0000"', "x.toml", kind=PretrainConfig)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("select.top_k=" + "[" * 20_000, _DEEP),
        ("select.top_k=" + "[" * 99 + "]" * 99, _DEEP),
        (".".join("a" * 2_000) + "=1", _DEEP),
        ("select.top_k=" + "9" * 5_000, _LONG),
        ("select.top_k=0x" + "9" * 5_000, _LONG),
        ('corpus.path="a\\u0000b"', "a text has a NUL character"),
        ("corpus.path=a\udcffb", "a text has half a surrogate pair, or bytes that are not UTF-8"),
    ],
)
def test_what_no_override_can_hold_is_one_line(override: str, reason: str) -> None:
    (message,) = errors_of(MINIMAL, override)
    assert message.startswith(f"--set {override[:12]}") and reason in message


# -- overrides -----------------------------------------------------------------------------------------------


def test_overrides_are_toml_or_text() -> None:
    config = parse_config(
        MINIMAL + '[[source]]\nname = "v1.2"\ninput = ["x"]\n',
        "corpus.toml",
        [
            "corpus.seed=7",
            "select.min_score=0.25",
            "crawl.robots_txt=true",
            "caption.model=Org/name",
            "caption.revision=1234567",
            "caption.prompt=",
            "crawl.contact=a = b",
            'crawl.allow_hosts=["127.0.0.1:80"]',
            "rank.rerank.model='RN50x64'",
            "source.cc3m.caption_column=title",
            "source.v1.2.url_column=URL",
            "corpus.seed=8",
        ],
    )
    assert (config.corpus.seed, config.select.min_score, config.crawl.robots_txt) == (8, 0.25, True)
    assert (config.caption.model, config.caption.revision, config.caption.prompt) == (
        "Org/name",
        "1234567",
        "",
    )
    assert (config.crawl.contact, config.crawl.allow_hosts) == ("a = b", ("127.0.0.1:80",))
    assert config.rank.rerank is not None
    assert config.rank.rerank.model == "RN50x64"
    assert config.source[0].caption_column == "title"
    assert config.source[1].url_column == "URL"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("select.top_k=two", '--set select.top_k=two: select.top_k: "two" is not an integer'),
        ("select.topk=2", "--set select.topk=2: select.topk: unknown key; did you mean select.top_k?"),
        ("selekt.top_k=2", "--set selekt.top_k=2: selekt: unknown key; did you mean select?"),
        ("top_k=2", "--set top_k=2: not of the form section.key=value"),
        ("select.top_k", "--set select.top_k: not of the form section.key=value"),
        (
            "source.cc12m.format=csv",
            "--set source.cc12m.format=csv: not of the form source.NAME.key=value, NAME of cc3m; "
            "did you mean cc3m?",
        ),
        (
            "source.cc3m.format=parket",
            "--set source.cc3m.format=parket: source.cc3m.format: \"parket\" is not 'auto', 'parquet', "
            "'csv', 'tsv', 'tsv-quoted', 'jsonl', 'txt', 'img2dataset', 'imagefolder', 'webdataset' or 'huggingface'; "
            "did you mean parquet?",
        ),
        (
            "crawl.allow_hosts=127.0.0.1:80",
            '--set crawl.allow_hosts=127.0.0.1:80: crawl.allow_hosts: "127.0.0.1:80" is not a list; '
            'write ["127.0.0.1:80"]',
        ),
        ("corpus.path.x=1", "--set corpus.path.x=1: corpus.path is not a section"),
    ],
)
def test_errors_of_an_override_name_the_argument(override: str, message: str) -> None:
    assert errors_of(MINIMAL, override) == [message]


def test_an_override_may_open_a_section_and_must_complete_it() -> None:
    assert errors_of(MINIMAL, "rank.rerank.first=3") == [
        "--set rank.rerank.first=3: rank.rerank.model: missing; as rank.model"
    ]


def test_an_override_corrects_an_error_of_the_file() -> None:
    text = MINIMAL + "[select]\ntop_k = 0\n"
    assert parse_config(text, "corpus.toml", ["select.top_k=1"]).select.top_k == 1


# -- paths, digest, secrets ----------------------------------------------------------------------------------


def test_relative_paths_start_at_the_file_or_at_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    (there / "captioner").mkdir(parents=True)
    (there / "clip.pt").touch()
    (there / "corpus.toml").write_text(
        MINIMAL.replace('"cc3m.tsv"', '"../lists/*.tsv", "s3://bucket/x.parquet", "/abs/x.csv"')
        + '[caption]\nmodel = "captioner"\n[rank]\nmodel = "local-dir:clip"\npretrained = "clip.pt"\n'
        + '[rank.rerank]\nmodel = "RN50x64"\npretrained = "openai"\n'
    )
    monkeypatch.chdir(here)
    config = load_config("../there/corpus.toml")
    assert config.corpus.path == str(there / "out")
    assert config.source[0].input == (str(tmp_path / "lists/*.tsv"), "s3://bucket/x.parquet", "/abs/x.csv")
    assert config.caption.model == str(there / "captioner")
    assert config.rank.model == f"local-dir:{there / 'clip'}"
    assert config.rank.pretrained == str(there / "clip.pt")
    assert config.rank.rerank is not None
    assert (config.rank.rerank.model, config.rank.rerank.pretrained) == ("RN50x64", "openai")

    overrides = [
        "corpus.path=out",
        'source.cc3m.input=["a.csv"]',
        "caption.model=captioner",
        "rank.pretrained=./x",
    ]
    config = load_config("../there/corpus.toml", overrides)
    assert config.corpus.path == str(here / "out")
    assert config.source[0].input == (str(here / "a.csv"),)
    assert config.caption.model == "captioner"  # no such folder here: a hub id
    assert config.rank.pretrained == str(here / "x")


def test_digest_is_of_the_resolved_config(tmp_path: Path) -> None:
    first = parse_config(MINIMAL, "a.toml", base_folder=tmp_path)
    assert config_digest(first) == config_digest(parse_config("# x\n" + MINIMAL, "b", base_folder=tmp_path))
    assert config_digest(first) != config_digest(parse_config(MINIMAL, "a.toml", ["corpus.seed=1"], tmp_path))


def test_passwords_are_refused_and_not_repeated() -> None:
    text = MINIMAL.replace('"cc3m.tsv"', '"a.csv", "https://me:hunter2@host/list.csv"')
    assert errors_of(text) == [
        "corpus.toml:6: source.cc3m.input[1]: a password in a URL; use environment variables instead"
    ]
    (message,) = errors_of(MINIMAL, "corpus.path=s3://key:hunter2@bucket/x")
    assert "hunter2" not in message
    assert message.startswith("--set: corpus.path: a password")


# -- lines of keys -------------------------------------------------------------------------------------------


def test_lines_of_keys_in_every_notation() -> None:
    text = '''\
a.b = 1  # [not a table]
"q.x" = """multi
[no] = "line" \\""" ok
"""
[corpus]
arr = [ 1, "a,]",
  {x = 1, y.z = [2]}, [3,
  4] ]
[[source]]
name = '#'
 [source.sub]
 k = 1979-05-27 07:32:00
[[source]]
s = \'\'\'lit
'q'\'\'\'\'
z = 1
[a.c]
'''
    assert {path: line for path, line in key_lines(text).items() if path[0] != "a"} == {
        ("q.x",): 2,
        ("corpus",): 5,
        ("corpus", "arr"): 6,
        ("corpus", "arr", 0): 6,
        ("corpus", "arr", 1): 6,
        ("corpus", "arr", 2): 6,
        ("corpus", "arr", 2, "x"): 6,
        ("corpus", "arr", 2, "y"): 6,
        ("corpus", "arr", 2, "y", "z"): 6,
        ("corpus", "arr", 2, "y", "z", 0): 6,
        ("corpus", "arr", 3): 6,
        ("corpus", "arr", 3, 0): 6,
        ("corpus", "arr", 3, 1): 6,
        ("source",): 9,
        ("source", 0): 9,
        ("source", 0, "name"): 10,
        ("source", 0, "sub"): 11,
        ("source", 0, "sub", "k"): 12,
        ("source", 1): 13,
        ("source", 1, "s"): 14,
        ("source", 1, "z"): 16,
    }
    assert key_lines(text.replace("\n", "\r\n")) == key_lines(text)


@given(
    st.lists(
        st.tuples(
            st.text(max_size=8), st.one_of(st.text(max_size=12), st.integers(), st.lists(st.text(max_size=4)))
        ),
        max_size=6,
        unique_by=lambda pair: pair[0],
    )
)
def test_every_key_of_any_table_is_found_on_its_line(pairs: list[tuple[str, object]]) -> None:
    def quoted(text: str) -> str:
        return (
            '"'
            + "".join(f"\\U{ord(c):08x}" if not 32 < ord(c) < 127 or c in '"\\' else c for c in text)
            + '"'
        )

    def value(thing: object) -> str:
        if isinstance(thing, list):
            return "[" + ", ".join(map(value, thing)) + "]"
        return quoted(thing) if isinstance(thing, str) else str(thing)

    text = "".join(f"{quoted(name)} = {value(thing)}\n" for name, thing in pairs)
    line_by_key = {path[0]: line for path, line in key_lines(text).items() if len(path) == 1}
    assert line_by_key == {name: number for number, (name, _) in enumerate(pairs, start=1)}
