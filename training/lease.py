"""The lease of a run's folder: of several drivers, one at a time trains a run, on local disk and object storage alike.

<run folder>/lease/00000003.json    the third holder: created only if absent, then written again as a heartbeat

The number is a fencing token. A holder that finds a higher number than its own has lost the lease: it publishes and
deletes nothing any more. Whether a holder is alive is judged by the heartbeats in the storage, and by its process where
that runs on this machine; no clock but the storage's is read.
"""

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Self

from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError
from schemas.json_record import Count, Json, Time, utc_now

_FOLDER = "lease"
_CLOCK = f"{_FOLDER}/clock"
_HEARTBEAT_S, _EXPIRES_S = 15.0, 90.0
_POLLS_A_HEARTBEAT = 8


class LostLeaseError(Exception):
    """Report that another driver has taken over the run, after this one sent no heartbeat for too long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseHolder(Json):
    """Who holds a lease.

    ``machine`` is the boot and the process namespace in which ``pid`` and ``process_start`` (clock ticks since the
    boot) name one process; empty where the system does not tell them. ``ended_at``: when it gave the lease back.
    """

    run_id: str
    host: str
    pid: Count
    machine: str
    process_start: Count
    since: Time
    ended_at: str = ""

    @classmethod
    def of_this_process(cls, run_id: str) -> Self:
        """Return the holder that this process is, from now on."""
        return cls(
            run_id=run_id,
            host=socket.gethostname(),
            pid=os.getpid(),
            machine=_machine(),
            process_start=_process_start(os.getpid()),
            since=utc_now(),
        )

    def lives(self) -> bool | None:
        """Return whether the holder's process runs; None where it is not one of this machine."""
        if not self.machine or self.machine != _machine():
            return None
        return _process_start(self.pid) == self.process_start

    def __str__(self) -> str:
        return f"process {self.pid} of {self.host}, run {self.run_id}, since {self.since[:19].replace('T', ' ')} UTC"


class Lease:
    """A lease that this process holds; a thread sends its heartbeats until ``release``.

    Args:
        storage: the run's folder.
        number: greater than that of every holder before.
        holder: this process.
        heartbeat_s: seconds between two heartbeats.
    """

    def __init__(self, storage: Storage, number: int, holder: LeaseHolder, heartbeat_s: float) -> None:
        self.number = number
        self._storage, self._holder, self._heartbeat_s = storage, holder, heartbeat_s
        self._loss = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._send_heartbeats, name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def take(
        cls,
        storage: Storage,
        run_id: str,
        *,
        above: int = 0,
        log: Callable[[str], None],
        heartbeat_s: float = _HEARTBEAT_S,
        expires_s: float = _EXPIRES_S,
    ) -> Self:
        """Take the lease of a folder, once the holder before has given it back, is dead or sends no heartbeats.

        Args:
            run_id: whose ranks these are. Its own lease is taken over at once: its driver has started the ranks again.
            above: a number that the new one must exceed.
            log: called with a line where it has to be waited for.
            expires_s: seconds without a heartbeat after which a lease may be taken over.

        Raises:
            CapfiltError: another driver trains this run.
        """
        while True:
            wait_until_free(storage, run_id, log=log, expires_s=expires_s, heartbeat_s=heartbeat_s)
            numbers = _numbers(storage)
            number = max([above, *numbers]) + 1
            holder = LeaseHolder.of_this_process(run_id)
            if storage.create(_path(number), holder.to_json().encode()):
                break
        for earlier in numbers:
            storage.delete(_path(earlier))
        return cls(storage, number, holder, heartbeat_s)

    def check(self) -> None:
        """Raise LostLeaseError if a heartbeat has found that the lease is lost; asks nothing of the storage."""
        if self._loss:
            raise LostLeaseError(self._loss)

    def is_lost(self) -> bool:
        """Return whether another driver has taken the lease: two requests."""
        newest = _newest(self._storage)
        if newest is not None and newest[0] > self.number:
            self._loss = (
                f"another process trains this run now ({newest[1]}): this one sent no heartbeat for so long that its "
                "lease was taken over. It stops, and has published and deleted nothing since"
            )
        return bool(self._loss)

    def require(self) -> None:
        """Raise LostLeaseError if the lease is lost: to be called before anything is published or deleted."""
        self.is_lost()
        self.check()

    def release(self) -> None:
        """Give the lease back, so that the next driver need not wait."""
        self._ended.set()
        self._thread.join()
        # Where the storage does not answer, the lease expires.
        with suppress(OSError):
            if not self.is_lost():
                self._write(replace(self._holder, ended_at=utc_now()))

    def _send_heartbeats(self) -> None:
        while not self._ended.wait(self._heartbeat_s):
            # A storage that does not answer takes no checkpoint either, and its clock stands for other drivers too.
            with suppress(OSError):
                if self.is_lost():
                    return
                self._write(self._holder)

    def _write(self, holder: LeaseHolder) -> None:
        self._storage.write(_path(self.number), holder.to_json().encode())


def wait_until_free(
    storage: Storage,
    run_id: str,
    *,
    log: Callable[[str], None],
    heartbeat_s: float = _HEARTBEAT_S,
    expires_s: float = _EXPIRES_S,
) -> None:
    """Return once nobody holds the lease of a folder; it is taken by nobody then either.

    A holder on another machine is watched until its next heartbeat, or until its lease expires. Raises CapfiltError
    where the holder is alive.
    """
    while (newest := _newest(storage)) is not None:
        number, holder = newest
        if holder.ended_at or holder.run_id == run_id or holder.lives() is False:
            return
        with suppress(FileNotFoundError):  # it was taken over meanwhile
            if _expires(storage, _path(number), holder, log, heartbeat_s, expires_s):
                return


def _expires(
    storage: Storage,
    path: str,
    holder: LeaseHolder,
    log: Callable[[str], None],
    heartbeat_s: float,
    expires_s: float,
) -> bool:
    """Wait until a lease expires and return True. Raises CapfiltError as soon as there is a sign of its holder."""
    last = storage.info(path)
    ends = last.modified + timedelta(seconds=expires_s)
    # Both times are the storage's: this machine's clock may differ from it.
    left_s = (ends - _now(storage)).total_seconds()
    held = (
        f"{storage.root}: another process trains this run: {holder}; its lease ends {ends:%Y-%m-%d %H:%M:%S} UTC by "
        "the storage's clock, unless it is renewed. Wait for it, or set run.name to another"
    )
    if holder.lives():
        raise CapfiltError(held)
    if left_s > 0:
        log(f"{storage.root}: {holder} may train this run; waiting {left_s:.0f} s for a sign of it")
    deadline = time.monotonic() + left_s
    while (left_s := deadline - time.monotonic()) > 0:
        time.sleep(min(left_s, heartbeat_s / _POLLS_A_HEARTBEAT))
        if storage.info(path).modified != last.modified:
            raise CapfiltError(held)
    return True


def _now(storage: Storage) -> datetime:
    """Return the storage's time: that of a file written now."""
    storage.write(_CLOCK, utc_now().encode())
    return storage.info(_CLOCK).modified


def _path(number: int) -> str:
    return f"{_FOLDER}/{number:08d}.json"


def _numbers(storage: Storage) -> list[int]:
    names = [info.path.removeprefix(f"{_FOLDER}/").removesuffix(".json") for info in storage.list(_FOLDER)]
    return [int(name) for name in names if name.isdecimal()]


def _newest(storage: Storage) -> tuple[int, LeaseHolder] | None:
    """Return the number and the holder of the last lease; None before the first. Raises CapfiltError."""
    while numbers := _numbers(storage):
        path = _path(max(numbers))
        try:
            return max(numbers), LeaseHolder.from_json(storage.read(path))
        except FileNotFoundError:
            continue  # a later holder has removed it
        except ValueError as error:
            raise CapfiltError(
                f"{storage.url(path)} is not a lease ({error}); delete it if nobody trains this run"
            ) from error
    return None


def _machine() -> str:
    """Return which boot of a machine and which process namespace this is; empty where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return ""


def _process_start(pid: int) -> int:
    """Return when a process was started, in clock ticks since the boot; 0 where it has ended."""
    try:
        # proc(5): "pid (name) state ...", where a name may contain brackets; field 3 is the state, 22 the start time.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if state in "ZX" else int(fields[18])
