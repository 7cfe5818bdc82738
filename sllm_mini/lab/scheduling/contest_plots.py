"""Draws what `contest` and `learning` ran: ratios with their spread, sweeps as a grid of numbers, estimates against what came. Chapter 08."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sllm_mini.lab.scheduling.contest import SAME, Outcome, ratio, reported_order
from sllm_mini.lab.scheduling.learning import TRUE, Start, error_share
from sllm_mini.lab.scheduling.worked import NAMED, POLICIES
from sllm_mini.lab.style import INK, MUTED, PALETTE, PAPER, use_style
from sllm_mini.lab.table import Table
from sllm_mini.lab.units import seconds_text, share_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RIVALS = ("availability", "shepherd", "locality")
Sweep = Mapping[tuple[str, str], Sequence[Outcome]]
"""(row, column) → outcomes."""
_WHICH_MEDIAN = "P99: median of seeds; ratios: median (least to largest) of those within each seed"
"""Of a table's columns; loads and counts are medians of seeds too."""


def contest_table(found: Mapping[str, Sequence[Outcome]]) -> Table:
    """P99 of the time to the first token, and ratios to ServerlessLLM's within each seed, for each size of model."""
    rows = []
    for shape, outcomes in found.items():
        for policy in POLICIES:
            mine = [one for one in outcomes if one.placement == policy]
            rows.append((
                shape, NAMED[policy], seconds_text(statistics.median(one.first_token_p99 for one in mine)),
                "" if policy == "serverlessllm" else ratio(outcomes, policy).text, "" if policy == "serverlessllm" else ratio(outcomes, policy, measure="wait_p99").text,
                share_text(statistics.median(one.remote_share() for one in mine)), f"{statistics.median(one.migrations for one in mine):.0f}", f"{statistics.median(one.preemptions for one in mine):.0f}",
            ))  # fmt: skip
    seeds = len({one.seed for outcomes in found.values() for one in outcomes})
    return Table(
        ("models", "policy", "P99 to the first token", "over ServerlessLLM's", "P99 until first run, over its", "loads from the network", "moved", "stopped"), tuple(rows),
        caption=f"Bursts of CV 8 on four machines of four GPUs, {seeds} seeds. {_WHICH_MEDIAN}", numeric=frozenset({2, 3, 4, 5, 6, 7}),
        emphasis=frozenset(range(len(POLICIES) - 1, len(rows), len(POLICIES))),
    )  # fmt: skip


def order_text(found: Mapping[str, Sequence[Outcome]]) -> str:
    """For each size: who is behind whom in how many seeds, and by how much in the median."""
    parts = []
    for shape, outcomes in found.items():
        pairs = [("availability", "serverlessllm"), ("shepherd", "serverlessllm"), ("availability", "shepherd")]
        said = "; ".join(f"{NAMED[policy]} behind {NAMED[over]} in {ratio(outcomes, policy, over).times_behind} ({ratio(outcomes, policy, over).text})" for policy, over in pairs)
        parts.append(f"{shape}: {said}")
    return "\n".join(parts)


def plot_contest(found: Mapping[str, Sequence[Outcome]], ax: Axes | None = None) -> Axes:
    """How many times ServerlessLLM's P99 each rival's is: the median as a dot, the seeds' range as a line."""
    from matplotlib import pyplot

    if ax is None:
        use_style()
        _, ax = pyplot.subplots(figsize=(7.2, 0.9 + 0.42 * len(found) * len(RIVALS)), layout="constrained")
    labels, y = [], 0.0
    marks = dict(zip(RIVALS, (("o", "process"), ("s", "dram"), ("D", "remote")), strict=True))
    for shape, outcomes in reversed(list(found.items())):
        for rival in reversed(RIVALS):
            one = ratio(outcomes, rival)
            marker, role = marks[rival]
            ax.plot([one.low, one.high], [y, y], color=PALETTE[role], linewidth=2, solid_capstyle="butt")
            ax.plot([one.median], [y], marker, color=PALETTE[role], markersize=7)
            labels.append((y, f"{NAMED[rival]}, {shape}"))
            y += 1
        y += 0.5
    ax.axvline(1, color=INK, linewidth=1)
    ax.text(1, y - 0.55, " ServerlessLLM = 1", fontsize=9, color=MUTED, va="bottom")
    ax.set_xscale("log")
    _plain_ratios(ax)
    ax.set_yticks([at for at, _ in labels], [text for _, text in labels])
    ax.set_ylim(-0.6, y)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("P99 of the time to the first token, over ServerlessLLM's in the same seed")
    return ax


def _plain_ratios(ax: Axes) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    ax.xaxis.set_major_locator(FixedLocator([0.125, 0.25, 0.5, 1, 2, 4, 8]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"x{value:g}"))
    ax.xaxis.set_minor_locator(NullLocator())


def contest_alt_text(found: Mapping[str, Sequence[Outcome]]) -> str:
    parts = [f"{shape}, {NAMED[rival]} {ratio(outcomes, rival).text}" for shape, outcomes in found.items() for rival in RIVALS]
    return f"P99 of the time to the first token over ServerlessLLM's, median and range of seeds: {'; '.join(parts)}."


def plot_sweep(sweep: Sweep, *, rows: str, columns: str) -> Figure:
    """A grid for each rival: the median ratio to ServerlessLLM's P99 in numbers, red where ServerlessLLM is ahead, green where it is behind, bold where it is so in
    every seed."""
    from matplotlib import pyplot
    from matplotlib.colors import LinearSegmentedColormap

    use_style()
    downs, acrosses = list(dict.fromkeys(key[0] for key in sweep)), list(dict.fromkeys(key[1] for key in sweep))
    figure, axes = pyplot.subplots(1, len(RIVALS), figsize=(7.2, 0.95 + 0.42 * len(downs)), sharey=True, layout="constrained")
    shades = LinearSegmentedColormap.from_list("ahead", [PALETTE["disk"], PAPER, PALETTE["dram"]])
    for ax, rival in zip(axes, RIVALS, strict=True):
        ratios = [[ratio(sweep[down, across], rival) for across in acrosses] for down in downs]
        ax.imshow([[math.log2(one.median) for one in line] for line in ratios], cmap=shades, vmin=-2, vmax=2, aspect="auto")
        for at, line in enumerate(ratios):
            for place, one in enumerate(line):
                sure = one.low > 1 or one.high < 1
                ax.text(place, at, f"{one.median:.2f}", ha="center", va="center", fontsize=9, fontweight="bold" if sure else "normal", color=INK)
        ax.set_xticks(range(len(acrosses)), acrosses)
        ax.set_yticks(range(len(downs)), downs)
        ax.set_title(NAMED[rival])
        ax.grid(visible=False)
        ax.tick_params(length=0)
        for spine in ax.spines.values():
            spine.set_visible(False)
    axes[0].set_ylabel(rows)
    axes[1].set_xlabel(columns)
    return figure


def sweep_text(sweep: Sweep) -> str:
    """In how many settings the reported order holds, is tied, or is reversed, and the same against locality."""
    orders = [reported_order(outcomes) for outcomes in sweep.values()]
    waits = [ratio(outcomes, "locality").median for outcomes in sweep.values()]
    return (
        f"ServerlessLLM, Shepherd*, Serverless, in this order: holds in {orders.count('holds')} of {len(orders)} settings, with ties in {orders.count('tied')}, reversed "
        f"somewhere in {orders.count('reversed')}. Locality is ahead of ServerlessLLM in {sum(one < 1 - SAME for one in waits)}, behind in {sum(one > 1 + SAME for one in waits)}."
    )


def variants_table(found: Mapping[str, Sequence[Outcome]]) -> Table:
    """What is left of ServerlessLLM's lead without its migration, and with patience."""
    rows = []
    for shape, outcomes in found.items():
        for policy in dict.fromkeys(one.placement for one in outcomes):
            mine = [one for one in outcomes if one.placement == policy]
            rows.append((
                shape, NAMED.get(policy, policy), seconds_text(statistics.median(one.first_token_p99 for one in mine)), ratio(outcomes, policy).text,
                share_text(statistics.median(one.remote_share() for one in mine)), f"{statistics.median(one.migrations for one in mine):.0f}",
            ))  # fmt: skip
    return Table(
        ("setting", "policy", "P99 to the first token", "over ServerlessLLM's", "loads from the network", "moved"), tuple(rows),
        caption=f"Which part of the policy does it. {_WHICH_MEDIAN}", numeric=frozenset({2, 3, 4, 5}),
    )  # fmt: skip


def sweep_alt_text(sweep: Sweep) -> str:
    parts = [f"{down}, {across}: " + ", ".join(f"{NAMED[rival]} {ratio(outcomes, rival).median:.2f}" for rival in RIVALS) for (down, across), outcomes in sweep.items()]
    return f"P99 to the first token over ServerlessLLM's, median of seeds. {'; '.join(parts)}. {sweep_text(sweep)}"


def plot_estimates(runs: Mapping[str, Sequence[Start]]) -> Figure:
    """Seconds expected and seconds taken, start after start, on each machine, for each controller; dots that meet are estimates that hold."""
    from matplotlib import pyplot

    use_style()
    figure, axes = pyplot.subplots(1, len(runs), figsize=(7.2, 2.9), sharey=True, squeeze=False, layout="constrained")
    for ax, (title, starts) in zip(axes[0], runs.items(), strict=True):
        for node, marker, role in zip(TRUE, ("o", "s"), ("process", "dram"), strict=True):
            mine = [(number, one) for number, one in enumerate(starts, 1) if one.node == node]
            ax.plot([at for at, _ in mine], [one.took for _, one in mine], marker, color=PALETTE[role], markersize=4.5, label=f"{node} disk: took", linestyle="none")
            ax.plot([at for at, _ in mine], [one.predicted for _, one in mine], "_", color=INK if node == "worn" else MUTED, markersize=7, markeredgewidth=1.4, linestyle="none", label=f"{node} disk: expected")
        ax.set_title(title)
        ax.set_xlabel("number of the start")
    axes[0, 0].set_ylabel("seconds, queue included")
    axes[0, 0].set_ylim(bottom=0)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower left", ncols=4)
    return figure


def estimates_alt_text(runs: Mapping[str, Sequence[Start]]) -> str:
    parts = []
    for title, starts in runs.items():
        for node in TRUE:
            mine = [one for one in starts if one.node == node]
            said = f"a mean error of {share_text(error_share(mine))}" if mine else "none"
            parts.append(f"{title}, {node} disk: {len(mine)} starts, {said}")
    return f"Seconds expected and taken, start after start. {'; '.join(parts)}."
