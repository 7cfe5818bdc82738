"""Cold starts as a climb: the seconds each rung of the warmth ladder costs, and what starting warmer would save.

Plain arithmetic over measured spans; drawing never measures. Taught in chapter 00.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

from sllm_mini.lab.style import PALETTE, WARMTH_MEANING, color_of, ink_on, use_style
from sllm_mini.lab.table import Table
from sllm_mini.lab.units import seconds_text, share_text
from sllm_mini.types import Span, Warmth

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sllm_mini.lab.anatomy import ColdStart

FIRST_TOKEN = "first token"
"""The last part of every start: the request's own prefill, paid however warm the instance is."""


def rung_seconds(start: ColdStart) -> dict[str, float]:
    """Seconds of the climb to each rung (by its name in lower case), then of the first token itself.

    They add up to the time to the first token: the lane that waits is counted, work beside it is not, and what no span
    claims is "unaccounted".
    """
    parts = {rung.name.lower(): 0.0 for rung in Warmth if rung is not Warmth.COLD}
    parts |= {FIRST_TOKEN: 0.0, "unaccounted": start.until_first_token.unaccounted_seconds}
    for span in start.spans:
        if span.lane == "main" and span.start < start.first_token_seconds:
            parts[_part(span)] += min(span.end, start.first_token_seconds) - span.start
    return {name: seconds for name, seconds in parts.items() if seconds > 0}


def _part(span: Span) -> str:
    if span.name == FIRST_TOKEN:
        return FIRST_TOKEN
    return "unaccounted" if span.warmth is None else span.warmth.name.lower()


def median_rungs(starts: Sequence[ColdStart]) -> dict[str, float]:
    """The median of each rung over several runs of one start. Raises ValueError without a run."""
    if not starts:
        raise ValueError("there is no run to take a median of; measure at least one")
    runs = [rung_seconds(start) for start in starts]
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: median(run.get(name, 0.0) for run in runs) for name in names}


def plot_rungs(starts: Mapping[str, Mapping[str, float]], ax: Axes | None = None) -> Axes:
    """One bar per start, cut into its rungs, seconds on the axis. `starts`: label → what `median_rungs` gave."""
    from matplotlib import pyplot
    from matplotlib.patches import Patch
    from matplotlib.transforms import ScaledTranslation

    if ax is None:
        use_style()
        _, ax = pyplot.subplots(figsize=(7.2, 0.9 + 0.62 * len(starts)), layout="constrained")
    longest = max(sum(parts.values()) for parts in starts.values())
    order = [*(rung.name.lower() for rung in Warmth), FIRST_TOKEN, "unaccounted"]
    used = [name for name in order if any(name in parts for parts in starts.values())]
    for row, parts in enumerate(starts.values()):
        left = 0.0
        for name in used:
            seconds = parts.get(name, 0.0)
            color = _color(name)
            ax.barh(row, seconds, left=left, height=0.62, color=color, edgecolor="white", linewidth=0.8, hatch="//" if name == FIRST_TOKEN else None)
            if seconds > 0.11 * longest:  # narrower, and the figures would run into each other
                ax.text(left + seconds / 2, row, seconds_text(seconds), ha="center", va="center", fontsize=8.5, color=ink_on(color))
            left += seconds
        ax.text(left + 0.01 * longest, row, seconds_text(left), va="center", fontsize=9, fontweight="bold")
    ax.set_yticks(range(len(starts)), list(starts))
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.set_xlim(0, longest * 1.12)
    ax.set_xlabel("seconds since the process was asked for")
    keys = [Patch(facecolor=_color(name), edgecolor="white", hatch="//" if name == FIRST_TOKEN else None, label=_meaning(name)) for name in used]
    # In points below the axis label, so that it never touches it whatever the height of the axes.
    below = ax.transAxes + ScaledTranslation(0, -38 / 72, ax.figure.dpi_scale_trans)
    ax.legend(handles=keys, loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=below, ncols=2, frameon=False, fontsize=8.5, borderaxespad=0)
    return ax


def _color(name: str) -> str:
    if name == FIRST_TOKEN:
        return PALETTE["ready"]
    return color_of(name)


def _meaning(name: str) -> str:
    meanings = {rung.name.lower(): f"to {rung.name.lower()}: {meaning}" for rung, meaning in WARMTH_MEANING.items()}
    # The loader puts weights straight on the device; of the model, this climb is what is left.
    meanings["dram"] = "to dram: tokenizer and skeleton in host memory"
    return meanings.get(name, {FIRST_TOKEN: "the first token itself"}.get(name, "no span claims it"))


def ladder_table(parts: Mapping[str, float]) -> Table:
    """What a start costs from each rung: the sum of the rungs still to climb and the first token."""
    total = sum(parts.values())
    rows = []
    for rung in Warmth:
        below = {lower.name.lower() for lower in Warmth if lower <= rung}
        left = sum(seconds for name, seconds in parts.items() if name not in below and not (name == "unaccounted" and rung > Warmth.COLD))
        rows.append((rung.name.lower(), WARMTH_MEANING[rung], f"{left:.3f}", share_text(left / total)))
    return Table(
        headers=("already there", "which means", "seconds to the first token", "of a cold start"),
        rows=tuple(rows),
        caption="Every rung that is kept warm is a rung not climbed",
        numeric=frozenset({2, 3}),
    )


def rungs_alt_text(starts: Mapping[str, Mapping[str, float]]) -> str:
    """What `plot_rungs(starts)` shows, in words."""
    bars = []
    for label, parts in starts.items():
        listed = ", ".join(f"{name} {seconds_text(seconds)}" for name, seconds in parts.items())
        bars.append(f"{label}: {seconds_text(sum(parts.values()))} in all ({listed})")
    return f"Bars of {len(starts)} starts cut into rungs. " + "; ".join(bars) + "."
