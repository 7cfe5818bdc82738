"""After how many steps compiling has paid: two straight lines that cross, or do not.

Pure arithmetic on what `measure` found; draws and never measures. Shown in chapter 06.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING, Any

from sllm_mini.lab.ladder.plots import Factor
from sllm_mini.lab.style import INK, MUTED, color_of, use_style
from sllm_mini.lab.units import seconds_text
from sllm_mini.lab.warmup.measure import COLD, COMPILED, EAGER, WARM, rows_of
from sllm_mini.lab.warmup.picture import factor_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def break_even_steps(first_seconds: float, eager_seconds: float, compiled_seconds: float) -> int | None:
    """The least number of steps after which compiling was not the slower choice: a first step of `first_seconds` and then
    compiled ones, against eager ones from the first. None if a compiled step is no faster, so never. Pure."""
    if compiled_seconds >= eager_seconds:
        return 1 if first_seconds <= eager_seconds else None
    return max(1, math.ceil((first_seconds - compiled_seconds) / (eager_seconds - compiled_seconds)))


def step_samples(document: Mapping[str, Any]) -> dict[str, list[float]]:
    """State → seconds by round. Raises ValueError if torch.compile was not measured."""
    found = {row["state"]: row["samples"] for row in rows_of(document, "torch.compile")}
    if set(found) != {COLD, WARM, EAGER, COMPILED}:
        raise ValueError("torch.compile was not measured; see what was skipped")
    return found


def plot_break_even(document: Mapping[str, Any], ax: Axes | None = None) -> Axes:
    """Seconds spent by number of steps: eager, compiled with a cold and with a warm cache; dotted where a line crosses the
    eager one. Both axes logarithmic. Raises ValueError if it was not measured. Not safe while another thread draws."""
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    seconds = {state: median(samples) for state, samples in step_samples(document).items()}
    eager, later = seconds[EAGER], seconds[COMPILED]
    crossings = {state: break_even_steps(seconds[state], eager, later) for state in (COLD, WARM)}
    last = 10 * max([steps for steps in crossings.values() if steps is not None] + [seconds[COLD] / eager])
    if ax is None:
        use_style()
        _, ax = pyplot.subplots(figsize=(7.2, 3.4), layout="constrained")
    steps = [10 ** (exponent / 50) for exponent in range(int(50 * math.log10(last)) + 1)]
    ax.plot(steps, [eager * count for count in steps], color=color_of("process"), linewidth=2, label="eager")
    for state, color, dashes in ((COLD, "cold", "--"), (WARM, "dram", "-.")):
        ax.plot(steps, [seconds[state] + later * (count - 1) for count in steps], color=color_of(color), linewidth=2, linestyle=dashes, label=f"compiled, {state}")
        if (crossing := crossings[state]) is not None:
            ax.axvline(crossing, color=MUTED, linewidth=1, linestyle=":")
            ax.annotate(f" {crossing:,} steps", (crossing, eager), fontsize=9, color=INK, va="bottom", ha="left" if state == COLD else "right")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: seconds_text(value)))
    ax.set_xlabel("decode steps (logarithmic)")
    ax.set_ylabel("time spent (logarithmic)")
    ax.legend(loc="upper left", frameon=False)
    return ax


def break_even_text(document: Mapping[str, Any]) -> str:
    """When compiling has paid, round by round, and what a later step gains."""
    samples = step_samples(document)
    ratios = [eager / later for eager, later in zip(samples[EAGER], samples[COMPILED], strict=True)]
    gain = Factor(median(ratios), min(ratios), max(ratios))
    said = [f"A later step takes {seconds_text(median(samples[EAGER]))} eager and {seconds_text(median(samples[COMPILED]))} compiled, {factor_text(gain, len(ratios))}."]
    for state in (COLD, WARM):
        found = [break_even_steps(*each) for each in zip(samples[state], samples[EAGER], samples[COMPILED], strict=True)]
        paid = sorted(steps for steps in found if steps is not None)
        least_most = f"{paid[0]:,}" + (f" to {paid[-1]:,}" if paid[-1] != paid[0] else "") if paid else ""
        never = len(found) - len(paid)
        words = f"after {least_most} steps" if paid else "after no number of steps"
        said.append(f"With a {state} the first takes {seconds_text(median(samples[state]))}, and compiling has paid {words}" + (f" (never in {never} of {len(found)} rounds)." if never and paid else "."))
    return " ".join(said)
