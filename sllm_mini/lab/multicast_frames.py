"""One tick of a scale-out plan: who sends which block to whom, and what every node holds then. Played, it is the animation.

The frame and its text come from one function for any tick, so the page without a kernel shows a frame as it is shown while
playing, beside the whole schedule (`multicast_plots.draw_schedule`). Computed, not measured. Shown in chapter 10.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sllm_mini.control.multicast import Plan
from sllm_mini.lab.figure import Described, describe
from sllm_mini.lab.multicast_plots import PLAN_NAMES, block_color, build_plan
from sllm_mini.lab.style import GRID, INK, MUTED, ink_on, use_style
from sllm_mini.lab.widgets import Choice, Control, Slider

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FRAME_MS = 900
"""Between two frames while playing: above what drawing one takes, so that the picture keeps up."""


@dataclass(frozen=True, slots=True)
class Player(Slider):
    """A `Slider` over whole numbers with buttons that play through it."""

    def widget(self, layout: Mapping[str, Any]) -> Any:
        import ipywidgets
        import traitlets

        low, high, value = round(self.low), round(self.high), round(self.value)
        play = ipywidgets.Play(min=low, max=high, value=value, step=1, interval=FRAME_MS)
        slider = ipywidgets.IntSlider(min=low, max=high, value=value, step=1, description=self.description, **layout)
        ipywidgets.jslink((play, "value"), (slider, "value"))
        box = ipywidgets.VBox([slider, play])
        box.add_traits(value=traitlets.Int(value))  # what whoever shows this box listens to
        traitlets.link((slider, "value"), (box, "value"))
        return box


def plot_tick(plan: Plan, tick: int) -> Figure:
    """Left, the tick's transfers from sender to receiver in the blocks' colours; right, a row of blocks for each node: those it holds at
    the tick's end, framed where they came in it. Tick 0 is the start. Raises ValueError for a tick that the plan does not
    have. Not safe while another thread draws."""
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    if not 0 <= tick <= plan.ticks:
        raise ValueError(f"plan {plan.name!r} has ticks 0 (the start) to {plan.ticks}, and no tick {tick}")
    use_style()
    size = (min(9.0, 4.2 + 0.3 * plan.blocks), 1.4 + 0.3 * plan.nodes)
    figure, (left, right) = pyplot.subplots(1, 2, sharey=True, figsize=size, layout="constrained", width_ratios=(2.2, max(2.2, 0.3 * plan.blocks)))
    for transfer in (t for t in plan.transfers if t.tick == tick):
        color = block_color(transfer.block, plan.blocks)
        arrow = {"arrowstyle": "-|>", "color": color, "linewidth": 2.0, "shrinkA": 4, "shrinkB": 8}
        left.annotate("", (1, transfer.target), (0, transfer.source), arrowprops=arrow)
        badge = {"boxstyle": "round,pad=0.2", "facecolor": color, "edgecolor": "white", "linewidth": 0.5}
        # At the receiver, of whom there is one for each block: a store sends several at once.
        left.text(1, transfer.target, str(transfer.block), fontsize=8, ha="center", va="center", color=ink_on(color), bbox=badge, zorder=3)
    for side in (0, 1):
        left.plot([side] * plan.nodes, range(plan.nodes), "o", color=MUTED, markersize=4)
    for node, held in enumerate(plan.arrivals()):
        for block in range(plan.blocks):
            came = held.get(block, plan.ticks + 1)
            color = block_color(block, plan.blocks)
            right.add_patch(Rectangle((block - 0.42, node - 0.38), 0.84, 0.76, facecolor=color if came <= tick else "white", edgecolor=GRID if came > tick else "white", linewidth=0.8))
            if came <= tick:
                right.text(block, node, str(block), fontsize=8, ha="center", va="center", color=ink_on(color))
            if came == tick and tick:
                right.add_patch(Rectangle((block - 0.46, node - 0.44), 0.92, 0.88, facecolor="none", edgecolor=INK, linewidth=2.0))
    left.set_xlim(-0.15, 1.15)
    left.set_xticks([0, 1], ["sends", "receives"])
    left.set_yticks(range(plan.nodes), [f"source {node}" if node < plan.sources else f"node {node}" for node in range(plan.nodes)])
    left.set_ylim(plan.nodes - 0.4, -0.6)
    right.set_xlim(-0.7, plan.blocks - 0.3)
    right.set_xticks([])
    right.set_xlabel("holds then (framed: just came)", loc="left", fontsize=9)
    for axes in (left, right):
        axes.grid(visible=False)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    left.set_title(f"{plan.name}, tick {tick} of {plan.ticks}")
    return figure


def tick_text(plan: Plan, tick: int) -> str:
    """One tick in words: its transfers, and how far the nodes are."""
    now = [transfer for transfer in plan.transfers if transfer.tick == tick]
    moved = ", ".join(f"{transfer.source} to {transfer.target}: block {transfer.block}" for transfer in now) or "nothing moves"
    new = plan.arrivals()[plan.sources :]
    whole = sum(len(held) == plan.blocks and max(held.values()) <= tick for held in new)
    jointly = len({block for held in new for block, came in held.items() if came <= tick})
    senders = len({transfer.source for transfer in now})
    return (
        f"{plan.name}, tick {tick} of {plan.ticks}: {moved}. {senders} of {plan.nodes} nodes send; {whole} of {len(new)} new nodes hold every block, "
        f"and between them they hold {jointly} of {plan.blocks}."
    )


def draw_tick(*, plan: str, tick: float, instances: float, blocks: float, ways: float) -> Described:
    """The animation's drawing, in the units of its controls. A tick past the plan's end shows its end."""
    built = build_plan(plan, round(instances), round(blocks), ways=round(ways))
    shown = min(round(tick), built.ticks)
    return describe(plot_tick(built, shown), tick_text(built, shown), caption=tick_text(built, shown))


def tick_controls(tick: int = 4) -> dict[str, Control]:
    """The controls of `draw_tick`; the first picture, which a page without a kernel keeps, is of tick `tick`."""
    return {
        "plan": Choice("plan", "binomial", {name: name for name in PLAN_NAMES}),
        "tick": Player("tick", tick, 0, 40, step=1),
        "instances": Slider("new instances", 7, 1, 15, step=1),
        "blocks": Slider("blocks", 8, 1, 16, step=1),
        "ways": Slider("sources of the k-way form", 2, 1, 4, step=1),
    }
