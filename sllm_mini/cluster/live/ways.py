"""Which way a request moves between two nodes, by what earlier moves between them took. Chapters 07 and 08.

A pair of nodes has its own link and its own arithmetic, and each model its own KV cache, so figures are kept for the three. What
has not been measured there is tried: first the tokens, then the KV cache; from then on the faster (`inference.migration.choice`).
Pure, but for what it has learned; one thread at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

from sllm_mini.inference.migration.choice import Speeds, choose_mode
from sllm_mini.inference.migration.messages import Mode, Report

Pair = tuple[str, str, str]
"""From which node, to which, and of which model."""


@dataclass(slots=True)
class _Sum:
    """Over all rounds that were sent one way."""

    tokens: int = 0
    nbytes: int = 0
    seconds: float = 0.0


class Ways:
    """See the module. Grows with the pairs that moves were made between."""

    def __init__(self) -> None:
        self._sums: dict[tuple[Pair, Mode], _Sum] = {}

    def choose(self, pair: Pair, tokens: int) -> Mode:
        """For a request of so many tokens."""
        recomputed, copied = self._sums.get((pair, "tokens")), self._sums.get((pair, "kv"))
        if recomputed is None:
            return "tokens"
        if copied is None:
            return "kv"
        if not (recomputed.seconds and recomputed.tokens and copied.seconds and copied.nbytes):
            return "tokens"  # one of the two never got as far as a round
        return choose_mode(tokens, Speeds(recomputed.tokens / recomputed.seconds, copied.nbytes / copied.seconds, max(1, round(copied.nbytes / copied.tokens))))

    def learn(self, pair: Pair, report: Report) -> None:
        """Also of a move that failed: it was tried."""
        found = self._sums.setdefault((pair, report.mode), _Sum())
        for phase in report.phases:
            if phase.name == "round" and phase.tokens:
                found.tokens += phase.tokens
                found.nbytes += phase.nbytes
                found.seconds += phase.seconds

    def forget(self, node: str) -> None:
        """It is gone; one of its name that comes back may be another machine."""
        self._sums = {key: value for key, value in self._sums.items() if node not in key[0][:2]}
