"""The floating-point operations of a training step, counted on the modules themselves.

A product of matrices M x K and K x N counts 2 MKN; nothing else counts. A forward pass counts once where nothing is
trained, twice where a gradient passes through frozen weights (the backward pass multiplies once more), and three times
where weights are trained (twice more). What is computed again to save memory does not count.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

FORWARD, THROUGH, TRAINED = 1, 2, 3


def count_flops(call: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Return the FLOP of a call, made on tensors without data, so that nothing is computed.

    Args:
        device: of the call's tensors. On ``meta`` they have no data as they are, and counting takes half the time.
    """
    counter = FlopCounterMode(display=False)
    is_empty = torch.device(device).type == "meta"
    with (
        torch.compiler.set_stance("force_eager"),
        nullcontext() if is_empty else FakeTensorMode(allow_non_fake_inputs=True),
        counter,
    ):
        call()
    return counter.get_total_flops()
