"""A Ray that cannot be joined or does not start: one clear line."""

import socket
from typing import Any

import pytest
import ray

from jobs.cluster.session import joined_ray
from jobs.interrupts import Interrupts
from schemas.errors import CapfiltError

pytestmark = pytest.mark.ray


def test_an_address_without_a_cluster_is_named() -> None:
    """At once, where Ray itself tries for ten minutes."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with (
            pytest.raises(
                CapfiltError, match=f"cluster.address '{address}': cannot join Ray there: .*refused"
            ),
            Interrupts() as interrupts,
            joined_ray(address, interrupts, patience_s=0),
        ):
            pytest.fail("joined a cluster that is not there")


def test_a_node_that_is_not_up_in_time_is_no_fault_of_capfilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that other work keeps busy: Ray waits 30 seconds, and its error has no type of its own."""

    def never_up(**_: Any) -> None:
        # As Ray does.
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", never_up)
    with (
        pytest.raises(
            CapfiltError, match=r"timed out during startup\. If other work .* --local` needs no Ray"
        ),
        Interrupts() as interrupts,
        joined_ray("local", interrupts),
    ):
        pytest.fail("Ray did not start")


def test_other_errors_of_a_start_keep_their_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_broken(**_: Any) -> None:
        raise KeyError("node")

    monkeypatch.setattr(ray, "init", is_broken)
    with pytest.raises(KeyError), Interrupts() as interrupts, joined_ray("local", interrupts):
        pytest.fail("Ray did not start")
