"""What a live run says about machines and models, as the figures that a simulation takes. Pure; taught in chapter 08.

Figures are means, since what is predicted with them is a mean. A cold start is its worker's fork (PROCESS), its imports (RUNTIME),
the load, and all the rest, which is counted as READY: attaching the weights, making the engine, orders on their way, and the
fall of what had the device before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from msgspec import Struct
from msgspec.structs import replace

from sllm_mini.checkpoint import Checkpoint
from sllm_mini.cluster.api import RequestReport
from sllm_mini.cluster.simulated import SimulationResult, simulate
from sllm_mini.cluster.trace.request import TraceRequest
from sllm_mini.control import messages as m
from sllm_mini.control.replay import read_log
from sllm_mini.errors import SllmError
from sllm_mini.lab.livebench.play import Played, frozen
from sllm_mini.lab.livebench.workload import Options
from sllm_mini.types import Tier, Warmth


@dataclass(frozen=True, slots=True)
class Started:
    """A start that was finished: seconds in all, those behind other loads, and those of its load."""

    node: str
    model: str
    warmth: Warmth
    target: Warmth
    tier: Tier
    seconds: float
    queued_seconds: float
    load_seconds: float


class Figures(Struct, frozen=True):
    """What a model costs, and the remote store gives, on a machine."""

    process_seconds: float
    runtime_seconds: float
    ready_seconds: float
    remote_bytes_per_second: float
    prefill_seconds_per_token: float
    decode_seconds_per_token: float

    def spec(self, spec: m.ModelSpec) -> m.ModelSpec:
        """The model with these seconds."""
        names = ("process_seconds", "runtime_seconds", "ready_seconds", "prefill_seconds_per_token", "decode_seconds_per_token")
        return replace(spec, **{name: getattr(self, name) for name in names})


def starts_of(log: Iterable[bytes]) -> list[Started]:
    """Those that a log tells the end of."""
    asked: dict[tuple[int, int], m.Start] = {}
    found = []
    for record in read_log(log):
        event = record.event
        if isinstance(event, m.InstanceReached) and (event.instance, event.epoch) in asked:
            start = asked.pop((event.instance, event.epoch))
            found.append(Started(start.node, start.model, start.warmth, start.target, event.tier, event.seconds, event.queued_seconds, event.load_seconds or 0.0))
        for action in record.actions:
            if isinstance(action, m.Start):
                asked[action.instance, action.epoch] = action
    return found


def measured_figures(played: Played, checkpoint: Checkpoint) -> Figures:
    """Raises SllmError for a run without a cold start from the remote store or without an answer of two tokens, which says nothing."""
    starts = [each for each in starts_of(played.log) if each.target == Warmth.READY]
    loads = [each.load_seconds for each in starts if each.tier is Tier.REMOTE and each.load_seconds > 0]
    rungs = {warmth: [climb.seconds for climb in played.climbs if climb.warmth == warmth] for warmth in Warmth}
    answers = [each for each in played.reports if each.outcome == "answered" and not (each.restarts or each.migrations)]
    tokens = sum(each.output_tokens - 1 for each in answers)
    if not loads or not tokens:
        raise SllmError("a run without a load from the remote store, or without an answer, says nothing of how long they take; play a longer trace")
    process, runtime = (fmean(rungs[warmth] or [0.0]) for warmth in (Warmth.PROCESS, Warmth.RUNTIME))
    ready = fmean(
        each.seconds - each.queued_seconds - each.load_seconds - process * (each.warmth < Warmth.PROCESS) - runtime * (each.warmth < Warmth.RUNTIME) for each in starts
    )  # fmt: skip
    decode = sum(each.decode_seconds for each in answers) / tokens
    return Figures(process, runtime, max(ready, 0.0), checkpoint.nbytes / fmean(loads), _prefill(answers, decode), decode)


def _prefill(answers: Sequence[RequestReport], decode: float) -> float:
    """A first token takes the prefill and a step; live it comes before the pause of its step, so there may be nothing left."""
    return max(0.0, fmean(each.prefill_seconds for each in answers) - decode) / fmean(each.input_tokens for each in answers)


def simulated(requests: Sequence[TraceRequest], checkpoint: Checkpoint, options: Options, figures: Figures, learned: bytes) -> tuple[SimulationResult, list[bytes]]:
    """The same requests on the same cluster under the same policies in simulated time, with these figures and an estimator as it was saved; and the log."""
    log: list[bytes] = []
    result = simulate(
        requests, options.nodes(figures.remote_bytes_per_second), [figures.spec(spec) for spec in options.specs(checkpoint)], placement=options.placement,
        keep_alive=options.keep_alive, autoscaler=options.autoscaler, estimator=frozen(learned), options=options.simulation(checkpoint), log=log.append,
    )  # fmt: skip
    return result, log
