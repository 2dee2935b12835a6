"""The wheel holds what the repository holds: every module, recipe and weight, and nothing else."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from jobs.demo.world.site import write_url_list

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("schemas", "pipeline", "training", "jobs", "capfilt")


def shipped_files() -> set[str]:
    """Return the files of the packages, by path from the repository's root."""
    return {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the repository with the setuptools of this environment: no network."""
    folder = tmp_path_factory.mktemp("wheel")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    build = "import setuptools.build_meta as backend; backend.build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", build], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = (folder / "dist").glob("capfilt-*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(wheel_file: Path) -> ZipFile:
    return ZipFile(wheel_file)


def test_wheel_holds_every_file_of_the_packages_and_no_other(wheel: ZipFile) -> None:
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == shipped_files()
    assert {Path(name).suffix for name in packed} >= {".py", ".toml", ".safetensors"}


def test_wheel_brings_the_command_and_the_license(wheel: ZipFile) -> None:
    [info] = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    assert "capfilt = jobs.cli.main:program" in wheel.read(f"{info}/entry_points.txt").decode()
    assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


def test_every_requirement_of_the_extras_is_pinned() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras.keys() == {"dev", "fp8", "heic", "notebook"}
    pinned = {
        canonicalize_name(line.partition("==")[0])
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    wanted = {canonicalize_name(Requirement(text).name) for texts in extras.values() for text in texts}
    assert wanted - pinned == set()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_the_wheel_alone_builds_the_demo_corpus_outside_the_checkout(
    wheel_file: Path, tmp_path: Path
) -> None:
    """In an environment of its own: only what it requires comes from this one's site-packages, not the checkout."""
    place = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def run(*command: str | Path, **options: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(word) for word in command], cwd=tmp_path, env=place | options, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    run(sys.executable, "-m", "venv", "--without-pip", "venv")
    binaries = tmp_path / "venv" / "bin"
    # Before the .pth: pip would take this environment's own capfilt for an older one that is to be removed.
    install = ("install", "--quiet", "--no-index", "--no-deps", "--disable-pip-version-check", wheel_file)
    run(sys.executable, "-m", "pip", "--python", binaries / "python", *install)
    [packages] = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    required = [path for path in sys.path if Path(path).name == "site-packages"]
    (packages / "required.pth").write_text("".join(f"{path}\n" for path in required))
    asked = (
        "import schemas, pipeline, training, jobs; print(schemas.__file__, jobs.__file__, training.__file__)"
    )
    assert all(
        Path(file).is_relative_to(packages) for file in run(binaries / "python", "-c", asked).stdout.split()
    )

    # A part of its world: what is there already is kept.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    (tmp_path / "demo-corpus" / "input").mkdir(parents=True)
    write_url_list(tmp_path / "demo-corpus" / "input" / "urls.parquet", f"http://127.0.0.1:{port}", 60)
    printed = run(binaries / "capfilt", "demo", "--corpus-only", PATH="/usr/bin:/bin").stdout
    assert re.search(r"60 URLs  ->  \d+ images  ->  \d+ curated", printed)
    # What it says to try next runs as it is printed, in the folder where it was printed.
    command = printed.partition("try next:")[2].strip().splitlines()[0].split()
    assert command[0] == "venv/bin/capfilt" and "images" in run(*command).stdout


def test_torch_alone_requires_what_a_machine_without_a_gpu_leaves_out() -> None:
    """docs/install.md: the pins without CUDA's libraries and Triton are whole but for what torch asks for."""
    [pattern] = re.findall(r"grep -vE '(.+)' constraints\.txt", (ROOT / "docs" / "install.md").read_text())
    names = [line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()]
    left_out = {canonicalize_name(name) for name in names if re.search(pattern, name)}
    assert {"triton", "nvidia-nccl-cu13", "cuda-toolkit"} <= left_out and "torch" not in left_out
    asking = set()
    for name in set(map(canonicalize_name, names)) - left_out:
        with contextlib.suppress(PackageNotFoundError):  # an extra that this environment does not have
            required = map(Requirement, requires(name) or ())
            if any(canonicalize_name(each.name) in left_out and _applies(each) for each in required):
                asking.add(name)
    assert asking == {"torch"}


def _applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})
