"""Runs a notebook, or the Python blocks of a Markdown page, without Jupyter: in order, in one process.

``python -m tests.notebooks FILE`` writes what each cell shows into the file (of a page: into the ``text`` block below
the Python block); with ``--print`` it prints that as JSON instead. Folders, ports, ids and durations, which differ from
run to run, are replaced.
"""

import argparse
import ast
import base64
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.documented import ROOT, agrees

_REPLACED = (
    (re.compile(r"127\.0\.0\.1:\d+"), "127.0.0.1:8421"),
    (re.compile(r"\b\d{8}T\d{6}-[0-9a-f]{6}\b"), "20261128T120000-c0ffee"),
    (re.compile(r" at 0x[0-9A-Fa-f]+"), ""),
    (re.compile(r" shards in [^,]+,"), " shards in 36s,"),
)
_BLOCK = re.compile(r"(^```python\n(.+?)^```\n)(\n```text\n(.*?)^```\n)?", re.M | re.S)


def sources(file: Path) -> list[str]:
    """Return the code of each cell of a notebook, or of each Python block of a page."""
    if file.suffix == ".md":
        return [block[2] for block in _BLOCK.finditer(file.read_text())]
    return ["".join(cell["source"]) for cell in _code_cells(json.loads(file.read_text()))]


def shown_text(file: Path) -> list[list[str]]:
    """Return the lines of text that a page shows below each Python block, or a notebook below each cell."""
    if file.suffix == ".md":
        return [(block[4] or "").splitlines() for block in _BLOCK.finditer(file.read_text())]
    return [text_of(cell["outputs"]) for cell in _code_cells(json.loads(file.read_text()))]


def text_of(outputs: list[dict[str, Any]]) -> list[str]:
    """Return the lines of text of a cell's outputs: what it printed, and the text of its last value."""
    texts = [output["text"] if "text" in output else output["data"]["text/plain"] for output in outputs]
    return "\n".join("".join(text).rstrip("\n") for text in texts).splitlines()


def outputs_of(file: Path, folder: Path) -> list[list[dict[str, Any]]]:
    """Run a notebook or a page in a process of its own, in a folder; return the outputs of each cell."""
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # A folder for Ray, too: a cell that starts Ray would join the cluster that another test runs on this machine.
    with tempfile.TemporaryDirectory(prefix="ray") as ray_folder:
        own = {"PYTHONPATH": str(ROOT), "PATH": binaries, "RAY_TMPDIR": ray_folder}
        done = subprocess.run(
            [sys.executable, "-m", "tests.notebooks", str(file), "--print"],
            cwd=folder, env=os.environ | own, capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_shown(file: Path, outputs: list[list[dict[str, Any]]]) -> None:
    """Assert that each cell of a file shows the text that comes, numbers within two in a hundred."""
    for source, shown, cell in zip(sources(file), shown_text(file), outputs, strict=True):
        comes = [line.rstrip() for line in text_of(cell)]
        assert len(shown) == len(comes), (source, comes)
        assert all(agrees(line.rstrip(), other, 0.02) for line, other in zip(shown, comes, strict=True)), (
            source,
            comes,
        )


def _code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run_cells(sources: list[str]) -> list[list[dict[str, Any]]]:
    """Return the outputs of each cell, in nbformat's form."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    return [_run_cell(source, namespace, count) for count, source in enumerate(sources, start=1)]


def _run_cell(source: str, namespace: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Execute a cell; its last expression is shown, as Jupyter does."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    value = None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, f"cell {count}", "exec"), namespace)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), f"cell {count}", "eval"), namespace)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": _lines(printed.getvalue())})
    if value is not None:
        outputs.append(
            {"output_type": "execute_result", "execution_count": count, "metadata": {}, "data": _data(value)}
        )
    return outputs


def _data(value: Any) -> dict[str, Any]:
    data: dict[str, Any] = {}
    if hasattr(value, "_repr_html_"):
        data["text/html"] = _lines(value._repr_html_())
    if hasattr(value, "_repr_png_"):
        data["image/png"] = base64.b64encode(value._repr_png_()).decode()
    return data | {"text/plain": _lines(repr(value))}


def _lines(text: str) -> list[str]:
    text = text.replace(str(Path.cwd()), "/home/you")
    for pattern, replacement in _REPLACED:
        text = pattern.sub(replacement, text)
    return text.splitlines(keepends=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--print", action="store_true")
    arguments = parser.parse_args()
    outputs = run_cells(sources(arguments.file))
    if arguments.print:
        print(json.dumps(outputs))
    elif arguments.file.suffix == ".md":
        comes = iter(outputs)
        arguments.file.write_text(
            _BLOCK.sub(lambda block: _with_text(block, next(comes)), arguments.file.read_text())
        )
    else:
        notebook = json.loads(arguments.file.read_text())
        for count, (cell, shown) in enumerate(zip(_code_cells(notebook), outputs, strict=True), start=1):
            cell |= {"outputs": shown, "execution_count": count}
        arguments.file.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def _with_text(block: re.Match[str], outputs: list[dict[str, Any]]) -> str:
    text = "\n".join(line.rstrip() for line in text_of(outputs))
    return f"{block[1]}\n```text\n{text}\n```\n" if text else block[1]


if __name__ == "__main__":
    main()
