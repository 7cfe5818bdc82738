"""Figures read back from text as chapters show it: "4.59 s", "x1.26", "84 %", "61,739". `lab.units` the other way round.

What is part of a name, a version, a date or an address ("opt-125m", "3.11.7", "127.0.0.1:80") is no figure. What stands
in brackets after a figure, such as its spread, is an aside and no figure of its own. Pure, safe from any thread.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_SECONDS = {"ns": 1e-9, "µs": 1e-6, "us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
_BYTES = {"B": 1.0, "bytes": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
_UNITS: dict[str, tuple[float, str]] = {
    **{unit: (scale, "s") for unit, scale in _SECONDS.items()},
    **{unit: (scale, "B") for unit, scale in _BYTES.items()},
    **{f"{unit}/s": (scale, "B/s") for unit, scale in _BYTES.items()},
    "Gbit/s": (1e9 / 8, "B/s"), "%": (0.01, "%"), "": (1.0, ""),
}  # fmt: skip
_UNIT = "|".join(re.escape(unit) for unit in sorted(_UNITS, key=len, reverse=True) if unit)
_NUMBER = r"\d+(?:[,\u202f]\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?"
_FIGURE = re.compile(rf"(?<![\w.,:/#-])([x×]?)([-−]?{_NUMBER})(?:[ \u00a0\u202f]?({_UNIT}))?(?![\w%]|[.:/-]\d|[-/+][A-Za-z])")
_ASIDE = re.compile(r"\([^()]*\)")


@dataclass(frozen=True, slots=True)
class Quantity:
    """One figure: its text from `start` to `end`, its `value` in the base unit, and that `unit`: "s", "B", "B/s", "%" (of 1),
    "x" for a factor, "" for a number."""

    text: str
    value: float
    unit: str
    start: int
    end: int

    def over(self, other: Quantity) -> float | None:
        """This one divided by another; None where they are not of one kind or one of them is 0."""
        return self.value / other.value if self.unit == other.unit and self.value and other.value else None


def quantities(text: str) -> list[Quantity]:
    """The figures of a text from left to right, without asides."""
    asides = [found.span() for found in _ASIDE.finditer(text)]
    found = []
    for match in _FIGURE.finditer(text):
        if any(start <= match.start() < end for start, end in asides):
            continue
        scale, unit = _UNITS[match[3] or ""]
        value = float(re.sub("[,\u202f]", "", match[2]).replace("−", "-"))
        found.append(Quantity(match[0], scale * value, "x" if match[1] else unit, match.start(), match.end()))
    return found


def skeleton(text: str) -> str:
    """A text without its figures and its spacing: the same for two runs of one cell, whatever they measured."""
    return " ".join(_FIGURE.sub("#", text).split())


def without_asides(text: str) -> str:
    """A text without the brackets that hold figures."""
    return re.sub(r"\s*\([^()]*\d[^()]*\)", "", text)
