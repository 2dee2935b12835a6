"""Whose fault an exception is, for the exceptions that the installed libraries really raise."""

import errno
import os
from importlib import import_module

import httpx
import obstore
import pytest
import ray.exceptions
import torch
from botocore.exceptions import ConnectionClosedError, EndpointConnectionError
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo
from ray.data.exceptions import ExecutionTimeoutError, RayDataUserCodeException
from requests.exceptions import ReadTimeout

from pipeline.faults import _BY_CLASS, Fault, fault_of
from pipeline.storage.errors import ObjectStorageError, StorageAwayError
from pipeline.storage.objects.stores import explained
from schemas.errors import CapfiltError, CorruptShardError, NotFiniteError, TryAgainLaterError


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def died(message: str, reason: int = NodeDeathInfo.UNSPECIFIED) -> ray.exceptions.ActorDiedError:
    """Return what Ray raises of an actor that died, with its own message."""
    return ray.exceptions.ActorDiedError(
        ActorDiedErrorContext(
            actor_id=b"1" * 16, error_message=message, node_death_info=NodeDeathInfo(reason=reason)
        )
    )


def through_ray(error: Exception) -> Exception:
    return ray.exceptions.RayTaskError("call", "Traceback ...", error, "ray::x", 1, "127.0.0.1")


# As cudaGetErrorString says them.
CUDA_ERRORS = (
    "device-side assert triggered",
    "an illegal memory access was encountered",
    "uncorrectable ECC error encountered",
    "unspecified launch failure",
)
NODE_DIED = "The actor died because its node has died. Node Id: 0123"
CASES: list[tuple[Exception, Fault]] = [
    (ObjectStorageError("S3 refused"), "storage"),
    (StorageAwayError("503"), "storage"),
    (obstore.exceptions.GenericError("500"), "storage"),
    (EndpointConnectionError(endpoint_url="http://s3"), "storage"),
    (ConnectionClosedError(endpoint_url="http://s3"), "storage"),
    (ReadTimeout("the hub"), "storage"),
    (httpx.ConnectError("the hub"), "storage"),
    (TimeoutError("read"), "storage"),
    (ConnectionResetError(errno.ECONNRESET, "reset"), "storage"),
    *(
        (os_error(number), "storage")
        for number in (errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EHOSTDOWN)
    ),
    (ray.exceptions.NodeDiedError("gone"), "node"),
    (died(NODE_DIED), "node"),
    (died("preempted", NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED), "node"),
    (ray.exceptions.ActorUnavailableError("away", b"1" * 16), "node"),
    (ray.exceptions.OwnerDiedError("00", None, "x"), "node"),
    (ExecutionTimeoutError("nothing for six hours"), "node"),
    (died("The actor died because its worker process has died"), "shard"),
    (ray.exceptions.OutOfMemoryError("the node's memory"), "shard"),
    (ray.exceptions.WorkerCrashedError(), "shard"),
    (RayDataUserCodeException("UDF"), "shard"),
    (os_error(errno.EIO), "shard"),
    (FileNotFoundError(errno.ENOENT, "gone"), "shard"),
    (CorruptShardError("other bytes"), "shard"),
    (NotFiniteError("nan"), "shard"),
    (ValueError("a fault of ours"), "shard"),
    (torch.OutOfMemoryError("CUDA out of memory"), "memory"),
    *((torch.AcceleratorError(f"CUDA error: {text}"), "device") for text in CUDA_ERRORS),
    (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"), "device"),
    (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "device"),
    (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), "device"),
    (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), "shard"),
    (CapfiltError("the config"), "run"),
    (TryAgainLaterError("waited for an hour"), "run"),
    (ray.exceptions.RuntimeEnvSetupError("pip"), "run"),
]


@pytest.mark.parametrize(("error", "fault"), CASES, ids=[f"{type(e).__name__}-{f}" for e, f in CASES])
def test_each_exception_has_one_that_is_at_fault(error: Exception, fault: Fault) -> None:
    assert fault_of(error) == fault
    if not isinstance(error, ray.exceptions.RayError):
        assert fault_of(through_ray(error)) == fault, "Ray wraps what a worker raises"


@pytest.mark.parametrize("name", _BY_CLASS)
def test_every_class_that_is_named_exists_under_that_name(name: str) -> None:
    module, _, kind = name.rpartition(".")
    found = getattr(import_module(module), kind)
    # The sorting goes by a class's own module: an alias would never match.
    assert f"{found.__module__}.{found.__qualname__}" == name


@pytest.mark.parametrize(
    ("answer", "is_away"),
    [
        ("status code: 500", True),
        ("status code: 503: <Code>SlowDown</Code>", True),
        ("status code: 429", True),
        ("status code: 403: <Code>RequestTimeTooSkewed</Code>", True),
        ("status code: 400: <Code>ExpiredToken</Code>", True),
        ("HTTP error: connection refused", True),
        ("status code: 403: <Code>AccessDenied</Code>", False),
        ("status code: 404: <Code>NoSuchBucket</Code>", False),
    ],
)
def test_what_may_pass_is_told_from_a_refusal(answer: str, is_away: bool) -> None:
    request = "Error performing GET http://s3/b/k in 2ms - Server returned non-2xx "
    with pytest.raises(ObjectStorageError) as raised, explained("s3://b/k"):
        raise obstore.exceptions.GenericError(request + answer)
    assert isinstance(raised.value, StorageAwayError) == is_away
