"""Which nodes a kind of cluster has. Chapter 08."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sllm_mini.cluster.live.carry import NodeHandle
from sllm_mini.cluster.live.options import LiveOptions
from sllm_mini.control.messages import NodeSpec


def handles_of(kind: str, folder: Path, options: LiveOptions) -> Callable[[NodeSpec, int], NodeHandle]:
    """What makes the nodes of a cluster: agents in this process with threads for workers, or each in a process
    of its own, here or on the machines of a Ray cluster."""
    if kind == "inprocess":
        from sllm_mini.cluster.nodes.agent import NodeAgent
        from sllm_mini.cluster.nodes.threads import ThreadLauncher

        return lambda spec, incarnation: NodeAgent(
            spec.name, incarnation, lambda store: ThreadLauncher(store, engine=options.node.engine), options.node, folder / spec.name,
        )  # fmt: skip
    if kind == "ray":
        from sllm_mini.cluster.ray import RayNodes

        return RayNodes(folder, options)
    from sllm_mini.cluster.nodes.program import Agent, connected_node, local_node

    def handle(spec: NodeSpec, incarnation: int) -> NodeHandle:
        agent = Agent(spec.name, incarnation, str(folder / spec.name), options.node)
        return connected_node(agent, options.host) if options.host else local_node(agent)

    return handle
