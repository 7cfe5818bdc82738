"""What becomes of the policies when memory is short: the same trace on smaller and smaller machines. Chapter 09, simulated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sllm_mini.cluster.trace import TraceRequest
from sllm_mini.control.messages import ModelSpec
from sllm_mini.lab.keeping.contenders import Outcome, run_contender
from sllm_mini.lab.style import INK, color_of, use_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES = (1.0e9, 1.5e9, 2.0e9, 3.0e9, 5.0e9)
POLICIES = ("LRU", "FaasCache", "hybrid histogram", "stem cells", "RainbowCake refitted")
_LOOK = {
    "LRU": ("process", "-", "o"), "FaasCache": ("dram", "--", "^"), "hybrid histogram": ("runtime", "-.", "D"), "stem cells": ("disk", ":", "s"),
    "RainbowCake refitted": ("device", "-", "*"),
}  # fmt: skip


def squeeze(
    requests: Sequence[TraceRequest], specs: Sequence[ModelSpec], until: float, *, policies: Sequence[str] = POLICIES, sizes: Sequence[float] = SIZES
) -> dict[str, list[Outcome]]:
    """By policy, a run for each size of memory."""
    return {name: [run_contender(name, requests, specs, nbytes=size, until=until) for size in sizes] for name in policies}


def plot_squeeze(runs: dict[str, list[Outcome]], sizes: Sequence[float] = SIZES) -> Figure:
    """Cold fraction and mean start-up over the memory there is. Raises ValueError without runs. Not safe while another thread draws."""
    from matplotlib import pyplot

    if not runs:
        raise ValueError("there is nothing to draw; give at least one policy's runs")
    use_style()
    figure, axes = pyplot.subplots(1, 2, figsize=(7.4, 3.5), layout="constrained")
    for name, outcomes in runs.items():
        role, line, marker = _LOOK.get(name, ("remote", "-", "."))
        for ax, values in ((axes[0], [100 * one.cold_fraction for one in outcomes]), (axes[1], [one.mean_start_seconds for one in outcomes])):
            ax.plot([size / 1e9 for size in sizes], values, color=color_of(role), linestyle=line, marker=marker, markersize=9 if marker == "*" else 5, label=name)
    for ax, title in zip(axes, ("requests that wait for a start (%)", "mean start-up (s)"), strict=True):
        ax.set_title(title, fontsize=10)
        ax.set_ylim(bottom=0)
        ax.set_xlabel("memory of the machine (GB)")
        ax.tick_params(labelcolor=INK)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def squeeze_text(runs: dict[str, list[Outcome]], sizes: Sequence[float] = SIZES) -> str:
    """For each size, who waits least: by requests and by seconds."""
    said = []
    for number, size in enumerate(sizes):
        fewest = min(runs, key=lambda name: runs[name][number].cold_fraction)
        least = min(runs, key=lambda name: runs[name][number].start_seconds)
        said.append(f"{size / 1e9:g} GB: fewest cold requests {fewest} ({runs[fewest][number].cold_fraction:.1%}), least start-up {least} ({runs[least][number].mean_start_seconds:.2f} s)")
    return "; ".join(said) + "."
