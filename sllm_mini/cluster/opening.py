"""A cluster by the name of its kind: `open_cluster`. Chapter 08."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sllm_mini.cluster.api import Cluster
from sllm_mini.cluster.live.driver import LiveCluster, Resume
from sllm_mini.cluster.live.options import ControlOptions, LiveOptions
from sllm_mini.cluster.simulated.interactive import SimulatedDriver
from sllm_mini.cluster.simulated.run import even_cluster
from sllm_mini.control.messages import NodeSpec
from sllm_mini.errors import SllmError

if TYPE_CHECKING:
    from sllm_mini.cluster.ray import RayNodes

_KINDS = ("inprocess", "local", "ray", "simulated")


def open_cluster(
    kind: str,
    *,
    folder: Path,
    nodes: Sequence[NodeSpec] | None = None,
    control: ControlOptions | None = None,
    options: LiveOptions | None = None,
    resume: Resume = False,
) -> Cluster:
    """A cluster whose nodes are threads of this process ("inprocess"), processes of this machine ("local") or of those of a Ray cluster
    ("ray", see `cluster.ray`), or played in virtual time ("simulated"); "local:4" makes four even nodes where none are given. `folder` is the cluster's own. With `resume` it goes on with
    what a live one left there that was killed or closed: its models are deployed, its requests go on where their readers were, and are
    found by `stream`. (One that was closed has told its requests so: they have failed.) With "models" its requests are cancelled instead:
    nobody is there to read them. Raises SllmError for another kind, for nodes that do not come up, and where nothing was left."""
    name, _, count = kind.partition(":")
    if name not in _KINDS or (count and not count.isdecimal()) or (count and nodes is not None):
        raise SllmError(f"there is no cluster {kind!r}; give {', '.join(_KINDS)}, or one of them with a number of nodes ('local:4') and no nodes beside it")
    if nodes is None:
        nodes = even_cluster(int(count or 1), devices=2, dram_nbytes=(options or LiveOptions()).node.store_dram_nbytes)
    control, options = control or ControlOptions(), options or LiveOptions()
    if name == "simulated":
        if resume:
            raise SllmError("a simulated cluster leaves nothing that could be resumed; ask it again")
        return SimulatedDriver(nodes, control, options)
    if name == "ray":
        return RayCluster.open(name, nodes, control, folder, options, resume=resume)
    return LiveCluster.open(name, nodes, control, folder, options, resume=resume)


class RayCluster(LiveCluster):
    """A live cluster of `RayNodes`, which end with it. Where `options` name no host, agents reach it at the address that Ray does."""

    def __init__(self, handles: RayNodes, control: ControlOptions, folder: Path, options: LiveOptions | None = None, *, resume: Resume = False) -> None:
        self._nodes = handles
        try:
            super().__init__(handles, control, folder, replace(options or LiveOptions(), host=handles.host), resume=resume)
        except BaseException:
            handles.close()
            raise

    def close(self) -> None:
        super().close()
        self._nodes.close()
