"""A GPU for machines without one: tensors that say they are on ``cuda:0`` and that the CPU computes, by a GPU's rules.

An operation on tensors of both devices fails, as on a GPU, and so does one that waits for the device while a CUDA graph
is captured; a graph does the operations of its capture again, on the memory that they had. What code for a GPU does
beside the kernels shows: where its tensors are, what it copies, what it freezes in a graph. Kernels, memory and speed
of a GPU do not, and ``torch.compile`` is off. Not for several GPUs.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo.trace_rules
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA = torch.device("cuda", 0)
NAME = "simulated GPU"

# Operations that a GPU does with tensors of both devices: copies, and indices that the CPU has.
_OF_BOTH = {
    "aten::_to_copy", "aten::copy_", "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_",
    # Of nn.Module.to, which only compares types.
    "aten::_has_compatible_shallow_copy_type",
}  # fmt: skip
# Operations that wait for the device, since the host reads a value or a size.
_WAITING = {
    "aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::masked_select", "aten::nonzero",
    "aten::_unique2", "aten::unique_consecutive", "aten::unique_dim",
}  # fmt: skip

_to, _start = Tensor.to, threading.Thread.run
_capture = threading.local()


@contextlib.contextmanager
def simulated_gpu() -> Iterator[None]:
    """Let this process, and threads that it starts, have one GPU."""
    cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": _nothing,
        "get_device_name": lambda *_: NAME,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: SimpleNamespace(name=NAME, major=9, minor=0, total_memory=2**36),
        "Stream": _Stream,
        "current_stream": _Stream,
        "stream": lambda _: contextlib.nullcontext(),
        "Event": _Event,
        "CUDAGraph": _Graph,
        "graph": _capturing,
        "graph_pool_handle": lambda: (0, 0),
        "synchronize": _nothing,
        "empty_cache": _nothing,
        "max_memory_allocated": lambda *_: 0,
        "max_memory_reserved": lambda *_: 0,
        "reset_peak_memory_stats": _nothing,
        "_lazy_init": _nothing,
    }
    # torch.compile's table of torch's functions is made once, of those that are there by then.
    torch._dynamo.trace_rules.get_torch_obj_rule_map()
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context
        for name, value in cuda.items():
            patch(mock.patch.object(torch.cuda, name, value))
        patch(mock.patch.object(torch.accelerator, "current_stream", _Stream))
        patch(mock.patch.object(Tensor, "to", _moved))
        patch(mock.patch.object(Tensor, "pin_memory", lambda tensor, *_: tensor))
        # C++ makes it with the driver.
        patch(mock.patch.object(torch, "tensor", _tensor_maker(torch.tensor)))
        patch(mock.patch.object(threading.Thread, "run", _run_thread))
        patch(torch.compiler.set_stance("force_eager"))
        patch(_Mode())
        yield


class GpuTensor(Tensor):
    """A tensor on the GPU; ``host`` has its values.

    To torch's C++ it is a tensor of the CPU: for one of CUDA, autograd asks the driver.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> "GpuTensor":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device="cpu",
            requires_grad=host.requires_grad,
        )

    def __init__(self, host: Tensor) -> None:
        self.host = host.detach()

    def __repr__(self) -> str:
        return f"GpuTensor({self.host})"

    # These make it one whose values nn.Module.to exchanges.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["host"], None

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, Tensor], *_: Any) -> "GpuTensor":
        return GpuTensor(inner["host"])

    def cpu(self, *_: Any) -> Tensor:
        return _moved(self, "cpu")

    def tolist(self) -> Any:
        _require_no_capture("tolist")
        return self.host.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert a tensor of cuda:0 to numpy; use Tensor.cpu()")

    def new_tensor(self, data: Any, dtype: torch.dtype | None = None, **_: Any) -> "GpuTensor":
        return GpuTensor(self.host.new_tensor(data, dtype=dtype))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Sees what makes tensors out of none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


def _dispatch(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Do an operation of torch by the rules of the GPU, if it is one of the GPU."""
    name = func._schema.name
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    on_gpu = [tensor for tensor in tensors if isinstance(tensor, GpuTensor)]
    # Derivatives are made in C++, which takes these tensors for a CPU's, and begins some with zeros of a CPU.
    in_backward = torch._C._current_graph_task_id() != -1
    device = kwargs.get("device")
    is_of_gpu = bool(on_gpu) if device is None or (in_backward and on_gpu) else _is_cuda(device)
    kwargs = dict(kwargs)
    if "pin_memory" in kwargs:  # there is no driver to pin with
        kwargs["pin_memory"] = False
    if not on_gpu and not is_of_gpu:
        return func(*args, **kwargs)
    is_mixed = any(not isinstance(tensor, GpuTensor) and tensor.ndim for tensor in tensors)
    if on_gpu and is_mixed and not in_backward and name not in _OF_BOTH:
        raise RuntimeError(f"{func}: all tensors must be on the same device, but there are cuda:0 and cpu")
    is_copy = name == "aten::copy_" and len(on_gpu) == 1
    if name in _WAITING or is_copy or not is_of_gpu:
        _require_no_capture(name)
    if device is not None:
        kwargs["device"] = torch.device("cpu")
    host_args, host_kwargs = tree_map_only(GpuTensor, lambda tensor: tensor.host, (args, kwargs))
    # Only GPUs have a matrix product of another type than its factors.
    is_wide_product = str(func) == "aten.mm.dtype"
    compute = _wide_product if is_wide_product else func
    result = compute(*host_args, **host_kwargs)
    if (graph := getattr(_capture, "graph", None)) is not None:
        graph.operations.append((compute, host_args, host_kwargs, tree_leaves(result)))
    if (
        not is_of_gpu
        or name == "aten::_local_scalar_dense"
        or (is_copy and not isinstance(args[0], GpuTensor))
    ):
        return args[0] if is_copy else result
    if is_wide_product:
        return GpuTensor(result)
    # A view of a tensor that was made outside of inference mode is none of that mode either.
    is_view = any(output.alias_info is not None for output in func._schema.returns)
    is_outside = is_view and any(not tensor.is_inference() for tensor in on_gpu)
    with torch.inference_mode(False) if is_outside else contextlib.nullcontext():
        wrapped = tree_map_only(Tensor, GpuTensor, result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _wide_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.mm(_to(left, dtype), _to(right, dtype))


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


# -- between the devices ---------------------------------------------------------------------------------------


class _ToGpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return GpuTensor(tensor.detach().clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.host.clone()


class _ToHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: GpuTensor) -> Tensor:
        _require_no_capture("copy to the CPU")
        return tensor.host.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return GpuTensor(gradient)


def _moved(tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
    """Do what ``Tensor.to`` does."""
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    format_ = {} if memory_format is None else {"memory_format": memory_format}
    # In C++ both devices are the CPU.
    converted = _to(tensor, dtype=dtype or tensor.dtype, copy=copy, **format_)
    is_of_gpu = isinstance(tensor, GpuTensor)
    if device is None or _is_cuda(device) == is_of_gpu:
        return _to(converted, device) if device is not None and device.type == "meta" else converted
    return (_ToHost if is_of_gpu else _ToGpu).apply(converted)


def _tensor_maker(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def tensor(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
        if not _is_cuda(device):
            return make(data, device=device, **kwargs)
        return GpuTensor(make(data.cpu() if isinstance(data, GpuTensor) else data, **kwargs))

    return tensor


# -- streams, graphs, threads ----------------------------------------------------------------------------------


class _Graph:
    """In place of ``torch.cuda.CUDAGraph``: the operations of a capture."""

    def __init__(self) -> None:
        self.operations: list[tuple[Callable[..., Any], Any, Any, list[Any]]] = []

    def replay(self) -> None:
        """Do the operations again, into the memory of their results."""
        for compute, args, kwargs, results in self.operations:
            for kept, again in zip(results, tree_leaves(compute(*args, **kwargs)), strict=True):
                if isinstance(kept, Tensor) and kept.data_ptr() != again.data_ptr():
                    kept.copy_(again)


@contextlib.contextmanager
def _capturing(graph: _Graph, **_: Any) -> Iterator[None]:
    _capture.graph = graph
    try:
        yield
    finally:
        _capture.graph = None


def _require_no_capture(what: str) -> None:
    if getattr(_capture, "graph", None) is not None:
        raise RuntimeError(f"{what}: not permitted while a graph is captured")


class _Stream:
    def __init__(self, *_: Any) -> None:
        pass

    def is_capturing(self) -> bool:
        return getattr(_capture, "graph", None) is not None

    def wait_stream(self, other: "_Stream") -> None:
        pass

    def synchronize(self) -> None:
        _require_no_capture("synchronize")


class _Event:
    def __init__(self, **_: Any) -> None:
        pass

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _require_no_capture("synchronize")

    def elapsed_time(self, other: "_Event") -> float:
        return 1.0


def _run_thread(thread: threading.Thread) -> None:
    # A mode is of one thread.
    with _Mode():
        _start(thread)


def _nothing(*_: Any) -> None:
    pass
