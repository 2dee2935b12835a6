"""sha256 digests of files and of JSON values: how files, weights, configs and outputs are identified."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pipeline.regular_files import open_regular


def sha256_file(path: Path) -> str:
    """Return the sha256 of a local file, in hex."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # typeshed asks for more


# JSON in canonical form; one encoder, since making one takes longer than it encodes.
_canonical_json = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode


def digest_json(value: Any) -> str:
    """Return the sha256 of a JSON value in canonical form."""
    return hashlib.sha256(_canonical_json(value).encode()).hexdigest()
