"""A running platform in a notebook: what its instances did, and what its nodes have now. `Panel` watches, and draws what it saw.

    with Panel(cluster) as panel:
        ...        # ask it for something
    panel          # the timeline and the nodes; in a running notebook with a switch that follows what happens

It looks twenty times a second, which wakes nothing, and keeps the last minutes. The page of the server, GET /dashboard, shows the same. Chapter 11.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from itertools import count
from types import TracebackType
from typing import Any, Self

from sllm_mini.cluster.api import Cluster, InstanceReport, NodeReport
from sllm_mini.errors import SllmError
from sllm_mini.lab.figure import Described, describe
from sllm_mini.lab.platform.opened import nodes_table
from sllm_mini.lab.style import use_style
from sllm_mini.lab.table import Table
from sllm_mini.lab.timeline import plot_timeline, timeline_alt_text, timeline_table
from sllm_mini.lab.widgets import has_front_end
from sllm_mini.types import Span

LOOK_SECONDS = 0.05
_FOLLOW_SECONDS = 0.5
_MOST_SPANS = 4000


class Panel:
    """Of one cluster, which stays its owner's. Safe from several threads. `spans` are what instances did, the latest `_MOST_SPANS` of them:
    a climb and a time in which it served have the rung on which it stood, an idle one has none. A node has as many rows as instances at once."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster, self._lock = cluster, threading.Lock()
        self._done: deque[Span] = deque(maxlen=_MOST_SPANS)
        self._open: dict[int, Span] = {}
        self._lanes: dict[int, str] = {}
        self._nodes: list[NodeReport] = []
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def spans(self) -> list[Span]:
        with self._lock:
            return [*self._done, *self._open.values()]

    def look(self) -> None:
        """Once. Raises SllmError where the cluster has ended."""
        nodes, now = self._cluster.nodes(), self._cluster.now
        with self._lock:
            self._nodes = nodes
            here = [(node.name, each) for node in nodes for each in node.instances]
            for instance in self._open.keys() - {each.instance for _, each in here}:
                self._done.append(self._open.pop(instance))
                del self._lanes[instance]
            there = {each.instance: _span(each, self._lane(name, each.instance), now) for name, each in here}
            for instance, seen in there.items():
                known = self._open.get(instance)
                same = known is not None and (known.name, known.warmth) == (seen.name, seen.warmth)
                if known is not None and not same:
                    self._done.append(Span(known.name, known.start, now, known.lane, 0, known.warmth))
                start = known.start if known is not None and same else now
                self._open[instance] = Span(seen.name, start, now, seen.lane, 0, seen.warmth)

    def start(self) -> None:
        """Looks again and again on a thread of its own, until `stop` or the cluster's end."""
        if self._thread is None:
            self._ended.clear()
            self._thread = threading.Thread(target=self._watch, name="sllm-panel", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """What it saw stays. Safe to call twice."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def render(self) -> tuple[Described | Table, ...]:
        """The timeline and its table, where there is one, and the nodes; the cluster is not asked."""
        spans, table = self.spans, nodes_table(self._nodes)
        if not spans:
            return (table,)
        use_style()
        axes = plot_timeline(spans, title="What the instances did")
        return describe(axes, timeline_alt_text(spans)), timeline_table(spans), table

    def widget(self) -> Any:
        """An ipywidgets box: a switch, and what `render` gives, again and again while it is on."""
        import ipywidgets

        follow = ipywidgets.Checkbox(value=False, description="follow what happens", indent=False)
        shown = ipywidgets.HTML(value=_html(self.render()))

        def redraw() -> None:
            self.start()
            while follow.value and not self._ended.wait(_FOLLOW_SECONDS):
                shown.value = _html(self.render())
            self.stop()

        def switched(change: dict[str, Any]) -> None:
            if change["new"]:
                threading.Thread(target=redraw, name="sllm-panel-draw", daemon=True).start()

        follow.observe(switched, names="value")
        return ipywidgets.VBox([follow, shown])

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _ipython_display_(self) -> None:
        from IPython.display import display

        if has_front_end():
            display(self.widget())
        else:
            display(*self.render())

    def _lane(self, node: str, instance: int) -> str:
        """The first row of its node that no other instance is in."""
        if instance not in self._lanes:
            taken = self._lanes.values()
            names = (f"{node} ({number})" if number > 1 else node for number in count(1))
            self._lanes[instance] = next(name for name in names if name not in taken)
        return self._lanes[instance]

    def _watch(self) -> None:
        while not self._ended.is_set():
            try:
                self.look()
            except SllmError:  # it has ended; what was seen is what there is
                self._ended.set()
            self._ended.wait(LOOK_SECONDS)


def _span(instance: InstanceReport, lane: str, now: float) -> Span:
    model, warmth = instance.model or "no model", instance.warmth
    if instance.climbing_to is not None:
        return Span(f"{model} climbs", now, now, lane, 0, warmth)
    return Span(f"{model} serves", now, now, lane, 0, warmth) if instance.requests else Span(f"{model} idle", now, now, lane)


def _html(parts: Iterable[Described | Table]) -> str:
    return "\n".join(part._repr_mimebundle_()["text/html"] for part in parts)
