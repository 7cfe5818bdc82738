"""What was predicted against what came: one table, grouped on demand by model, rung, tier and node.

Part of `estimate`; taught in chapter 08. Pure; constant time for an observation. Memory is bounded: of more than `MOST_ROWS`
different things, those first seen are counted together as "others", so that every total stays exact.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

from sllm_mini.types import Tier, Warmth

MOST_ROWS = 4096
"""Some 1.5 MB."""

Dimension = Literal["what", "model", "rung", "tier", "node"]
_WORDS: dict[str, str] = {"what": "", "model": "of ", "rung": "from ", "tier": "by ", "node": "on "}
_OTHERS = ""


@dataclass(slots=True)
class Errors:
    """`mean_*` of the absolute errors, in seconds and as a share of what came."""

    count: int = 0
    mean_seconds: float = 0.0
    mean_share: float = 0.0
    worst_seconds: float = 0.0

    def add(self, predicted: float, observed: float) -> None:
        error = abs(predicted - observed)
        self.count += 1
        self.mean_seconds += (error - self.mean_seconds) / self.count
        self.mean_share += ((error / observed if observed > 0 else 0.0) - self.mean_share) / self.count
        if error > self.worst_seconds:
            self.worst_seconds = error

    def join(self, other: Errors) -> None:
        """As if what the other was told had been told to this one."""
        self.count += other.count
        if other.count:
            share = other.count / self.count
            self.mean_seconds += share * (other.mean_seconds - self.mean_seconds)
            self.mean_share += share * (other.mean_share - self.mean_share)
            self.worst_seconds = max(self.worst_seconds, other.worst_seconds)


class Subject(NamedTuple):
    """What an error is of: "start", "migration" or "decode". None: it has no such thing; "": one of the others."""

    what: str
    model: str | None = None
    rung: Warmth | None = None
    """Where a start began."""
    tier: Tier | None = None
    """Where its weights were read from, if they were."""
    node: str | None = None


@dataclass(slots=True)
class ErrorTable:
    """A row for each subject, oldest first."""

    rows: dict[Subject, Errors] = field(default_factory=dict)

    def note(self, subject: Subject, predicted: float, observed: float) -> None:
        row = self.rows.get(subject)
        if row is None:
            row = self.rows[subject] = Errors()
            while len(self.rows) > MOST_ROWS:
                self._join_others(next(iter(self.rows)))
        row.add(predicted, observed)

    def forget(self, model: str) -> None:
        """What was noted of it is from now on of others."""
        for subject in [each for each in self.rows if each.model == model]:
            self._join_others(subject)

    def _join_others(self, subject: Subject) -> None:
        row = self.rows.pop(subject)
        model, node = (None if name is None else _OTHERS for name in (subject.model, subject.node))
        self.rows.setdefault(subject._replace(model=model, node=node), Errors()).join(row)

    def by(self, *dimensions: Dimension) -> dict[str, Errors]:
        """In groups, named as "start of opt-6.7b from COLD by DISK on node-0001" with the words that were asked for. What has
        none of these dimensions is left out. Raises ValueError for a dimension that there is not."""
        if unknown := set(dimensions) - set(get_args(Dimension)):
            raise ValueError(f"errors are not told apart by {', '.join(sorted(unknown))}; give some of {', '.join(_WORDS)}")
        groups: dict[str, Errors] = {}
        for subject, row in self.rows.items():
            values = ((word, getattr(subject, dimension)) for dimension, word in _WORDS.items() if dimension in dimensions)
            name = " ".join(f"{word}{'others' if value == _OTHERS else value}" for word, value in values if value is not None)
            if name:
                groups.setdefault(name, Errors()).join(row)
        return dict(sorted(groups.items()))
