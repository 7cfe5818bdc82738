"""Scale-out plans drawn and said: a schedule as nodes against ticks, and how long until n instances serve, for each plan.

Arithmetic on the plans of `control.multicast` in their model of a network (`control.multicast.schedule`); nothing here was
measured, and each figure says so. Shown in chapter 10; the moving picture of one tick is `multicast_frames`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, log2
from typing import TYPE_CHECKING, Any

from sllm_mini.control.multicast import (
    Plan,
    binary_tree,
    binomial_pipeline,
    k_way_pipeline,
    plan_seconds,
    serial_chain,
    store_reads,
    summarize,
)
from sllm_mini.lab.figure import Described, describe
from sllm_mini.lab.style import INK, MUTED, PALETTE, WAIT_HATCH, color_of, darker, ink_on, use_style
from sllm_mini.lab.table import Table
from sllm_mini.lab.units import nbytes_text, rate_text, seconds_text
from sllm_mini.lab.widgets import Slider

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLAN_NAMES = ("store", "tree", "chain", "binomial", "k-way")
"""The plans, from what helps least to what helps most."""

_LADDER = ("cold", "process", "runtime", "dram", "device")  # "ready" is kept for nodes that serve
_LOOKS: Mapping[str, tuple[str, str]] = {
    "store": ("remote", "v"),
    "tree": ("disk", "^"),
    "chain": ("runtime", "s"),
    "binomial": ("process", "o"),
    "k-way": ("dram", "D"),
}


def build_plan(name: str, instances: int, blocks: int, *, ways: int = 4, store_sends: int = 1) -> Plan:
    """The plan `name` (of `PLAN_NAMES`) that starts `instances` new instances from what runs already: one instance, `ways` of them
    for "k-way" (no more than there are new ones), a store of `store_sends` links for "store". Raises ValueError for another name."""
    if name == "store":
        return store_reads(instances + 1, blocks, store_sends)
    if name == "k-way":
        sources = max(1, min(ways, instances))
        return k_way_pipeline(instances + sources, blocks, sources)
    builders = {"tree": binary_tree, "chain": serial_chain, "binomial": binomial_pipeline}
    if name not in builders:
        raise ValueError(f"there is no plan called {name!r}; the plans are {', '.join(PLAN_NAMES)}")
    return builders[name](instances + 1, blocks)


def block_color(block: int, blocks: int) -> str:
    """A colour for each block, from dark for the first to light for the last: the warmth ladder's colours below "ready" and what lies between."""
    place = (len(_LADDER) - 1) * block / max(1, blocks - 1)
    low = min(int(place), len(_LADDER) - 2)
    ends = [PALETTE[role] for role in _LADDER[low : low + 2]]
    share = place - low
    channels = [round((1 - share) * int(ends[0][i : i + 2], 16) + share * int(ends[1][i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{channel:02x}" for channel in channels)


# A schedule


def plot_schedule(plan: Plan, ax: Axes | None = None) -> Axes:
    """Nodes against ticks: the block that each node receives in each tick, by number and colour; for a source, hatched, what it sends.

    A thin bar follows once a node holds every block; the dashed line is the tick at whose end the new nodes hold every block
    between them. Not safe while another thread draws.
    """
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch, Rectangle
    from matplotlib.ticker import MaxNLocator

    summary = summarize(plan)
    if ax is None:
        use_style()
        _, ax = pyplot.subplots(figsize=(min(10.0, 2.4 + 0.3 * max(12, plan.ticks)), 1.5 + 0.29 * plan.nodes), layout="constrained")
    small = 8.5 if plan.ticks <= 32 else 6.5
    for transfer in plan.transfers:
        color = block_color(transfer.block, plan.blocks)
        ax.add_patch(Rectangle((transfer.tick - 0.5, transfer.target - 0.44), 1, 0.88, facecolor=color, edgecolor="white", linewidth=0.8))
        ax.text(transfer.tick, transfer.target, str(transfer.block), ha="center", va="center", fontsize=small, color=ink_on(color))
    sent = Counter((t.source, t.tick) for t in plan.transfers if t.source < plan.sources)
    last = {(t.source, t.tick): t.block for t in plan.transfers}
    for (source, tick), count in sent.items():
        ax.add_patch(Rectangle((tick - 0.5, source - 0.44), 1, 0.88, facecolor="white", edgecolor=MUTED, linewidth=0.5, hatch=WAIT_HATCH, alpha=0.6))
        words = str(last[source, tick]) if count == 1 else f"{count}×"
        ax.text(tick, source, words, ha="center", va="center", fontsize=small, color=INK, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8})
    serving = color_of("ready")
    for node, complete in enumerate(summary.complete):
        if plan.sources <= node:
            ax.barh(node, plan.ticks + 1.5 - complete, left=complete + 0.5, height=0.24, color=serving, edgecolor=darker(serving), linewidth=0.5)
    ax.plot([summary.joint + 0.5] * 2, [plan.sources - 0.5, plan.nodes - 0.5], linestyle="--", color=INK, linewidth=1.2)
    ax.set_xlim(0.5, plan.ticks + 2)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylim(plan.nodes - 0.4, -0.6)
    ax.set_yticks(range(plan.nodes), [f"source {node}" if node < plan.sources else f"node {node}" for node in range(plan.nodes)])
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False)
    ax.set_xlabel("tick: one block over one link")
    ax.set_title(f"{plan.name}: {plan.nodes - plan.sources} new instances after {plan.ticks} ticks (computed, {plan.blocks} blocks)")
    middle = block_color(plan.blocks // 2, plan.blocks)
    keys = [
        Patch(facecolor=middle, edgecolor="white", label="receives this block"),
        Patch(facecolor="white", edgecolor=MUTED, hatch=WAIT_HATCH, label="a source sends"),
        Patch(facecolor=serving, edgecolor=darker(serving), label="holds every block"),
        Line2D([], [], linestyle="--", color=INK, label="the new nodes together do"),
    ]
    ax.figure.legend(handles=keys, loc="outside lower center", ncols=2)
    return ax


def schedule_text(plan: Plan) -> str:
    """The finding: how long, who is first, when the group could serve together, what the sources had to send."""
    summary = summarize(plan)
    new = summary.complete[plan.sources :]
    if not new:
        return f"{plan.name}: there is no new instance, so nothing moves."
    copies = summary.source_blocks / plan.blocks
    return (
        f"{plan.name}: {len(new)} new instances hold all {plan.blocks} blocks after {summary.ticks} ticks, the first of them after {min(new)}; "
        f"together they hold a whole model after {summary.joint}. {'The source' if plan.sources == 1 else f'The {plan.sources} sources'} "
        f"sent {copies:.3g} copies' worth."
    )


def draw_schedule(plan: Plan) -> Described:
    """`plot_schedule` with its alt text."""
    rows = [f"node {node}: {', '.join(str(block) for _, block in sorted((tick, block) for block, tick in held.items()))}" for node, held in enumerate(plan.arrivals()) if node >= plan.sources]
    listed = f" Blocks in order of arrival: {'; '.join(rows)}." if len(rows) * plan.blocks <= 64 else ""
    return describe(plot_schedule(plan), f"Nodes against ticks, the block that each node receives. {schedule_text(plan)}{listed}", caption=schedule_text(plan))


def plans_table(instances: int, blocks: int, *, ways: int = 4, store_sends: int = 1) -> Table:
    """All plans side by side, in ticks."""
    rows = []
    for name in PLAN_NAMES:
        plan = build_plan(name, instances, blocks, ways=ways, store_sends=store_sends)
        summary = summarize(plan)
        new = summary.complete[plan.sources :]
        rows.append((plan.name, str(plan.sources), str(summary.joint), str(min(new)), str(summary.ticks), f"{summary.source_blocks / blocks:.3g}"))
    return Table(
        headers=("plan", "sources", "jointly whole after", "first whole after", "all whole after", "copies sent by sources"),
        rows=tuple(rows),
        caption=f"{instances} new instances, {blocks} blocks, in ticks",
        note=f"Computed. The store's link is {store_sends} times a node's.",
        numeric=frozenset(range(1, 6)),
    )


# How long until n instances serve


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One plan for one number of new instances: seconds until every one can serve alone, and until they can together."""

    name: str
    instances: int
    seconds: float
    joint_seconds: float


def ticks_until_served(name: str, instances: int, blocks: int, *, ways: int = 4, store_sends: int = 1) -> tuple[int, int]:
    """The plan's ticks until all hold every block, and until they do between them. By formula for "binomial" and "k-way", which
    cost the square of `blocks` to build (`k_way_pipeline` states it); counted in the plan for the others. Pure."""
    if name in ("binomial", "k-way"):
        sources = max(1, min(ways, instances)) if name == "k-way" else 1
        return blocks + ceil(log2(1 + ceil(instances / sources))) - 1, ceil(blocks / sources)
    summary = summarize(build_plan(name, instances, blocks, store_sends=store_sends))
    return summary.ticks, summary.joint


def serve_curves(
    instances: Sequence[int], blocks: int, *, model_nbytes: float, bytes_per_second: float, tick_seconds: float = 0.0, ways: int = 4, store_sends: int = 1
) -> list[CurvePoint]:
    """All plans for all these numbers of new instances. `bytes_per_second` is a node's link; see `plan_seconds` for the fixed cost
    of a tick. Pure; about a second for 1 to 32 instances and 1,000 blocks."""
    points = []
    for name in PLAN_NAMES:
        for count in instances:
            counted = ticks_until_served(name, count, blocks, ways=ways, store_sends=store_sends)
            alone, joint = (plan_seconds(ticks, model_nbytes / blocks, bytes_per_second, tick_seconds=tick_seconds) for ticks in counted)
            points.append(CurvePoint(name, count, alone, joint))
    return points


def plot_serve_curves(points: Sequence[CurvePoint], ax: Axes | None = None) -> Axes:
    """Seconds until n new instances serve, against n, a line for each plan; dashed, the k-way form until its nodes can together.
    Both axes logarithmic. Raises ValueError without points. Not safe while another thread draws."""
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullFormatter

    if not points:
        raise ValueError("there are no plans to draw; give serve_curves at least one number of instances")
    if ax is None:
        use_style()
        _, ax = pyplot.subplots(figsize=(7.2, 4.2), layout="constrained")
    for name, line in _lines(points).items():
        role, marker = _LOOKS[name]
        counts = [point.instances for point in line]
        ax.plot(counts, [point.seconds for point in line], color=color_of(role), marker=marker, markersize=5, label=_NAMES[name])
        if name == "k-way":
            ax.plot(counts, [point.joint_seconds for point in line], color=color_of(role), marker=marker, markersize=4, linestyle="--", markerfacecolor="white", label="the same, jointly")
    counts = sorted({point.instances for point in points})
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(counts, [str(count) for count in counts])
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("new instances (logarithmic)")
    ax.set_ylabel("seconds (logarithmic)")
    ax.set_title("Until all new instances serve (computed, not measured)")
    ax.figure.legend(loc="outside lower center", ncols=3)
    return ax


_NAMES = {
    "store": "everyone reads the store",
    "tree": "FaaSNet's tree",
    "chain": "BlitzScale's chain",
    "binomial": "λScale's binomial pipeline",
    "k-way": "its k-way form",
}


def _lines(points: Sequence[CurvePoint]) -> dict[str, list[CurvePoint]]:
    return {name: line for name in PLAN_NAMES if (line := sorted((point for point in points if point.name == name), key=lambda point: point.instances))}


def serve_text(points: Sequence[CurvePoint]) -> str:
    """The finding, at the greatest number of instances: what each plan takes there, and against one instance."""
    lines = _lines(points)
    said = [
        f"{_NAMES[name]} {seconds_text(line[-1].seconds)} (x{line[-1].seconds / line[0].seconds:.2f} against {line[0].instances})" for name, line in lines.items()
    ]
    text = f"Until {max(point.instances for point in points)} new instances serve: {'; '.join(said)}."
    if "k-way" in lines:
        text += f" From several sources, the new ones hold a model between them after {seconds_text(lines['k-way'][-1].joint_seconds)}, and can serve as a pipeline."
    return text


@dataclass(frozen=True, slots=True)
class CountSlider(Slider):
    """A `Slider` whose numbers are counts, said in full."""

    def text(self, value: Any) -> str:
        return f"{round(value):,}"


def draw_serve_curves(*, model_gb: float, link_gbit: float, blocks: float, tick_ms: float, ways: float, store_sends: float) -> Described:
    """The widget's drawing, in the units of its sliders: 1 to 32 new instances."""
    nbytes, rate = model_gb * 1e9, link_gbit * 1e9 / 8
    points = serve_curves(
        (1, 2, 4, 8, 16, 32), round(blocks), model_nbytes=nbytes, bytes_per_second=rate, tick_seconds=tick_ms / 1e3, ways=round(ways), store_sends=round(store_sends)
    )
    said = serve_text(points)
    setting = f"{nbytes_text(nbytes)} in {round(blocks):,} blocks, {rate_text(rate)} a node, a store of {round(store_sends)} such links, up to {round(ways)} sources for the k-way form."
    return describe(plot_serve_curves(points), f"Seconds until n new instances serve, against n. {said} {setting}", caption=f"{said} {setting}")


def serve_controls() -> dict[str, Slider]:
    """The controls of `draw_serve_curves`. Where they stand first is an assumption, a 16 GB model and 100 Gbit/s links,
    and of blocks the number at which the binomial pipeline is quickest for 32 new instances then."""
    return {
        "model_gb": Slider("model", 16, 0.1, 1000, unit="GB", log=True),
        "link_gbit": Slider("a node's link", 100, 1, 800, unit="Gbit/s", log=True),
        "blocks": CountSlider("blocks", 80, 1, 4096, log=True),
        "tick_ms": Slider("fixed cost of a tick", 1, 0, 50, step=0.5, unit="ms"),
        "ways": Slider("sources of the k-way form", 4, 1, 8, step=1),
        "store_sends": Slider("the store's link, in nodes' links", 4, 1, 32, step=1),
    }
