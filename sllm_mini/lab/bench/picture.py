"""The roofline: bytes per second of each loader against the limits of the machine, one panel per state (chapter 02).

Bars are medians of totals (the load and the use of every byte), thin lines reach from the slowest to the fastest
sample; upright lines are the limits, as far as a loader can get: the limit's seconds and the sum's together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sllm_mini.lab.bench.document import limit_of, rows_of
from sllm_mini.lab.bench.entry import STATES, State
from sllm_mini.lab.bench.words import LIMIT_NOUNS, STATE_TITLES
from sllm_mini.lab.figure import Described, describe
from sllm_mini.lab.style import INK, MUTED, color_of, use_style
from sllm_mini.lab.table import Table
from sllm_mini.lab.units import rate_text, seconds_text

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

_COLORS = {"ours": "process", "ladder": "runtime", "peer": "wait", "limit": "disk"}
_MEANINGS = {"ours": "sllm_mini", "ladder": "a rung of the ladder", "peer": "another package", "limit": "a limit"}
_ROW_INCHES, _SPARE_INCHES = 0.27, 1.1


def plot_roofline(document: Mapping[str, Any], ax: Axes | None = None, *, state: State | None = None) -> Axes:
    """Draws one state into `ax` (`state` says which; the first measured if it does not), or, without `ax`, a figure with
    a panel per state, whose first axes it returns. Raises ValueError for a document without results."""
    from matplotlib import pyplot

    use_style()
    states = [one for one in STATES if rows_of(document, one)]
    if not states or (state is not None and state not in states):
        raise ValueError("the document has no results to draw" + (f" for {state}" if state else ""))
    if ax is not None:
        return _panel(document, state or states[0], ax)
    shown = [state] if state else states
    heights = [_SPARE_INCHES + _ROW_INCHES * len(rows_of(document, one)) for one in shown]
    figure, grid = pyplot.subplots(len(shown), 1, figsize=(7.5, sum(heights)), height_ratios=heights, squeeze=False, layout="constrained")
    axes = [_panel(document, one, panel) for one, panel in zip(shown, grid[:, 0], strict=True)]
    figure.suptitle(f"{document['model']['name']} to {document['method']['device']}", x=0.01, ha="left", fontsize=11)
    return axes[0]


def _panel(document: Mapping[str, Any], state: State, ax: Axes) -> Axes:
    from matplotlib.patches import Patch

    rows = rows_of(document, state)
    rates = [row["bytes_per_second_median"] / 1e9 for row in rows]
    spread = [
        [rate - row["nbytes"] / row["seconds_max"] / 1e9 for rate, row in zip(rates, rows, strict=True)],
        [row["nbytes"] / row["seconds_min"] / 1e9 - rate for rate, row in zip(rates, rows, strict=True)],
    ]
    colors = [color_of(_COLORS[row["kind"]]) for row in rows]
    ax.barh(range(len(rows)), rates, xerr=[[max(value, 0.0) for value in side] for side in spread], color=colors, height=0.72,
            error_kw={"ecolor": MUTED, "elinewidth": 1.0, "capsize": 2})  # fmt: skip
    ax.set_yticks(range(len(rows)), [row["name"] for row in rows])
    for label, row in zip(ax.get_yticklabels(), rows, strict=True):
        if row["kind"] == "ours":
            label.set_fontweight("bold")
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.set_xlabel("GB/s, the load and the use of every byte")
    ax.set_title(STATE_TITLES[state], fontsize=10)
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    keys: list[Artist] = [Patch(color=color_of(_COLORS[kind]), label=_MEANINGS[kind]) for kind in kinds]
    roof = _roof(document, state)
    if roof is not None:
        name, rate = roof
        keys.append(ax.axvline(rate / 1e9, color=INK, linewidth=1.2, linestyle="--", label=f"what {LIMIT_NOUNS[name]} gave"))
    ax.legend(handles=keys, loc="lower right", fontsize=8, frameon=True, framealpha=0.9, edgecolor="none")
    return ax


def _roof(document: Mapping[str, Any], state: State) -> tuple[str, float] | None:
    """The limit's name and the bytes per second of a loader that is at it and then uses every byte."""
    nbytes = document["model"]["nbytes"]
    name, seconds = limit_of(state, document["method"]["device"], document["limits"], nbytes)
    use = document["limits"].get("resident_use_seconds_median")
    return None if name is None or seconds is None or use is None else (name, nbytes / (seconds + use))


def roofline_alt_text(document: Mapping[str, Any]) -> str:
    """What `plot_roofline(document)` shows, in words."""
    parts = [f"Bars of bytes per second for loading {document['model']['name']} to {document['method']['device']}."]
    for state in STATES:
        rows = rows_of(document, state)
        if not rows:
            continue
        listed = ", ".join(f"{row['name']} {rate_text(row['bytes_per_second_median'])}" for row in rows)
        roof = _roof(document, state)
        limit = f" The most that {LIMIT_NOUNS[roof[0]]} allows is {rate_text(roof[1])}." if roof else ""
        parts.append(f"{state.capitalize()}, fastest first: {listed}.{limit}")
    return " ".join(parts)


def described_roofline(document: Mapping[str, Any]) -> Described:
    """The picture of every state with its alt text, for a page or a file."""
    method = document["method"]
    caption = f"Medians of {method['rounds']} interleaved rounds, memory {method['memory']}; {document['date'][:10]}."
    return describe(plot_roofline(document), roofline_alt_text(document), caption=caption)


def bench_table(document: Mapping[str, Any], state: State) -> Table:
    """One state as a table, fastest first: seconds, share of the limit, and the ratio to our loader with its spread."""
    rows = rows_of(document, state)
    cells = tuple(
        (
            row["name"],
            row["setting"] if row["kind"] == "peer" else _MEANINGS[row["kind"]],
            seconds_text(row["seconds_median"]),
            spread_text(row),
            "" if row["ratio_to_limit"] is None else f"{row['ratio_to_limit']:.2f}",
            ratio_text(row),
        )
        for row in rows
    )
    return Table(
        headers=("loader", "setting", "seconds", "fastest to slowest", "of the limit", f"times {document['reference']}"),
        rows=cells,
        caption=f"{document['model']['name']}, {STATE_TITLES[state]}",
        note=share_note(rows),
        numeric=frozenset({2, 3, 4, 5}),
        emphasis=frozenset(number for number, row in enumerate(rows) if row["kind"] == "ours"),
    )


def limit_noun(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """What the rows of one state are held against, in words; None where it could not be measured."""
    return next((LIMIT_NOUNS[row["limit"]] for row in rows if row["limit"]), None)


def share_note(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the shares of a limit are taken on, and what one above 1 means where the table has one; empty without a limit."""
    noun = limit_noun(rows)
    if noun is None:
        return ""
    note = f"Against {noun} stands the load alone: the sample less the sum over every byte."
    if any(row["ratio_to_limit"] is not None and round(row["ratio_to_limit"], 2) > 1 for row in rows):
        note += " Above 1: the model is too small, or the machine too noisy, to tell a load from its limit."
    return note


def spread_text(row: Mapping[str, Any]) -> str:
    """ "1.40 s – 1.61 s": the fastest and the slowest sample; one sample has no spread, and says so."""
    if len(row["samples"]) == 1:
        return "one round"
    return f"{seconds_text(row['seconds_min'])} – {seconds_text(row['seconds_max'])}"


def ratio_text(row: Mapping[str, Any]) -> str:
    """ "1.52 (1.40 – 1.61)": the median over rounds, the least and the most; of one round alone "1.52"."""
    if row["ratio_to_reference_median"] is None:
        return ""
    if len(row["ratio_to_reference_samples"]) == 1:
        return f"{row['ratio_to_reference_median']:.2f}"
    return f"{row['ratio_to_reference_median']:.2f} ({row['ratio_to_reference_min']:.2f} – {row['ratio_to_reference_max']:.2f})"
