"""Chapter 05 drawn and said: attaching by size, the memory of a crowd, each means of starting cut into its rungs.

Arithmetic on what `warm` measured; nothing here measures. Texts are made from the figures, so they say what this
machine showed. Shown in chapter 05.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

from sllm_mini.cluster import ProcessMemory
from sllm_mini.lab.ladder.plots import Factor
from sllm_mini.lab.rungs import FIRST_TOKEN
from sllm_mini.lab.style import color_of, use_style
from sllm_mini.lab.table import Table
from sllm_mini.lab.units import nbytes_text, seconds_text, share_text
from sllm_mini.lab.warm import HOWS, Brought, Crowd, How, WarmStart

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HOW_MEANING: Mapping[How, str] = {"copy": "copied from the page cache", "map": "mapped from the page cache", "attach": "attached to the store"}
_LOOKS: Mapping[How, tuple[str, str, str]] = {"copy": ("disk", "s", "-"), "map": ("remote", "D", "--"), "attach": ("dram", "o", "-")}
_PAYS_RUNTIME, _PAYS_BYTES = ("process", "runtime"), ("device",)


# Attaching by size


def _names(runs: Sequence[Brought]) -> list[str]:
    """Models from the smallest to the largest. Raises ValueError without runs."""
    if not runs:
        raise ValueError("nothing was brought; measure at least one round")
    return sorted({run.name for run in runs}, key=lambda name: next(run.nbytes for run in runs if run.name == name))


def _of(runs: Sequence[Brought], name: str, how: How) -> list[Brought]:
    return [run for run in runs if (run.name, run.how) == (name, how)]


def plot_brought(runs: Sequence[Brought], ax: Axes | None = None) -> Axes:
    """Milliseconds until a model's tensors are there against its size, a line for each way, both axes logarithmic; the open
    marks are the first touch of what was attached. Bars are from the least to the most of the rounds."""
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator

    names = _names(runs)
    if ax is None:
        use_style()
        _, ax = pyplot.subplots(figsize=(7.2, 3.8), layout="constrained")
    sizes = [_of(runs, name, "attach")[0].nbytes for name in names]
    for how in HOWS:
        role, marker, dashes = _LOOKS[how]
        _line(ax, sizes, [[run.seconds for run in _of(runs, name, how)] for name in names], color_of(role), marker, dashes, HOW_MEANING[how])
    touched = [[run.touch_seconds for run in _of(runs, name, "attach")] for name in names]
    if all(median(samples) > 0 for samples in touched):
        _line(ax, sizes, touched, color_of("dram"), "o", ":", "first touch of what was attached, apart", hollow=True)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks(sizes, [f"{name}\n{nbytes_text(size)}" for name, size in zip(names, sizes, strict=True)])
    ax.xaxis.set_minor_locator(LogLocator(numticks=1))
    ax.set_xlim(sizes[0] / 2, sizes[-1] * 2)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: seconds_text(value)))
    ax.set_xlabel("size of the model")
    ax.set_ylabel("until all tensors are there")
    ax.legend(loc="upper center", bbox_to_anchor=(0.45, -0.26), ncols=2)
    return ax


def _line(ax: Axes, sizes: Sequence[int], samples: Sequence[Sequence[float]], color: str, marker: str, dashes: str, label: str, *, hollow: bool = False) -> None:
    middle = [median(values) for values in samples]
    # A first touch may be too small to measure in one round; zero has no place on a logarithmic axis.
    spread = [[m - max(min(values), m / 100) for m, values in zip(middle, samples, strict=True)], [max(values) - m for m, values in zip(middle, samples, strict=True)]]
    face = "white" if hollow else color
    ax.errorbar(sizes, middle, yerr=spread, color=color, marker=marker, markersize=7, markerfacecolor=face, linestyle=dashes, capsize=3, elinewidth=1, label=label)


def brought_text(runs: Sequence[Brought]) -> str:
    """What the picture shows, in a few sentences made from its figures."""
    names = _names(runs)
    small, large = names[0], names[-1]
    said = []
    growth = _of(runs, large, "attach")[0].nbytes / _of(runs, small, "attach")[0].nbytes
    for how in HOWS:
        ends = [median(run.seconds for run in _of(runs, name, how)) for name in (small, large)]
        said.append(f"{HOW_MEANING[how]}: {seconds_text(ends[0])} → {seconds_text(ends[1])}, x{ends[1] / ends[0]:.1f}")
    touch = median(run.touch_seconds / run.nbytes for run in _of(runs, large, "attach")) * 1e9
    words = f"From {small} to {large} the bytes grow x{growth:.0f}. Until all tensors are there: {'; '.join(said)}."
    return f"{words} The first touch of what was attached, which comes on top when it is used, took {seconds_text(touch)} per GB of {large}."


def brought_table(runs: Sequence[Brought]) -> Table:
    """Every model by every way: until the tensors are there, the first use of every byte, the second."""
    rows = []
    for name in _names(runs):
        for how in HOWS:
            found = _of(runs, name, how)
            seconds = [run.seconds for run in found]
            spread = f"{seconds_text(min(seconds))} to {seconds_text(max(seconds))}"
            used = (seconds_text(median(run.use_seconds for run in found)), seconds_text(median(run.again_seconds for run in found)))
            rows.append((name, nbytes_text(found[0].nbytes), HOW_MEANING[how], seconds_text(median(seconds)), spread, *used))
    return Table(("model", "bytes", "tensors", "there after", "least to most", "first use", "second use"), tuple(rows), numeric=frozenset({1, 3, 4, 5, 6}))


# Memory


def memory_table(processes: Mapping[str, ProcessMemory]) -> Table:
    """What processes hold, counted in the kernel's three ways."""
    rows = tuple((name, *(nbytes_text(n) for n in (one.resident_nbytes, one.proportional_nbytes, one.private_nbytes))) for name, one in processes.items())
    headers = ("process", "resident (RSS)", "its share (PSS)", "private (USS)")
    note = "RSS counts a shared page in full for each process, PSS divides it by its users, USS is what the end of the process gives back."
    return Table(headers, rows, numeric=frozenset({1, 2, 3}), note=note)


def plot_memory(crowds: Sequence[Crowd], ax: Axes | None = None) -> Axes:
    """Bytes that all processes hold together against how many there are, a line for each way. Raises ValueError without any."""
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    if not crowds:
        raise ValueError("no crowd was measured; start at least one process")
    if ax is None:
        use_style()
        _, ax = pyplot.subplots(figsize=(7.2, 3.4), layout="constrained")
    for how in HOWS:
        role, marker, dashes = _LOOKS[how]
        found = [crowd for crowd in crowds if crowd.how == how]
        ax.plot([crowd.count for crowd in found], [crowd.nbytes / 1e9 for crowd in found], color=color_of(role), marker=marker, markersize=7, linestyle=dashes, label=HOW_MEANING[how])
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylim(0, max(crowd.nbytes for crowd in crowds) / 1e9 * 1.1)
    ax.set_xlabel("processes that use every byte of the model")
    ax.set_ylabel("held by all together (GB)")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3)
    return ax


def one_more_nbytes(crowds: Sequence[Crowd], how: How) -> float:
    """What each process after the first added. Raises ValueError unless two sizes of crowd were measured."""
    found = sorted((crowd for crowd in crowds if crowd.how == how), key=lambda crowd: crowd.count)
    if len(found) < 2:
        raise ValueError("what one more process adds is the difference of two crowds; measure at least two sizes")
    return (found[-1].nbytes - found[0].nbytes) / (found[-1].count - found[0].count)


def memory_text(crowds: Sequence[Crowd], model_nbytes: int) -> str:
    """What one more process costs by each way."""
    said = [f"{HOW_MEANING[how]} {nbytes_text(one_more_nbytes(crowds, how))} ({share_text(one_more_nbytes(crowds, how) / model_nbytes)} of the model)" for how in HOWS]
    return f"Each further process adds, with the model {', '.join(said)}."


# Starts


def predicted_seconds(parts: Mapping[str, float], *, forked: bool, attached: bool) -> float:
    """What a start should take by the rungs of a cold one: a fork is taken to save process and runtime, attaching the
    wait for bytes, and each to cost nothing."""
    saved = (_PAYS_RUNTIME if forked else ()) + (_PAYS_BYTES if attached else ())
    return sum(seconds for name, seconds in parts.items() if name not in saved)


def speedups(starts: Mapping[str, Sequence[WarmStart]], base: str) -> dict[str, Factor]:
    """How many times sooner than `base` each start had its first token, round by round."""
    found = {}
    for name, runs in starts.items():
        ratios = [cold.first_token_seconds / run.first_token_seconds for cold, run in zip(starts[base], runs, strict=True)]
        found[name] = Factor(median(ratios), min(ratios), max(ratios))
    return found


def starts_table(starts: Mapping[str, Sequence[WarmStart]], base: str, predicted: Mapping[str, float]) -> Table:
    """Each means: its first token, its factor against `base` beside the predicted one, and what one process held alone."""
    factors, rows = speedups(starts, base), []
    for name, runs in starts.items():
        private = [run.memory.private_nbytes for run in runs if run.memory is not None]
        foretold = f"x{predicted[base] / predicted[name]:.2f}" if name in predicted else ""
        held = nbytes_text(median(private)) if private else "not counted"
        rows.append((name, seconds_text(median(run.first_token_seconds for run in runs)), "" if name == base else str(factors[name]), foretold if name != base else "", held))
    headers = ("start", "first token after", f"sooner than {base} (rounds)", "predicted", "private memory")
    return Table(headers, tuple(rows), numeric=frozenset({1, 2, 3, 4}), caption="The same model, the same prompt, the same token")


def ready_parts(runs: Sequence[WarmStart]) -> dict[str, float]:
    """The parts of a start that has nothing left to climb: the second request's time to its first token."""
    return {FIRST_TOKEN: median(run.again_seconds for run in runs)}


def starts_text(starts: Mapping[str, Sequence[WarmStart]], base: str) -> str:
    """The finding, with its spread: which means were sooner in every round, and which is the soonest."""
    factors = {name: factor for name, factor in speedups(starts, base).items() if name != base}
    said = "; ".join(f"{name} x{factor.median:.2f} ({factor.least:.2f} to {factor.most:.2f}), {factor.verdict}" for name, factor in factors.items())
    best = max(factors, key=lambda name: factors[name].median)
    return f"Against {base}: {said}. The soonest by its median is {best}."


def above_text(parts: Mapping[str, float]) -> str:
    """Which rung the rest of a start is spent on, and how much of it is the request's own."""
    total = sum(parts.values())
    longest = max(parts, key=lambda name: parts[name])
    own = parts.get(FIRST_TOKEN, 0.0)
    said = f"Of {seconds_text(total)}, the first token itself is {share_text(own / total)}"
    return f"{said}, the longest part." if longest == FIRST_TOKEN else f"{said}; the longest part is the rung {longest}, {share_text(parts[longest] / total)}."
