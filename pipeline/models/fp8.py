"""Matrix products in float8 (e4m3), for the blocks of a vision tower. The home of torchao.

Each weight is rounded once, with one scale for each output. Each row of its input is rounded when it comes, with
one scale too. The products are summed in float32 (on Hopper in its fast mode, which keeps a little less of it)
and come out as bfloat16. All else stays as it is: norms, attention, biases, embeddings, the projection after the
blocks.

This is what torchao's ``quantize_`` makes of ``Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())``,
but for three things: it works on a CPU too (slowly, in the same roundings), attention's output projection is
not passed over (torchao's filter leaves torch's own class for it out), and inductor's settings stay.
"""

from importlib.util import find_spec
from platform import node
from typing import Literal

import torch
from torch import nn

from schemas.errors import CapfiltError

# The first GPUs that multiply float8: Ada (8.9), then Hopper (9.0).
_FIRST_CAPABILITY = (8, 9)
# The kernels take matrices with sides that are multiples of it; a layer of another shape stays as it is.
_SIDE_STEP = 16


def require_fp8(stage: Literal["caption", "rank"], device: torch.device) -> None:
    """Refuse ``precision = "fp8"`` where nothing can compute it.

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
