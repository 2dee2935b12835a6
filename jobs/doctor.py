"""Checks whether this machine can do the job: each check says what it found and, if need be, how to fix it."""

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from schemas.config import CapfiltConfig
from schemas.errors import CapfiltError

if TYPE_CHECKING:
    from pipeline.models.weights import Weights

_MIN_FREE_BYTES = 20_000_000_000
_LIBRARIES = (
    "torch",
    "torchvision",
    "transformers",
    "open_clip_torch",
    "webdataset",
    "img2dataset",
    "ray",
    "pyarrow",
    "duckdb",
)
# What workers import, and how to fix an import that fails.
_IMPORTED = (
    ("torch, torchvision, open_clip, transformers", "the pins of constraints.txt work together"),
    ("img2dataset.downloader", "img2dataset needs Python <= 3.12 and the pins of constraints.txt"),
    ("ray", "pip install -c constraints.txt 'ray[default,data,train]'"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One finding, and how to fix it if it is not ok. The fields are the keys of ``doctor --json``."""

    name: str
    state: Literal["ok", "warn", "fail"]
    found: str
    mend: str = ""


def examine(
    corpus: str | None, config: CapfiltConfig | None, begin: Callable[[str], None] = lambda text: None
) -> Iterator[Check]:
    """Yield the checks one by one, quick ones first: machine, storage, weights, and what has to be imported.

    Args:
        begin: told what is about to be checked, where that takes seconds.
    """
    yield _python()
    yield from _versions()
    yield _dataclasses()
    yield _scratch()
    root = config.corpus.path if config else corpus
    if root:
        yield check_storage(root)
    for modules, fix in _IMPORTED:
        begin(f"importing {modules}, which can take a minute")
        yield _imports(modules, fix)
    begin("asking PyTorch for GPUs")
    asked = bool(config and (config.cluster.caption.gpus or config.cluster.rank.gpus))
    gpus = _gpus()
    yield _gpu(gpus, asked)
    if gpus:
        yield check_compiler(asked)
    if config:
        begin("reading the weights that the config names")
        yield from _weights(config)


def _python() -> Check:
    fit = (3, 11) <= sys.version_info[:2] < (3, 13)
    fix = "" if fit else "use Python 3.11 or 3.12 (img2dataset imports imghdr, gone in 3.13)"
    return Check(name="python", state="ok" if fit else "fail", found=platform.python_version(), mend=fix)


def _versions() -> Iterator[Check]:
    pins = _pins()
    for library in _LIBRARIES:
        try:
            version = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            yield Check(
                name=library, state="fail", found="not installed", mend="pip install -c constraints.txt ."
            )
            continue
        pinned = pins.get(_canonical(library), version)
        if version.partition("+")[0] == pinned.partition("+")[0]:
            yield Check(name=library, state="ok", found=version)
        else:
            fix = f"only {pinned} is tested: pip install -c constraints.txt {library}"
            yield Check(name=library, state="warn", found=version, mend=fix)


def _pins() -> dict[str, str]:
    """Return the tested versions, where the repository with its constraints.txt is at hand."""
    path = Path(__file__).resolve().parent.parent / "constraints.txt"
    if not path.exists():
        return {}
    pins = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;#]+)", path.read_text(), re.M)
    return {_canonical(name): version for name, version in pins}


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _dataclasses() -> Check:
    """img2dataset installs a backport of ``dataclasses``, which breaks Python where it comes first."""
    import dataclasses

    shadowed = "site-packages" in (dataclasses.__file__ or "")
    return Check(
        name="dataclasses",
        state="fail" if shadowed else "ok",
        found=dataclasses.__file__ or "frozen",
        mend="take site-packages off PYTHONPATH, or: pip uninstall dataclasses" if shadowed else "",
    )


def _imports(modules: str, fix: str) -> Check:
    """Import in a process of its own: a broken torch build takes the interpreter with it."""
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", f"import {modules}"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode == 0:
        return Check(name="import", state="ok", found=modules)
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return Check(name="import", state="fail", found=f"{modules}: {last}", mend=fix)


def _gpus() -> str:
    """Return the names of the GPUs that PyTorch sees."""
    code = "import torch; print([torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip().strip("[]").replace("'", "")


def _gpu(gpus: str, asked: bool) -> Check:
    if gpus:
        return Check(name="gpu", state="ok", found=gpus)
    return Check(
        name="gpu",
        state="warn" if asked else "ok",
        found="none on this machine",
        mend="[cluster] asks for GPUs: run on a machine, or join a Ray cluster, that has them"
        if asked
        else "",
    )


def check_compiler(asked: bool) -> Check:
    """See that Triton could build what torch.compile makes for a GPU: it needs a C compiler and Python's headers.

    Args:
        asked: the config gives workers GPUs, so that captioning and ranking would fail without.
    """
    # Triton's own order.
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    state: Literal["fail", "warn"] = "fail" if asked else "warn"
    fix = "workers on a GPU use torch.compile; on every node: apt-get install gcc libc6-dev, or set CC"
    if compiler is None:
        return Check(name="compiler", state=state, found="neither gcc nor clang", mend=fix)
    headers = sysconfig.get_paths("posix_prefix")["include"]
    try:
        done = subprocess.run(
            [compiler, "-fsyntax-only", f"-I{headers}", "-x", "c", "-"],
            input="#include <Python.h>\n",
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        return Check(name="compiler", state=state, found=f"{compiler}: {error.strerror}", mend=fix)
    if done.returncode == 0:
        return Check(name="compiler", state="ok", found=f"{compiler}, {headers}/Python.h")
    first = next(
        (line for line in done.stderr.splitlines() if "error" in line), f"exit code {done.returncode}"
    )
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    fix = f"workers on a GPU use torch.compile; on every node: apt-get install {version}-dev libc6-dev"
    return Check(name="compiler", state=state, found=f"{compiler}: {first}", mend=fix)


def _scratch() -> Check:
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    fix = "shards are made here before they are uploaded: set TMPDIR to a disk with more room"
    well = free >= _MIN_FREE_BYTES
    return Check(
        name="scratch",
        state="ok" if well else "warn",
        found=f"{free / 1e9:.0f} GB free in {folder}",
        mend="" if well else fix,
    )


def check_storage(root: str) -> Check:
    """Return the check of the corpus's storage, whatever its library raises."""
    fix = "corpus.path must be a folder or a bucket that may be written"
    return _guarded("storage", lambda: _storage(root), fix)


def _storage(root: str) -> Check:
    """Check that create-if-absent lets exactly one writer win: the commit of every shard depends on it."""
    from pipeline.corpus.storage import Storage

    storage = Storage(root)
    storage.require_place("corpus.path")
    path = f".doctor-{uuid.uuid4().hex}"
    folder = Path(storage.base)
    created = [place for place in (folder, *folder.parents) if storage.is_local and not place.exists()]
    try:
        first, second = storage.create(path, b"first"), storage.create(path, b"second")
        kept = storage.read(path)
    finally:
        storage.delete(path)
        with contextlib.suppress(OSError):  # not empty: a run has begun meanwhile
            for place in created:
                place.rmdir()
    if (first, second, kept) == (True, False, b"first"):
        return Check(name="storage", state="ok", found=f"{storage.root}: writable, create-if-absent works")
    fix = "this store does not honour If-None-Match: two workers could commit one shard; use another"
    return Check(
        name="storage", state="fail", found=f"{storage.root}: a second create was accepted", mend=fix
    )


def _weights(config: CapfiltConfig) -> Iterator[Check]:
    from pipeline.models.weights import captioner_weights, ranker_weights

    rank = config.rank
    asked: list[tuple[str, Callable[[], Weights]]] = [
        ("captioner", lambda: captioner_weights(config.caption)),
        ("ranker", lambda: ranker_weights(rank.model, rank.pretrained)),
    ]
    if rerank := rank.rerank:
        asked.append(("reranker", lambda: ranker_weights(rerank.model, rerank.pretrained, "rank.rerank")))
    for name, load in asked:
        yield _guarded(name, partial(_found_weights, name, load), "")


def _found_weights(name: str, load: Callable[[], "Weights"]) -> Check:
    record = load().to_record()
    return Check(
        name=name, state="ok", found=f"{record.name}, {record.parameters:,} parameters, {record.digest[:12]}"
    )


def _guarded(name: str, check: Callable[[], Check], fix: str) -> Check:
    try:
        return check()
    except CapfiltError as error:
        return Check(name=name, state="fail", found=str(error), mend=fix)
    except Exception as error:  # whatever a storage's library raises is the finding, not a fault of capfilt
        return Check(name=name, state="fail", found=f"{type(error).__name__}: {error}", mend=fix)
