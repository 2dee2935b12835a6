"""Ray's Jobs API: the jobs of a cluster, their logs, and their end."""

import asyncio
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import Any
from urllib.request import Request, urlopen

from jobs.environment import send_token_if_there_is_one
from schemas.errors import CapfiltError, TryAgainLaterError

_DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_PREFIX = "capfilt-"
_STOP_WAIT_S = 60.0
_OPEN_CHECK_S = 10.0


def jobs_client(address: str, headers: Sequence[str]) -> Any:
    """Return a client of the Jobs API at an address; "": RAY_API_SERVER_ADDRESS, or this machine.

    Args:
        headers: NAME=VALUE, sent with each request, as a proxy in front of the cluster may ask for.

    Raises:
        CapfiltError: a header has another form; nobody answers there, or refuses us.
    """
    sent = parse_headers(headers)
    send_token_if_there_is_one()
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    # Its progress lines (uploads, closed sockets) are not the job's.
    logging.getLogger("ray.dashboard").setLevel(logging.WARNING)
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS", "") or _DEFAULT_ADDRESS
    try:
        return JobSubmissionClient(address, headers=sent or None)
    except AuthenticationError as error:
        raise CapfiltError(
            f"--address {address}: the cluster refused us: {str(error).splitlines()[0]}; put its token into "
            "RAY_AUTH_TOKEN, or into a file that RAY_AUTH_TOKEN_PATH names"
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise CapfiltError(f"--address {address}: the Jobs API did not answer: {error}") from error


def parse_headers(given: Sequence[str]) -> dict[str, str]:
    """Return the headers that ``--header NAME=VALUE`` gives. Raises CapfiltError for another form."""
    headers = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise CapfiltError("--header: give NAME=VALUE")
        headers[name] = value
    return headers


def require_closed(client: Any) -> None:
    """Raise CapfiltError where the cluster lists its jobs to somebody who shows no token."""
    address = client.get_address()
    try:
        with urlopen(Request(f"{address}/api/jobs/"), timeout=_OPEN_CHECK_S) as answer:
            is_open = isinstance(json.load(answer), list)
    except (OSError, ValueError):  # refused, or the page of a proxy
        return
    if is_open:
        raise CapfiltError(
            f"--address {address}: the cluster takes jobs from anybody who reaches it, and a job can run any code; "
            "start its nodes with RAY_AUTH_MODE=token, or say --allow-open where the network keeps others out"
        )


def list_jobs(client: Any) -> list[dict[str, Any]]:
    """Return capfilt's jobs of a cluster, the latest first."""
    found = [job for job in client.list_jobs() if (job.submission_id or "").startswith(_PREFIX)]
    rows = [
        {
            "job": job.submission_id,
            "status": str(job.status).rpartition(".")[2],
            "corpus": (job.metadata or {}).get("corpus"),
            "started_at": _time(job.start_time),
            "ended_at": _time(job.end_time),
            "exit_code": job.driver_exit_code,
        }
        for job in found
    ]
    return sorted(rows, key=lambda row: row["started_at"] or "", reverse=True)


def stop_job(client: Any, job_id: str) -> str:
    """Have a job stop in order, as SIGTERM does; wait for its end and return its status. Raises CapfiltError."""
    info = _job_info(client, job_id)
    if info.status.is_terminal():
        raise CapfiltError(f"{job_id} ended already: {info.status}")
    client.stop_job(job_id)
    deadline = time.monotonic() + _STOP_WAIT_S
    while not info.status.is_terminal() and time.monotonic() < deadline:
        time.sleep(0.5)
        info = _job_info(client, job_id)
    return str(info.status)


def show_log(client: Any, job_id: str, follow: bool) -> int:
    """Print a job's log; with ``follow`` as it grows, and return the job's exit code, else 0."""
    _job_info(client, job_id)
    if not follow:
        print(client.get_job_logs(job_id), end="")
        return 0
    try:
        return asyncio.run(_follow(client, job_id))
    except KeyboardInterrupt:
        print(f"{job_id} goes on; `capfilt logs {job_id}` follows it again", file=sys.stderr)
        return 130


async def _follow(client: Any, job_id: str) -> int:
    """Print the job's log as it grows; return the driver's exit code."""
    import aiohttp

    printed = 0
    while True:
        try:
            received = 0
            async for lines in client.tail_job_logs(job_id):
                # After a reconnection the log comes again from its start.
                fresh = lines[max(printed - received, 0) :]
                received += len(lines)
                printed = max(printed, received)
                print(fresh, end="", flush=True)
            info = client.get_job_info(job_id)
        except (RuntimeError, aiohttp.ClientError, OSError):  # requests' errors are OSErrors
            await asyncio.sleep(2)  # the connection broke; the job may go on
            info = _job_info(client, job_id)
        if info.status.is_terminal():
            break
        await asyncio.sleep(1)
    if info.driver_exit_code is not None:
        return info.driver_exit_code
    print(f"capfilt: {job_id} ended as {info.status}: {info.message}", file=sys.stderr)
    return 0 if str(info.status) == "SUCCEEDED" else 1


def _job_info(client: Any, job_id: str) -> Any:
    try:
        return client.get_job_info(job_id)
    except (RuntimeError, OSError) as error:
        if "does not exist" in str(error):
            raise CapfiltError(f"{job_id}: the cluster has no such job; `capfilt jobs` lists them") from error
        raise TryAgainLaterError(
            f"{job_id}: the cluster does not answer any more ({error}); submit the same again to attach to the job, or "
            "to go on where it stopped"
        ) from error


def _time(milliseconds: int | None) -> str | None:
    if milliseconds is None:
        return None
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(milliseconds / 1000))
