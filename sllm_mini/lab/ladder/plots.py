"""What a bench says about the ladder: rates beside the disk's limit, the factor of each step, the counters behind it.

Arithmetic on the document of `lab.bench`; measures nothing. A rung's seconds are its total less the sum over every byte
alone, so that a step is not made smaller by what all rungs share. A factor is taken round by round: the seconds of
the rung before over those of this one, above 1 is faster. Shown in chapter 02.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sllm_mini.lab.bench.document import limit_of, read_document, rows_of
from sllm_mini.lab.bench.ours import REFERENCE
from sllm_mini.lab.bench.words import COLD_LIMITS, STATE_SOURCES
from sllm_mini.lab.figure import Described, describe
from sllm_mini.lab.recorded import recorded_note, recorded_runs
from sllm_mini.lab.style import INK, PAPER, color_of, use_style
from sllm_mini.lab.table import Table
from sllm_mini.lab.units import rate_text, seconds_text
from sllm_mini.loading.ladder import LADDER, READ_NBYTES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAPER_FACTORS: Mapping[str, float] = MappingProxyType({"bulk": 1.2, "direct": 2.1, "threads": 2.3, "pinned": 1.4, "pipeline": 1.5})
"""What each idea was worth to ServerlessLLM (OSDI'24) on GPU servers with several disks. Second-hand: from notes on the
paper, which do not agree with each other."""

_PREFIX = "ladder: "
_UNKNOWN = "not counted"


@dataclass(frozen=True, slots=True)
class Factor:
    """How many times faster than the rung before: the median over the rounds, the least, the most."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"x{self.median:.2f} ({self.least:.2f} to {self.most:.2f})"

    @property
    def verdict(self) -> str:
        if self.least > 1:
            return "faster in every round"
        return "slower in every round" if self.most < 1 else "faster in one round and slower in another, so no finding"


@dataclass(frozen=True, slots=True)
class Step:
    """One rung of one run. `seconds`: median, without the sum over every byte; `factor`: None for the lowest rung.
    `before`: the name of the rung that it is compared with; `row`: its results in the document."""

    name: str
    idea: str
    threads: int
    seconds: float
    rates: tuple[float, ...]
    factor: Factor | None
    before: str
    row: Mapping[str, Any]


def ladder_steps(document: Mapping[str, Any]) -> list[Step]:
    """The rungs that were measured cold, from the lowest up. Raises ValueError where there are none."""
    rows = {row["name"].removeprefix(_PREFIX): row for row in rows_of(document, "cold", kinds=("ladder",))}
    use = _use_seconds(document, list(rows.values()))
    steps, parts = list[Step](), list[dict[int, float]]()
    for rung in LADDER:
        row = rows.get(rung.name)
        if row is None:
            continue
        parts.append({number: total - use for number, total in zip(row["rounds"], row["samples"], strict=True)})
        factor = _factor(parts[-2], parts[-1]) if steps else None
        rates = tuple(row["nbytes"] / part for part in parts[-1].values())
        steps.append(Step(rung.name, rung.idea, rung.threads, statistics.median(parts[-1].values()), rates, factor, steps[-1].name if steps else "", row))
    if not steps:
        raise ValueError("the document holds no rung of the ladder that was measured cold; measure with ladder=True")
    return steps


def _use_seconds(document: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> float:
    """The seconds of the sum alone; 0 where they are so much of a sample that only noise would be left of it."""
    use = float(document["limits"].get("resident_use_seconds_median") or 0.0)
    return use if all(use < 0.8 * min(row["samples"]) for row in rows) else 0.0


def _factor(before: Mapping[int, float], after: Mapping[int, float]) -> Factor:
    """Round by round, over the rounds that both have; where they have none in common, of the medians, without a spread."""
    ratios = [before[number] / after[number] for number in before if number in after]
    ratios = ratios or [statistics.median(before.values()) / statistics.median(after.values())]
    return Factor(statistics.median(ratios), min(ratios), max(ratios))


def floor_of(document: Mapping[str, Any]) -> tuple[str, float]:
    """Which limit a cold load meets, in words, and the bytes per second it allows; where none could be measured (direct
    reads are refused, say), the fastest run of a rung stands in and the words say so."""
    name, seconds = limit_of("cold", document["method"]["device"], document["limits"], document["model"]["nbytes"])
    if name is None or seconds is None:
        return "the fastest run (the limit itself could not be measured)", max(max(step.rates) for step in ladder_steps(document))
    return COLD_LIMITS[name], document["model"]["nbytes"] / seconds


def plot_ladder(document: Mapping[str, Any], ax: Axes | None = None) -> Axes:
    """One bar per rung: bytes per second of the median, a dot for each round; the limit of the same rounds as a line."""
    from matplotlib import pyplot

    steps, (words, limit) = ladder_steps(document), floor_of(document)
    if ax is None:
        use_style()
        _, ax = pyplot.subplots(figsize=(7.2, 0.95 + 0.46 * len(steps)), layout="constrained")
    medians = [step.row["nbytes"] / step.seconds / 1e9 for step in steps]
    ax.barh(range(len(steps)), medians, height=0.62, color=[color_of("runtime")] * (len(steps) - 1) + [color_of("process")])
    for row, step in enumerate(steps):
        rates = [rate / 1e9 for rate in step.rates]
        ax.plot(rates, [row + 0.38] * len(rates), ".", color=INK, markersize=4)
        against = f"  x{step.factor.median:.2f}" if step.factor else ""
        behind = {"facecolor": PAPER, "edgecolor": "none", "pad": 1}
        ax.text(medians[row] + 0.012 * limit / 1e9, row, f"{medians[row]:.2f}{against}", va="center", fontsize=9, bbox=behind)
    ax.axvline(limit / 1e9, color=INK, linestyle="--", linewidth=1.3)
    ax.annotate(
        f"{words}, {limit / 1e9:.2f} GB/s", (limit / 1e9, 1), xycoords=("data", "axes fraction"), xytext=(0, 4), textcoords="offset points",
        ha="right", fontsize=9,
    )  # fmt: skip
    ax.set_yticks(range(len(steps)), [step.name for step in steps])
    ax.set_ylim(len(steps) - 0.4, -0.6)
    ax.set_xlim(0, 1.22 * max(limit / 1e9, *medians))
    ax.grid(False, axis="y")
    ax.set_xlabel("GB/s, cold; a dot is one round, xN is against the rung before")
    return ax


def ladder_alt_text(document: Mapping[str, Any]) -> str:
    """What `plot_ladder` shows, in words."""
    words, limit = floor_of(document)
    bars = []
    for step in ladder_steps(document):
        against = f", {step.factor} against {step.before}" if step.factor else ""
        bars.append(f"{step.name} {rate_text(step.row['nbytes'] / step.seconds)}{against}")
    return f"Bars of bytes per second, one per rung, cold: {'; '.join(bars)}. A line marks {words}, {rate_text(limit)}."


def ladder_text(document: Mapping[str, Any]) -> str:
    """The finding: how far from the limit, which step gave most, which gave nothing."""
    steps, (words, limit) = ladder_steps(document), floor_of(document)
    rates = [step.row["nbytes"] / step.seconds for step in steps]
    text = f"From {rate_text(rates[0])} to {rate_text(rates[-1])}: "
    text += f"{rates[0] / limit:.0%} of {words} on the lowest rung, {rates[-1] / limit:.0%} on the top one."
    climbed = [(step.factor.median, step) for step in steps if step.factor]
    if climbed:
        factor, most = max(climbed, key=lambda item: item[0])
        lost = [step.name for other, step in climbed if other < 1]
        text += f" The largest step here is {most.name} (x{factor:.2f})"
        text += f"; slower than the rung before: {', '.join(lost)}." if lost else "; no rung is slower than the one before."
    return text


def ladder_table(document: Mapping[str, Any]) -> Table:
    """What each rung adds and what that was worth, here and to the paper."""
    steps, (words, limit) = ladder_steps(document), floor_of(document)
    without = "without " if _use_seconds(document, [step.row for step in steps]) else "with "
    return Table(
        headers=("rung", "it adds", "seconds", "of the limit", "against the rung before (rounds)", "the paper's"),
        rows=tuple(
            (
                step.name,
                step.idea,
                f"{step.seconds:.3f}",
                f"{step.row['nbytes'] / step.seconds / limit:.0%}",
                str(step.factor) if step.factor else "",
                f"x{PAPER_FACTORS[step.name]:.1f}" if step.name in PAPER_FACTORS else "",
            )
            for step in steps
        ),
        caption=f"{document['model']['name']}, cold: one idea at a time",
        note=f"The limit is {words}. Seconds are {without}the sum over every byte. The paper's factors: ServerlessLLM, OSDI'24, GPU servers with "
        "several disks; second-hand, from notes that do not agree with each other.",
        numeric=frozenset({2, 3, 4, 5}),
        emphasis=frozenset({len(steps) - 1}),
    )


def counters_table(document: Mapping[str, Any], state: str, *, kinds: Sequence[str] = ("ladder",)) -> Table:
    """What the kernel counted for loaders of some kinds during the load and the sum: medians over the rounds."""
    if tuple(kinds) == ("ladder",):
        rows = [(step.name, step.row) for step in ladder_steps(document)] if state == "cold" else []
    else:
        rows = [(row["name"], row) for row in rows_of(document, state, kinds=kinds)]
    return Table(
        headers=("loader", "seconds", "read calls", "page faults", "that waited", "from the disk", "processor s (kernel)", "memory"),
        rows=tuple((name, f"{row['seconds_median']:.3f}", *(told(row) for told in _COUNTS.values())) for name, row in rows),
        caption=f"{document['model']['name']}, {STATE_SOURCES[state]}: what the kernel counted",
        note="The load and the sum over every byte together. “x” is times the bytes of the model; memory is the most that what is resident grew, "
        "pages shared with the page cache included; faults that waited are those that had to ask the disk.",
        numeric=frozenset(range(1, 8)),
    )


def step_text(document: Mapping[str, Any], name: str) -> str:
    """One step in figures: seconds, factor, and the counters before → after."""
    steps = {step.name: step for step in ladder_steps(document)}
    if name not in steps or steps[name].factor is None:
        return f"{name}: not measured on this machine; the table of skipped loaders says why"
    step, before = steps[name], steps[steps[name].before]
    verdict = step.factor.verdict if step.factor else ""
    lines = [f"{step.before} → {name}: {seconds_text(before.seconds)} → {seconds_text(step.seconds)}, {step.factor}: {verdict}"]
    lines.append(f"   {'reads under way at most':26} {_in_flight(before)} → {_in_flight(step)}")
    for words, told in _COUNTS.items():
        lines.append(f"   {words:26} {told(before.row)} → {told(step.row)}")
    return "\n".join(lines)


def _in_flight(step: Step) -> str:
    if step.name == LADDER[0].name:
        return "1 of a tensor's size"
    return f"{step.threads} of {READ_NBYTES >> 20} MiB"


def peers_text(document: Mapping[str, Any], state: str) -> str:
    """How other packages compare with our loader in its default setting, a line each, then how sure that is."""
    peers = [row for row in rows_of(document, state, kinds=("peer",)) if row["ratio_to_reference_median"] is not None]
    if not peers:
        return f"No other package was measured {state}."
    lines = [f"  {row['name']:32} x{row['ratio_to_reference_median']:.2f}" for row in peers]
    first = peers[0]
    low, high = first["ratio_to_reference_min"], first["ratio_to_reference_max"]
    lead = "behind ours in every round" if low > 1 else "ahead of ours in every round" if high < 1 else "now ahead of ours, now behind"
    spread = f"{low:.2f} to {high:.2f}" if len(first["ratio_to_reference_samples"]) > 1 else "one round"
    nearest = f"The nearest, {first['name']}, was {lead} ({spread})."
    return "\n".join((f"Seconds against ours (hashes checked), {STATE_SOURCES[state]}:", *lines, nearest))


def hashing_text(document: Mapping[str, Any], state: str) -> str:
    """What checking every hash costs: our default against `verify=False`, round by round."""
    row = next((row for row in rows_of(document, state, kinds=("ours",)) if row["name"] == f"{REFERENCE}, no hashing"), None)
    if row is None or not row["ratio_to_reference_median"]:
        return f"The load without hashing was not measured {state}."
    middle, low, high = (1 / row[f"ratio_to_reference_{which}"] for which in ("median", "max", "min"))
    return f"{STATE_SOURCES[state]}: with every hash checked the load and the sum took {middle:.2f} times as long as without ({low:.2f} to {high:.2f})"


def skipped_table(document: Mapping[str, Any]) -> Table:
    """What could not be measured here, one row per reason."""
    reasons: dict[str, list[str]] = {}
    for skipped in document["skipped"]:
        reasons.setdefault(skipped["reason"], []).append(skipped["name"])
    return Table(
        caption="Skipped",
        headers=("not measured here", "why"),
        rows=tuple((", ".join(dict.fromkeys(names)), reason) for reason, names in reasons.items()) or (("nothing", ""),),
    )


def recorded_ladder(name: str) -> Described | str:
    """The ladder as recorded on the first GPU that has a run of that name; the note where there is none. Raises
    FormatError for a recorded run that is no document of a bench."""
    runs = recorded_runs(name)
    if not runs:
        return recorded_note(name)
    document = read_document(next(iter(runs.values())))
    return describe(plot_ladder(document), ladder_alt_text(document), caption=f"{recorded_note(name)} {ladder_text(document)}")


def _count(*names: str) -> Callable[[Mapping[str, Any]], str]:
    def told(row: Mapping[str, Any]) -> str:
        values = [row[f"{name}_median"] for name in names]
        return _UNKNOWN if None in values else f"{sum(values):,.0f}"

    return told


def _times(name: str) -> Callable[[Mapping[str, Any]], str]:
    def told(row: Mapping[str, Any]) -> str:
        value = row[f"{name}_median"]
        return _UNKNOWN if value is None else f"{value / row['nbytes']:.2f} x"

    return told


def _processor(row: Mapping[str, Any]) -> str:
    user, system = row["user_seconds_median"], row["system_seconds_median"]
    return _UNKNOWN if user is None or system is None else f"{user + system:.2f} ({system:.2f})"


_COUNTS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "read calls": _count("read_calls"),
    "page faults": _count("minor_faults", "major_faults"),
    "faults that waited": _count("major_faults"),
    "from the disk": _times("disk_nbytes"),
    "processor s (kernel)": _processor,
    "memory": _times("peak_nbytes"),
}
