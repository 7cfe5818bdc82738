"""Does the simulator say what a live cluster will do? Learn on one trace, predict another, play it, compare. Taught in chapter 08.

Trace A is played live while the estimator learns; what it learned, and the figures measured there, are kept. Trace B is played live, several
times, with that estimator as it was, and simulated once with those figures under the same policies and budgets. Nothing of B goes into what
is said about B. Decisions are compared before times: two runs that decide differently wait for different things.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from sllm_mini.checkpoint import Checkpoint
from sllm_mini.cluster.simulated import SimulationResult
from sllm_mini.cluster.trace.request import Trace, TraceRequest
from sllm_mini.cluster.trace.tokens import TokenLengths, TokenProfile
from sllm_mini.cluster.trace.workloads import burst_trace
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.replay import replay
from sllm_mini.errors import FormatError
from sllm_mini.lab.livebench.agreement import agreement, decisions_of, ratio_interval
from sllm_mini.lab.livebench.figures import Figures, measured_figures, simulated
from sllm_mini.lab.livebench.play import Played, context_of, frozen, play
from sllm_mini.lab.livebench.workload import Options, fitted
from sllm_mini.types import Tier, Warmth

KIND = "sllm-mini bench cluster --calibrate"
TOKENS = TokenProfile(TokenLengths(80, 64, 400), TokenLengths(24, 20, 100))
"""Short ones: two cores compute for four devices."""
STATED = (
    "Two cores play several devices: steps are paced, the remote store is rate-limited and cold starts come at some 0.3 a second, so that waiting is sleep "
    "and not contention. Without that the two cores would be what is measured."
)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Two Poisson traces over models of popularity i^-`exponent`: seconds and seeds of each, and how often B is played. Raises ValueError."""

    learn_seconds: float = 220.0
    seconds: float = 400.0
    requests_per_second: float = 1.0
    exponent: float = 0.5
    repeats: int = 3
    seeds: tuple[int, int] = (1, 2)

    def __post_init__(self) -> None:
        if min(self.learn_seconds, self.seconds, self.requests_per_second) <= 0 or self.repeats < 1 or self.seeds[0] == self.seeds[1]:
            raise ValueError("a calibration has two traces of some seconds, of different seeds, and plays the second at least once")

    def trace(self, which: int, options: Options) -> Trace:
        """A is 0, B is 1."""
        seconds = (self.learn_seconds, self.seconds)[which]
        return burst_trace(
            seconds=seconds, requests_per_second=self.requests_per_second, cv=1.0, models=options.names, exponent=self.exponent, tokens=TOKENS, seed=self.seeds[which]
        )


class Learned(Struct, frozen=True):
    """What trace A taught: figures, the estimator's bytes, how many cold starts there were, and how it was played."""

    figures: Figures
    estimator: bytes
    cold_starts: int
    requests: int
    lateness_p99: float
    method: dict[str, Any]

    def save(self, path: Path) -> None:
        path.write_bytes(msgspec.json.encode(self))

    @classmethod
    def read(cls, path: Path) -> Learned:
        """Raises FormatError for another file, OSError."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except msgspec.DecodeError as error:
            raise FormatError(f"it is not what a calibration has learned ({error}); learn again", path=path) from error


def learn(checkpoint: Checkpoint, options: Options, calibration: Calibration, *, folder: Path | None = None, say: Callable[[str], None] = lambda _: None) -> Learned:
    """Plays trace A. Raises what `play` raises, and SllmError where it says too little."""
    requests = fitted(calibration.trace(0, options), options, context_of(checkpoint)).requests
    played = play(requests, checkpoint, options, folder=folder, on_progress=lambda number: say(f"learning: request {number} of {len(requests)}"))
    starts, late = sum(played.result.account.starts), percentile(played.lateness, 99)
    return Learned(measured_figures(played, checkpoint), played.learned, starts, len(requests), late, _method(options, calibration))


def predict(checkpoint: Checkpoint, options: Options, calibration: Calibration, learned: Learned) -> tuple[list[TraceRequest], SimulationResult, list[bytes]]:
    """Trace B, and what the simulation says of it."""
    requests = fitted(calibration.trace(1, options), options, context_of(checkpoint)).requests
    return requests, *simulated(requests, checkpoint, options, learned.figures, learned.estimator)


def calibrate(
    checkpoint: Checkpoint, options: Options, calibration: Calibration, learned: Learned, *, folder: Path | None = None, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Predicts trace B, then plays it `repeats` times; the comparison. Raises what `play` raises."""
    requests, expected, log = predict(checkpoint, options, calibration, learned)
    runs = []
    for number in range(1, calibration.repeats + 1):
        words = f"run {number} of {calibration.repeats}"
        played = play(
            requests, checkpoint, options, learned=learned.estimator, folder=folder, on_progress=lambda done, words=words: say(f"{words}: request {done} of {len(requests)}")  # type: ignore[misc]
        )  # fmt: skip
        runs.append(compared(played, expected, log, options, learned, calibration.seeds[1]))
    return assembled(options, calibration, learned, expected, runs)


def assembled(options: Options, calibration: Calibration, learned: Learned, expected: SimulationResult, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The parts of the document that are the calibration's. `ratio` is simulated over live."""
    live_mean = statistics.fmean(run["live"]["first_token_seconds_mean"] for run in runs)
    live_starts = statistics.fmean(run["live"]["starts"] for run in runs)
    mean = expected.totals()["first_token_seconds_mean"]
    return {
        "stated": STATED,
        "method": _method(options, calibration),
        "learned": {
            "figures": msgspec.to_builtins(learned.figures), "cold_starts": learned.cold_starts, "requests": learned.requests, "lateness_seconds_p99": learned.lateness_p99,
            "method": learned.method,
        },
        "simulated": expected.totals() | {"loads_by_tier": expected.to_dict()["loads_by_tier"]},
        "limits": {},
        "results": [{"name": f"run {number}"} | {key: value for key, value in run.items() if key != "pairs"} for number, run in enumerate(runs, 1)],
        "skipped": [],
        "first_token_seconds_mean": {"live": live_mean, "simulated": mean, "ratio": mean / live_mean},
        "cold_starts": {"live": live_starts, "simulated": sum(expected.account.starts), "ratio": sum(expected.account.starts) / live_starts},
        "predictions": _prediction_rows([pair for run in runs for pair in run["pairs"]]),
    }


def compared(played: Played, expected: SimulationResult, log: Iterable[bytes], options: Options, learned: Learned, seed: int) -> dict[str, Any]:
    """One live run against what was expected. `first_token_seconds` are, for each request that both answered, its arrival in the trace, and the seconds
    from there to its first token live and simulated."""
    firsts = {row.request: row.first_token_seconds for row in expected.requests if row.outcome == "answered"}
    both = [(report.arrived, report.first - report.arrived, firsts[number]) for number, report in enumerate(played.reports) if report.outcome == "answered" and number in firsts]
    totals, mean = played.result.totals(), expected.totals()["first_token_seconds_mean"]
    return {
        "live": totals | {"loads_by_tier": played.result.to_dict()["loads_by_tier"]},
        "first_token_mean_ratio": mean / totals["first_token_seconds_mean"],
        "first_token_mean_ratio_interval": ratio_interval([(seen, said) for _, seen, said in both], seed),
        "cold_starts_ratio": sum(expected.account.starts) / totals["starts"],
        "lateness_seconds_p99": percentile(played.lateness, 99),
        "replayed_events": played.replayed,
        "first_token_seconds": both,
        "agreement": agreement(decisions_of(played.log), decisions_of(log), played.began),
        "pairs": predictions(played.log, options, learned.estimator),
    }


class _Noting(Estimator):
    """One that learns nothing and notes what it said and what came."""

    noted: list[tuple[str, float, float]]

    def observe_start(self, node: Any, spec: Any, warmth: Warmth, tier: Tier, seconds: float, queued_seconds: float, predicted: float, *rest: Any, **more: Any) -> None:
        self.noted.append((f"start from {warmth.name} by {tier.name}", predicted, seconds))

    def observe_migration(self, request: Any, output_tokens: int, seconds: float, predicted: float) -> None:
        self.noted.append(("migration", predicted, seconds))


def predictions(log: Iterable[bytes], options: Options, learned: bytes) -> list[tuple[str, float, float]]:
    """Of every start and migration of a log what the estimator said when it was decided, and what it took: found by replaying the log."""
    noting: list[_Noting] = []

    def make() -> Estimator:
        estimator = _Noting(learning=False)
        estimator.restore(frozen(learned).save())
        estimator.noted = []
        noting.append(estimator)
        return estimator

    replay(log, replace(options.control(), estimator=make).controller())
    return noting[0].noted


def _prediction_rows(pairs: Iterable[tuple[str, float, float]]) -> list[dict[str, Any]]:
    kinds: dict[str, list[tuple[float, float]]] = {}
    for kind, predicted, observed in pairs:
        kinds.setdefault(kind, []).append((predicted, observed))
    rows = []
    for kind, both in sorted(kinds.items()):
        errors = [abs(predicted - observed) / observed for predicted, observed in both if observed > 0]
        rows.append(
            {
                "name": kind, "count": len(both), "predicted_seconds_mean": statistics.fmean(predicted for predicted, _ in both),
                "observed_seconds_mean": statistics.fmean(observed for _, observed in both), "observed_seconds_median": statistics.median(observed for _, observed in both),
                "error_median": percentile(errors, 50), "error_p90": percentile(errors, 90),
            }
        )  # fmt: skip
    return rows


def _method(options: Options, calibration: Calibration) -> dict[str, Any]:
    return asdict(options) | {"calibration": asdict(calibration)}


def percentile(numbers: Sequence[float], percent: float) -> float:
    """Of numbers that are all there; NaN of none."""
    import numpy as np

    return float(np.percentile(numbers, percent)) if len(numbers) else float("nan")
