"""A platform that stays open behind HTTP while a reader looks at it: remote store, cluster and server in one. Chapter 11."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from sllm_mini.checkpoint import Checkpoint
from sllm_mini.cluster.api import Deployment, NodeReport
from sllm_mini.cluster.opening import open_cluster
from sllm_mini.lab.livebench.play import with_shared_zygote
from sllm_mini.lab.platform.switches import Platform
from sllm_mini.lab.table import Table
from sllm_mini.lab.tiers.origin import Origin
from sllm_mini.lab.units import nbytes_text, seconds_text
from sllm_mini.serving.options import ServeOptions

if TYPE_CHECKING:
    from openai import OpenAI

_COMMENT_SECONDS = 0.25


class OpenPlatform:
    """See the module. Its models are `platform.names`, all of them the checkpoint under names of their own; `client` speaks to it. As a
    context manager it closes itself. Costs some seconds to come up. Raises SllmError where a node or the server does not."""

    def __init__(self, platform: Platform, checkpoint: Checkpoint) -> None:
        from openai import OpenAI

        from sllm_mini.serving.server import Server

        with ExitStack() as made:
            folder = Path(made.enter_context(tempfile.TemporaryDirectory(prefix="sllm-platform-")))
            origin = made.enter_context(Origin(Path(checkpoint.path), platform.remote_bytes_per_second, per_connection=platform.per_connection))
            self.cluster = made.enter_context(
                open_cluster(platform.kind, folder=folder / "cluster", nodes=platform.nodes(), control=platform.control(), options=with_shared_zygote(platform.live(checkpoint), platform.kind))
            )
            for spec in platform.specs(checkpoint):
                self.cluster.deploy(Deployment(spec, f"{origin.url.rpartition('/')[0]}/{spec.name}"))
            self.server = made.enter_context(Server(self.cluster, ServeOptions(port=0, comment_seconds=_COMMENT_SECONDS)))
            self.server.read_ahead().join()
            self.client: OpenAI = made.enter_context(OpenAI(base_url=f"{self.server.url}/v1", api_key="none is needed here", max_retries=0))
            self._made = made.pop_all()

    def close(self) -> None:
        """Ends server, cluster and store. Safe to call twice."""
        self._made.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def timing_table(answers: Iterable[tuple[str, Any]]) -> Table:
    """What each answer of the client says of its own time: (what was asked, completion)."""
    rows = []
    for what, answer in answers:
        timing = answer.choices[0].sllm
        first = timing["queue_seconds"] + timing["prefill_seconds"]
        rows.append((what, timing["rung"], timing["tier"] or "", seconds_text(timing["load_seconds"]), seconds_text(timing["queue_seconds"]), seconds_text(first)))
    headers = ("asked", "started from", "weights read from", "load", "queue", "first token")
    return Table(headers, tuple(rows), numeric=frozenset({3, 4, 5}), caption="Where the time of each request went, as its answer says")


def nodes_table(nodes: Iterable[NodeReport]) -> Table:
    """Each node now: who has its devices, and what its store holds."""
    rows = tuple(
        (
            node.name, ", ".join(f"{each.model} ({each.warmth.name.lower()})" for each in node.instances if each.model) or "nobody",
            ", ".join(f"{name} in {tier.name.lower()}" for name, tier in sorted(node.cached.items(), key=lambda item: (-item[1], item[0]))) or "nothing",
            "" if node.store is None else nbytes_text(node.store.dram_used_nbytes), "" if node.store is None else nbytes_text(node.store.shared_nbytes),
        )
        for node in nodes
    )  # fmt: skip
    return Table(("node", "its device is with", "its store has", "store's memory", "zygote"), rows, numeric=frozenset({3, 4}), caption="The platform, now")
