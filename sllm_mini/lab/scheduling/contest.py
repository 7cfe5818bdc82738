"""The paper's comparison, played again: policies on bursts over a cluster of its shape, several seeds, ratios within each. Chapter 08.

Four machines of four GPUs, checkpoints of OPT's sizes on disks, arrivals of CV 8, popularity by Zipf. What the paper does not say, or
notes on it disagree about, is an argument here, so that it can be swept: where a result hangs on it, the chapter must say so. Simulated.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from types import MappingProxyType

from sllm_mini.cluster.simulated import SimulationOptions, SimulationResult, simulate
from sllm_mini.cluster.trace import Trace, burst_trace
from sllm_mini.cluster.trace.tokens import TokenLengths, TokenProfile
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.keepalive import FixedKeepAlive
from sllm_mini.control.messages import ModelSpec, NodeSpec
from sllm_mini.control.placement import StartupTimeOptimised
from sllm_mini.control.policy import Placement
from sllm_mini.lab.scheduling.machine import KEEP_ALIVE_SECONDS
from sllm_mini.lab.scheduling.patient import Patient
from sllm_mini.lab.scheduling.worked import GB, POLICIES, llm, machine
from sllm_mini.types import Tier

NODES, DEVICES = 4, 4
CACHE_NBYTES = 100 * GB
"""Memory of each machine's store."""
QUESTIONS = TokenProfile(TokenLengths(100, 90, 500), TokenLengths(120, 110, 400))
"""Short questions, short answers; a choice of ours in the manner of GSM8K."""
SAME = 0.005
"""Ratios this near to 1 are called a tie."""
VARIANTS: Mapping[str, Callable[[Estimator], Placement]] = MappingProxyType({"without moving": lambda estimator: StartupTimeOptimised(estimator, migrate=False), "patient": Patient})
"""Beside the policies that have a name: ServerlessLLM's without its migration, and `Patient`."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One size of model: bytes in 16 bit, devices, seconds a token (a choice of ours), how many different ones there are, requests/s."""

    name: str
    nbytes: int
    devices: int
    seconds_per_token: float
    models: int
    requests_per_second: float


SHAPES = (
    Shape("OPT-6.7B", 13 * GB, 1, 0.030, 32, 0.6),
    Shape("OPT-13B", 26 * GB, 1, 0.045, 16, 0.4),
    Shape("OPT-30B", 60 * GB, 2, 0.060, 8, 0.15),
)


@dataclass(frozen=True, slots=True)
class Setting:
    """`copies` is on how many machines' disks a checkpoint lies; `concurrency` how many requests one instance runs at once, each decode step
    5 % longer per further one; with `apart` each model's arrivals have this CV, else only all together."""

    shape: Shape = SHAPES[0]
    requests_per_second: float = 0.6
    cv: float = 8.0
    apart: bool = True
    copies: int = 2
    concurrency: int = 8
    requests: int = 600


@dataclass(frozen=True, slots=True)
class Outcome:
    """One policy, one seed. P99 in seconds: of the wait until a request is first run, and until the first token of the answer that counts."""

    placement: str
    seed: int
    wait_p99: float
    first_token_p99: float
    first_token_p50: float
    migrations: int
    preemptions: int
    loads: tuple[int, ...]
    unanswered: int

    def remote_share(self) -> float:
        return self.loads[Tier.REMOTE] / sum(self.loads) if sum(self.loads) else 0.0


def cluster_for(setting: Setting, seed: int) -> tuple[list[NodeSpec], list[ModelSpec]]:
    """Machines and models; which disks hold which checkpoint is drawn from the seed."""
    shape = setting.shape
    models = [llm(f"{shape.name}/{number:02}", shape.nbytes, devices=shape.devices, seconds_per_token=shape.seconds_per_token, concurrency=setting.concurrency) for number in range(shape.models)]
    chance = Random(f"{seed}:disks")
    disks: list[list[str]] = [[] for _ in range(NODES)]
    for model in models:
        for node in chance.sample(range(NODES), setting.copies):
            disks[node].append(model.name)
    return [machine(f"node-{number}", *held, devices=DEVICES) for number, held in enumerate(disks)], models


def trace_for(setting: Setting, models: Sequence[ModelSpec], seed: int) -> Trace:
    return burst_trace(
        requests=setting.requests, requests_per_second=setting.requests_per_second, cv=setting.cv, apart=setting.apart,
        models=[model.name for model in models], tokens=QUESTIONS, seed=seed,
    )  # fmt: skip


def play(setting: Setting, placement: str, seed: int) -> SimulationResult:
    """One run of a policy, or of one of `VARIANTS`. Costs 0.1 to 0.5 s."""
    nodes, models = cluster_for(setting, seed)
    estimator = Estimator()
    policy = VARIANTS[placement](estimator) if placement in VARIANTS else placement
    options = SimulationOptions(keep="requests", store_dram_nbytes=CACHE_NBYTES, batch_slowdown=0.05)
    return simulate(
        trace_for(setting, models, seed), nodes, models, placement=policy, keep_alive=FixedKeepAlive(KEEP_ALIVE_SECONDS), estimator=estimator, options=options,
    )  # fmt: skip


def contest(setting: Setting, seeds: Iterable[int], policies: Sequence[str] = POLICIES) -> list[Outcome]:
    """Every policy on the same traces and disks."""
    return [_outcome(placement, seed, play(setting, placement, seed)) for seed in seeds for placement in policies]


def _outcome(placement: str, seed: int, result: SimulationResult) -> Outcome:
    account = result.account
    return Outcome(
        placement, seed, result.wait.p99, result.first_token.p99, result.first_token.p50, account.migrations, account.preemptions, tuple(account.loads), result.unanswered,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times one policy's figure is another's, seed by seed."""

    ratios: tuple[float, ...]
    """In order."""

    @property
    def low(self) -> float:
        return self.ratios[0]

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    @property
    def high(self) -> float:
        return self.ratios[-1]

    @property
    def text(self) -> str:
        return f"x{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"

    @property
    def times_behind(self) -> str:
        """In how many seeds it is the larger."""
        return f"{sum(one > 1 for one in self.ratios)} of {len(self.ratios)} seeds"


def ratio(outcomes: Sequence[Outcome], placement: str, over: str = "serverlessllm", measure: str = "first_token_p99") -> Ratio:
    """Of one policy over another, within each seed."""
    mine = {one.seed: getattr(one, measure) for one in outcomes if one.placement == placement}
    theirs = {one.seed: getattr(one, measure) for one in outcomes if one.placement == over}
    return Ratio(tuple(sorted(mine[seed] / theirs[seed] for seed in mine)))


def sweep(settings: Mapping[tuple[str, str], Setting], seeds: Sequence[int]) -> dict[tuple[str, str], list[Outcome]]:
    """A contest in each setting, by the names given."""
    return {names: contest(setting, seeds) for names, setting in settings.items()}


def reported_order(outcomes: Sequence[Outcome]) -> str:
    """Of ServerlessLLM < Shepherd* < Serverless at P99 of the first token, in the medians over ServerlessLLM that are drawn: "holds",
    "tied" where neighbours are within 0.5 % of each other and none is the other way round, or "reversed" where one is."""
    shepherd = ratio(outcomes, "shepherd").median
    least = min(shepherd, ratio(outcomes, "availability").median / shepherd)
    return "holds" if least > 1 + SAME else "tied" if least >= 1 - SAME else "reversed"
