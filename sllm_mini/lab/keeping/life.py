"""One function's life under several policies: how warm it was at each moment, as a row of the timeline each. Chapter 09."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sllm_mini.cluster.simulated import SimulationResult
from sllm_mini.cluster.trace import TraceRequest
from sllm_mini.control.messages import ModelSpec
from sllm_mini.lab.keeping.contenders import Outcome, run_contender
from sllm_mini.lab.style import INK, MUTED, color_of, darker, ink_on, use_style
from sllm_mini.lab.units import seconds_text
from sllm_mini.types import Span, Warmth

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POLICIES = ("scale to zero", "fixed 10 min", "stem cells", "hybrid histogram", "RainbowCake", "RainbowCake refitted", "clairvoyant")
REGULAR_MINUTES = tuple(12.0 * number + (0.0, 0.4, -0.5, 0.2)[number % 4] for number in range(14))
STRAY_MINUTES = (170.0, 205.0)
FROM_MINUTES, UNTIL_MINUTES = 128.0, 220.0
_CLIMBS = {"process", "runtime", "queue", "load", "ready", "cut"}


def one_life() -> list[TraceRequest]:
    """A function that is called every 12 minutes, then 14 minutes later, then 35: times chosen by hand."""
    return [TraceRequest(60 * minute, "f", 0, 0, None, 2.0) for minute in (*REGULAR_MINUTES, *STRAY_MINUTES)]


def lives(policies: Sequence[str] = POLICIES) -> dict[str, Outcome]:
    """The same calls under each policy: a Python function of 100 MB that takes 2.7 s to start."""
    spec = ModelSpec(
        name="f", nbytes=100_000_000, devices=0, runtime="python", process_nbytes=2_000_000, runtime_nbytes=60_000_000, process_seconds=0.4,
        runtime_seconds=0.8, ready_seconds=1.5,
    )  # fmt: skip
    return {name: run_contender(name, one_life(), [spec], until=60 * UNTIL_MINUTES, spans=True) for name in policies}


def warmth_spans(result: SimulationResult, begin: float, end: float) -> list[Span]:
    """The warmest that any instance was at each moment from `begin` to `end`, COLD where there was none. A climb counts for
    nothing until it is there. O(n log n) in the result's spans."""
    changes: list[tuple[float, int, Warmth]] = []
    for span in result.spans:
        low, high = max(span.start, begin), min(span.end, end)
        if span.what not in _CLIMBS and high > low:
            changes += [(low, 1, span.warmth), (high, -1, span.warmth)]
    held = dict.fromkeys(Warmth, 0)
    spans: list[Span] = []
    since, now = begin, Warmth.COLD
    for at, change, warmth in sorted(changes, key=lambda each: (each[0], -each[1])):
        held[warmth] += change
        best = max((rung for rung in Warmth if held[rung]), default=Warmth.COLD)
        if best is not now:
            if at > since:
                spans.append(Span(now.name.lower(), since, at, warmth=now))
            since, now = at, best
    if end > since:
        spans.append(Span(now.name.lower(), since, end, warmth=now))
    return spans


def plot_lives(outcomes: Mapping[str, Outcome], begin: float = 60 * FROM_MINUTES, end: float = 60 * UNTIL_MINUTES) -> Figure:
    """A row for each policy, the height of the bar its warmth; arrivals as lines, a cross where one waited for a start.

    Raises ValueError without outcomes. Not safe while another thread draws."""
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if not outcomes:
        raise ValueError("there is nothing to draw; give at least one outcome")
    use_style()
    figure, ax = pyplot.subplots(figsize=(7.4, 0.62 * len(outcomes) + 1.1), layout="constrained")
    used: set[Warmth] = set()
    for row, outcome in enumerate(outcomes.values()):
        for span in warmth_spans(outcome.result, begin, end):
            warmth = span.warmth if span.warmth is not None else Warmth.COLD
            if warmth is Warmth.COLD:
                continue
            used.add(warmth)
            height = {Warmth.PROCESS: 0.2, Warmth.RUNTIME: 0.42}.get(warmth, 0.72)
            color = color_of(warmth)
            thin = span.seconds < 0.004 * (end - begin)  # its edge is all that can be seen, so that is in its colour, and wider
            edge, width = (color, 1.6) if thin else (darker(color), 0.6)
            ax.broken_barh([(span.start / 60, span.seconds / 60)], (-row - 0.36, height), facecolor=color, edgecolor=edge, linewidth=width)
            if span.seconds > 0.055 * (end - begin) and height > 0.4:
                ax.text((span.start + span.end) / 120, -row - 0.36 + height / 2, f"{span.seconds / 60:.0f} min", ha="center", va="center", fontsize=8, color=ink_on(color))
        for request in outcome.result.requests:
            if begin <= request.arrived <= end:
                waited = request.wait_seconds > 0.05
                ax.plot(request.arrived / 60, -row + 0.43, marker="x" if waited else "v", color=INK if waited else MUTED, markersize=5.5 if waited else 4)
    ax.set_yticks([-row for row in range(len(outcomes))], list(outcomes))
    ax.set_ylim(-len(outcomes) + 0.5, 0.65)
    ax.set_xlim(begin / 60, end / 60)
    ax.set_xlabel("minutes")
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    handles: list[Patch | Line2D] = [Patch(facecolor=color_of(rung), edgecolor=darker(color_of(rung)), label=rung.name.lower()) for rung in sorted(used)]
    handles += [
        Line2D([], [], marker="v", color=MUTED, linestyle="", markersize=4, label="a request, served at once"),
        Line2D([], [], marker="x", color=INK, linestyle="", markersize=5.5, label="it waited for a start"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), handlelength=1.2, columnspacing=1.2)
    return figure


def lives_text(outcomes: Mapping[str, Outcome], begin: float = 60 * FROM_MINUTES, end: float = 60 * UNTIL_MINUTES) -> str:
    """For each policy, what the requests of that stretch waited in all, and how long it was how warm."""
    said = []
    for name, outcome in outcomes.items():
        waited = sum(one.wait_seconds for one in outcome.result.requests if begin <= one.arrived <= end)
        warm = dict.fromkeys(Warmth, 0.0)
        for span in warmth_spans(outcome.result, begin, end):
            warm[span.warmth if span.warmth is not None else Warmth.COLD] += span.seconds
        kept = ", ".join(f"{rung.name.lower()} {seconds / 60:.0f} min" for rung, seconds in reversed(warm.items()) if rung > Warmth.COLD and seconds >= 30)
        said.append(f"{name}: {seconds_text(waited) if waited > 0.05 else 'nothing'} waited, {kept or 'never kept'}")
    return "; ".join(said) + "."
