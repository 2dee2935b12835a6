"""A job as Kubernetes runs it: a RayJob of KubeRay's operator, with a cluster of its own that ends with it.

The image brings capfilt and all that it requires; the config comes as a ConfigMap. Values of environment variables
are never written: the pods take them from a Secret.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

from jobs.cluster.job_environment import CONFIG_NAME, Config
from jobs.cluster.submit import entrypoint, submission_id
from jobs.environment import WORKER_ENVIRONMENT
from pipeline.config import dump_config
from schemas.config import CapfiltConfig, StageResources
from schemas.errors import CapfiltError
from schemas.pretrain import PretrainConfig
from schemas.stages import STAGES

_CONFIG_FOLDER = "/etc/capfilt"
_SECRET = "capfilt"
_QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
_GPU = "nvidia.com/gpu"
# Of a pod without GPUs: as many workers as fit share one.
_CPUS_PER_POD = 16
_MEMORY_GB_PER_CPU = 4.0
_HEAD_CPUS, _HEAD_MEMORY_GB = 2.0, 8.0
# A whole cluster is started anew so often; what was committed stands.
_RESTARTS = 3


def rayjob(config: Config, arguments: Sequence[str], queue: str = "") -> list[dict[str, Any]]:
    """Return the Kubernetes objects of a job: a ConfigMap and a RayJob.

    Args:
        queue: of Kueue, which starts the job when there is room; "": none.

    Raises:
        CapfiltError: ``cluster.image`` is not set.
    """
    cluster = config.cluster
    if not cluster.image:
        raise CapfiltError("cluster.image: name a container image with capfilt; docs/cluster.md builds one")
    name = submission_id(config, arguments)
    pods = partial(_pod, config, name)
    head_cpus = max(_HEAD_CPUS, cluster.driver_cpus)
    head_memory_gb = max(_HEAD_MEMORY_GB, cluster.driver_memory_gb)
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name},
        "data": {CONFIG_NAME: json.dumps(dump_config(config), indent=1)},
    }
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name} | ({"labels": {_QUEUE_LABEL: queue}} if queue else {}),
        "spec": {
            "entrypoint": entrypoint(arguments, f"{_CONFIG_FOLDER}/{CONFIG_NAME}"),
            "entrypointNumCpus": cluster.driver_cpus,
            "backoffLimit": _RESTARTS,
            "shutdownAfterJobFinishes": True,
            "rayClusterSpec": {
                "rayVersion": version("ray"),
                "authOptions": {"mode": "token"},
                "enableInTreeAutoscaling": isinstance(config, CapfiltConfig),
                "headGroupSpec": {
                    # The driver's share alone: no worker comes to the head.
                    "rayStartParams": {"num-cpus": f"{cluster.driver_cpus:g}"},
                    "template": pods("head", head_cpus, head_memory_gb),
                },
                "workerGroupSpecs": _worker_groups(config, pods),
            },
        },
    }
    return [config_map, job]


def _worker_groups(config: Config, pods: Callable[..., dict[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(config, PretrainConfig):
        cluster = config.cluster
        if not cluster.gpus:
            raise CapfiltError(
                "cluster.gpus: say how many GPUs the training takes; a RayJob's pods are made for it"
            )
        pod = pods("gpu", cluster.cpus_per_gpu, cluster.cpus_per_gpu * _MEMORY_GB_PER_CPU, gpus=1)
        return [_group("gpu", pod, cluster.gpus, cluster.gpus)]
    groups: dict[tuple[bool, tuple[tuple[str, str], ...]], list[StageResources]] = {}
    for stage in STAGES:
        if stage == "filter" and config.filter is None:
            continue
        pool: StageResources = getattr(config.cluster, stage)
        groups.setdefault((pool.gpus > 0, tuple(sorted(pool.labels.items()))), []).append(pool)
    named = zip(_group_names(groups), groups.items(), strict=True)
    return [
        _worker_group(pods, name, pools, dict(labels), has_gpu=has_gpu)
        for name, ((has_gpu, labels), pools) in named
    ]


def _group_names(groups: Mapping[tuple[bool, Any], Any]) -> list[str]:
    kinds = ["gpu" if has_gpu else "cpu" for has_gpu, _ in groups]
    return [
        f"{kind}-{kinds[:place].count(kind)}" if kinds.count(kind) > 1 else kind
        for place, kind in enumerate(kinds)
    ]


def _worker_group(
    pods: Callable[..., dict[str, Any]],
    name: str,
    pools: Sequence[StageResources],
    labels: Mapping[str, str],
    *,
    has_gpu: bool,
) -> dict[str, Any]:
    """Return a group of equal pods for the stages that run on one kind of node: one GPU a pod, or a share of CPUs."""
    unit = "gpus" if has_gpu else "cpus"
    least, most = (
        sum(getattr(pool, unit) * getattr(pool, size) for pool in pools)
        for size in ("min_workers", "max_workers")
    )
    per_pod = (
        float(math.ceil(max(pool.gpus for pool in pools))) if has_gpu else min(_CPUS_PER_POD, max(most, 1.0))
    )
    per_pod = max(per_pod, *(getattr(pool, unit) for pool in pools))
    number = math.ceil(most / per_pod)
    # Of what a GPU's workers need, a pod takes the part that its GPUs are of all.
    cpus = max(sum(pool.cpus * pool.max_workers for pool in pools) / number, max(pool.cpus for pool in pools))
    memory_gb = max(
        sum(pool.memory_gb * pool.max_workers for pool in pools) / number,
        max(pool.memory_gb for pool in pools),
        cpus * _MEMORY_GB_PER_CPU,
    )
    pod = pods(name, cpus, memory_gb, gpus=math.ceil(per_pod) if has_gpu else 0)
    group = _group(name, pod, math.ceil(least / per_pod), number)
    return group | ({"labels": dict(labels)} if labels else {})


def _group(name: str, pod: dict[str, Any], least: int, most: int) -> dict[str, Any]:
    return {
        "groupName": name,
        "replicas": least,
        "minReplicas": least,
        "maxReplicas": most,
        "rayStartParams": {},
        "template": pod,
    }


def _pod(
    config: Config, config_map: str, name: str, cpus: float, memory_gb: float, gpus: int = 0
) -> dict[str, Any]:
    limits = {"cpu": f"{math.ceil(cpus)}", "memory": f"{math.ceil(memory_gb)}G"}
    limits |= {_GPU: f"{gpus}"} if gpus else {}
    variables: list[dict[str, Any]] = [
        {"name": variable, "value": value} for variable, value in WORKER_ENVIRONMENT.items()
    ]
    variables += [
        {"name": variable, "valueFrom": {"secretKeyRef": {"name": _SECRET, "key": variable}}}
        for variable in config.cluster.env
    ]
    container = {
        "name": name,
        "image": config.cluster.image,
        "env": variables,
        "resources": {"limits": limits, "requests": limits},
        "volumeMounts": [{"name": "config", "mountPath": _CONFIG_FOLDER, "readOnly": True}],
    }
    return {
        "spec": {
            "containers": [container],
            "volumes": [{"name": "config", "configMap": {"name": config_map}}],
        }
    }
