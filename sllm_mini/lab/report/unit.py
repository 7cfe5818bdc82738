"""A unit: one command of the report that is run, limited, recorded and resumed as a whole; and what it may need first.

Plain data, no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

STAGE_SECONDS = 450.0
"""No unit is given longer, so that any of them fits into a call of eight minutes and leaves time for the archive."""

Status = Literal["done", "failed", "timeout", "interrupted"]


@dataclass(frozen=True, slots=True)
class Product:
    """Something large that units share, such as a model: made when the first of them starts, deleted after the last.

    `command` writes `path`; `seconds` is an estimate.
    """

    name: str
    path: Path
    command: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Unit:
    """One command. `seconds` is an estimate (a unit is begun only where so much of the budget is left), `limit_seconds`
    when it is killed; `result` is the JSON file it makes, below the report's results, which its standard output is
    written to if `from_stdout`; `modules` and `programs` are what it cannot do without; `uses` names products.
    """

    stage: str
    name: str
    command: tuple[str, ...]
    seconds: float = 60.0
    limit_seconds: float = STAGE_SECONDS
    result: str | None = None
    from_stdout: bool = False
    modules: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.stage}/{self.name}"


@dataclass(frozen=True, slots=True)
class Plan:
    """The units in the order they are run, the products they use, and by key what this machine cannot run and why."""

    units: tuple[Unit, ...]
    products: Mapping[str, Product] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(key.split("/")[0] for key in (*(unit.key for unit in self.units), *self.skipped)))


@dataclass(frozen=True, slots=True)
class Entry:
    """What became of a unit: `rc` is its exit code (None if it was killed), `seconds` what it took, `started` when (UTC),
    `code` the hash of the package it ran, `log` its output's file in the report's folder."""

    status: Status
    rc: int | None
    seconds: float
    started: str
    code: str
    command: tuple[str, ...]
    log: str
    result: str | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Entry:
        return cls(**{**document, "command": tuple(document["command"])})
