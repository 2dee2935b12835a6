"""Environment variables that Ray and the workers' libraries read, and the name under which this program is started.

``ray`` reads its variables when it is imported.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

# albumentations calls home at import, tokenizers warn after a fork.
WORKER_ENVIRONMENT = {"NO_ALBUMENTATIONS_UPDATE": "1", "TOKENIZERS_PARALLELISM": "false"}


@contextlib.contextmanager
def variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables while the block runs."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]


def send_token_if_there_is_one() -> None:
    """Turn on Ray's token authentication where there is a token; without the mode Ray's client sends none.

    Must come before ``ray`` is imported.
    """
    has_token = (
        os.environ.get("RAY_AUTH_TOKEN")
        or os.environ.get("RAY_AUTH_TOKEN_PATH")
        or (Path.home() / ".ray" / "auth_token").is_file()
    )
    if has_token:
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def ray_address(configured: str) -> str:
    """Return where the Ray to join is: Ray says it to a submitted job, else ``cluster.address``; empty for none."""
    return os.environ.get("RAY_ADDRESS", "") or configured


def program_name() -> str:
    """Return what a person types to start this program: its path where it is not on PATH."""
    if shutil.which("capfilt"):
        return "capfilt"
    script = Path(sys.executable).parent / "capfilt"
    if not script.is_file():
        return f"{sys.executable} -m jobs.cli"
    return str(script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script)
