"""A driver for the tests with several nodes: a cluster of raylets, of which those of a draft and of the target die.

Writes a JSON object: where actors were, the texts, and which of them changed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import ray
from ray.cluster_utils import Cluster

from ssd_ray import LLM, SamplingParams
from tests.support.actors import info, wait_until

PROMPT = "def add(a, b):"
PARAMS = [SamplingParams(max_tokens=300, seed=seed, temperature=seed % 2, ignore_eos=True) for seed in range(4)]


def lose(cluster: Cluster, node_id: str) -> None:
    """Kill a raylet, and with it all that runs there."""
    (node,) = [node for node in cluster.list_all_nodes() if node.node_id == node_id]
    cluster.remove_node(node, allow_graceful=False)


def changed(llm: LLM, calm: list[list[int]], harm: Callable[[], None]) -> int:
    """How many texts are other ones if something happens while they are written."""
    streams = [llm.stream(PROMPT, each) for each in PARAMS]
    for stream in streams:
        next(stream)
    harm()
    return sum(list(stream.wait().token_ids) != tokens for stream, tokens in zip(streams, calm, strict=True))


def tell(cluster: Cluster, llm: LLM) -> dict[str, Any]:
    """What an engine on two nodes does, while it loses one and then the other, and others come."""
    calm = [list(output.token_ids) for output in llm.generate([PROMPT] * len(PARAMS), PARAMS)]
    report: dict[str, Any] = {"texts": calm}
    (draft,) = llm.stats().drafts
    nodes = info(llm, "target")["node"], info(llm, draft)["node"]
    report["nodes"] = nodes
    report["changed by a draft's node"] = changed(llm, calm, lambda: lose(cluster, nodes[1]))
    cluster.add_node(num_cpus=1)
    wait_until(lambda: len(llm.stats().drafts) == 1, 120.0)
    cluster.add_node(num_cpus=1)
    report["changed by the target's node"] = changed(llm, calm, lambda: lose(cluster, nodes[0]))
    report["restarts"] = llm.stats().draft_restarts, llm.stats().target_restarts
    return report


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    cluster.connect()
    try:
        with LLM(*sys.argv[1:3], max_restarts=10) as llm:
            print(json.dumps(tell(cluster, llm)))
    finally:
        ray.shutdown()  # first: a cluster does not take down the node that somebody is connected to
        cluster.shutdown()


if __name__ == "__main__":
    main()
