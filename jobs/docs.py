"""Write the generated pages of docs/ (``make docs``): what code declares is described from the code."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from jobs.manifest_page import manifest_page
from pipeline.configerrors import section_class
from schemas.config import CapfiltConfig

FOLDER = Path(__file__).resolve().parent.parent / "docs"

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


_CLI_INTRODUCTION = """\
# Command line

`make docs` writes this page from what each command prints for `--help`; a test compares them.

- Commands that work on a corpus take its config, `-c FILE`; commands that read one take its folder or URL, `CORPUS`.
- Exit codes: **0** done; **1** our fault, or `verify` found a difference; **2** the user's input: a config, a path, a
  stale shard, refused before any work; **3** done in part: shards are quarantined, and named; **130** interrupted.
- Every command is safe to repeat, to kill and to start twice at once: what is committed is skipped.
- Messages go to standard error where `--json` is given, so that standard output is one JSON value.
"""


def cli_page() -> str:
    """Return docs/cli.md: every command with what it prints for ``--help``."""
    import typer
    from typer.testing import CliRunner

    from jobs.cli import app

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


PAGES = {"cli.md": cli_page, "config.md": config_page, "manifest.md": manifest_page}


def main() -> None:
    """Write every generated page."""
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")
        print(f"docs/{name}")


def _sections(section: type[BaseModel], path: str = "") -> dict[type[BaseModel], list[str]]:
    """Return the sections below one, in order, each with the TOML headers it goes by."""
    found: dict[type[BaseModel], list[str]] = {}
    for name, info in section.model_fields.items():
        inner = section_class(info.annotation)
        if inner is None:
            continue
        header = f"{path}.{name}".removeprefix(".")
        is_list = get_origin(info.annotation) is tuple
        found.setdefault(inner, []).append(f"[[{header}]]" if is_list else f"[{header}]")
        found.update(_sections(inner, header))
    return found


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
    if get_origin(annotation) is tuple:
        return "list of text"
    names: dict[Any, str] = {str: "text", int: "integer", float: "number", bool: "`true` or `false`"}
    return names[options[0] if options else annotation] + _range(info)


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


if __name__ == "__main__":
    main()
