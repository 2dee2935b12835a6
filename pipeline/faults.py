"""Whose fault an exception is: decided here for the runner of a shard, the storage, the executors and the command line.

Libraries are named, not imported: this is read by processes that load neither Ray nor a storage's client. A test
looks every name up in the installed versions.
"""

import errno
import re
from typing import Literal

from schemas.errors import CapfiltError, CorruptShardError, NotFiniteError

# storage and node: waited for, and not charged to the shard.
# shard: tried again, then quarantined.
# memory: the device's, for one image alone (a larger batch is halved before); tried again with fresh weights.
# device: the shard's, and the process is done with: its device answers every further call with the same error.
# run: the config, the weights or the input; nothing is tried again.
Fault = Literal["storage", "node", "shard", "memory", "device", "run"]

_BY_CLASS: dict[str, Fault] = {
    "pipeline.storage.errors.ObjectStorageError": "storage",
    "obstore.exceptions.BaseError": "storage",
    "botocore.exceptions.BotoCoreError": "storage",
    "botocore.exceptions.ClientError": "storage",
    # Weights and lists that are fetched.
    "requests.exceptions.ConnectionError": "storage",
    "requests.exceptions.Timeout": "storage",
    "urllib3.exceptions.TimeoutError": "storage",
    "urllib3.exceptions.ProtocolError": "storage",
    "httpx.TransportError": "storage",
    "aiohttp.client_exceptions.ClientConnectionError": "storage",
    "torch.OutOfMemoryError": "memory",
    # Of a few of CUDA's errors the process would recover; a new one is the same for all of them.
    "torch.AcceleratorError": "device",
    # A worker that dies on a node that lives. Of one whose node went, see ``_fault_of_death``.
    "ray.exceptions.WorkerCrashedError": "shard",
    "ray.exceptions.OutOfMemoryError": "shard",
    "ray.exceptions.RuntimeEnvSetupError": "run",
    "ray.exceptions.AuthenticationError": "run",
    "ray.exceptions.NodeDiedError": "node",
    "ray.exceptions.LocalRayletDiedError": "node",
    "ray.exceptions.ActorUnavailableError": "node",
    "ray.exceptions.ActorUnschedulableError": "node",
    "ray.exceptions.TaskUnschedulableError": "node",
    "ray.exceptions.GetTimeoutError": "node",
    "ray.exceptions.ObjectLostError": "node",
    "ray.exceptions.ObjectStoreFullError": "node",
    "ray.exceptions.OutOfDiskError": "node",
    "ray.exceptions.RaySystemError": "node",
    "ray.exceptions.RpcError": "node",
    "ray.data.exceptions.ExecutionTimeoutError": "node",
}

# How cuBLAS, cuDNN and Triton tell of them, as RuntimeErrors.
_DEVICE_ERROR = re.compile(r"CUDA error: |cuDNN error: |Triton Error \[CUDA\]: ")

# What a network filesystem says of a server that is away, and a disk of its lack of room: the next shard would fare the
# same. EIO is among them where something is written; of a read it means one damaged file (a server that is mounted
# "hard" gives none).
_AWAY = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.EPIPE,
    errno.ENOTCONN,
    errno.ESHUTDOWN,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EREMOTEIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
}


def fault_of(error: BaseException) -> Fault:
    """Return whose fault an exception is."""
    if isinstance(error, CapfiltError):
        return "shard" if isinstance(error, CorruptShardError | NotFiniteError) else "run"
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__]
    if "ray.exceptions.RayTaskError" in names and isinstance(
        cause := getattr(error, "cause", None), Exception
    ):
        return fault_of(cause)
    if "ray.exceptions.ActorDiedError" in names:
        return _fault_of_death(error)
    named = next((_BY_CLASS[name] for name in names if name in _BY_CLASS), None)
    if named is not None:
        return named
    if isinstance(error, RuntimeError) and _DEVICE_ERROR.search(str(error)):
        return "device"
    is_away = isinstance(error, OSError) and error.errno in _AWAY
    return "storage" if is_away or isinstance(error, ConnectionError | TimeoutError) else "shard"


def is_waited_for(error: BaseException, *, is_writing: bool = False) -> bool:
    """Tell whether the storage or a node is at fault, which may be over in a while.

    Args:
        is_writing: a file of the corpus.
    """
    is_unwritable = is_writing and isinstance(error, OSError) and error.errno == errno.EIO
    return is_unwritable or fault_of(error) in ("storage", "node")


def _fault_of_death(error: BaseException) -> Fault:
    """Return whether an actor of Ray died with its node (drained, preempted or lost), or alone."""
    return "node" if getattr(error, "preempted", False) or "node has died" in str(error) else "shard"
