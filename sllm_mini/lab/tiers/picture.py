"""What `bench tiers` measured, drawn and in tables: how near each tier comes to its limit (chapter 03).

Draws and never measures. Bars are of medians; what is attached and not moved has no limit, and is in the tables only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sllm_mini.lab.figure import Described, describe
from sllm_mini.lab.style import INK, color_of, use_style
from sllm_mini.lab.table import Table
from sllm_mini.lab.tiers.document import LABELS, rows_of
from sllm_mini.lab.units import nbytes_text, rate_text, seconds_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = {"remote": "remote", "cold": "disk", "warm": "runtime", "dram": "dram", "device": "device"}
_ROW_INCHES, _SPARE_INCHES = 0.4, 1.0


def drawn_rows(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The loads that are held against a limit."""
    return [row for row in rows_of(document, "load") if row["compared_bytes_per_second_median"] and row["ratio_to_limit"]]


def plot_tiers(document: Mapping[str, Any], ax: Axes | None = None) -> Axes:
    """Draws how much of its limit each load reaches, and both rates. Raises ValueError where no limit was measured."""
    from matplotlib import pyplot

    rows = drawn_rows(document)
    if not rows:
        raise ValueError("the document has no load with a limit to draw")
    if ax is None:
        use_style()
        _, ax = pyplot.subplots(figsize=(7.5, _SPARE_INCHES + _ROW_INCHES * len(rows)), layout="constrained")
    shares = [row["ratio_to_limit"] for row in rows]
    ax.barh(range(len(rows)), shares, color=[color_of(_COLORS[row["state"]]) for row in rows], height=0.6)
    for number, row in enumerate(rows):
        ax.annotate(_rates(row), (max(1.0, *shares) + 0.03, number), va="center", fontsize=8, color=INK)
    ax.axvline(1.0, color=INK, linewidth=1.2, linestyle="--")
    ax.set_yticks(range(len(rows)), [row["name"] for row in rows])
    ax.invert_yaxis()
    ax.set_xlim(0, max(1.0, *shares) + 0.95)
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
    ax.grid(False, axis="y")
    ax.set_xlabel("share of its limit, which was measured in the same rounds")
    return ax


def _rates(row: Mapping[str, Any]) -> str:
    rate = row["compared_bytes_per_second_median"]
    return f"{rate_text(rate)} of {rate_text(rate / row['ratio_to_limit'])}, {LABELS[row['limit']]}"


def tiers_alt_text(document: Mapping[str, Any]) -> str:
    """What `plot_tiers(document)` shows, in words."""
    listed = "; ".join(f"{row['name']} {row['ratio_to_limit']:.2f}, {_rates(row)}" for row in drawn_rows(document))
    return f"Bars of the share of its limit that each load of {document['model']['name']} reaches: {listed}."


def described_tiers(document: Mapping[str, Any]) -> Described:
    """The picture with its alt text, for a page or a file."""
    caption = f"Medians of {document['method']['rounds']} interleaved rounds, memory backed; {document['date'][:10]}."
    return describe(plot_tiers(document), tiers_alt_text(document), caption=caption)


def tiers_table(document: Mapping[str, Any]) -> Table:
    """Every load and attachment: seconds with their spread, what of them is held against the limit, and its share."""
    rows = rows_of(document, "load", "limit", "attach")
    cells = tuple(
        (
            row["name"],
            nbytes_text(row["nbytes"]),
            seconds_text(row["seconds_median"]),
            spread_text(row),
            "" if row["compared_seconds_median"] is None else seconds_text(row["compared_seconds_median"]),
            seconds_text(row["parts"]["use_seconds_median"]),
            against_text(row),
        )
        for row in rows
    )
    headers = ("what", "bytes", "seconds", "min – max", "of it the load", "the sum", "share of its limit or target")
    note = "A load's seconds end with the sum over every byte. An attachment's end when its tensors exist; the sum comes after, page faults and all."
    return Table(headers, cells, numeric=frozenset(range(1, 6)), caption="From tier to tier", note=note)


def parts_table(document: Mapping[str, Any]) -> Table:
    """What attaching leaves to do: page faults by page size, per GB, and the modules of a model."""
    rows = rows_of(document, "pages", "part")
    cells = tuple(
        (row["name"], seconds_text(row["seconds_median"]), spread_text(row), "" if row["seconds_per_gb_median"] is None else seconds_text(row["seconds_per_gb_median"]))
        for row in rows
    )
    return Table(("what", "seconds", "min – max", "per GB"), cells, numeric=frozenset((1, 2, 3)), caption="After the tensors are mapped")


def spread_text(row: Mapping[str, Any]) -> str:
    """ "1.40 s – 1.61 s": the fastest and the slowest sample; one sample has no spread, and says so."""
    return "one round" if len(row["samples"]) == 1 else f"{seconds_text(row['seconds_min'])} – {seconds_text(row['seconds_max'])}"


def against_text(row: Mapping[str, Any]) -> str:
    """ "0.93 of disk, direct read" or "0.31 of 20.0 ms"; nothing where it is held against nothing."""
    if row["ratio_to_target"] is not None:
        return f"{row['ratio_to_target']:.2f} of {seconds_text(row['target_seconds'])}"
    return "" if row["ratio_to_limit"] is None else f"{row['ratio_to_limit']:.2f} of {LABELS[row['limit']]}"
