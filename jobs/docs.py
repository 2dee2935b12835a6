"""The generated parts of docs/ (``make docs``): what code declares is described from the code.

A page's text is written in the page; what stands between its two markers is made here. ``python -m jobs.docs CORPUS``
also asks that corpus the questions of docs/manifest.md anew, and writes the answers below them. The figures of
docs/experiments.md are those of docs/experiments/, which `capfilt experiment` wrote.
"""

import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pipeline.config_messages import section_class
from schemas.bootstrap import BootstrapConfig
from schemas.catalog.views import FUNCTIONS, PYTHON_FUNCTIONS, TABLE_MACROS, VIEWS
from schemas.config import CapfiltConfig
from schemas.pretrain import PretrainConfig
from schemas.statuses import REASONS, SAMPLE_STATUSES
from schemas.tables import TABLE_DOCS, TABLES, column_doc

FOLDER = Path(__file__).resolve().parent.parent / "docs"

_BEGIN, _END = "<!-- made by `make docs` -->", "<!-- end of what `make docs` makes -->"
# A question of docs/manifest.md, its SQL, and the answer as `capfilt sql` prints it.
_QUESTION = re.compile(r"(^### ([^\n]+)\n\n```sql\n(.+?)\n```\n\n```text\n)(.+?)(?=\n```)", re.M | re.S)

# An experiment of docs/experiments.md and what `capfilt experiment` prints, but for its last lines.
_EXPERIMENT = re.compile(
    r"(^```console\n\$ capfilt experiment (\w+) --out experiments\n)(.+?)(?=^```)", re.M | re.S
)
_MOST_ROWS = 20


def page(name: str) -> str:
    """Return a page of docs/ with what the code says now between its markers."""
    before, begin_mark, rest = (FOLDER / name).read_text(encoding="utf-8").partition(_BEGIN)
    _, end_mark, after = rest.partition(_END)
    assert begin_mark and end_mark, f"docs/{name} lacks a marker"
    return f"{before}{begin_mark}\n\n{PAGES[name]().strip()}\n\n{end_mark}{after}"


def config_tables(config: type[BaseModel]) -> str:
    """Return every section and key of a config with type, default and meaning."""
    parts: list[str] = []
    for section, headers in _sections(config).items():
        parts += ["## " + ", ".join(f"`{header}`" for header in headers), "", *_key_table(section)]
    return "\n".join(parts)


def commands() -> str:
    """Return every command with what it prints for ``--help``."""
    import typer
    from typer.testing import CliRunner

    from jobs.cli.main import app

    runner = CliRunner(env={"COLUMNS": "100", "TERMINAL_WIDTH": "100"})
    parts = []
    for words in _command_names(typer.main.get_command(app)):
        printed = runner.invoke(app, [*words, "--help"], prog_name="capfilt")
        assert printed.exit_code == 0, printed.output
        heading = "#" * (len(words) + 1)
        parts += [f"{heading} {' '.join(words)}", "", "```text", printed.output.strip(), "```", ""]
    return "\n".join(line.rstrip() for line in "\n".join(parts).splitlines())


def manifest_tables() -> str:
    """Return every table with its columns, and every view and macro."""
    parts = ["## Tables", ""]
    for table, schema in TABLES.items():
        parts += [f"### `{table}`", "", TABLE_DOCS[table], ""]
        if table == "dropped":
            assert schema == TABLES["curated"]
            parts += ["The columns are those of [`curated`](#curated).", ""]
            continue
        rows = [(f"`{field.name}`", field.type, column_doc(field)) for field in schema]
        parts += _table(("column", "type", "meaning"), rows)
    named = {
        name: doc for name, (doc, _) in {**VIEWS, **FUNCTIONS, **TABLE_MACROS}.items()
    } | PYTHON_FUNCTIONS
    views = [(f"`{name}`", doc) for name, doc in named.items()]
    return "\n".join([*parts, "## Views and macros", "", *_table(("name", "what it answers"), views)])


def statuses() -> str:
    """Return every status and reason of a sample."""
    meanings = [(f"`{status}`", meaning) for status, meaning in SAMPLE_STATUSES.items()]
    reasons = [
        (f"`{name}`", reason.status, "*t*" if reason.transient else "", reason.meaning)
        for name, reason in REASONS.items()
    ]
    return "\n".join(
        [*_table(("status", "meaning"), meanings), *_table(("reason", "status", "", "meaning"), reasons)]
    )


PAGES = {
    "cli.md": commands,
    "config.md": lambda: config_tables(CapfiltConfig),
    "pretrain.md": lambda: config_tables(PretrainConfig),
    "bootstrap.md": lambda: config_tables(BootstrapConfig),
    "manifest.md": manifest_tables,
    "crawl.md": statuses,
}


def answers() -> dict[str, str]:
    """Return the answer that docs/manifest.md has to each of its questions."""
    text = (FOLDER / "manifest.md").read_text(encoding="utf-8")
    return {question: answer for _, question, _, answer in _QUESTION.findall(text)}


def ask(corpus: str) -> dict[str, str]:
    """Return a corpus's answer to each question of docs/manifest.md, as ``capfilt sql`` prints it."""
    from jobs.output.render import print_table
    from pipeline.manifest.manifest import Manifest
    from pipeline.storage.storage import Storage

    manifest, answers = Manifest(Storage(corpus)), {}
    for _, question, sql, _ in _QUESTION.findall((FOLDER / "manifest.md").read_text(encoding="utf-8")):
        answer = manifest.query(sql)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            print_table(answer.dicts(), answer.columns)
        answers[question] = printed.getvalue().rstrip("\n")
    return answers


def experiments_page() -> str:
    """Return docs/experiments.md with the table of each experiment from docs/experiments/, where its results are."""
    text = (FOLDER / "experiments.md").read_text(encoding="utf-8")
    return _EXPERIMENT.sub(lambda match: match[1] + _experiment(match[2]), text)


def _experiment(name: str) -> str:
    from jobs.experiments.report import print_results, read_results

    results = read_results(FOLDER / "experiments" / f"{name}.json")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        print_results(results)
    lines = printed.getvalue().splitlines()
    if len(results.facts) > _MOST_ROWS:
        # A plain table has the others.
        others = {arm.name for arm in results.question.arms} - {trial.arm for trial in results.trials}
        lines = [line for line in lines if line.split()[0] not in others]
    return "\n".join([*lines, "...", ""])


def main() -> None:
    """Write every page anew; with a corpus, the answers too."""
    for name in PAGES:
        (FOLDER / name).write_text(page(name), encoding="utf-8")
        print(f"docs/{name}")
    (FOLDER / "experiments.md").write_text(experiments_page(), encoding="utf-8")
    if len(sys.argv) > 1:
        answers, path = ask(sys.argv[1]), FOLDER / "manifest.md"
        text = _QUESTION.sub(lambda match: match[1] + answers[match[2]], path.read_text(encoding="utf-8"))
        path.write_text(text, encoding="utf-8")


def _table(titles: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    """Return the lines of a Markdown table, and an empty one."""
    escaped = [[str(cell).replace("|", "\\|") for cell in row] for row in (titles, *rows)]
    lines = [f"| {' | '.join(cells)} |" for cells in escaped]
    return [lines[0], "|" + "---|" * len(titles), *lines[1:], ""]


def _command_names(group: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the words of every command, a group's own before those in it."""
    for name, command in group.commands.items():
        yield (*above, name)
        if hasattr(command, "commands"):
            yield from _command_names(command, (*above, name))


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
        (f"`{name}`", _type(info), _default(info), _meaning(info))
        for name, info in section.model_fields.items()
        if section_class(info.annotation) is None
    ]
    return [summary[:1].upper() + summary[1:], "", *_table(("key", "type", "default", "meaning"), rows)]


def _type(info: FieldInfo) -> str:
    annotation = info.annotation
    options = [part for part in get_args(annotation) if part is not type(None)]
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{json.dumps(option)}`" for option in options)
    numbers = [part for part in (annotation, *options) if get_origin(part) is dict or _is_pair(part)]
    if numbers:
        if get_origin(numbers[0]) is not dict:
            return "two numbers"
        return f"a {'text' if get_args(numbers[0])[1] is str else 'number'} for each name"
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


if __name__ == "__main__":
    main()
