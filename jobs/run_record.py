"""The record of a run that begins: a corpus's or a training's."""

import secrets
import socket
from datetime import UTC, datetime

from pydantic import BaseModel

from pipeline.config import config_digest, dump_config
from pipeline.corpus.commit import library_versions
from schemas.json_record import utc_now
from schemas.records import RunRecord


def begin_run(command: str, config: BaseModel) -> RunRecord:
    """Return the record of a run that starts now, under a new id that sorts by start. Writes nothing."""
    return RunRecord(
        run_id=f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}",
        command=command,
        config=dump_config(config),
        config_digest=config_digest(config),
        started_at=utc_now(),
        host=socket.gethostname(),
        versions=library_versions(),
    )
