"""Matrix products in float8 (e4m3), for the blocks of a vision tower. The home of torchao.

Weights are rounded once, with one scale for each output; inputs at each call, with one scale for each row. Products
are summed in float32 (on Hopper in its fast mode, of a little lower precision) and returned as bfloat16. All other
parts keep their precision: norms, attention, biases, embeddings, the projection after the blocks.

It differs from torchao's ``quantize_`` with ``Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())`` in
three points: it works on a CPU too (slowly, with the same rounding), it includes attention's output projection
(torchao's filter skips torch's class for it), and it leaves inductor's settings alone.
"""

from importlib.util import find_spec
from platform import node
from typing import Literal

import torch
from torch import nn

from schemas.errors import CapfiltError

# The first GPUs that multiply float8: Ada (8.9), then Hopper (9.0).
_FIRST_CAPABILITY = (8, 9)
# The kernels take matrices whose sides are multiples of it; other layers keep their precision.
_SIDE_STEP = 16


def require_fp8(stage: Literal["caption", "rank"], device: torch.device) -> None:
    """Reject ``precision = "fp8"`` where it cannot be computed.

    Raises:
        CapfiltError: no GPU, one that does not multiply float8, or no torchao.
    """
    setting = f'{stage}.precision = "fp8" on {node()}'
    if device.type != "cuda":
        raise CapfiltError(
            f'{setting}: this worker has no GPU; give it one (cluster.{stage}.gpus = 1), or set "auto"'
        )
    if (capability := torch.cuda.get_device_capability(device)) < _FIRST_CAPABILITY:
        name, version = torch.cuda.get_device_name(device), ".".join(map(str, capability))
        raise CapfiltError(
            f"{setting}: {name} (compute capability {version}) does not multiply float8, which takes 8.9 or "
            'more, such as an H100; set "bf16"'
        )
    require_torchao(setting, 'set "bf16"')


def require_torchao(what: str, instead: str = "") -> None:
    """Refuse ``what`` where torchao is not installed; ``instead`` is another way out than installing it."""
    if find_spec("torchao") is None:
        remedy = "pip install -c constraints.txt '.[fp8]'" + (f", or {instead}" if instead else "")
        raise CapfiltError(f"{what}: torchao is not installed; {remedy}")


def quantise(blocks: nn.Module) -> None:
    """Turn the weights of all linear layers in ``blocks``, bfloat16 on their device, to float8 in place."""
    # Imported here because few runs need it, and not every installation has it.
    from torchao.quantization import Float8MMConfig, Float8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    for layer in blocks.modules():
        if isinstance(layer, nn.Linear) and not any(side % _SIDE_STEP for side in layer.weight.shape):
            weight = Float8Tensor.from_hp(
                layer.weight.detach(),
                granularity=PerRow(),
                mm_config=Float8MMConfig(use_fast_accum=True),
                act_quant_kwargs=QuantizeTensorToFloat8Kwargs(granularity=PerRow()),
            )
            layer.weight = nn.Parameter(weight, requires_grad=False)
