"""The text of a corpus.toml: what was found and guessed as comments, the keys most people change with what they do."""

import json
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.init.machine import Machine, stage_resources, why_resources
from jobs.init.source_text import Key, SourceText
from schemas.config import CaptionConfig, RankConfig
from schemas.errors import CapfiltError

RECIPES = Path(__file__).resolve().parent.parent / "recipes"

_COMMENT_COLUMN, _WIDTH = 34, 100
_SHARDS_WANTED = 8
# A CPU captions about one image in three seconds: a shard should end within the hour.
_LEAST_SHARD, _CPU_SHARD, _GPU_SHARD = 100, 1_000, 10_000
# Of the demo's world: three words are a caption.
_DEMO_MIN_LENGTH = 3
PLACEHOLDER = "your-list.parquet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """The captioner and the ranker that a config names."""

    captioner: str = CaptionConfig().model
    ranker: str = RankConfig().model
    pretrained: str = RankConfig().pretrained
    are_the_demos: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What goes into a config, and the facts that its opening comment and the terminal tell."""

    command: str
    facts: Mapping[str, Sequence[str]]
    corpus: str
    source: SourceText
    machine: Machine
    models: Models = field(default_factory=Models)


def config_text(findings: Findings) -> str:
    """Return the whole file for one source."""
    sections = [
        _opening(findings),
        _corpus(findings),
        source_section(findings.source),
        _crawl(findings.source),
        *_models(findings.models),
        _SELECT,
        cluster_section(findings.machine),
    ]
    return "\n\n".join(sections) + "\n"


def recipe_names() -> list[str]:
    """Return the recipes of corpora, not those of trainings; the demo's two serve its own world."""
    recipes = [path for path in RECIPES.glob("*.toml") if path.stem.partition("-")[0] != "demo"]
    return sorted(path.stem for path in recipes if "\n[[source]]" in path.read_text())


def recipe_text(
    name: str, corpus: str, source: SourceText | None, machine: Machine, models: Models | None = None
) -> str:
    """Return a recipe for a corpus on local disk; with a source, that in place of the recipe's own and of its workers.

    Args:
        models: in place of the recipe's.

    Raises:
        CapfiltError: no such recipe.
    """
    if name not in recipe_names():
        raise CapfiltError(
            f"--recipe {name}: there is none of this name; there are {', '.join(recipe_names())}"
        )
    text = (RECIPES / f"{name}.toml").read_text(encoding="utf-8")
    opening, *sections = re.split(r"(?m)^(?=\[)", text.replace("# or a folder", "# or s3://bucket/prefix"))
    changed = {"[corpus]": {"path": corpus}}
    if models is not None:
        changed["[caption]"] = {"model": models.captioner}
        changed["[rank]"] = {"model": models.ranker, "pretrained": models.pretrained}
    for number, section in enumerate(sections):
        sections[number] = _with_values(section, changed.get(section.partition("\n")[0], {}))
    if source is not None:
        sections = [part for part in sections if not part.startswith(("[[source]]", "[cluster"))]
        sections.insert(1, source_section(source) + "\n\n")
        crawl = next(number for number, part in enumerate(sections) if part.startswith("[crawl]"))
        needed = [_key(*entry) for entry in source.crawl]
        sections[crawl] = "\n".join([sections[crawl].rstrip(), *needed]) + "\n\n"
        sections.append(cluster_section(machine) + "\n")
    return opening + "".join(sections)


def _with_values(section: str, values: Mapping[str, str]) -> str:
    """Return a section's lines with other values for some of its keys; their comments stay."""
    for name, value in values.items():
        line = f"{name} = {_value(value)}".replace("\\", r"\\")
        section = re.sub(rf'(?m)^{name} = "[^"]*"', line, section)
    return section


def _opening(findings: Findings) -> str:
    lines = [f"# A corpus, written by `{findings.command}`. Every key: docs/config.md.", "#"]
    for label, texts in findings.facts.items():
        for number, text in enumerate(texts):
            head = f"# {label if not number else '':<10}"
            lines += textwrap.wrap(
                text,
                _WIDTH,
                initial_indent=head,
                subsequent_indent=f"#{'':<11}",
                break_long_words=False,
                break_on_hyphens=False,
            )
    return "\n".join(lines)


def _corpus(findings: Findings) -> str:
    size = samples_per_shard(findings.source.samples, bool(findings.machine.gpus))
    return _section(
        "[corpus]",
        ("path", findings.corpus, "or s3://bucket/prefix, gs://bucket/prefix"),
        ("samples_per_shard", size, "what one worker does at a time; for new shards"),
    )


def samples_per_shard(samples: int | None, has_gpu: bool) -> int:
    """Return a size of shards: some for all workers, none that a CPU needs a day for."""
    most = _GPU_SHARD if has_gpu else _CPU_SHARD
    if samples is None:
        return most
    hundreds = -(-samples // (_SHARDS_WANTED * _LEAST_SHARD))
    return min(max(hundreds, 1) * _LEAST_SHARD, most)


def source_section(source: SourceText) -> str:
    """Return the lines of ``[[source]]``."""
    return _section("[[source]]", *source.keys, hints=source.hints)


def _crawl(source: SourceText) -> str:
    keys: list[Key] = [
        ("image_size_px", 384, "shorter side of a stored image; the captioner sees 384"),
        ("min_size_px", 64, "smaller images are dropped, with the reason too_small"),
        *source.crawl,
    ]
    if source.is_fetched:
        keys += [
            ("contact", "", "a page or address for the sites' owners; sent with every request"),
            ("rate_per_host", 50.0, "requests a second to one host"),
            ("robots_txt", False, "true: fetch and respect robots.txt"),
        ]
    return _section("[crawl]", *keys, hints=source.crawl_hints)


def _models(models: Models) -> Iterable[str]:
    caption: list[Key] = [
        ("model", models.captioner, "hub id or folder; `revision` pins a commit"),
        ("num_captions", 10, "sampled for an image"),
    ]
    if models.are_the_demos:
        caption.append(("min_length", _DEMO_MIN_LENGTH, "tokens; the demo's captions are short"))
    yield _section("[caption]", *caption, ("batch_size", 32, "images; more for a large GPU"))
    yield _section(
        "[rank]",
        ("model", models.ranker, "open_clip architecture, hf-hub:ORG/NAME or local-dir:FOLDER"),
        ("pretrained", models.pretrained, 'open_clip tag; "" for hf-hub: and local-dir:'),
    )


_SELECT = """\
[select]                          # costs no GPU to change: run again with --recompute
top_k = 2                         # captions kept for an image, of the sampled and its own
web_caption = "compete"           # never: only synthetic ones; always: its own on top of the top_k
# min_score = 0.2                 # drop captions below this similarity; `capfilt stats` shows them"""


def cluster_section(machine: Machine) -> str:
    """Return ``[cluster]`` for a machine, and why."""
    lines = ["[cluster]", f"# {machine}:", f"# {why_resources(machine)}"]
    for stage, values in stage_resources(machine).items():
        inside = ", ".join(f"{name} = {_value(value)}" for name, value in values.items())
        lines.append(f"{stage} = {{ {inside} }}")
    return "\n".join(lines)


def _section(header: str, *keys: Key, hints: Sequence[Key] = ()) -> str:
    """Return a section's lines; the hints are commented out."""
    return "\n".join([header, *(_key(*key) for key in keys), *map(_hint, hints)])


def _key(name: str, value: Any, comment: str) -> str:
    text = f"{name} = {_value(value)}"
    return f"{text:<{_COMMENT_COLUMN - 1}} # {comment}" if comment else text


def _hint(key: Key) -> str:
    """Return a key that is commented out."""
    name, value, comment = key
    return f"# {f'{name} = {_value(value)}':<{_COMMENT_COLUMN - 3}} # {comment}"


def _value(value: Any) -> str:
    """Return a value as TOML; JSON's texts are TOML's, but for DEL, which TOML wants escaped."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
