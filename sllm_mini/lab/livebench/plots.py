"""What chapter 08 shows of a calibration: totals side by side, predictions against what came, every request's first token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sllm_mini.lab.style import color_of, use_style
from sllm_mini.lab.table import Table
from sllm_mini.lab.units import seconds_text, share_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TOTALS: Mapping[str, str] = {
    "answered": "requests answered", "starts": "cold starts", "first_token_seconds_mean": "first token, mean", "first_token_seconds_p50": "first token, p50",
    "first_token_seconds_p90": "first token, p90", "latency_seconds_mean": "last token, mean", "gpu_seconds_held": "device-seconds held", "gpu_seconds_idle": "of those idle",
}  # fmt: skip
"""Keys of `SimulationResult.totals()` that the page shows, and what they are called there."""


def beside_table(document: Mapping[str, Any]) -> Table:
    """The simulated totals beside those of each live run of the same trace."""
    runs, expected = document["results"], document["simulated"]
    rows = []
    for key, words in TOTALS.items():
        said = [seconds_text(each[key]) if "seconds" in key else f"{each[key]:,}" for each in (expected, *(run["live"] for run in runs))]
        mean = sum(run["live"][key] for run in runs) / len(runs)
        rows.append((words, *said, f"{expected[key] / mean:.2f}" if mean else ""))
    headers = ("", "simulated before", *(["live"] if len(runs) == 1 else [f"live, run {number}" for number in range(1, len(runs) + 1)]), "simulated over live")
    learned = document["learned"]
    return Table(
        headers, tuple(rows), numeric=frozenset(range(1, len(headers))), emphasis=frozenset({2}),
        caption=f"One trace of {expected['arrived']} requests; figures and estimator learned from another, with {learned['cold_starts']} cold starts. {where_text(document)}",
    )  # fmt: skip


def prediction_table(document: Mapping[str, Any]) -> Table:
    """What the estimator said of each kind of start when it was decided, and what it took."""
    rows = tuple(
        (row["name"], f"{row['count']:,}", seconds_text(row["predicted_seconds_mean"]), seconds_text(row["observed_seconds_mean"]), share_text(row["error_median"]), share_text(row["error_p90"]))
        for row in document["predictions"]
    )
    return Table(
        ("what", "how many", "predicted, mean", "observed, mean", "error, median", "error, p90"), rows, numeric=frozenset(range(1, 6)),
        caption=f"The estimator, frozen after the other trace, against what came. {where_text(document)}",
    )  # fmt: skip


def interval_text(document: Mapping[str, Any]) -> str:
    """Mean time to first token and cold starts, simulated over live, run by run."""
    lines = []
    for number, run in enumerate(document["results"], 1):
        agreed, interval = run["agreement"], run["first_token_mean_ratio_interval"]
        said = "too few requests for an interval" if interval is None else "95 % of resampled runs: {:.2f} to {:.2f}".format(*interval)
        lines.append(
            f"run {number}: mean time to first token, simulated over live {run['first_token_mean_ratio']:.3f} ({said}); cold starts "
            f"{run['cold_starts_ratio']:.3f}; {share_text(agreed['same_start'])} of requests waited for the same kind of start"
        )
    return "\n".join(lines)


def agreement_text(document: Mapping[str, Any]) -> str:
    """How far the first run decided as the simulation had, and the first action that differs."""
    agreed = document["results"][0]["agreement"]
    other = agreed["first_different"]
    said = f"{agreed['actions_alike']} actions alike, of {agreed['actions_live']} live and {agreed['actions_simulated']} simulated"
    if other is not None:
        said += "; then " + ", ".join(f"{side}: {_told(other[side])}" for side in ("live", "simulated"))
    return f"{said}\nsame node for {share_text(agreed['same_node'])} of requests, same kind of start for {share_text(agreed['same_start'])}"


def _told(done: Mapping[str, Any] | None) -> str:
    return "nothing more" if done is None else f"{done['action'].partition('(')[0]} at {done['seconds']:.2f} s"


def plot_firsts(document: Mapping[str, Any], ax: Axes | None = None) -> Axes:
    """Each request's seconds from arrival to its first token, live (the first run) and as simulated."""
    from matplotlib import pyplot

    use_style()
    if ax is None:
        _, ax = pyplot.subplots(figsize=(9, 3.2))
    pairs = document["results"][0]["first_token_seconds"]
    for place, (label, marker, color) in enumerate((("live", "o", color_of("remote")), ("simulated before", "x", color_of("dram"))), 1):
        ax.plot([pair[0] for pair in pairs], [pair[place] for pair in pairs], marker, color=color, label=label, markersize=6, markerfacecolor="none")
    ax.set_yscale("log")
    ax.set_xlabel("arrival, seconds since the trace began")
    ax.set_ylabel("time to first token, seconds")
    ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2)
    return ax


def firsts_alt_text(document: Mapping[str, Any]) -> str:
    pairs = document["results"][0]["first_token_seconds"]
    near = sum(abs(expected - seen) <= 0.25 * seen for _, seen, expected in pairs)
    return f"Time to first token of {len(pairs)} requests by arrival, logarithmic: live as circles, simulated as crosses; {near} of them are within a quarter of what came."


def where_text(document: Mapping[str, Any]) -> str:
    """Which machine, and when."""
    machine = document["machine"]
    return f"{machine['processor']}, {machine['cpu_count']} cores, {document['date'][:10]}."
