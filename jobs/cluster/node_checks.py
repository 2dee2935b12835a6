"""The checks of ``capfilt doctor`` on every node of a Ray cluster, and what they found in one table."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.cluster.session import joined_ray, living_nodes
from jobs.doctor import LIBRARIES, WORST_FIRST, Check, node_checks
from jobs.environment import ray_address
from jobs.interrupts import Interrupts
from pipeline.config import dump_config
from schemas.config import CapfiltConfig

# Hashing a captioner's weights from a slow disk takes a minute or two.
_ANSWER_WITHIN_S = 600.0


def check_nodes(config: CapfiltConfig) -> list[dict[str, Any]]:
    """Return what the checks found, a row for each distinct finding with the nodes that it holds for, worst first.

    Joins the Ray that this process is part of, or that ``cluster.address`` names. Raises CapfiltError without one.
    """
    address = ray_address(config.cluster.address) or "auto"
    with Interrupts() as interrupts, joined_ray(address, interrupts):
        nodes = {node["NodeID"]: node for node in living_nodes()}
        answers = {
            node_id: _on_node.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
            ).remote(dump_config(config), int(node["Resources"].get("GPU", 0)))
            for node_id, node in nodes.items()
        }
        ray.wait(list(answers.values()), num_returns=len(answers), timeout=_ANSWER_WITHIN_S)
        found = {_name(nodes[node_id]): _answer(answer) for node_id, answer in answers.items()}
    return rows_of(found)


@ray.remote(num_cpus=0, max_retries=0)
def _on_node(config: Mapping[str, Any], gpus: int) -> list[dict[str, Any]]:
    return [asdict(check) for check in node_checks(CapfiltConfig.model_validate(config), gpus)]


def _answer(answer: Any) -> list[Check]:
    try:
        return [Check(**check) for check in ray.get(answer, timeout=0)]
    except GetTimeoutError:
        what = f"no answer within {_ANSWER_WITHIN_S:g} s"
    except RayError as error:
        what = [line for line in str(error).splitlines() if line.strip()][-1]
    return [Check(name="node", state="fail", found=what, mend="see that its Ray has capfilt's libraries")]


def _name(node: Mapping[str, Any]) -> str:
    """Return a node's address; where several nodes share one, the beginning of its id tells them apart."""
    return f"{node['NodeManagerAddress']}/{node['NodeID'][:6]}"


def rows_of(found: Mapping[str, Sequence[Check]]) -> list[dict[str, Any]]:
    """Return the findings of all nodes, worst first: each with the nodes that it holds for.

    Versions that differ from node to node are a warning: a corpus's workers should be alike.
    """
    nodes_of: dict[Check, list[str]] = defaultdict(list)
    for node, checks in sorted(found.items()):
        for check in checks:
            nodes_of[check].append(node)
    versions: dict[str, set[str]] = defaultdict(set)
    for check in nodes_of:
        if check.name in LIBRARIES:
            versions[check.name].add(check.found)
    rows = [
        {
            "state": "warn" if check.state == "ok" and len(versions[check.name]) > 1 else check.state,
            "check": check.name,
            "found": check.found,
            "nodes": nodes,
            "mend": check.mend
            or ("install one version on all nodes" if len(versions[check.name]) > 1 else ""),
        }
        for check, nodes in nodes_of.items()
    ]
    return sorted(rows, key=lambda row: WORST_FIRST.index(row["state"]))


def names_of(nodes: Sequence[str], of: int) -> str:
    """Return some nodes of a cluster in few words."""
    if len(nodes) == of:
        return f"all {of}"
    return ", ".join(nodes) if len(nodes) <= 3 else f"{len(nodes)} of {of}"
