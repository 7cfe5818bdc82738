"""Bars of what a warm-up costs, with the spread of the rounds, and the same in words and tables. Draws and never measures.

Seconds are on a logarithmic axis: what is prepared is often a thousand times sooner there. Shown in chapter 06.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from sllm_mini.lab.figure import Described, describe
from sllm_mini.lab.ladder.plots import Factor
from sllm_mini.lab.style import color_of, darker, use_style
from sllm_mini.lab.table import Table
from sllm_mini.lab.units import nbytes_text, seconds_text
from sllm_mini.lab.warmup.measure import PARTS, rows_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAIRS: Mapping[str, tuple[str, str]] = {
    "first calls": ("first", "again"),
    "torch.compile": ("cold cache", "warm cache"),
    "kernels": ("just in time", "ahead of time"),
    "memory profile": ("measured", "recorded"),
    "attention": ("SDPA with a mask", "our kernel"),
}
"""Of each part, the state that pays and the state that was prepared."""
_COLORS = {
    "first": "cold", "cold cache": "cold", "just in time": "cold", "measured": "cold",
    "again": "ready", "warm cache": "dram", "cached": "dram", "ahead of time": "ready", "recorded": "ready",
    "SDPA with a mask": "process", "our kernel": "ready",
    "eager step": "process", "compiled step": "ready",
    "before the first step": "cold", "first steps of all batch sizes": "dram", "one later step of each": "ready",
}  # fmt: skip
_TITLES = {
    "first calls": "The first call in a process, and the next",
    "torch.compile": "torch.compile: cache cold and warm",
    "kernels": "Our attention kernel in three states",
    "memory profile": "How much memory a step needs: tried and recorded",
    "attention": "Attention of one layer, one new token per row",
    "graphs": "Decode steps: eager, captured lazily, captured up front",
}


def factor_of(document: Mapping[str, Any], part: str, name: str) -> Factor:
    """How many times sooner the prepared state of a part was, round by round. Raises ValueError if it was not measured."""
    states = {row["state"]: row["samples"] for row in rows_of(document, part) if row["name"] == name}
    pays, prepared = PAIRS[part]
    if pays not in states or prepared not in states:
        raise ValueError(f"{name} of {part} was not measured in both states; see what was skipped")
    ratios = [slow / fast for slow, fast in zip(states[pays], states[prepared], strict=False)]
    return Factor(median(ratios), min(ratios), max(ratios))


def factor_text(factor: Factor, rounds: int, whose: str = "") -> str:
    """A factor with its bracket and verdict, on whom (`whose`) where that is not plain; one round has neither."""
    return bracketed(factor, rounds) if rounds == 1 else f"{factor}, {whose}{factor.verdict}"


def bracketed(factor: Factor, rounds: int) -> str:
    """A factor with its bracket, which one round does not have."""
    return f"x{factor.median:.2f} in one round" if rounds == 1 else str(factor)


def plot_part(document: Mapping[str, Any], part: str, ax: Axes | None = None) -> Axes:
    """One part as horizontal bars from the median, thin lines from the least to the most of the rounds. Raises ValueError if
    it was not measured. Not safe while another thread draws."""
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    rows = rows_of(document, part)
    if not rows:
        raise ValueError(f"{part} was not measured; see what was skipped")
    names = list(dict.fromkeys(row["name"] for row in rows))
    states = list(dict.fromkeys(row["state"] for row in rows))
    if ax is None:
        use_style()
        _, ax = pyplot.subplots(figsize=(7.2, _height(rows)), layout="constrained")
    at, ticks, labels = 0.0, [], []
    seen: set[str] = set()
    for name in names:
        own = [row for row in rows if row["name"] == name]
        ticks.append(at + (len(own) - 1) / 2)
        labels.append(name)
        for row in own:
            middle, color = row["seconds_median"], color_of(_COLORS[row["state"]])
            spread = [[middle - row["seconds_min"]], [row["seconds_max"] - middle]]
            label = row["state"] if row["state"] not in seen else None
            ax.barh(at, middle, 0.8, xerr=spread, color=color, edgecolor=darker(color), linewidth=0.5, error_kw={"elinewidth": 1, "capsize": 2}, label=label)
            ax.annotate(f" {seconds_text(middle)}", (row["seconds_max"], at), va="center", fontsize=9)
            seen.add(row["state"])
            at += 1
        at += 0.6
    ax.set_yticks(ticks, labels)
    ax.set_ylim(at - 0.6, -0.8)
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    ax.set_xscale("log")
    low, high = min(row["seconds_min"] for row in rows), max(row["seconds_max"] for row in rows)
    ax.set_xlim(low / 3, high * 4)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: seconds_text(value)))
    ax.set_xlabel("time (logarithmic)")
    ax.set_title(_TITLES[part])
    if len(states) > 1:
        ax.legend(loc="upper center", bbox_to_anchor=(0.4, -0.55 / _height(rows)), ncols=min(len(states), 4))
    return ax


def _height(rows: Sequence[Mapping[str, Any]]) -> float:
    return 1.3 + 0.24 * len(rows) + 0.14 * len({row["name"] for row in rows})


def described_warmup(document: Mapping[str, Any], parts: Sequence[str] = ()) -> Described:
    """The parts that were measured, one above the other, with alt text. Raises ValueError where none was."""
    from matplotlib import pyplot

    shown = [part for part in (parts or PARTS) if rows_of(document, part)]
    if not shown:
        raise ValueError("nothing was measured; see what was skipped")
    use_style()
    heights = [_height(rows_of(document, part)) for part in shown]
    figure, axes = pyplot.subplots(len(shown), 1, figsize=(7.2, sum(heights)), height_ratios=heights, squeeze=False, layout="constrained")
    for part, ax in zip(shown, axes[:, 0], strict=True):
        plot_part(document, part, ax)
    return describe(figure, warmup_alt_text(document, shown))


def warmup_alt_text(document: Mapping[str, Any], parts: Sequence[str] = ()) -> str:
    """What was found, in words made from the figures."""
    said = []
    for part in parts or PARTS:
        for name in dict.fromkeys(row["name"] for row in rows_of(document, part)):
            own = [row for row in rows_of(document, part) if row["name"] == name]
            words = f"{name}: " + ", ".join(f"{row['state']} {seconds_text(row['seconds_median'])}" for row in own)
            if part in PAIRS and {row["state"] for row in own} >= set(PAIRS[part]):
                factor = factor_of(document, part, name)
                pays, prepared = PAIRS[part]
                words += f" ({pays} over {prepared} {factor_text(factor, len(own[0]['samples']), f'{prepared} ')})"
            said.append(f"{words}.")
    return " ".join(said)


def warmup_table(document: Mapping[str, Any], parts: Sequence[str] = ()) -> Table:
    """Every result: median, least and most, and how many times sooner the prepared state was."""
    rows = []
    for part in parts or PARTS:
        for row in rows_of(document, part):
            prepared = part in PAIRS and row["state"] == PAIRS[part][1]
            rounds = len(row["samples"])
            spread = f"{seconds_text(row['seconds_min'])} to {seconds_text(row['seconds_max'])}" if rounds > 1 else "one round"
            sooner = bracketed(factor_of(document, part, row["name"]), rounds) if prepared else ""
            rows.append((part, row["name"], row["state"], seconds_text(row["seconds_median"]), spread, sooner))
    headers = ("part", "what", "state", "median", "least to most", "sooner (rounds)")
    return Table(headers, tuple(rows), numeric=frozenset({3, 4, 5}), note="Each sample is a fresh process; ratios are of one round.")


def kernels_table(document: Mapping[str, Any]) -> Table:
    """Where the time of each state of the kernel went, in the last round, and how large its code is."""
    rows = []
    for row in rows_of(document, "kernels"):
        steps = ", ".join(f"{name} {seconds_text(seconds)}" for name, seconds in row["facts"]["seconds"].items())
        rows.append((row["state"], seconds_text(row["seconds_median"]), steps, nbytes_text(row["facts"]["image_nbytes"])))
    return Table(("state", "median", "of which (last round)", "machine code"), tuple(rows), numeric=frozenset({1, 3}))
