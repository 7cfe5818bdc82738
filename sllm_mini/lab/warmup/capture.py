"""CUDA graphs lazily, up front or restored: where their cost falls, as arithmetic on assumptions that a reader can change.

Medusa (ASPLOS'25) asks how much of a start is capture, and which graphs will be used at all. Pure; nothing here was measured.
Shown in chapter 06.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sllm_mini.lab.figure import Described, describe
from sllm_mini.lab.style import color_of, darker, use_style
from sllm_mini.lab.units import seconds_text
from sllm_mini.lab.widgets import Slider

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True)
class CapturePlan:
    """Seconds of capturing of one way: before the first request is served, inside requests, and of those before it, for
    graphs that no step ever replays."""

    before_seconds: float
    inside_seconds: float
    unused_seconds: float

    @property
    def total_seconds(self) -> float:
        return self.before_seconds + self.inside_seconds


def plan_captures(sizes: int, capture_seconds: float, used_share: float, restored_share: float = 0.3) -> dict[str, CapturePlan]:
    """What `sizes` graphs of `capture_seconds` each cost if only `used_share` of them are ever replayed: captured up front,
    captured when first used, or restored up front from a record at `restored_share` of a capture's cost. Raises ValueError
    for a share outside 0 to 1, no size, or a negative time."""
    if sizes < 1 or capture_seconds < 0 or not 0 <= used_share <= 1 or not 0 <= restored_share <= 1:
        raise ValueError("give at least one batch size, a time of zero or more and shares from 0 to 1")
    used, everything = round(sizes * used_share), sizes * capture_seconds
    unused = (sizes - used) * capture_seconds
    return {
        "up front": CapturePlan(everything, 0.0, unused),
        "lazy": CapturePlan(0.0, used * capture_seconds, 0.0),
        "restored": CapturePlan(restored_share * everything, 0.0, restored_share * unused),
    }


def plot_captures(plans: Mapping[str, CapturePlan], ax: Axes | None = None) -> Axes:
    """A bar for each way: before the first request, of which for nothing, and inside requests. Not safe while another thread
    draws."""
    from matplotlib import pyplot

    if ax is None:
        use_style()
        _, ax = pyplot.subplots(figsize=(7.2, 2.5), layout="constrained")
    longest = max([plan.total_seconds for plan in plans.values()] + [1e-9])
    drawn = {"before the first request": ("dram", None), "before it, for graphs never used": ("wait", "////"), "inside requests, which wait": ("cold", None)}
    for row, plan in enumerate(plans.values()):
        left = 0.0
        parts = (plan.before_seconds - plan.unused_seconds, plan.unused_seconds, plan.inside_seconds)
        for (label, (role, hatch)), seconds in zip(drawn.items(), parts, strict=True):
            color = color_of(role)
            ax.barh(row, seconds, left=left, height=0.6, color=color, edgecolor=darker(color), linewidth=0.5, hatch=hatch, label=label if row == 0 else None)
            left += seconds
        ax.annotate(f" {seconds_text(plan.total_seconds)}", (left, row), va="center", fontsize=9)
    ax.set_yticks(range(len(plans)), list(plans))
    ax.set_ylim(len(plans) - 0.4, -0.6)
    ax.set_xlim(0, 1.15 * longest)
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("seconds of capturing (assumed, not measured)")
    ax.legend(loc="lower center", bbox_to_anchor=(0.42, 1.0), ncols=3, frameon=False, fontsize=8.5)
    return ax


def captures_text(plans: Mapping[str, CapturePlan], capture_seconds: float) -> str:
    """What the bars show, and what follows from it."""
    front, lazy, restored = (plans[name] for name in ("up front", "lazy", "restored"))
    return (
        f"Up front, the first request waits {seconds_text(front.before_seconds)} longer, {seconds_text(front.unused_seconds)} of that for graphs that no step replays. Lazily it does not, "
        f"and later requests wait {seconds_text(lazy.inside_seconds)} in all, {seconds_text(capture_seconds)} whenever a batch size is new. Restored, {seconds_text(restored.before_seconds)} come first. "
        f"Lazy saves {seconds_text(front.total_seconds - lazy.total_seconds)} of work against up front."
    )


def draw_captures(*, sizes: float, capture_ms: float, used_percent: float, restored_percent: float) -> Described:
    """The widget's drawing, in the units of its sliders."""
    plans = plan_captures(round(sizes), capture_ms / 1e3, used_percent / 100, restored_percent / 100)
    said = captures_text(plans, capture_ms / 1e3)
    return describe(plot_captures(plans), f"Bars of what graphs cost by the way they are come by. {said}", caption=said)


def capture_controls() -> dict[str, Slider]:
    """The controls of `draw_captures`. Where they stand first is an assumption."""
    return {
        "sizes": Slider("batch sizes", 32, 1, 64, step=1),
        "capture_ms": Slider("capture of one", 30, 1, 300, step=1, unit="ms"),
        "used_percent": Slider("of which are ever used", 25, 0, 100, step=1, unit="%"),
        "restored_percent": Slider("a restore costs", 30, 1, 100, step=1, unit="% of a capture"),
    }
