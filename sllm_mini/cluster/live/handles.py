"""Which nodes a kind of cluster has. Chapter 08."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sllm_mini.cluster.live.carry import NodeHandle
from sllm_mini.cluster.live.options import LiveOptions
from sllm_mini.control.messages import NodeSpec


def handles_of(kind: str, folder: Path, options: LiveOptions) -> Callable[[NodeSpec, int], NodeHandle]:
    """What makes the nodes of a cluster: agents in this process with threads for workers, or each in a process of its own."""
    if kind == "inprocess":
        from sllm_mini.cluster.nodes.agent import NodeAgent
        from sllm_mini.cluster.nodes.threads import ThreadLauncher

        return lambda spec, incarnation: NodeAgent(
            spec.name, incarnation, lambda store: ThreadLauncher(store, engine=options.node.engine), options.node, folder / f"{spec.name}.{incarnation}",
        )  # fmt: skip
    from sllm_mini.cluster.nodes.remote import RemoteNode

    return lambda spec, incarnation: RemoteNode(spec.name, incarnation, options.node, folder / f"{spec.name}.{incarnation}")
