"""Write the generated pages of docs/ (``make docs``): what code declares is described from the code."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from jobs.docs.crawl_page import crawl_page
from jobs.docs.manifest_page import manifest_page
from pipeline.config_messages import section_class
from schemas.config import CapfiltConfig
from schemas.pretrain import PretrainConfig

FOLDER = Path(__file__).resolve().parent.parent.parent / "docs"

_CONFIG_INTRODUCTION = """\
# Config

One TOML file describes one corpus. `make docs` writes this page from `schemas/config.py`; edit that.

- `-c FILE` names it; `--set section.key=value` replaces one key, as often as needed. A source is addressed by
  its name: `--set source.cc3m.caption_column=title`. The value is TOML, and what is no TOML is taken as text:
  `--set caption.revision=main`, but `--set 'crawl.allow_hosts=["127.0.0.1:8080"]'`.
- Unknown keys, wrong types and values out of range are refused before any work, all at once, each with its
  line and the nearest valid key.
- Relative paths in the file start at the file's folder, those in a `--set` at the current directory: of
  `corpus.path`, `source.input` and `local-dir:` models always. `caption.model` and `rank.pretrained` can be
  names too; they are paths if they start with `./`, `../`, `~` or `/`, or if such a path exists, so that
  `Salesforce/blip-image-captioning-large` stays a hub id.
- Secrets do not belong in it, since a copy is kept with every run: credentials of storage and hub come from
  the environment (`AWS_ACCESS_KEY_ID`, `GOOGLE_APPLICATION_CREDENTIALS`, `HF_TOKEN`), and a password in a URL
  is refused.
- Keys marked *free* change speed or reach, never what a sample becomes. Every other key of `[crawl]`,
  `[caption]`, `[rank]` and `[select]` enters its stage's fingerprint: change it, and the shards that exist
  are stale. A model counts by the digest of its files, not by its name.
- Recipes to start from: [demo](../jobs/recipes/demo.toml), [blip2](../jobs/recipes/blip2.toml),
  [laion-coco](../jobs/recipes/laion-coco.toml). How lists are read: [intake](intake.md).
"""


def config_page() -> str:
    """Return docs/config.md: every section and key of the config with type, default and meaning."""
    parts = [_CONFIG_INTRODUCTION]
    for section, headers in _sections(CapfiltConfig).items():
        parts += ["## " + ", ".join(f"`{header}`" for header in headers), "", *_key_table(section)]
    return "\n".join(parts)


_PRETRAIN_INTRODUCTION = """\
# Pretraining

One TOML file describes one training run: `capfilt pretrain -c recipe.toml`. `make docs` writes this page from
`schemas/pretrain.py`; edit that. Files, overrides and errors work as for a corpus ([config](config.md)).

```console
$ capfilt pretrain -c jobs/recipes/blip2-stage1-vitg.toml --dry-run  # parameters, steps, GPU-hours; needs no weights
$ capfilt pretrain -c jobs/recipes/blip2-stage1-vitg.toml            # trains; the same command goes on after any stop
$ capfilt trace demo-corpus/checkpoints/stage1/demo-stage1           # the shards, sources, runs and models behind it
$ capfilt export demo-corpus/checkpoints/stage1/demo-stage1 exported # transformers' Blip2, or a format of our own
```

- **Data.** Curated shards of one or more corpora, or WebDataset folders made by other tools. The order of samples
  depends on the list of shards (the snapshot) and the seed alone. The only state is the number of samples consumed, so
  a resumed run starts with the very next sample, on any number of ranks. Each image comes once before any comes twice;
  `weights` changes how often a source comes. Each shard is checked against its record before its samples are used.
- **Where.** On this machine: one process for each GPU, or one on the CPU. On a Ray cluster, through Ray Train, if
  `cluster.address` is set.
- **Losses** are over the global batch, independent of micro-batch size and number of ranks:
  `performance.micro_batch_size` and the number of GPUs change memory and speed, not which texts an image is compared
  with.
- **Checkpoints** are written as safetensors to `run.output`, or to the first corpus. A checkpoint counts from the
  moment its record exists; a damaged one is skipped, and the one before it is used. On a resume only *free* keys
  and locations may differ: corpora, models and checkpoints may have been moved, but shards and model files must be
  those the run began with. Each model is a row of the table `models`, identified by its digest.
- **Every loss**, ITM's accuracy, temperature, learning rate, gradient norm, samples per second, share of the GPU's
  peak and waiting time is a line of `metrics.jsonl` beside the checkpoints.
- Weights must be safetensors. If the hub has a model as `.bin` alone, convert it once: load it with transformers, if
  you trust it, save it with `save_pretrained`, and name that folder in the recipe.
- Recipes: `jobs/recipes/blip2-stage{1,2}-*.toml`, one for each published combination, and the demo's. How results are
  scored: [evaluation](evaluate.md).
"""


def pretrain_page() -> str:
    """Return docs/pretrain.md: every section and key of a training run."""
    parts = [_PRETRAIN_INTRODUCTION]
    for section, headers in _sections(PretrainConfig).items():
        parts += ["## " + ", ".join(f"`{header}`" for header in headers), "", *_key_table(section)]
    return "\n".join(parts)


_CLI_INTRODUCTION = """\
# Command line

`make docs` writes this page from what each command prints for `--help`; a test compares them.

- Commands that work on a corpus take its config, `-c FILE`; commands that read one take its folder or URL, `CORPUS`.
- Exit codes: **0** done; **1** our fault, or `verify` found a difference; **2** the user's input: a config, a path, a
  stale shard, refused before any work; **3** done in part: shards are quarantined, and named, or
  not one URL gave an image, or no image was kept (a warning says for what reason, and what mends it); **130** stopped
  by Ctrl-C (SIGINT), **143** by SIGTERM (a scheduler, a spot machine, `ray job stop`): both end in the same order, the
  run is recorded as interrupted, and the same command goes on. A second signal does not wait for workers and manifest;
  a third ends the process.
- Every command is safe to repeat, to kill and to start twice at once: what is committed is skipped.
- `--local` runs the stages in one process, a shard at a time, instead of on Ray: for a small corpus or a debugger. The
  corpus is the same; of `[cluster]`, `max_attempts`, `compact_interval_s` and whether a stage has GPUs count. From
  Python: `jobs.run.run_local(load_config("corpus.toml"), limit=1)`.
- A crawled URL is done, however it ended ([statuses and reasons](crawl.md#statuses)); `--retry WHICH` tries it again
  ([retries](intake.md#retries)).
- Messages go to standard error where `--json` is given, so that standard output is one JSON value.
- Tables fit the screen, and break no value. Text wraps at spaces; a uid, run id, path or URL is shown whole. What finds
  no room is left out, column by column, and a line below the table names it; a digest is shown by its first 12 digits.
  A single row, or rows of few columns, become records: a line for each column. In these every value is whole; one
  longer than the screen is one line all the same, so that it can be copied. `--wide` shows everything, and so do
  `--json` and a pipe: `capfilt trace CORPUS UID | less -S`.
- `capfilt --install-completion` lets the shell complete commands and options.
"""


def cli_page() -> str:
    """Return docs/cli.md: every command with what it prints for ``--help``."""
    import typer
    from typer.testing import CliRunner

    from jobs.cli.main import app

    runner = CliRunner(env={"COLUMNS": "100", "TERMINAL_WIDTH": "100"})
    parts = [_CLI_INTRODUCTION]
    for words in _command_names(typer.main.get_command(app)):
        printed = runner.invoke(app, [*words, "--help"], prog_name="capfilt")
        assert printed.exit_code == 0, printed.output
        heading = "#" * (len(words) + 1)
        parts += [f"{heading} {' '.join(words)}", "", "```text", printed.output.strip(), "```", ""]
    return "\n".join(line.rstrip() for line in "\n".join(parts).splitlines()) + "\n"


def _command_names(group: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the words of every command, a group's own before those in it."""
    for name, command in group.commands.items():
        yield (*above, name)
        if hasattr(command, "commands"):
            yield from _command_names(command, (*above, name))


PAGES = {
    "cli.md": cli_page,
    "config.md": config_page,
    "pretrain.md": pretrain_page,
    "manifest.md": manifest_page,
    "crawl.md": crawl_page,
}


def main() -> None:
    """Write every generated page."""
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")
        print(f"docs/{name}")


def _sections(section: type[BaseModel], path: str = "") -> dict[type[BaseModel], list[str]]:
    """Return the sections below one, in order, each with the TOML headers it goes by."""
    headers: dict[type[BaseModel], list[str]] = {}
    for name, info in section.model_fields.items():
        inner = section_class(info.annotation)
        if inner is None:
            continue
        header = f"{path}.{name}".removeprefix(".")
        is_list = get_origin(info.annotation) is tuple
        headers.setdefault(inner, []).append(f"[[{header}]]" if is_list else f"[{header}]")
        headers.update(_sections(inner, header))
    return headers


def _key_table(section: type[BaseModel]) -> list[str]:
    """Return a section's summary and the table of its plain keys."""
    summary = (section.__doc__ or "").splitlines()[0].rpartition("``: ")[2]
    rows = [
        f"| `{name}` | {_type(info)} | {_default(info)} | {_meaning(info)} |"
        for name, info in section.model_fields.items()
        if section_class(info.annotation) is None
    ]
    header = ["| key | type | default | meaning |", "|---|---|---|---|"]
    return [summary[:1].upper() + summary[1:], "", *header, *rows, ""]


def _type(info: FieldInfo) -> str:
    annotation = info.annotation
    options = [part for part in get_args(annotation) if part is not type(None)]
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{json.dumps(option)}`" for option in options)
    numbers = [part for part in (annotation, *options) if get_origin(part) is dict or _is_pair(part)]
    if numbers:
        return "a number for each name" if get_origin(numbers[0]) is dict else "two numbers"
    if get_origin(annotation) is tuple:
        return "list of text"
    names: dict[Any, str] = {str: "text", int: "integer", float: "number", bool: "`true` or `false`"}
    return names[options[0] if options else annotation] + _range(info)


def _is_pair(annotation: Any) -> bool:
    return (
        get_origin(annotation) is tuple and len(get_args(annotation)) == 2 and ... not in get_args(annotation)
    )


def _range(info: FieldInfo) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    limits = [
        f"{sign} {getattr(limit, name)}"
        for limit in info.metadata
        for name, sign in signs.items()
        if getattr(limit, name, None) is not None
    ]
    return f" {', '.join(limits)}" if limits else ""


def _default(info: FieldInfo) -> str:
    if info.default is PydanticUndefined:
        return "required"
    if info.default is None:
        return "none"
    return f"`{json.dumps(info.default)}`"


def _meaning(info: FieldInfo) -> str:
    is_free = isinstance(info.json_schema_extra, dict) and info.json_schema_extra.get("tuning")
    return (info.description or "") + (" (*free*)" if is_free else "")
