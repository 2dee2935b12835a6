"""Who may import whom: the contracts of pyproject.toml, what ``schemas`` may use, and what ``--help`` loads."""

import subprocess
import sys
from pathlib import Path

import grimp
from importlinter import api

ROOT = Path(__file__).resolve().parent.parent
SCHEMAS_MAY_IMPORT = {"schemas", "pydantic", "pyarrow"} | sys.stdlib_module_names


def test_import_contracts_are_kept() -> None:
    # The contracts name packages of the repository: run from its root, as `make check` does.
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_package_is_under_contract() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == set(
        api.read_configuration(str(ROOT / "pyproject.toml"))["session_options"]["root_packages"]
    )


def test_schemas_use_the_standard_library_pydantic_and_pyarrow_alone() -> None:
    graph = grimp.build_graph("schemas", include_external_packages=True)
    imported = {
        (importer, name)
        for importer in graph.modules
        if importer.startswith("schemas")
        for name in graph.find_modules_directly_imported_by(importer)
    }
    assert {
        (importer, name) for importer, name in imported if name.split(".")[0] not in SCHEMAS_MAY_IMPORT
    } == set()


def test_help_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from jobs.cli.main import app; "
        "result = CliRunner().invoke(app, ['--help']); assert result.exit_code == 0, result.output; "
        "print(sorted({'torch', 'ray', 'duckdb', 'transformers', 'pyarrow', 'pydantic'} & set(sys.modules)))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert printed.stdout.strip() == "[]"
