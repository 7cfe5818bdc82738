"""One look for every chapter: the palette, the type size, and which colour means what.

The six rungs of the warmth ladder run from dark to light, so they keep their order in greyscale. All colours stay at
least 15 CIELAB units apart for normal, protan, deutan and tritan vision (a test simulates each, with the matrices of
Machado, Oliveira and Fernandes 2009). Taught in chapter 00. Costs nothing until `use_style` imports matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from sllm_mini.types import Tier, Warmth

PALETTE: Mapping[str, str] = MappingProxyType(
    {
        # The ladder, dark to light.
        "cold": "#1c2537",
        "process": "#303c8d",
        "runtime": "#8a5a9a",
        "dram": "#e56b5e",
        "device": "#f0a358",
        "ready": "#f4e158",
        # Where bytes come from.
        "remote": "#2f7771",
        "disk": "#5ec094",
        # Time in which nothing moves.
        "wait": "#d1d3d7",
    }
)
"""The roles that fill an area. `compute` is `ready`: a ready instance is one that computes."""

INK = "#1f2328"
MUTED = "#5b6472"
GRID = "#e3e6ea"
SHADE = "#eef0f3"
"""Behind what is drawn."""
PAPER = "#ffffff"
RECORDED_HATCH = "...."
WAIT_HATCH = "////"

_ALIASES = {"compute": "ready", "gpu": "device", "host": "dram", "unaccounted": "wait"}

WARMTH_MEANING: Mapping[Warmth, str] = MappingProxyType(
    {
        Warmth.COLD: "nothing is running",
        Warmth.PROCESS: "a process exists",
        Warmth.RUNTIME: "libraries imported, device open",
        Warmth.DRAM: "weights in host memory",
        Warmth.DEVICE: "weights on the device",
        Warmth.READY: "warmed up, computing",
    }
)


def color_of(role: Warmth | Tier | str) -> str:
    """The one colour of a rung, a tier or a named role. Raises ValueError for a role that has none."""
    name = role.name.lower() if isinstance(role, Warmth | Tier) else role
    name = _ALIASES.get(name, name)
    if name not in PALETTE:
        raise ValueError(f"no colour is set for {role!r}; the roles are {', '.join([*PALETTE, *_ALIASES])}")
    return PALETTE[name]


def has_color(role: str) -> bool:
    """True where `color_of(role)` has an answer."""
    return _ALIASES.get(role, role) in PALETTE


def luminance(color: str) -> float:
    """Relative luminance of "#rrggbb", 0 to 1 (WCAG 2)."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours, 1 to 21 (WCAG 2); 4.5 is the least for body text."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def ink_on(color: str) -> str:
    """The text colour, dark or white, that reads better on `color`."""
    return INK if contrast(INK, color) >= contrast(PAPER, color) else PAPER


def darker(color: str) -> str:
    """The same hue for an edge: `color` mixed with ink, half and half."""
    mixed = [(int(color[i : i + 2], 16) + int(INK[i : i + 2], 16)) // 2 for i in (1, 3, 5)]
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def use_style() -> None:
    """Sets matplotlib's defaults for this process: 10-point type, light grid behind, no box, fonts matplotlib ships.

    Sizes suit a figure 7 inches wide, which is what a notebook column shows. Not safe while another thread draws.
    """
    import matplotlib
    from cycler import cycler

    matplotlib.rcParams.update(
        {
            "axes.axisbelow": True,
            "axes.edgecolor": MUTED,
            "axes.facecolor": PAPER,
            "axes.grid": True,
            "axes.labelcolor": INK,
            "axes.labelsize": 10,
            "axes.linewidth": 0.8,
            "axes.prop_cycle": cycler(color=[PALETTE[role] for role in ("process", "dram", "disk", "device", "runtime", "remote")]),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "figure.dpi": 96,
            "figure.facecolor": PAPER,
            "figure.figsize": (7.0, 3.4),
            "font.family": ["DejaVu Sans"],  # shipped with matplotlib, so widths are the same on every machine
            "font.size": 10,
            "grid.color": GRID,
            "grid.linewidth": 0.8,
            "hatch.linewidth": 0.7,
            "legend.fontsize": 9,
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "savefig.facecolor": PAPER,
            "text.color": INK,
            "xtick.color": MUTED,
            "xtick.labelcolor": INK,
            "xtick.labelsize": 9.5,
            "ytick.color": MUTED,
            "ytick.labelcolor": INK,
            "ytick.labelsize": 9.5,
        }
    )
