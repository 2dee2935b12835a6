"""Environment variables that Ray and the workers' libraries read; ``ray`` itself reads them when it is imported."""

import os
from pathlib import Path

# albumentations calls home at import, tokenizers warn after a fork.
WORKER_ENVIRONMENT = {"NO_ALBUMENTATIONS_UPDATE": "1", "TOKENIZERS_PARALLELISM": "false"}


def send_token_if_there_is_one() -> None:
    """Turn on Ray's token authentication where a token lies; without the mode Ray's client sends none.

    Must come before ``ray`` is imported.
    """
    has_token = (
        os.environ.get("RAY_AUTH_TOKEN")
        or os.environ.get("RAY_AUTH_TOKEN_PATH")
        or (Path.home() / ".ray" / "auth_token").is_file()
    )
    if has_token:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
