"""What chapter 11 shows of its rows: first tokens live and forecast, what they cost, what providers would have done, what stays open."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING

from sllm_mini.checkpoint import Checkpoint
from sllm_mini.cluster.trace.request import TraceRequest
from sllm_mini.lab.platform.contest import Row, Run
from sllm_mini.lab.platform.forecast import Costs
from sllm_mini.lab.platform.providers import Served
from sllm_mini.lab.platform.switches import SWITCHES
from sllm_mini.lab.style import INK, MUTED, color_of, use_style
from sllm_mini.lab.table import Table
from sllm_mini.lab.units import nbytes_text, seconds_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

_SAME = 0.05
"""Rows whose means are nearer to each other than this share are one line in words: two plays of one row differ by as much."""


def rows_table(rows: Sequence[Row]) -> Table:
    """Live beside forecast, row by row."""
    lines, before = [], None
    for row in rows:
        live, expected = row.live, row.expected
        loads = ", ".join(f"{count} {tier}" for tier, count in live.loads.items())
        worth = "" if before is None else f"x{before.live.mean / live.mean:.2f}"
        lines.append((row.name, seconds_text(live.mean), seconds_text(expected.mean), f"{row.error:+.0%}", worth, f"{live.starts} / {expected.starts}", loads, str(live.migrations)))
        before = row
    headers = ("with", "first token, mean", "forecast", "error", "worth", "starts live / forecast", "weights read from", "moves")
    return Table(headers, tuple(lines), numeric=frozenset({1, 2, 3, 4, 5, 7}), caption=f"One trace of {len(rows[0].live.firsts)} requests, one switch more in each row")


def plot_rows(rows: Sequence[Row], ax: Axes | None = None) -> Axes:
    """Seconds to the first token of every request, a line for each row: live above, as forecast below, and both means."""
    from matplotlib import pyplot

    use_style()
    if ax is None:
        _, ax = pyplot.subplots(figsize=(9, 0.55 * len(rows) + 0.9))
    for place, row in enumerate(rows):
        for run, offset, marker, color, label in ((row.live, -0.17, "o", color_of("remote"), "live"), (row.expected, 0.17, "x", color_of("dram"), "forecast")):
            y = [place + offset] * len(run.firsts)
            ax.plot(run.firsts, y, marker, color=color, markersize=6, markerfacecolor="none", alpha=0.75, label=label if not place else None)
            ax.plot([run.mean] * 2, [place + offset - 0.16, place + offset + 0.16], color=color, linewidth=3)
    ax.set_xscale("log")
    _plain(ax.xaxis)
    ax.set_yticks(range(len(rows)), [row.name if not place else f"+ {row.name}" for place, row in enumerate(rows)])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlabel("time to first token, seconds (a bar is the mean)")
    ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2)
    return ax


def rows_alt_text(rows: Sequence[Row]) -> str:
    told = "; ".join(f"{row.name} {seconds_text(row.live.mean)} live, {seconds_text(row.expected.mean)} forecast" for row in rows)
    return f"Time to first token of every request in {len(rows)} rows, logarithmic. Means: {told}."


def idle_switches(rows: Sequence[Row]) -> list[str]:
    """Those that did not shorten the mean, live, by more than two plays of one row may differ."""
    return [after.name for before, after in pairwise(rows) if after.live.mean > (1 - _SAME) * before.live.mean]


def cost_table(rows: Sequence[Row]) -> Table:
    """MB-seconds beside seconds to the first token; what workers held, and what stood beside them."""
    lines = tuple(
        (row.name, seconds_text(row.live.mean), f"{row.live.worker_mb_seconds:,.0f}", f"{row.live.standing_mb_seconds:,.0f}", f"{row.live.mb_seconds:,.0f}", f"{row.expected.mb_seconds:,.0f}")
        for row in rows
    )
    headers = ("with", "first token, mean", "workers", "zygotes and stores", "together, MB-seconds", "forecast")
    return Table(headers, lines, numeric=frozenset(range(1, 6)), caption="Memory held until the last answer, live; a worker's own, a zygote's share, a store's budget")


def plot_costs(rows: Sequence[Row], ax: Axes | None = None) -> Axes:
    """Mean time to first token over the memory held, a path from row to row: down and to the left is better."""
    from matplotlib import pyplot

    use_style()
    if ax is None:
        _, ax = pyplot.subplots(figsize=(7.5, 3.6))
    ax.plot([row.live.mb_seconds for row in rows], [row.live.mean for row in rows], color=MUTED, linewidth=1, zorder=1)
    for number, row in enumerate(rows):
        at = row.live.mb_seconds, row.live.mean
        ax.scatter(*at, s=60, color=color_of("device"), edgecolor=INK, linewidth=0.8, zorder=2)
        ax.annotate(str(number), at, xytext=(11 if number % 2 else -11, 0), textcoords="offset points", ha="center", va="center", fontsize=9)
    key = "\n".join(f"{number}  {row.name if not number else '+ ' + row.name}" for number, row in enumerate(rows))
    ax.annotate(key, (1.02, 0.5), xycoords="axes fraction", va="center", fontsize=9, color=INK, linespacing=1.5)
    ax.set_xlim(left=0)
    ax.set_yscale("log")
    _plain(ax.yaxis)
    ax.set_xlabel("memory held until the last answer, MB-seconds")
    ax.set_ylabel("first token, mean, seconds")
    return ax


def _plain(axis: Axis) -> None:
    """Numbers instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(FuncFormatter(lambda _value, _place: ""))


def costs_alt_text(rows: Sequence[Row]) -> str:
    told = "; ".join(f"{row.name} {row.live.mb_seconds:,.0f} MB-seconds at {seconds_text(row.live.mean)}" for row in rows)
    return f"Mean time to first token over memory held, both logarithmic, a path from row to row: {told}."


def worth_table(rows: Sequence[Row], costs: Costs, checkpoint: Checkpoint) -> Table:
    """What each switch could have saved here, as a number that is not its own row's time."""
    of, near = {row.name: row.live for row in rows}, _near(rows)
    slow, fast = costs.slow.figures, costs.fast.figures
    loads = [seconds_text(checkpoint.nbytes / each.remote_bytes_per_second) for each in (slow, fast)]
    said = {
        "fast loader": f"a load from afar takes {loads[0]} on one connection, {loads[1]} on several",
        "tiers": f"{near} of {sum(of['tiers'].loads.values())} loads found weights nearer than the remote store",
        "overlap": f"{seconds_text(fast.ready_seconds)} between the weights and a ready instance can hide behind a load",
        "zygote": f"a fresh interpreter takes {seconds_text(slow.process_seconds + slow.runtime_seconds)}, a fork {seconds_text(fast.process_seconds + fast.runtime_seconds)}",
        "scheduler": f"it answers {_sooner(of['zygote'], of['scheduler'])} of {len(of['tiers'].firsts)} requests sooner by 50 ms or more, {_sooner(of['scheduler'], of['zygote'])} later",
        "migration": f"{of['migration'].migrations} requests were moved",
        "keep-alive": f"{of['keep-alive'].starts} starts in place of {of['migration'].starts}",
    }
    lines = tuple((after.name, f"x{before.live.mean / after.live.mean:.2f}", said[after.name]) for before, after in pairwise(rows))
    return Table(("switch", "worth, live", "what there was to save"), lines, numeric=frozenset({1}))


def noise_text(rows: Sequence[Row]) -> str:
    """How far apart alike things were: imports of fresh interpreters, and rows whose switch had nothing to do, which are second plays of the
    rows above them."""
    imports = [seconds for row in rows if row.platform.launcher == "spawn" for seconds in row.live.runtimes]
    said = [f"a fresh interpreter imported for {min(imports):.1f} to {max(imports):.1f} s"] if imports else []
    for before, after in pairwise(rows):
        if (after.name == "tiers" and not _near(rows)) or (after.name == "migration" and not after.live.migrations):
            said.append(f"{after.name}, which had nothing to do, differs from the row above by {abs(after.live.mean / before.live.mean - 1):.0%}")
    return "the noise of this measurement: " + (";\n  ".join(said) or "every switch had something to do")


def _near(rows: Sequence[Row]) -> int:
    """Loads in the row of tiers that were not from the remote store."""
    loads = next(row.live.loads for row in rows if row.name == "tiers")
    return sum(loads.values()) - loads.get("remote", 0)


def _sooner(before: Run, after: Run) -> int:
    return sum(other < mine - 0.05 for mine, other in zip(before.firsts, after.firsts, strict=True))


def left_out_table(means: Mapping[float, Mapping[str, float]]) -> Table:
    """How much longer a first token takes without each switch, for weights of several sizes."""
    names = [name for name in next(iter(means.values())) if name in SWITCHES]
    first = ("nothing: the mean", *(seconds_text(each["all of them"]) for each in means.values()))
    lines = (first, *((name, *(f"x{each[name] / each['all of them']:.2f}" for each in means.values())) for name in names))
    headers = ("left out", *(f"weights x{times:g}" for times in means))
    return Table(headers, lines, numeric=frozenset(range(1, len(headers))), emphasis=frozenset({0}), caption="One switch taken away from the whole platform, forecast")


def open_table(row: Row, requests: Sequence[TraceRequest], checkpoint: Checkpoint, costs: Costs) -> Table:
    """What nobody in the survey has an answer for, or nobody whom we could check, beside a number of the whole platform's live row."""
    live, firsts, new = row.live, row.live.firsts, dict[str, float]()
    for each, seconds in zip(requests, firsts, strict=True):
        new.setdefault(each.model, seconds)
    asked = Counter(each.model for each in requests)
    common = asked.most_common(1)[0][0]
    mine = fmean(seconds for each, seconds in zip(requests, firsts, strict=True) if each.model == common)
    others = fmean(seconds for each, seconds in zip(requests, firsts, strict=True) if each.model != common)
    fast, brought = costs.fast.figures, sum(count for tier, count in live.loads.items() if tier != "dram")
    lines = (
        ("foreseeing a burst that has no rhythm", "hybrid histogram: the next call of one model from its last ones", f"{sum(new.values()) / sum(firsts):.0%} of all waiting was by the first request of a model"),
        ("fairness between models", "no row weighs one model against another", f"{seconds_text(others)} for the rare models, {seconds_text(mine)} for {common}"),
        ("one copy of what tenants have in common", "ServerlessLoRA (not checked), resident weights without isolation", f"{brought} loads brought {nbytes_text(brought * checkpoint.nbytes)} of weights that are all the same {nbytes_text(checkpoint.nbytes)}"),
        ("a snapshot of a device that is ready", "Modal, cuda-checkpoint (second-hand)", f"{seconds_text(fast.ready_seconds)} of each start are neither process, runtime nor weights"),
        ("who pays for what stands ready", "providers: a price for idle instances; none for zygotes and stores", f"{live.standing_mb_seconds / live.mb_seconds:.0%} of the memory was held by no worker"),
    )  # fmt: skip
    return Table(("left open", "what the survey has", "here"), lines, caption="Left open, each beside a number of the last live row")


def providers_table(served: Sequence[Served], slowed: Sequence[Served]) -> Table:
    """Each approach under the trace as it is, and slowed down."""
    lines = tuple(
        (one.name, one.assumed, "" if one.row is None else f"{one.row.source}: {one.row.trust}", seconds_text(one.mean), f"{one.idle_mb_seconds / 1e3:,.1f}",
         seconds_text(other.mean), f"{other.idle_mb_seconds / 1e3:,.0f}")
        for one, other in zip(served, slowed, strict=True)
    )  # fmt: skip
    headers = ("approach", "what we assumed", "source, and how far we trust it", "first token", "idle GB-seconds", "slowed: first token", "idle GB-seconds")
    return Table(
        headers, lines, numeric=frozenset(range(3, 7)), caption="Providers' ways under this trace, simulated on this machine",
        note="Means. Mechanisms only: none of it is a measurement of the provider named.",
    )  # fmt: skip
