"""Into how many blocks a model is best cut: a scale-out plan's ticks times what a block was measured to take. Shown in chapter 10."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, log2
from typing import TYPE_CHECKING

from sllm_mini.control.multicast import plan_seconds
from sllm_mini.lab.local_link import LocalLink
from sllm_mini.lab.style import color_of, darker, use_style
from sllm_mini.lab.units import nbytes_text, rate_text, seconds_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOOKS = {"store": ("remote", "v", "everyone reads the store"), "chain": ("runtime", "s", "chain"), "binomial": ("process", "o", "binomial pipeline")}


def plan_ticks(name: str, instances: int, blocks: int) -> int:
    """The ticks of `build_plan(name, instances, blocks)`, by formula, for "store" (of one link), "chain" and "binomial".

    Raises ValueError for another name. Pure."""
    if name == "store":
        return instances * blocks
    if name == "chain":
        return blocks + instances - 1
    if name == "binomial":
        return blocks + ceil(log2(instances + 1)) - 1
    raise ValueError(f"there is no formula here for the ticks of {name!r}; the plans are {', '.join(_LOOKS)}")


def best_blocks(link: LocalLink, instances: int, model_nbytes: int) -> float:
    """The number of blocks at which the binomial pipeline is quickest by the link's two figures: √((⌈log₂ n⌉ − 1) · M / (B · t₀)), n counting
    the source, from the derivative of (b + ⌈log₂ n⌉ − 1) · (t₀ + M / (b · B)); at least 1. Pure."""
    copy = model_nbytes / link.bytes_per_second
    return max(1.0, ((ceil(log2(instances + 1)) - 1) * copy / link.fixed_seconds) ** 0.5)


def best_copy_seconds(link: LocalLink, model_nbytes: int, block_counts: Sequence[int]) -> float:
    """What one copy over the link takes in blocks of the measured size that moves quickest: no plan of these blocks is over sooner,
    as none has fewer ticks than blocks. Each count's block has to be among the measured. Pure."""
    return min(count * link.seconds[model_nbytes // count] for count in block_counts)


def plot_block_counts(link: LocalLink, instances: int, model_nbytes: int, block_counts: Sequence[int], ax: Axes | None = None) -> Axes:
    """Seconds until all new instances hold the model, against the number of blocks, both axes logarithmic: lines from the link's two
    figures, marks from what a block of that very size took, dotted `best_copy_seconds`. Each count's block has to be among the measured. Not safe while another thread draws."""
    from matplotlib import pyplot

    if ax is None:
        use_style()
        _, ax = pyplot.subplots(figsize=(7.2, 4.0), layout="constrained")
    for name, (role, marker, label) in _LOOKS.items():
        lines = [plan_seconds(plan_ticks(name, instances, count), model_nbytes / count, link.bytes_per_second, tick_seconds=link.fixed_seconds) for count in block_counts]
        marks = [plan_ticks(name, instances, count) * link.seconds[model_nbytes // count] for count in block_counts]
        ax.plot(block_counts, lines, color=color_of(role))
        ax.plot(block_counts, marks, marker, color=color_of(role), markeredgecolor=darker(color_of(role)), label=label)
    ax.axhline(best_copy_seconds(link, model_nbytes, block_counts), color=color_of("cold"), linestyle=":", linewidth=1.2, label="one copy, in the quickest blocks")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(block_counts, [str(count) for count in block_counts])
    ax.set_xlabel("blocks (logarithmic)")
    ax.set_ylabel("seconds (logarithmic)")
    ax.set_title(f"{nbytes_text(model_nbytes)} to {instances} new instances: ticks computed, blocks measured")
    ax.figure.legend(loc="outside lower center", ncols=2)
    return ax


def block_counts_text(link: LocalLink, instances: int, model_nbytes: int, block_counts: Sequence[int]) -> str:
    """The finding: the quickest number of blocks by the figures and by the marks, and what too few and too many cost."""
    marks = {count: plan_ticks("binomial", instances, count) * link.seconds[model_nbytes // count] for count in block_counts}
    best = min(marks, key=marks.__getitem__)
    fewest, most = min(marks), max(marks)
    return (
        f"A block costs {seconds_text(link.fixed_seconds)} whatever its size and moves at {rate_text(link.bytes_per_second)}: by these two figures the binomial pipeline is "
        f"quickest with {best_blocks(link, instances, model_nbytes):,.0f} blocks; of the measured sizes {best} blocks are, with {seconds_text(marks[best])}, where one copy takes at least "
        f"{seconds_text(best_copy_seconds(link, model_nbytes, block_counts))}. "
        f"{fewest} takes x{marks[fewest] / marks[best]:.1f} that and {most:,} take x{marks[most] / marks[best]:.1f}."
    )
