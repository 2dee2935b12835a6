"""The sum of the gradients over the ranks: after the backward passes of a step, or while the last of them run.

Gradients gather in ``.grad`` over several backward passes. Sums that begin earlier must know which pass gives a
gradient its last part: a stage says when its last passes begin (``PartlyTrained.begin_last_passes``), and which
gradients those passes change, and how often, is the same in each step. It is written down in the first one, as DDP does
with ``static_graph``, and checked in each later one.
"""

from collections import Counter
from functools import partial
from typing import Literal

import torch
from torch import Tensor, distributed, nn

from training.distributed import World, divided
from training.trainer.steps.optim import NamedParameters, gradients_of

GradientSumKind = Literal["after", "overlapped", "overlapped-bf16"]

# Elements that are summed at once while gradients are still computed: 32 MB in float32, as DDP's 25. The last bucket
# cannot be hidden behind anything.
_BUCKET_ELEMENTS = 8 * 2**20


def make_gradient_sum(kind: GradientSumKind, world: World, parameters: NamedParameters) -> "GradientSum":
    """Return what sums the gradients of parameters as ``performance.gradient_sum`` says."""
    if kind == "after" or world.size == 1:
        return GradientSum(world, parameters)
    return OverlappedSum(world, parameters, torch.bfloat16 if kind == "overlapped-bf16" else None)


class GradientSum:
    """How a rank's gradients become those of all ranks: here all are summed once the backward passes are done.

    ``is_overlapped``: between a step's backward passes and ``finish`` there is something to wait for.
    """

    is_overlapped = False

    def __init__(self, world: World, parameters: NamedParameters) -> None:
        self._world, self._parameters = world, parameters

    def begin_last_passes(self) -> None:
        """Take note that from now on a step's last backward passes run."""

    def finish(self) -> list[Tensor]:
        """Return the summed gradients, in the order of the parameters, once a step's backward passes are done."""
        gradients = gradients_of(self._parameters)
        self._world.all_reduce_sum_(gradients)
        return gradients


class OverlappedSum(GradientSum):
    """Sums gradients in buckets, each as soon as its last gradient is whole on this rank.

    The buckets, and the order of their sums, are rank 0's order of gradients in the first step, so that they are the
    same on all ranks, in every step and after a resume.

    Args:
        world: the ranks, more than one.
        parameters: what is trained.
        wire_dtype: that gradients are rounded to for the sum; None: they are not rounded.
        bucket_elements: of one sum.

    Attributes:
        buckets: the parameters of each sum, by index; none before the first step.
        under_way: the sums that have begun.
    """

    is_overlapped = True

    def __init__(
        self,
        world: World,
        parameters: NamedParameters,
        wire_dtype: torch.dtype | None = None,
        bucket_elements: int = _BUCKET_ELEMENTS,
    ) -> None:
        super().__init__(world, parameters)
        self._wire_dtype, self._bucket_elements = wire_dtype, bucket_elements
        # With a communicator of its own: else what the ranks sum or gather meanwhile would wait for the gradients
        # before it, and the device too.
        self._group = distributed.new_group()
        self._is_last = False
        # Parameters by index. How often each gradient arrives in the last passes, and in which order for the last time.
        self._arrivals: Counter[int] = Counter()
        self._order: list[int] = []
        # Known after the first step, as the buckets.
        self._expected: Counter[int] | None = None
        self.buckets: list[list[int]] = []
        self.under_way: list[tuple[Tensor, distributed.Work]] = []
        for index, (_, parameter) in enumerate(parameters):
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, index))

    def begin_last_passes(self) -> None:
        """Begin the sums of the gradients that no later pass changes."""
        self._is_last = True
        self._begin_whole_buckets()

    def finish(self) -> list[Tensor]:
        """Return the summed gradients; begin the sums that have not begun."""
        assert self._is_last, "the stage has not said when its last backward passes begin"
        self._is_last = False
        if self._expected is None:
            self._agree_on_buckets()
        assert self._arrivals == self._expected, (
            "the last backward passes gave other gradients than in the first step"
        )
        self._begin_whole_buckets()
        for bucket, (flat, work) in zip(self.buckets, self.under_way, strict=True):
            work.wait()
            gradients = [self._gradient(index) for index in bucket]
            for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(total.view_as(gradient))
        self.under_way, self._arrivals, self._order = [], Counter(), []
        return gradients_of(self._parameters)

    def _arrived(self, index: int, parameter: nn.Parameter) -> None:
        if not self._is_last:
            return
        self._arrivals[index] += 1
        if self._expected is None:
            # Only the last arrival counts.
            if index in self._order:
                self._order.remove(index)
            self._order.append(index)
        else:
            self._begin_whole_buckets()

    def _agree_on_buckets(self) -> None:
        """Divide the parameters into buckets: first those that the last passes do not change."""
        orders = self._world.gather_objects((self._order, self._arrivals))
        order, self._expected = orders[0]
        assert all(arrivals == self._expected for _, arrivals in orders), (
            "the last backward passes of the ranks differ"
        )
        unchanged = [index for index in range(len(self._parameters)) if index not in self._expected]
        sizes = [self._parameters[index][1].numel() for index in [*unchanged, *order]]
        self.buckets = divided([*unchanged, *order], sizes, self._bucket_elements)

    def _begin_whole_buckets(self) -> None:
        """Begin the sums of the buckets whose gradients are whole, in order: all ranks begin them in the same one."""
        expected = self._expected
        if expected is None:
            return
        for bucket in self.buckets[len(self.under_way) :]:
            if any(self._arrivals[index] < expected[index] for index in bucket):
                return
            flat = torch.cat([self._gradient(index).reshape(-1) for index in bucket])
            flat = flat if self._wire_dtype is None else flat.to(self._wire_dtype)
            self.under_way.append((flat, distributed.all_reduce(flat, group=self._group, async_op=True)))

    def _gradient(self, index: int) -> Tensor:
        return gradients_of(self._parameters[index : index + 1])[0]
