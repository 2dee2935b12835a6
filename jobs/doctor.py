"""Checks whether this machine can do the job: each check says what it found and, if need be, how to fix it.

What has to be imported, which takes seconds, is imported in processes of their own at the same time: a broken build
of torch takes its interpreter with it.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from packaging.utils import canonicalize_name

from pipeline.config import dump_config
from pipeline.storage.errors import storage_error_message
from schemas.config import CapfiltConfig, SourceConfig
from schemas.errors import CapfiltError

if TYPE_CHECKING:
    from pipeline.models.weights import Weights

_MIN_FREE_BYTES = 20_000_000_000
LIBRARIES = (
    "torch",
    "torchvision",
    "transformers",
    "open_clip_torch",
    "webdataset",
    "img2dataset",
    "opencv-python-headless",
    "ray",
    "pyarrow",
    "duckdb",
)
# What workers import, how, and what to do where that fails.
_MODELS = "torch, torchvision, open_clip, transformers"
_MODELS_FIX = "the pins of constraints.txt work together"
_IMPORTS = (
    ("cv2", "import cv2", "pip install -c constraints.txt opencv-python-headless"),
    ("ray", "import ray", "pip install -c constraints.txt 'ray[default,data,train]'"),
)
WORST_FIRST = ("fail", "warn", "ok")


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One finding, and how to fix it if it is not ok. The fields are the keys of ``doctor --json``."""

    name: str
    state: Literal["ok", "warn", "fail"]
    found: str
    mend: str = ""


def run_checks(corpus: str | None, config: CapfiltConfig | None) -> list[Check]:
    """Return what every check found, worst first: machine, storage, what has to be imported, GPUs and weights."""
    with ThreadPoolExecutor(1 + len(_IMPORTS)) as pool:
        models = pool.submit(_model_checks, config)
        imports = [pool.submit(_imported, *each) for each in _IMPORTS]
        checks = [_python(), *_versions(), _dataclasses(), _scratch()]
        if root := config.corpus.path if config else corpus:
            checks.append(check_storage(root))
        if config:
            checks += _lists(config)
        checks += [*models.result(), *(each.result() for each in imports)]
    return sorted(checks, key=lambda check: WORST_FIRST.index(check.state))


def node_checks(config: CapfiltConfig, gpus: int) -> list[Check]:
    """Return what a node of a cluster is asked: libraries, devices, scratch, storage, weights. Imports no library.

    Args:
        gpus: how many the cluster says that the node has.
    """
    compiler = [check_compiler(asked=True)] if gpus else []
    return [
        _capfilt(),
        _python(),
        *_versions(),
        _devices(gpus),
        *compiler,
        _scratch(),
        check_storage(config.corpus.path),
        *_weights(config),
    ]


def _capfilt() -> Check:
    """Say which capfilt is installed here; a job brings its own along."""
    try:
        version = importlib.metadata.version("capfilt")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed: comes with each job"
    return _judged("capfilt", True, version)


def _devices(gpus: int) -> Check:
    """Compare the GPUs that the driver of a node shows with those that the cluster counts on."""
    try:
        done = _run("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
        names = done.stdout.splitlines() if done.returncode == 0 else []
    except OSError:
        names = []
    found = ", ".join(f"{names.count(name)} x {name}" for name in sorted(set(names))) or "no GPU"
    fix = f"the cluster counts on {gpus} GPUs: start this node's Ray with --num-gpus {len(names)}, or mend the driver"
    return _judged("device", len(names) >= gpus, found, fix)


def _judged(
    name: str, ok: bool, finding: str, fix: str = "", otherwise: Literal["warn", "fail"] = "fail"
) -> Check:
    """Return a check; how to fix it is said only where it is not ok."""
    return Check(name=name, state="ok" if ok else otherwise, found=finding, mend="" if ok else fix)


def _python() -> Check:
    fit = (3, 11) <= sys.version_info[:2] < (3, 13)
    fix = "use Python 3.11 or 3.12 (img2dataset imports imghdr, gone in 3.13)"
    return _judged("python", fit, platform.python_version(), fix)


def _versions() -> Iterator[Check]:
    pins = _pins()
    for library in LIBRARIES:
        try:
            version = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            yield _judged(library, False, "not installed", "pip install -c constraints.txt .")
            continue
        pinned = pins.get(canonicalize_name(library), version)
        fix = f"only {pinned} is tested: pip install -c constraints.txt {library}"
        is_pinned = version.partition("+")[0] == pinned.partition("+")[0]
        yield _judged(library, is_pinned, version, fix, "warn")


def _pins() -> dict[str, str]:
    """Return the tested versions, where the repository with its constraints.txt is at hand."""
    path = Path(__file__).resolve().parent.parent / "constraints.txt"
    if not path.exists():
        return {}
    pins = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;#]+)", path.read_text(), re.M)
    return {canonicalize_name(name): version for name, version in pins}


def _dataclasses() -> Check:
    """img2dataset installs a backport of ``dataclasses``, which breaks Python where it comes first."""
    file = dataclasses.__file__ or "frozen"
    fix = "take site-packages off PYTHONPATH, or: pip uninstall dataclasses"
    return _judged("dataclasses", "site-packages" not in file, file, fix)


def _run(*command: str, text: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}
    return subprocess.run(command, input=text, capture_output=True, text=True, env=environment, check=False)


def _python_process(code: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return _run(sys.executable, "-c", code, text=text)


def _imported(modules: str, code: str, fix: str) -> Check:
    return _import_check(modules, fix, _python_process(code))


def _import_check(modules: str, fix: str, done: subprocess.CompletedProcess[str]) -> Check:
    if done.returncode == 0:
        return _judged("import", True, modules)
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return _judged("import", False, f"{modules}: {last}", fix)


def _model_checks(config: CapfiltConfig | None) -> list[Check]:
    """Import the libraries of the models, and let the process that has them look for GPUs and at the weights."""
    code = f"import {_MODELS}\nfrom jobs.doctor import print_model_checks\nprint_model_checks()"
    done = _python_process(code, json.dumps(config and dump_config(config)))
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return [_import_check(_MODELS, _MODELS_FIX, done), *(Check(**json.loads(line)) for line in lines)]


def print_model_checks() -> None:
    """Print, one JSON object a line, the checks that need the models' libraries; standard input holds the config."""
    values = json.load(sys.stdin)
    config = CapfiltConfig.model_validate_json(json.dumps(values)) if values else None
    import torch

    gpus = ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))
    asked = bool(config and (config.cluster.caption.gpus or config.cluster.rank.gpus))
    checks = [_gpu(gpus, asked), *([check_compiler(asked)] if gpus else [])]
    for check in [*checks, *(_weights(config) if config else [])]:
        print(json.dumps(asdict(check)))


def _gpu(gpus: str, asked: bool) -> Check:
    fix = "[cluster] asks for GPUs: run on a machine, or join a Ray cluster, that has them"
    return _judged("gpu", bool(gpus) or not asked, gpus or "none on this machine", fix, "warn")


def check_compiler(asked: bool) -> Check:
    """See that Triton could build what torch.compile makes for a GPU: it needs a C compiler and Python's headers.

    Args:
        asked: the config gives workers GPUs, so that captioning and ranking would fail without.
    """
    # Triton's own order.
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    otherwise: Literal["fail", "warn"] = "fail" if asked else "warn"
    fix = "workers on a GPU use torch.compile; on every node: apt-get install gcc libc6-dev, or set CC"
    if compiler is None:
        return _judged("compiler", False, "neither gcc nor clang", fix, otherwise)
    headers = sysconfig.get_paths("posix_prefix")["include"]
    try:
        done = _run(compiler, "-fsyntax-only", f"-I{headers}", "-x", "c", "-", text="#include <Python.h>\n")
    except OSError as error:
        return _judged("compiler", False, f"{compiler}: {error.strerror}", fix, otherwise)
    if done.returncode == 0:
        return _judged("compiler", True, f"{compiler}, {headers}/Python.h")
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    fix = f"workers on a GPU use torch.compile; on every node: apt-get install {version}-dev libc6-dev"
    finding = f"{compiler}: {[*errors, f'exit code {done.returncode}'][0]}"
    return _judged("compiler", False, finding, fix, otherwise)


def _scratch() -> Check:
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    fix = "shards are made here before they are uploaded: set TMPDIR to a disk with more room"
    return _judged("scratch", free >= _MIN_FREE_BYTES, f"{free / 1e9:.0f} GB free in {folder}", fix, "warn")


def check_storage(root: str) -> Check:
    """Return the check of the corpus's storage, whatever its library raises."""
    fix = "corpus.path must be a folder or a bucket that may be written"
    return _guarded("storage", lambda: _storage(root), fix)


def _storage(root: str) -> Check:
    """Check that create-if-absent lets exactly one writer win: the commit of every shard depends on it."""
    from pipeline.storage.storage import Storage

    storage = Storage(root)
    storage.require_place("corpus.path")
    path = f".doctor-{uuid.uuid4().hex}"
    folder = Path(storage.root)
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
        return _judged("storage", True, f"{storage.root}: writable, create-if-absent works")
    fix = "this store does not honour If-None-Match: two workers could commit one shard; use another"
    return _judged("storage", False, f"{storage.root}: a second create was accepted", fix)


def _lists(config: CapfiltConfig) -> Iterator[Check]:
    from pipeline.corpus.records import Records
    from pipeline.intake.read_lists import check_lists
    from pipeline.storage.storage import Storage

    def check_source(source: SourceConfig) -> Check:
        unread = check_lists(source, config, Records(Storage(config.corpus.path)))
        return _judged(
            "lists", True, f"{source.name}: {unread:,} lists to read" if unread else f"{source.name}: read"
        )

    for source in config.source:
        yield _guarded("lists", partial(check_source, source), "")


def _weights(config: CapfiltConfig) -> list[Check]:
    """Read the weights at the same time: each waits for the hub's answer, and for its disk."""
    from pipeline.models.weights import captioner_weights, filter_weights, ranker_weights

    rank = config.rank
    asked: dict[str, Callable[[], Weights]] = {
        "captioner": lambda: captioner_weights(config.caption),
        "ranker": lambda: ranker_weights(rank.model, rank.pretrained),
    }
    if rerank := rank.rerank:
        asked["reranker"] = lambda: ranker_weights(rerank.model, rerank.pretrained, "rank.rerank")
    if section := config.filter:
        asked["filter"] = lambda: filter_weights(section)
    with ThreadPoolExecutor(len(asked)) as pool:
        return list(
            pool.map(lambda name: _guarded(name, partial(_weights_check, name, asked[name]), ""), asked)
        )


def _weights_check(name: str, load: Callable[[], "Weights"]) -> Check:
    record = load().to_record()
    return _judged(name, True, f"{record.name}, {record.parameters:,} parameters, {record.digest[:12]}")


def _guarded(name: str, check: Callable[[], Check], fix: str) -> Check:
    try:
        return check()
    except CapfiltError as error:
        return _judged(name, False, str(error), fix)
    except Exception as error:  # whatever a storage's library raises is the finding, not a fault of capfilt
        return _judged(name, False, storage_error_message(error) or f"{type(error).__name__}: {error}", fix)
