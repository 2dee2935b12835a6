"""The rooms of the house: who may import whom, and one home for each heavy library."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("schemas", "pipeline", "training", "jobs")
MAY_IMPORT = {
    "schemas": {"schemas"},
    "pipeline": {"schemas", "pipeline"},
    "training": {"schemas", "training", "pipeline"},
    "jobs": {"schemas", "pipeline", "training", "jobs"},
}
# Of the pipeline, training reads only: nothing that fetches, captions, scores or writes.
PIPELINE_READ_SIDE = ("corpus", "images", "models", "manifest", "text", "rng", "digests", "regular_files")
STAGE_FILES = {"crawl", "caption", "rank", "selection"}
# Heavy library -> the files or packages that may import it. A benchmark may also import what it compares with.
HOMES = {
    "ray": ("jobs/",),
    "typer": ("jobs/",),
    "rich": ("jobs/",),
    "img2dataset": ("pipeline/stages/crawl.py", "jobs/bench/crawl.py"),
    "duckdb": ("pipeline/manifest/manifest.py", "jobs/bench/manifest.py"),
    "open_clip": ("pipeline/models/", "training/models/vision.py", "jobs/demo/", "jobs/bench/"),
    "transformers": (
        "pipeline/models/",
        "pipeline/stages/caption.py",
        "training/",
        "jobs/demo/",
        "jobs/bench/",
    ),
    "torchao": ("pipeline/models/fp8.py",),
    "PIL": ("pipeline/images/", "jobs/demo/", "jobs/bench/"),
    "cv2": ("pipeline/images/",),
    "torchvision": ("pipeline/images/", "training/", "jobs/bench/loader.py"),
}
SCHEMAS_MAY_USE = set(sys.stdlib_module_names) | {"pydantic", "pyarrow", "schemas"}


def modules() -> list[Path]:
    return sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Return the dotted names that a file imports, wherever in it, type-checking blocks included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_file_keeps_to_its_room(path: Path) -> None:
    relative = path.relative_to(ROOT)
    room = relative.parts[0]
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "tests":
            pytest.fail(f"{relative} imports {name}")
        if top in ROOMS:
            assert top in MAY_IMPORT[room], f"{relative}: {room}/ may not import {name}"
        if room == "schemas":
            assert top in SCHEMAS_MAY_USE, f"{relative}: schemas/ may not import {name}"
        if room == "training" and top == "pipeline":
            assert rest[0] in PIPELINE_READ_SIDE, f"{relative}: training/ may not import {name}"
        if relative.parent.name == "stages" and relative.stem in STAGE_FILES and rest[:1] == ["stages"]:
            assert rest[1] not in STAGE_FILES - {relative.stem}, (
                f"{relative}: a stage imports a stage, {name}"
            )
        if top in HOMES:
            assert any(str(relative).startswith(home) for home in HOMES[top]), (
                f"{relative} may not import {top}"
            )


def test_help_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from jobs.cli.main import app; "
        "result = CliRunner().invoke(app, ['--help']); assert result.exit_code == 0, result.output; "
        "print(sorted({'torch', 'ray', 'duckdb', 'transformers', 'pyarrow'} & set(sys.modules)))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert printed.stdout.strip() == "[]"
