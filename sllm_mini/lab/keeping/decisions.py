"""How two policies decide: the hybrid histogram's window over its counts, RainbowCake's quantile, floor and bound. Chapter 09.

Draws what `control.keepalive` answers; nothing is simulated here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sllm_mini.control.keepalive import HybridHistogram, layer_ttl
from sllm_mini.control.keepalive.histogram import IdleTimes, Windows
from sllm_mini.control.keepalive.rainbowcake import FLOOR_SECONDS, quantile_seconds
from sllm_mini.lab.forecast import autoregression
from sllm_mini.lab.style import INK, MUTED, color_of, darker, use_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHOWN_MINUTES = 60


def idle_times(minutes: Sequence[float], bins: int = 240) -> IdleTimes:
    """A histogram of these idle times."""
    idle = IdleTimes([0] * bins)
    for each in minutes:
        idle.add(60 * each)
    return idle


def by_hand() -> dict[str, list[float]]:
    """Three idle lives, in minutes: one with a rhythm, one without, one too rare for the histogram. Chosen by hand."""
    return {
        "a rhythm": [20.5] * 8 + [21.5] * 6 + [22.5] * 3 + [19.5] * 2 + [30.5],
        "no rhythm": [each + 0.5 for each in range(0, 240, 4)],
        "too rare": [300.0, 310.0, 295.0, 305.0, 300.0, 290.0, 310.0, 300.0],
    }


def decide(minutes: Sequence[float]) -> Windows:
    """What the policy answers to such a past."""
    return HybridHistogram(autoregression()).windows(idle_times(minutes))


def plot_decisions(lives: Mapping[str, Sequence[float]]) -> Figure:
    """A row for each past: counts of idle times, and below them when the model is away and when it is there. Raises ValueError
    for none. Not safe while another thread draws."""
    from matplotlib import pyplot

    if not lives:
        raise ValueError("there is nothing to draw; give at least one list of idle times")
    use_style()
    figure, axes = pyplot.subplots(len(lives), 1, figsize=(7.4, 1.55 * len(lives)), layout="constrained", squeeze=False)
    for ax, (name, minutes) in zip(axes[:, 0], lives.items(), strict=True):
        windows = decide(minutes)
        _draw_decision(ax, idle_times(minutes, bins=400), windows)
        ax.set_title(f"{name}: {windows_text(windows)}", fontsize=10)
        ax.set_xlim(0, max(_SHOWN_MINUTES, 1.1 * windows.alive / 60 if windows.prewarm else 250))
    axes[-1, 0].set_xlabel("minutes after the end of its work")
    axes[len(lives) // 2, 0].set_ylabel("idle times counted")
    return figure


def _draw_decision(ax: Axes, idle: IdleTimes, windows: Windows) -> None:
    top = max(idle.counts) or 1
    ax.bar([minute + 0.5 for minute in range(len(idle.counts))], idle.counts, width=1.0, color=MUTED)
    low, high = windows.prewarm / 60, windows.alive / 60
    below = (-0.22 * top, 0.16 * top)
    if low:
        ax.broken_barh([(0, low)], below, facecolor="white", edgecolor=MUTED, linewidth=0.7)
    ax.broken_barh([(low, high - low)], below, facecolor=color_of("ready"), edgecolor=darker(color_of("ready")), linewidth=0.7)
    ax.axhline(0, color=INK, linewidth=0.6)
    ax.set_ylim(-0.26 * top, 1.1 * top)
    ax.set_yticks([0, top])
    ax.grid(visible=False)


def windows_text(windows: Windows) -> str:
    """In a few words."""
    until = f"there until {windows.alive / 60:.0f} min"
    return f"away until {windows.prewarm / 60:.0f} min, {until}" if windows.prewarm else f"never unloaded, {until}"


def decisions_text(lives: Mapping[str, Sequence[float]]) -> str:
    """The finding, for all."""
    return "; ".join(f"{name}: {windows_text(decide(minutes))}" for name, minutes in lives.items()) + "."


def plot_layer_times(betas: Mapping[str, float], *, most_seconds: float = 600.0, quantiles: Sequence[float] = (0.5, 0.8, 0.95)) -> Figure:
    """Left: t(p) over the mean gap for some p. Right: how long a layer stays, `betas` naming bounds in seconds, with the floor
    under the bound, and dashed with the floor before it (its code's quirk). Not safe while another thread draws."""
    from matplotlib import pyplot

    use_style()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(7.4, 3.1), layout="constrained")
    gaps = [most_seconds * step / 200 for step in range(201)]
    for p, role, line in zip(quantiles, ("process", "dram", "remote"), ("-", "--", "-."), strict=False):
        left.plot(gaps, [quantile_seconds(p, gap) for gap in gaps], color=color_of(role), linestyle=line, label=f"p = {p:g}: {quantile_seconds(p, 1.0):.3f} × mean")
    left.set_title("t(p) = −ln(1 − p) × mean gap", fontsize=10)
    left.set_ylabel("seconds")
    left.set_xlabel("mean gap (s)")
    left.legend(fontsize=8.5)
    for (name, beta), role in zip(betas.items(), ("process", "dram", "remote"), strict=False):
        times = [quantile_seconds(0.8, gap) for gap in gaps]
        right.plot(gaps, [layer_ttl(time, beta) for time in times], color=color_of(role), label=name)
        right.plot(gaps, [layer_ttl(time, beta, floor_first=True) for time in times], color=color_of(role), linestyle=":", linewidth=2.2)
    right.axhline(FLOOR_SECONDS, color=MUTED, linewidth=0.7)
    right.annotate("60 s floor", (most_seconds, FLOOR_SECONDS), xytext=(0, 3), textcoords="offset points", ha="right", fontsize=8, color=MUTED)
    right.set_yscale("log")
    right.set_ylim(1, 1000)
    right.set_yticks([1, 5, 10, 60, 120, 600], ["1", "5", "10", "60", "120", "600"])
    right.minorticks_off()
    right.set_title("how long a layer stays, p = 0.8", fontsize=10)
    right.set_xlabel("mean gap (s); dotted: the floor first")
    right.legend(fontsize=8.5, loc="lower center", ncols=3, columnspacing=1.0, handlelength=1.4)
    return figure


def layer_times_text(betas: Mapping[str, float]) -> str:
    """The finding."""
    said = []
    for name, beta in betas.items():
        often, rare = quantile_seconds(0.8, 20.0), quantile_seconds(0.8, 600.0)
        said.append(
            f"{name}: {layer_ttl(often, beta):.0f} s at a mean gap of 20 s and {layer_ttl(rare, beta):.0f} s at 600 s"
            f" (with the floor first {layer_ttl(often, beta, floor_first=True):.0f} s and {layer_ttl(rare, beta, floor_first=True):.0f} s)"
        )
    return "; ".join(said) + "."
