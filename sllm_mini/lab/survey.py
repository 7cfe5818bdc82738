"""The survey of systems and FaaS providers: reading it, checking it, and showing which rung each of them attacks.

The rows are in `data/survey/systems.csv`; the README beside it says what its columns mean. Shown in chapter 00; later
chapters show the rows that they rebuild. Reading costs one pass over some 15 kB.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sllm_mini.errors import ResourceError
from sllm_mini.lab.style import INK, MUTED, SHADE, color_of, darker, ink_on, use_style
from sllm_mini.lab.table import Table
from sllm_mini.resources import resource
from sllm_mini.types import Warmth

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = ("system", "kind", "mechanism", "rung", "figure", "source", "trust", "date", "chapter", "policy")
KINDS = ("paper", "open source", "provider")
TRUST = (
    "read in its code",
    "read in its full text",
    "read in its abstract",
    "read in its documentation",
    "second-hand",
    "from memory, not checked",
)
"""How far a row is to be trusted, from most to least."""

_UNCHECKED = "unchecked: "
_FORMS = (
    ("date", r"(\d{4})?", "2025"),
    ("chapter", r"(\d\d(;\d\d)*)?", "04;10"),
    ("policy", r"(\w+(\.\w+)+(;\w+(\.\w+)+)*)?", "keepalive.FixedKeepAlive;autoscale.QueueLength"),
)
"""Column, pattern, and an example of what may stand in it."""


@dataclass(frozen=True, slots=True)
class SurveyRow:
    """One system or provider. `figure` is what its source reports, on its hardware; `year` is None where unknown; `policies` are
    what models it in `sllm_mini.control`, as dotted names.

    Raises ValueError for anything the README of the survey does not allow.
    """

    system: str
    kind: str
    mechanism: str
    rungs: tuple[Warmth, ...]
    figure: str
    source: str
    trust: str
    year: int | None
    chapters: tuple[int, ...]
    policies: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("system", "mechanism", "source"):
            if not getattr(self, name):
                raise ValueError(f"column {name} is empty; every row needs one")
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is none of {', '.join(KINDS)}")
        if self.trust not in TRUST:
            raise ValueError(f"trust {self.trust!r} is none of {'; '.join(TRUST)}")
        if not self.rungs or list(self.rungs) != sorted(set(self.rungs)):
            raise ValueError("rungs must be at least one, each once, from cold to ready")
        if self.year is not None and not 1990 <= self.year <= 2100:
            raise ValueError(f"date {self.year} is no year from 1990 to 2100")
        if any(not 0 <= chapter <= 11 for chapter in self.chapters):
            raise ValueError(f"chapters {self.chapters} are not all from 00 to 11")
        remembered = self.trust == TRUST[-1]
        if self.figure and remembered != self.figure.startswith(_UNCHECKED):
            raise ValueError(f"a figure starts with {_UNCHECKED!r} exactly where trust is {TRUST[-1]!r}; {self.figure!r} breaks that")


def _row(cells: dict[str, str]) -> SurveyRow:
    names = [name for name in cells["rung"].split(";") if name]
    unknown = [name for name in names if name.upper() not in Warmth.__members__ or name != name.lower()]
    if unknown:
        raise ValueError(f"rung {unknown[0]!r} is none of {', '.join(rung.name.lower() for rung in Warmth)}")
    for column, pattern, example in _FORMS:
        if not re.fullmatch(pattern, cells[column], flags=re.ASCII):
            raise ValueError(f"{column} {cells[column]!r} is not of the form {example}")
    return SurveyRow(
        system=cells["system"],
        kind=cells["kind"],
        mechanism=cells["mechanism"],
        rungs=tuple(Warmth[name.upper()] for name in names),
        figure=cells["figure"],
        source=cells["source"],
        trust=cells["trust"],
        year=int(cells["date"]) if cells["date"] else None,
        chapters=tuple(int(chapter) for chapter in cells["chapter"].split(";") if chapter),
        policies=tuple(name for name in cells["policy"].split(";") if name),
    )


def load_survey(path: str | os.PathLike[str] | None = None) -> list[SurveyRow]:
    """All rows in file order, from `path` or from the survey that travels with the package.

    Raises ResourceError naming file and line for a file that is absent, is not UTF-8, has other columns, a cell that
    the README does not allow, or a system twice. Safe from any thread.
    """
    file = Path(path) if path is not None else resource("data/survey") / "systems.csv"
    rows: list[SurveyRow] = []
    seen: dict[str, int] = {}
    try:
        with open(file, newline="", encoding="utf-8") as text:
            reader = csv.reader(text, strict=True)
            header = next(reader, [])
            if tuple(header) != COLUMNS:
                raise ResourceError(f"{file} line 1: the columns are {','.join(header)!r}; they must be {','.join(COLUMNS)}")
            for cells in reader:
                place = f"{file} line {reader.line_num}"
                if len(cells) != len(COLUMNS):
                    raise ResourceError(f"{place}: {len(cells)} cells where {len(COLUMNS)} are needed; quote cells that hold commas")
                try:
                    row = _row(dict(zip(COLUMNS, cells, strict=True)))
                except ValueError as error:
                    raise ResourceError(f"{place}: {error}") from error
                if row.system in seen:
                    raise ResourceError(f"{place}: {row.system!r} is on line {seen[row.system]} already; give each row its own name")
                seen[row.system] = reader.line_num
                rows.append(row)
    except OSError as error:
        raise ResourceError(f"{file}: the survey cannot be read ({error.strerror}); reinstall sllm_mini or name another file") from error
    except UnicodeDecodeError as error:
        raise ResourceError(f"{file} at byte {error.start:,}: this is not UTF-8; save the survey as UTF-8") from error
    except csv.Error as error:
        raise ResourceError(f"{file}: this is not a CSV file ({error}); compare it with the README beside the survey") from error
    return rows


def select(
    rows: Iterable[SurveyRow], *, rung: Warmth | None = None, kind: str | None = None, chapter: int | None = None
) -> list[SurveyRow]:
    """The rows that attack `rung`, are of `kind` and are rebuilt in `chapter`; what is None does not filter."""
    return [
        row
        for row in rows
        if (rung is None or rung in row.rungs) and (kind is None or row.kind == kind) and (chapter is None or chapter in row.chapters)
    ]


def survey_table(
    rows: Sequence[SurveyRow], *, rung: Warmth | None = None, kind: str | None = None, chapter: int | None = None, policies: bool = False
) -> Table:
    """The selected rows as a table; the source and how far it is to be trusted stand beside each figure. With `policies` a last
    column names what models the row in `sllm_mini.control`."""
    chosen = select(rows, rung=rung, kind=kind, chapter=chapter)
    filters = [
        *([f"attacking the rung {rung.name.lower()}"] if rung is not None else []),
        *([f"of kind {kind}"] if kind is not None else []),
        *([f"rebuilt in chapter {chapter:02d}"] if chapter is not None else []),
    ]
    return Table(
        headers=("system", "mechanism", "rungs", "as reported", "source, and how far we trust it", "year", "chapter", *(["modelled by"] if policies else [])),
        rows=tuple(
            (
                row.system,
                row.mechanism,
                ", ".join(rung.name.lower() for rung in row.rungs),
                row.figure or "no figure",
                f"{row.source}: {row.trust}",
                str(row.year) if row.year else "",
                ", ".join(f"{chapter:02d}" for chapter in row.chapters),
                *([", ".join(row.policies)] if policies else []),
            )
            for row in chosen
        ),
        caption=f"{len(chosen)} of {len(rows)} systems and providers" + (f", {' and '.join(filters)}" if filters else ""),
        note="Figures are those of their sources, on their hardware and workloads; they do not compare with each other.",
    )


def survey_alt_text(rows: Sequence[SurveyRow]) -> str:
    """What `plot_survey(rows)` shows, in words: how many systems attack each rung."""
    counts = ", ".join(f"{rung.name.lower()} {len(select(rows, rung=rung))}" for rung in Warmth)
    return f"Matrix of {len(rows)} systems and the rungs of the warmth ladder each attacks. Systems per rung: {counts}."


def plot_survey(rows: Sequence[SurveyRow], ax: Axes | None = None) -> Axes:
    """A matrix: one line per system, a dot in the column of every rung it attacks, the count above each column.

    Lines are sorted by the lowest rung, then by the highest, so the eye follows a staircase. A provider's name is
    set bold. Raises ValueError where there are no rows. Not safe while another thread draws.
    """
    from matplotlib import pyplot

    if not rows:
        raise ValueError("there are no rows to draw; load the survey or relax the filter")
    ordered = sorted(rows, key=lambda row: (row.rungs[0], row.rungs[-1], len(row.rungs), KINDS.index(row.kind), row.system.lower()))
    if ax is None:
        use_style()
        _, ax = pyplot.subplots(figsize=(7.2, 0.19 * len(rows) + 0.7), layout="constrained")
    for y, row in enumerate(ordered):
        if y % 2:
            ax.axhspan(y - 0.5, y + 0.5, color=SHADE, linewidth=0, zorder=0)
        ax.plot([row.rungs[0], row.rungs[-1]], [y, y], color=MUTED, linewidth=1.0, zorder=1)
        for rung in row.rungs:
            fill = color_of(rung)
            ax.scatter(rung, y, s=58, color=fill, edgecolor=darker(fill), linewidth=0.8, zorder=2)
        where = ", ".join(f"{chapter:02d}" for chapter in row.chapters)
        ax.text(len(Warmth) - 0.45, y, where, va="center", fontsize=8.5, color=MUTED)
    ax.text(len(Warmth) - 0.45, -1.4, "chapter", va="center", fontsize=8.5, color=INK)
    ax.annotate(
        "bold: a provider", (-0.5, -1.4), xytext=(-4, 0), textcoords="offset points", ha="right", va="center", fontsize=8.5,
        color=MUTED,
    )  # fmt: skip
    for rung in Warmth:
        ax.text(
            rung, -1.4, f"{rung.name.lower()}\n{len(select(rows, rung=rung))}", ha="center", va="center", fontsize=8.5,
            linespacing=1.15, color=ink_on(color_of(rung)),
            bbox={"boxstyle": "round,pad=0.3", "facecolor": color_of(rung), "edgecolor": darker(color_of(rung)), "linewidth": 0.8},
        )  # fmt: skip
    ax.set_yticks(range(len(ordered)), [row.system for row in ordered], fontsize=9)
    for tick, row in zip(ax.get_yticklabels(), ordered, strict=True):
        tick.set_fontweight("bold" if row.kind == "provider" else "normal")
    ax.set_ylim(len(ordered) - 0.4, -2.0)
    ax.set_xlim(-0.5, len(Warmth) + 0.55)
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.grid(visible=False)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    return ax
