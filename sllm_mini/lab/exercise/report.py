"""What came of checking a student's function: points, and for each check that failed one sentence that teaches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sllm_mini.lab.table import Table


@dataclass(frozen=True, slots=True)
class Result:
    """One check. `said` is "" where it passed; `printed` is what the student's function printed meanwhile."""

    name: str
    points: float
    max_points: float
    said: str = ""
    printed: str = ""

    @property
    def passed(self) -> bool:
        return self.points == self.max_points


@dataclass(frozen=True, slots=True)
class Report:
    """The checks of one function, in their order. Shows itself as a table in a notebook and when printed. Immutable."""

    name: str
    results: tuple[Result, ...]

    @property
    def points(self) -> float:
        return float(sum(result.points for result in self.results))

    @property
    def max_points(self) -> float:
        return float(sum(result.max_points for result in self.results))

    def table(self) -> Table:
        rows = [(result.name, f"{result.points:g} of {result.max_points:g}", _words(result)) for result in self.results]
        rows.append(("together", f"{self.points:g} of {self.max_points:g}", _verdict(self.results)))
        return Table(
            headers=("check", "points", "what it says"),
            rows=tuple(rows),
            caption=f"{self.name}: {self.points:g} of {self.max_points:g} points",
            numeric=frozenset({1}),
            emphasis=frozenset({len(rows) - 1}),
        )

    def __str__(self) -> str:
        return str(self.table())

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return self.table()._repr_mimebundle_()


def _words(result: Result) -> str:
    said = "passed" if result.passed else result.said
    return f"{said} (it printed: {result.printed.strip()[:300]})" if result.printed.strip() and not result.passed else said


def _verdict(results: Sequence[Result]) -> str:
    failed = sum(not result.passed for result in results)
    return f"{failed} of {len(results)} checks to be mended" if failed else "every check passed"
