"""The memory of a training step, counted by computing the step on the device "meta", where tensors have no data.

What is counted are the bytes of the tensors that live at the same time, from the first operation to the last: features,
what autograd saves, gradients. Not counted are the weights, and the workspaces inside the kernels of a GPU.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from training.blip2.stage1 import Stage1
from training.blip2.stage2 import Stage2
from training.build import Stage
from training.distributed import World
from training.models.language import Target
from training.models.micro_batches import SampleKeys
from training.models.tokenizer import Texts


def step_bytes(stage: Stage, images: int, step_images: int, *, is_one_of_many: bool) -> int:
    """Return the most bytes that live at once while a micro-batch is computed, gradients included.

    Args:
        stage: on "meta", without gradients; its ranks are replaced.
        images: of the micro-batch.
        step_images: of all ranks.
        is_one_of_many: whether there are others before it, so that every parameter has a gradient already.
    """
    stage.world = _OtherRanks(step_images - images)
    stage.train()
    gradient_bytes = 0
    if is_one_of_many:
        for _, parameter in stage.trainable_named_parameters():
            parameter.grad = torch.empty_like(parameter)
            gradient_bytes += parameter.nbytes
    step = _step(stage, images)
    with torch.compiler.set_stance("force_eager"), _FusedAttention(), LiveBytes(stage) as live:
        step()
    stage.zero_grad(set_to_none=True)
    return live.peak + gradient_bytes


def _step(stage: Stage, images: int) -> Callable[[], object]:
    """Return a step on captions of full length, in one micro-batch."""
    size_px = stage.config.data.image_size_px
    pixels_BCHW = torch.empty((images, 3, size_px, size_px), dtype=torch.uint8)
    if isinstance(stage, Stage2):
        target = example_target(stage, images)
        return lambda: stage.step([pixels_BCHW], [target], images)
    length = (stage.config.qformer if isinstance(stage, Stage1) else stage.shape.text).max_text_tokens
    texts = Texts.full(images, length)
    names = [str(number) for number in range(images)]
    keys = SampleKeys.of(names, range(images), names, [[name] for name in names], texts.ids_BL)
    return lambda: stage.step(pixels_BCHW, texts, keys, images, images)


def example_target(stage: Stage2, images: int) -> Target:
    """Return a longest caption: OPT predicts what it reads, T5 the longer part of what is split before its middle."""
    longest = stage.language.config.max_text_tokens
    inputs_BL = torch.zeros(
        images, longest if stage.language.name == "opt" else longest // 2, dtype=torch.long
    )
    labels_BT = torch.zeros(images, longest, dtype=torch.long)
    return Target(
        inputs_BL=inputs_BL, mask_BL=torch.ones_like(inputs_BL, dtype=torch.bool), labels_BT=labels_BT
    )


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, while they live; ``peak`` is the most at once.

    Args:
        model: whose parameters, gradients and buffers are not counted, and on whose device the tensors are that are.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._device = next(model.parameters()).device
        # Storages are known by their address, which is given to another one only after the end of the first.
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        known = (*model.parameters(), *model.buffers(), *gradients)
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Compute an operation, and count what it has made."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device == self._device:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address in self._known:
            return
        self._known.add(address)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, address, storage.nbytes())

    def _free(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.live -= size


class _FusedAttention(TorchFunctionMode):
    """Has attention computed as a GPU does, without a matrix of scores: on "meta" torch would take the plain one.

    A tensor without data counts as true.
    """

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Compute an operation."""
        if func is Tensor.__bool__:
            return True  # transformers asks whether there is no padding
        if func is F.scaled_dot_product_attention:
            return _fused_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_: Any,
) -> Tensor:
    bias = None
    if attn_mask is not None:
        # A mask of true and false becomes one of 0 and -inf; one for all heads and rows is not repeated.
        bias = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, dropout_p, is_causal, scale=scale
    )[0]


class _OtherRanks(World):
    """Two ranks, of which the other one has all other images of the step."""

    def __init__(self, images: int) -> None:
        super().__init__("meta")
        self._images = images

    def gather_counts(self, count: int) -> list[int]:
        """Return the images of this rank and of the other."""
        return [count, self._images]

    def all_gather(self, local: Tensor, counts: Sequence[int]) -> Tensor:
        """Return rows without data for all images."""
        return local.new_empty(sum(counts), *local.shape[1:])
