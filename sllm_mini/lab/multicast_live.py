"""What `bench multicast` measured beside what was planned: a plan's ticks, each as long as one block took over the idle link.

Of several rounds the quickest counts, run and block alike, since a noisy machine only adds. Shown in chapter 10.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sllm_mini.lab.figure import Described, describe
from sllm_mini.lab.style import INK, color_of, darker, use_style
from sllm_mini.lab.units import nbytes_text, rate_text, seconds_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOOKS = {"store": "remote", "tree": "disk", "chain": "runtime", "binomial": "process", "2-way": "dram"}


def planned_seconds(row: Mapping[str, Any]) -> float:
    """A plan's ticks times the quickest of the blocks that were measured beside it. Pure."""
    return float(row["ticks"] * row["block_seconds_min"])


def _rows(document: Mapping[str, Any], nodes: int) -> list[dict[str, Any]]:
    rows = [row for name in _LOOKS for row in document["results"] if row["plan"] == name and row["nodes"] == nodes]
    if not rows:
        raise ValueError(f"nothing was measured with {nodes} nodes; give one of {sorted({row['nodes'] for row in document['results']})}")
    return rows


def plot_live(document: Mapping[str, Any], nodes: int, ax: Axes | None = None) -> Axes:
    """A bar for each plan of so many nodes: measured seconds until all hold the model, of the quickest round; a line across it: `planned_seconds`.
    Raises ValueError where none was measured with so many. Not safe while another thread draws."""
    from matplotlib import pyplot

    rows = _rows(document, nodes)
    if ax is None:
        use_style()
        _, ax = pyplot.subplots(figsize=(7.2, 0.9 + 0.5 * len(rows)), layout="constrained")
    colors = [color_of(_LOOKS[row["plan"]]) for row in rows]
    ax.barh(range(len(rows)), [row["seconds_min"] for row in rows], height=0.62, color=colors, edgecolor=[darker(color) for color in colors], label="measured")
    for place, row in enumerate(rows):
        ticks = f"{row['ticks']} ticks"
        ax.plot([planned_seconds(row)] * 2, [place - 0.42, place + 0.42], color=INK, linewidth=2.0, label="planned: ticks × one block" if place == 0 else None)
        ax.annotate(f"{seconds_text(row['seconds_min'])}, {ticks}", (max(row["seconds_min"], planned_seconds(row)), place), (6, 0), textcoords="offset points", va="center")
    ax.set_yticks(range(len(rows)), [row["name"].split(",")[0] for row in rows])
    ax.invert_yaxis()
    ax.set_xlim(0, 1.35 * max(max(row["seconds_min"], planned_seconds(row)) for row in rows))
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("seconds until every node holds the model")
    ax.set_title(f"{nodes} node processes on this machine: planned and measured")
    ax.figure.legend(*_unique(ax), loc="outside lower center", ncols=2)
    return ax


def _unique(ax: Axes) -> tuple[list[Any], list[str]]:
    """The line's entry, and one for the bars, whose colour says which plan."""
    from matplotlib.patches import Patch

    handles, labels = ax.get_legend_handles_labels()
    found = dict(zip(labels, handles, strict=True))
    found["measured"] = Patch(facecolor="white", edgecolor=INK)
    return list(found.values()), list(found)


def live_text(document: Mapping[str, Any], nodes: int) -> str:
    """The finding: each plan's seconds over what was planned, and the pipeline against the store."""
    rows = {row["plan"]: row for row in _rows(document, nodes)}
    model, method = document["model"], document["method"]
    said = [f"{row['name'].split(',')[0]} {seconds_text(row['seconds_min'])} (x{row['seconds_min'] / planned_seconds(row):.2f} of its plan)" for row in rows.values()]
    text = (
        f"{model['blocks']} blocks of {nbytes_text(model['block_nbytes'])} to {nodes} nodes, {method['links']} of {rate_text(method['bytes_per_second_used'])}, "
        f"{method['transport']}, quickest of {method['rounds']}: {'; '.join(said)}."
    )
    if {"store", "binomial"} <= rows.keys():
        binomial, store = rows["binomial"], rows["store"]
        text += f" Against the store the binomial pipeline takes x{binomial['seconds_min'] / store['seconds_min']:.2f}; by ticks x{binomial['ticks'] / store['ticks']:.2f}."
    return text


def draw_live(document: Mapping[str, Any], nodes: int) -> Described:
    """`plot_live` with its alt text."""
    said = live_text(document, nodes)
    return describe(plot_live(document, nodes), f"Measured seconds of each plan, beside its ticks times one block. {said}", caption=said)
