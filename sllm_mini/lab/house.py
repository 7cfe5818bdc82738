"""The map of the house: seven floors, their rooms, and a light in each room that a chapter adds.

Every chapter opens with `draw_house(lit=…)`. A floor imports only floors below it; `FLOORS` is that order, bottom up.
Which rooms stand is looked up in the package, so the map shows what is there and never what somebody wrote down.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING

from sllm_mini.lab.style import INK, MUTED, PAPER, SHADE, color_of, darker, use_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True)
class Room:
    """A module or package and, in a few words, what lives there. `lines` are how the drawing breaks them."""

    name: str
    lines: tuple[str, ...]
    width: float = 1.0

    @property
    def inside(self) -> str:
        return " ".join(self.lines)


@dataclass(frozen=True, slots=True)
class Floor:
    """One storey: what it is for and its rooms, left to right."""

    purpose: str
    rooms: tuple[Room, ...]


FLOORS: tuple[Floor, ...] = (
    Floor(
        "words and devices",
        (
            Room("errors", ("one tree",), 0.75),
            Room("types", ("the words", "all floors share"), 1.15),
            Room("wire", ("messages,", "descriptors"), 0.9),
            Room("device", ("memory, streams,", "copies: CPU, CUDA"), 1.2),
        ),
    ),
    Floor(
        "bytes at rest",
        (
            Room("checkpoint", ("format, writer, converter, verifier",), 2.4),
            Room("eviction", ("what to throw out",), 1.6),
        ),
    ),
    Floor("bytes in motion", (Room("loading", ("readers, pipeline, LoadHandle, tensors before their bytes",), 4.0),)),
    Floor(
        "keep, run, decide",
        (
            Room("storage", ("tiers, remote,", "the store"), 1.25),
            Room("inference", ("prefill, decode,", "live migration"), 1.35),
            Room("control", ("placement,", "keep-alive, scaling"), 1.4),
        ),
    ),
    Floor("machines together", (Room("cluster", ("nodes, drivers, router, traces",), 4.0),)),
    Floor("the front door", (Room("serving", ("OpenAI-compatible HTTP, streaming, metrics",), 4.0),)),
    Floor(
        "for people",
        (
            Room("cli", ("the command line",), 1.6),
            Room("lab", ("measuring, plots, widgets",), 2.4),
        ),
    ),
)

_PACKAGE = Path(__file__).resolve().parents[1]
_WIDTH = 4.0
_STOREY = 0.86
_GAP = 0.06


def room_names() -> tuple[str, ...]:
    """All rooms, from the ground floor up."""
    return tuple(room.name for floor in FLOORS for room in floor.rooms)


def built_rooms() -> tuple[str, ...]:
    """The rooms that are modules or packages of sllm_mini today, from the ground floor up. Lists a folder, imports nothing."""
    found = {module.name for module in iter_modules([str(_PACKAGE)])}
    return tuple(name for name in room_names() if name in found)


def house_alt_text(lit: Iterable[str], *, standing: Iterable[str] | None = None) -> str:
    """What `draw_house(lit, standing=standing)` shows, in words."""
    added, built = _checked(lit), _checked(built_rooms() if standing is None else standing)
    lights = [
        f"{room.name} ({room.inside}; floor {number})"
        for number, floor in enumerate(FLOORS)
        for room in floor.rooms
        if room.name in added
    ]
    old = [name for name in room_names() if name in built - added]
    plans = [name for name in room_names() if name not in built | added]
    parts = [f"lit are {', '.join(lights)}" if lights else "no room is lit"]
    parts += [f"standing already are {', '.join(old)}"] if old else []
    parts += [f"still to come are {', '.join(plans)}"] if plans else []
    return f"The house of sllm_mini: seven floors, each built on those below it; {'; '.join(parts)}."


def _checked(lit: Iterable[str]) -> frozenset[str]:
    names = frozenset((lit,)) if isinstance(lit, str) else frozenset(lit)
    unknown = sorted(names - set(room_names()))
    if unknown:
        raise ValueError(f"the house has no room called {', '.join(unknown)}; its rooms are {', '.join(room_names())}")
    return names


def draw_house(lit: Iterable[str] = (), ax: Axes | None = None, *, standing: Iterable[str] | None = None) -> Axes:
    """Draws the floors bottom up: rooms in `lit` lit, rooms `standing` (None: those that are built) plain, the rest dashed.

    A lit room differs in fill, in a bold name and in a heavier wall, so it shows without colour too. Raises ValueError
    for a room the house does not have. Not safe while another thread draws.
    """
    from matplotlib import pyplot
    from matplotlib.patches import FancyBboxPatch, Polygon

    names, built = _checked(lit), _checked(built_rooms() if standing is None else standing)
    if ax is None:
        use_style()
        _, ax = pyplot.subplots(figsize=(7.2, 4.9), layout="constrained")
    left, right, top = 0.0, _WIDTH, len(FLOORS) * _STOREY
    roof = [(left - 0.12, top + 0.02), (left + 0.42, top + 0.42), (right - 0.42, top + 0.42), (right + 0.12, top + 0.02)]
    ax.add_patch(Polygon(roof, closed=True, facecolor=SHADE, edgecolor=MUTED, linewidth=1.2))
    ax.text((left + right) / 2, top + 0.22, "sllm_mini", ha="center", va="center", fontweight="bold", fontsize=11, color=INK)
    ax.plot([left - 0.25, right + 0.25], [-0.04, -0.04], color=MUTED, linewidth=2.0, solid_capstyle="round")
    for number, floor in enumerate(FLOORS):
        base = number * _STOREY
        ax.text(left - 0.14, base + _STOREY / 2, f"{floor.purpose}  {number}", ha="right", va="center", fontsize=9, color=MUTED)
        x = left
        unit = _WIDTH / sum(room.width for room in floor.rooms)
        for room in floor.rooms:
            width = room.width * unit
            on = room.name in names
            ink = INK if on or room.name in built else MUTED
            ax.add_patch(
                FancyBboxPatch(
                    (x + _GAP / 2, base + _GAP / 2), width - _GAP, _STOREY - _GAP, boxstyle="round,pad=0,rounding_size=0.03",
                    facecolor=color_of("ready") if on else PAPER, edgecolor=darker(color_of("ready")) if on else MUTED,
                    linewidth=2.0 if on else 0.9, linestyle="-" if ink == INK else (0, (3, 2)),
                )
            )  # fmt: skip
            middle = (x + width / 2, base + _STOREY / 2)
            rise, fall = (8.5, -6.5) if len(room.lines) == 1 else (12.0, -7.0)
            ax.annotate(
                room.name, middle, xytext=(0, rise), textcoords="offset points", ha="center", va="center", fontsize=10.5,
                fontweight="bold" if on else "normal", color=ink,
            )  # fmt: skip
            ax.annotate(
                "\n".join(room.lines), middle, xytext=(0, fall), textcoords="offset points", ha="center", va="center",
                fontsize=8.5, linespacing=1.1, color=ink,
            )  # fmt: skip
            x += width
    ax.set_xlim(left - 1.42, right + 0.3)
    ax.set_ylim(-0.12, top + 0.48)
    ax.set_axis_off()
    return ax
