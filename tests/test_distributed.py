"""The ranks: gathers, sums and means over two of them, and alone."""

import os

import pytest
import torch
from ranks import on_ranks

from schemas.errors import CapfiltError
from tests.listeners import addresses_by_process
from training import distributed
from training.distributed import World

pytestmark = pytest.mark.training


def collectives(world: World) -> dict[str, object]:
    distributed._BUCKET_ELEMENTS = 4
    mine = torch.arange(3.0) + 10 * world.rank
    tensors = [torch.full((2,), 1.0 + world.rank), torch.full((3, 2), 2.0 + world.rank).T, torch.tensor(5.0)]
    world.all_reduce_sum_(tensors)
    world.barrier()
    return {
        "gathered": world.all_gather(mine.requires_grad_(), [3, 3]),
        "mask": world.all_gather(torch.tensor([[True, world.rank == 0]]), [1, 1]),
        "counts": world.gather_counts(2 - world.rank),
        "uneven": world.all_gather(mine[: 2 - world.rank], [2, 1]),
        "broadcast_object": world.broadcast(mine.long()),
        "sum": world.sum(mine),
        "sums": tensors,
    }


def test_two_ranks() -> None:
    for results in on_ranks(2, collectives):
        assert results["gathered"].tolist() == [0, 1, 2, 10, 11, 12] and not results["gathered"].requires_grad
        assert results["mask"].tolist() == [[True, True], [True, False]]
        assert results["counts"] == [2, 1] and results["uneven"].tolist() == [0, 1, 10]
        assert results["broadcast_object"].tolist() == [0, 1, 2]
        assert results["sum"].tolist() == [10, 12, 14]
        assert [tensor.tolist() for tensor in results["sums"]] == [[3, 3], [[5, 5, 5], [5, 5, 5]], 10]


def listeners(world: World) -> set[str]:
    world.barrier()
    return addresses_by_process(os.getpid()).get("driver", set())


def test_ranks_of_one_machine_listen_on_loopback() -> None:
    assert set().union(*on_ranks(2, listeners)) == {"127.0.0.1"}


def agreements(world: World) -> dict[str, object]:
    def fail_on_second() -> int:
        if world.rank == 1:
            raise CapfiltError("no weights here")
        return 7

    def first_alone(text: str = "") -> int:
        assert world.rank == 0
        if text:
            raise CapfiltError(text)
        return 41

    refusals = []
    for ask in (
        lambda: world.all_or_raise(fail_on_second),
        lambda: world.broadcast_object(lambda: first_alone("no corpus")),
    ):
        with pytest.raises(CapfiltError) as refused:
            ask()
        refusals.append(str(refused.value))
    own = world.all_or_raise(lambda: 10 + world.rank)
    return {"refusals": refusals, "own": own, "first's": world.broadcast_object(first_alone)}


def test_a_refusal_of_one_rank_is_everybodys() -> None:
    for rank, results in enumerate(on_ranks(2, agreements)):
        assert results == {"refusals": ["no weights here", "no corpus"], "own": 10 + rank, "first's": 41}


def test_alone_needs_no_process_group() -> None:
    world = World.join()
    assert (world.rank, world.size, world.device.type) == (0, 1, "cpu")
    tensors = [torch.ones(2)]
    world.all_reduce_sum_(tensors)
    world.barrier()
    world.close()
    assert (world.all_or_raise(lambda: 3), world.broadcast_object(lambda: 4)) == (3, 4)
    assert tensors[0].tolist() == [1, 1]
    assert world.all_gather(tensors[0], [2]).tolist() == world.sum(tensors[0]).tolist() == [1, 1]
    assert world.broadcast(tensors[0]).tolist() == [1, 1]
