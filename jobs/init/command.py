"""``capfilt init``: look, write the config, and check that the next commands take it."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

from jobs.environment import program_name
from jobs.init.config_text import PLACEHOLDER, Findings, Models, config_text, recipe_text
from jobs.init.machine import this_machine
from jobs.init.source_text import SourceText
from jobs.init.sources import describe, written_path
from pipeline.config import parse_config
from pipeline.corpus.records import Records
from pipeline.intake.read_lists import check_lists
from pipeline.models.files.hub import cache_and_offline
from pipeline.models.weights import require_model_names, uncached_models
from pipeline.runs.plan import stages_in_use
from pipeline.storage.storage import Storage
from schemas.config import CapfiltConfig
from schemas.errors import CapfiltError
from schemas.names import fits_utf8, printable
from schemas.stages import STAGES

_DEMO_WEIGHTS = Path(__file__).resolve().parent.parent / "demo" / "weights"
_DEMO_NOTE = (
    "the demo's tiny models, which know coloured shapes alone: to try the commands without a download"
)
_LOOK = "SELECT uid, caption, scores[1] AS score FROM curated LIMIT 10"
_PLACEHOLDER_SOURCE = SourceText(
    keys=(
        ("name", "mine", "unique; never change it: part of every uid"),
        ("input", [PLACEHOLDER], "files or globs, local or remote: Parquet, CSV, TSV, JSON, a URL a line"),
        ("url_column", "url", "rows without one are counted and left out"),
        ("caption_column", "caption", 'a text or a list of texts; "": none'),
    ),
    hints=(
        ("format", "imagefolder", 'images of your own; or "webdataset", "huggingface", "img2dataset"'),
        ("input", ["photos"], "instead of the three lines above"),
    ),
    facts=(f"nothing to look at yet: fill in [[source]], instead of {PLACEHOLDER}",),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class InitResult:
    """What ``init`` wrote, and what it tells: facts by label, and the commands that come next."""

    facts: dict[str, list[str]]
    commands: tuple[str, ...]


def init(
    arguments: Sequence[str],
    out: str = "corpus.toml",
    *,
    recipe: str = "",
    model: str = "",
    ranker: str = "",
    demo_weights: bool = False,
) -> InitResult:
    """Write a config for what the arguments name, or one to be filled in, and check it as a plan would.

    Args:
        arguments: folders, lists, globs or URLs, of one kind.
        out: the file to write; never one that exists.
        recipe: a recipe of jobs/recipes that the config follows.
        model: the captioner, a hub id or a folder.
        ranker: the ranker: a folder, hf-hub:ORG/NAME, or ARCHITECTURE/TAG of open_clip.
        demo_weights: name the demo's captioner and ranker.

    Raises:
        CapfiltError: an argument cannot be used, ``out`` exists, or the models cannot be had.
    """
    target = Path(out).expanduser().absolute()
    _require_new(target, out)
    base = target.parent
    source = describe(arguments, base) if arguments else _PLACEHOLDER_SOURCE
    machine, models = this_machine(), _models(model, ranker, demo_weights)
    facts = {
        "Found": list(source.facts),
        "Guessed": list(source.guessed),
        "Machine": [str(machine)],
        "Weights": [],
    }
    words = ["init", *map(shlex.quote, arguments), *(["--recipe", recipe] if recipe else [])]
    findings = Findings(
        command=printable(f"capfilt {' '.join(words)}"),
        facts=facts,
        corpus=_corpus_name(target),
        source=source,
        machine=machine,
        models=models,
    )
    has_source = bool(arguments)
    config = _checked(_text(findings, recipe, has_source), target, has_source)
    facts["Weights"] = [_DEMO_NOTE] if demo_weights else list(_weights(config))
    if recipe and not has_source:
        facts["Found"] = [f"the recipe {recipe}, whose lists are to be filled in: {_inputs(config, base)}"]
    _write(_text(findings, recipe, has_source), target, out)
    return InitResult(facts=facts, commands=tuple(_next(out, config, base)))


def _require_new(target: Path, out: str) -> None:
    if target.exists() or target.is_symlink():
        raise CapfiltError(f"{out} is there already, and is never overwritten; name another file with --out")
    if not target.parent.is_dir():
        raise CapfiltError(f"--out {out}: there is no folder {target.parent}")


def _corpus_name(target: Path) -> str:
    """Return a name for the corpus's folder beside the config that nothing has yet."""
    stem = target.stem if target.suffix else f"{target.name}-corpus"
    names = chain([stem], (f"{stem}-{number}" for number in count(2)))
    return next(name for name in names if not (target.parent / name).exists())


def _models(model: str, ranker: str, demo_weights: bool) -> Models:
    if demo_weights:
        if model or ranker:
            raise CapfiltError("--demo-weights names both models: leave out --model and --ranker")
        return Models(
            captioner=str(_DEMO_WEIGHTS / "captioner"),
            ranker=f"local-dir:{_DEMO_WEIGHTS / 'ranker'}",
            pretrained="",
            are_the_demos=True,
        )
    models = Models()
    captioner = _folder(model) or model or models.captioner
    if not ranker:
        return Models(captioner=captioner)
    if ranker.startswith(("hf-hub:", "local-dir:")):
        return Models(captioner=captioner, ranker=_anchored_ranker(ranker), pretrained="")
    if folder := _folder(ranker):
        return Models(captioner=captioner, ranker=f"local-dir:{folder}", pretrained="")
    architecture, _, tag = ranker.partition("/")
    return Models(captioner=captioner, ranker=architecture, pretrained=tag or models.pretrained)


def _folder(name: str) -> str:
    """Return the absolute path of a folder that is there, or nothing."""
    path = Path(name).expanduser()
    return str(path.absolute()) if name and path.is_dir() else ""


def _anchored_ranker(ranker: str) -> str:
    scheme, _, folder = ranker.partition(":")
    return ranker if scheme == "hf-hub" else f"local-dir:{Path(folder).expanduser().absolute()}"


def _text(findings: Findings, recipe: str, has_source: bool) -> str:
    if not recipe:
        return config_text(findings)
    source = findings.source if has_source else None
    models = findings.models if findings.models != Models() else None
    return recipe_text(recipe, findings.corpus, source, findings.machine, models)


def _checked(text: str, target: Path, has_source: bool) -> CapfiltConfig:
    """Return the config that the text means. Raises CapfiltError where a run would refuse a whole one."""
    if not fits_utf8(text):
        raise CapfiltError("a name that is not UTF-8 cannot stand in a config; rename the file or folder")
    config = parse_config(text, str(target), base_folder=target.parent)
    if has_source:
        require_model_names(config, stages_in_use(config, STAGES))
        for source in config.source:
            check_lists(source, config, Records(Storage(config.corpus.path)))
    return config


def _weights(config: CapfiltConfig) -> Iterator[str]:
    """Say which weights a run would download first, and what to do where it cannot."""
    uncached = uncached_models(config)
    if not uncached:
        yield f"{config.caption.model} and {config.rank.model}: nothing to download"
        return
    cache, is_offline = cache_and_offline()
    offline = "; HF_HUB_OFFLINE is set, so that a run would stop" if is_offline else ""
    names = " and ".join(uncached.values())
    yield f"the first run downloads {names}: {cache} does not have them{offline}"
    yield "without a network: hf download NAME where there is one, and copy that folder here; or --model and --ranker"


def _inputs(config: CapfiltConfig, base: Path) -> str:
    paths = [path for source in config.source for path in source.input]
    return ", ".join(written_path(path, base) for path in paths)


def _write(text: str, target: Path, out: str) -> None:
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        _require_new(target, out)


def _next(out: str, config: CapfiltConfig, base: Path) -> Iterator[str]:
    """Yield the three commands that come next, as they can be typed."""
    program, file = program_name(), shlex.quote(out)
    corpus = Path(config.corpus.path)
    near = corpus.relative_to(Path.cwd()) if corpus.is_relative_to(Path.cwd()) else corpus
    yield f"{program} plan -c {file}"
    yield f"{program} run -c {file}"
    yield f'{program} sql {shlex.quote(str(near))} "{_LOOK}"'
