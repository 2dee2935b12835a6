"""Collective operations of a run's ranks: one process each, one GPU each where there are GPUs.

Every rank calls the methods of ``World``, in the same order. None of them carries a gradient.
"""

import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch import distributed as dist

from schemas.errors import CapfiltError

T = TypeVar("T")

# Elements of one all-reduce: large enough for full bandwidth, far smaller than a copy of the model.
_BUCKET_ELEMENTS = 32 * 2**20

# How long ranks wait for one that indexes shards for the first time or downloads weights. A rank that died is noticed
# at once, since its connection closes.
_PREPARATION_TIMEOUT = timedelta(days=1)

_LOOPBACK = "127.0.0.1"


def rank_rows(batch_size: int, rank: int, size: int) -> slice:
    """Return the rows of a batch that one of ``size`` ranks takes, in order of rank: the first ranks one row more.

    Raises CapfiltError where there are more ranks than rows.
    """
    if batch_size < size:
        raise CapfiltError(
            f"optim.batch_size: {batch_size} images are too few for {size} ranks, each of which takes one at least; "
            f"set cluster.gpus (or cpu_ranks) to {batch_size} or less"
        )
    # batch_size = fewest * size + more: ranks 0 .. more - 1 take fewest + 1 rows.
    fewest, more = divmod(batch_size, size)
    start = rank * fewest + min(rank, more)
    return slice(start, start + fewest + (rank < more))


def _loopback_store(timeout: timedelta) -> dist.TCPStore:
    """Return the rendezvous store of one machine's ranks, on loopback only; torch's own listens on all interfaces."""
    port, is_first = int(os.environ["MASTER_PORT"]), os.environ["RANK"] == "0"
    try:
        # The store takes ownership of the descriptor.
        descriptor = socket.create_server((_LOOPBACK, port)).detach() if is_first else None
    except OSError as error:
        raise dist.DistNetworkError(f"{_LOOPBACK}:{port}: {error}") from error
    return dist.TCPStore(
        _LOOPBACK,
        port,
        int(os.environ["WORLD_SIZE"]),
        is_first,
        timeout,
        wait_for_workers=False,
        master_listen_fd=descriptor,
    )


class World:
    """All ranks, seen from one of them. A single rank needs no process group.

    Args:
        device: this rank's.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        grouped = dist.is_available() and dist.is_initialized()
        self.device = torch.device(device)
        self.rank = dist.get_rank() if grouped else 0
        self.size = dist.get_world_size() if grouped else 1

    @classmethod
    def join(cls, device: torch.device | str = "cpu", timeout_s: float = 600.0) -> "World":
        """Join the process group that the launcher described in RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."""
        device = torch.device(device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            timeout = timedelta(seconds=timeout_s)
            # torchrun's agent has a store of its own there.
            is_served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            on_this_machine = os.environ["MASTER_ADDR"] == _LOOPBACK and not is_served
            dist.init_process_group(
                backend,
                store=_loopback_store(timeout) if on_this_machine else None,
                rank=int(os.environ["RANK"]),
                world_size=int(os.environ["WORLD_SIZE"]),
                timeout=timeout,
                device_id=device if device.type == "cuda" else None,
            )
        return cls(device)

    def close(self) -> None:
        """Close the process group, if there is one."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def all_or_raise(self, do: Callable[[], T]) -> T:
        """Return what ``do`` returns on this rank, once it has returned on all ranks.

        Raises CapfiltError on every rank if it is raised on one: so no rank waits in a later collective that another
        never reaches.
        """
        own_error: CapfiltError | None = None
        try:
            result = do()
        except CapfiltError as error:
            if self.size == 1:
                raise
            own_error = error
        messages = self.gather_objects(own_error and str(own_error))
        if own_error is not None:
            raise own_error
        if errors := [message for message in messages if message is not None]:
            raise CapfiltError(errors[0])
        return result

    def broadcast_object(self, find: Callable[[], T]) -> T:
        """Return on every rank what ``find`` returns on rank 0, which alone calls it.

        Raises CapfiltError on every rank if rank 0 does.
        """
        value = self.all_or_raise(find if self.rank == 0 else lambda: None)
        return self.gather_objects(cast(T, value))[0]

    def gather_objects(self, value: T) -> list[T]:
        """Return an object of each rank, in order; slow, since it needs a process group of its own."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        group = dist.new_group(backend="gloo", timeout=_PREPARATION_TIMEOUT)
        dist.all_gather_object(values, value, group=group)
        dist.destroy_process_group(group)
        return values

    def part(self, count: int) -> slice:
        """Return which of ``count`` items are this rank's, none where they are too few; parts follow each other."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def gather_parts(self, part: Sequence[T]) -> list[T]:
        """Return the items of all ranks, in order of rank."""
        return [item for items in self.gather_objects(part) for item in items]

    def gather_counts(self, count: int) -> list[int]:
        """Return a number of each rank, in order: over the CPU, so that no device is waited for."""
        if self.size == 1:
            return [count]
        counts = [torch.empty(1, dtype=torch.long) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor([count]))
        return [int(number) for number in counts]

    def all_gather(self, local: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the ranks' tensors joined along the first dimension, in order of rank.

        Args:
            local: this rank's rows.
            counts: how many rows each rank has.
        """
        local = local.detach().contiguous()
        if self.size == 1:
            return local
        # A collective takes tensors of one shape: the shorter ones are padded, and cut again.
        padding = local.new_zeros(max(counts) - len(local), *local.shape[1:])
        padded = torch.cat((local, padding)) if len(padding) else local
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Return rank 0's tensor; the others give one of the same shape and dtype."""
        tensor = tensor.detach().contiguous()
        if self.size > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def broadcast_tensors(self, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield rank 0's tensors with their names, one after the other on this rank's device.

        Args:
            tensors: rank 0's, which is emptied; what the others give is not looked at.
        """
        kinds = self.broadcast_object(
            lambda: {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        )
        for name, (shape, dtype) in kinds.items():
            if self.rank == 0:
                tensor = tensors.pop(name).to(self.device)
            else:
                tensor = torch.empty(shape, dtype=dtype, device=self.device)
            yield name, self.broadcast(tensor)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over the ranks."""
        total = tensor.detach().clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def all_reduce_sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors, of one dtype, by their sums over the ranks: a few large messages for many tensors."""
        if self.size == 1:
            return
        tensors = list(tensors)
        for bucket in divided(tensors, [tensor.numel() for tensor in tensors], _BUCKET_ELEMENTS):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat)
            for tensor, total in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(total.view_as(tensor))


def divided(items: Sequence[T], sizes: Sequence[int], most: int) -> list[list[T]]:
    """Divide items, in their order, into lists of at most a total size each; an item that is larger is alone."""
    buckets: list[list[T]] = []
    total = most
    for item, size in zip(items, sizes, strict=True):
        if total + size > most or not buckets:
            buckets.append([])
            total = 0
        buckets[-1].append(item)
        total += size
    return buckets
