"""What platforms do, as the survey has it, under the chapter's trace and on its machine, in simulated time. Chapter 11.

All start as the row "fast loader" does, from nothing on a machine without tiers, unless their way is to start otherwise; each model is
deployed a minute before the trace. What is taken over is the mechanism, and not the provider's machines, prices or code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from msgspec.structs import replace

from sllm_mini.checkpoint import Checkpoint
from sllm_mini.cluster.simulated import SimulationResult
from sllm_mini.cluster.trace.request import TraceRequest
from sllm_mini.control.keepalive import FixedKeepAlive, StemCells, from_snapshot
from sllm_mini.control.messages import ModelSpec
from sllm_mini.control.policy import KeepAlive
from sllm_mini.lab.platform.forecast import Costs, forecast
from sllm_mini.lab.platform.switches import Platform, platform_with, stretched, switched
from sllm_mini.lab.survey import SurveyRow, load_survey

LEAD_SECONDS = 60.0
SNAPSHOT_BYTES_PER_SECOND = 1e9
_PROCESS_NBYTES = 10 << 20
"""Of a worker's own memory this much is counted as the bare process."""


@dataclass(frozen=True, slots=True)
class Approach:
    """A row of the survey as policies: a keep-alive by name or what makes one, `always` so many models of which one instance is never let
    go, and what we had to assume to play it."""

    system: str
    assumed: str
    keep_alive: str | Callable[[], KeepAlive]
    autoscaler: str = "per-request"
    placement: str = "availability"
    snapshot: bool = False
    always: int = 0


APPROACHES = (
    Approach("AWS Lambda keep-alive", "10 min for every model", "fixed-10min"),
    Approach("AWS Lambda SnapStart", "process and runtime read at 1 GB/s, weights as ever; 10 min", "fixed-10min", snapshot=True),
    Approach("AWS Lambda provisioned concurrency", "one instance of the model asked for most, which somebody knew", "fixed-10min", always=1),
    Approach("Azure Functions keep-alive", "20 min for every model", "fixed-20min"),
    Approach("Google Cloud Run", "one minimum instance likewise; the rest goes after 15 min, a length of ours", lambda: FixedKeepAlive(900.0), "bounded-queue", always=1),
    Approach("Knative pod autoscaler", "the last replica goes after 30 s", lambda: FixedKeepAlive(30.0), "knative"),
    Approach("Apache OpenWhisk stem cells", "two runtimes without a model on hand; models 10 min", lambda: StemCells(FixedKeepAlive(600.0))),
    Approach("Cloudflare Worker sharding", "hashing alone, without isolates; 10 min", "fixed-10min", placement="affinity"),
    Approach("Ollama", "5 min for every model", lambda: FixedKeepAlive(300.0)),
)


@dataclass(frozen=True, slots=True)
class Served:
    """What came of it: seconds to the first token, mean and worst. `idle_mb_seconds` were held for no request, from the deployment to
    the last answer."""

    name: str
    assumed: str
    row: SurveyRow | None
    mean: float
    worst: float
    starts: int
    answered: int
    idle_mb_seconds: float


def serve(requests: Sequence[TraceRequest], checkpoint: Checkpoint, costs: Costs, *, slower: float = 1.0) -> list[Served]:
    """Every approach, then this chapter's platform with all switches; with `slower` the trace takes so many times as long."""
    shifted = stretched(requests, slower, later=LEAD_SECONDS)
    popular = [name for name, _ in Counter(each.model for each in requests).most_common()]
    rows = {row.system: row for row in load_survey()}
    plain = platform_with(["fast loader"])
    found = []
    for one in APPROACHES:
        specs = [_as(one, spec, spec.name in popular[: one.always]) for spec in _specs(plain, checkpoint, costs)]
        keep_alive = one.keep_alive if isinstance(one.keep_alive, str) else one.keep_alive()
        result = forecast(shifted, checkpoint, plain, costs, specs=specs, placement=one.placement, keep_alive=keep_alive, autoscaler=one.autoscaler)
        found.append(_served(one.system, one.assumed, rows[one.system], result))
    for name in ("zygote", "keep-alive"):
        platform = switched()[name]
        result = forecast(shifted, checkpoint, platform, costs, specs=_specs(platform, checkpoint, costs))
        zygotes = costs.launched(platform).shared_nbytes * len(platform.nodes()) * 1e-6 * max(each.end for each in result.requests)
        found.append(_served(f"this chapter, up to {name}", "its zygotes count as idle memory", None, result, zygotes))
    return found


def _specs(platform: Platform, checkpoint: Checkpoint, costs: Costs) -> list[ModelSpec]:
    """With the measured seconds, and the memory that a worker keeps for itself as that of its process and runtime."""
    figures, worker = costs.figures(platform, checkpoint), costs.launched(platform).worker_nbytes
    process = min(_PROCESS_NBYTES, worker)
    return [replace(figures.spec(spec), process_nbytes=process, runtime_nbytes=worker - process) for spec in platform.specs(checkpoint)]


def _as(one: Approach, spec: ModelSpec, always: bool) -> ModelSpec:
    made = from_snapshot(spec, SNAPSHOT_BYTES_PER_SECOND) if one.snapshot else spec
    return replace(made, min_instances=int(always))


def _served(name: str, assumed: str, row: SurveyRow | None, result: SimulationResult, standing_mb_seconds: float = 0.0) -> Served:
    firsts = [each.first_token_seconds for each in result.requests if each.outcome == "answered"]
    return Served(name, assumed, row, fmean(firsts), max(firsts), sum(result.account.starts), result.answered, result.account.wasted_mb_seconds + standing_mb_seconds)
