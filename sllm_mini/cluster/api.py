"""What every cluster can do, whether its nodes are threads, processes, machines or a simulation: the `Cluster` protocol.

    with open_cluster("local:2", folder=folder, control=ControlOptions(keep_alive="fixed-10min")) as cluster:
        cluster.deploy(Deployment(ModelSpec(name="tiny", nbytes=10**7), "models/tiny.sllm"))
        for piece in cluster.submit(Ask("tiny", "Once upon a time")):
            print(piece.text, end="")

The same controller decides in all of them, and one suite of tests holds them to the same promises. Taught in chapter 08.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf, nan
from types import TracebackType
from typing import Literal, Protocol, Self

from sllm_mini.cluster.latency import Latencies
from sllm_mini.cluster.simulated.result import SimulationResult
from sllm_mini.control.messages import ModelSpec, NodeSpec
from sllm_mini.errors import SllmError
from sllm_mini.inference.ownership.ledger import LedgerPiece
from sllm_mini.inference.ownership.messages import Finish
from sllm_mini.inference.sampler import SamplingOptions
from sllm_mini.types import Tier, Warmth

Outcome = Literal["answered", "cancelled", "refused", "failed"]
_GREEDY = SamplingOptions()


class RefusedError(SllmError):
    """The request was not taken, or was given up: `status` is that of HTTP (404 unknown, 429 too many, 503 it cannot start, 500 it
    failed too often), `reason` the sentence. `retry_after` are the seconds after which it may be asked again, where that may help."""

    def __init__(self, status: int, reason: str, retry_after: float | None = None) -> None:
        self.status, self.reason, self.retry_after = status, reason, retry_after
        super().__init__(reason)

    @classmethod
    def read(cls, text: str, retry_after: float | None = None) -> RefusedError:
        """Of the controller's words, "429: too many …"."""
        status, _, reason = text.partition(": ")
        found = cls(int(status), reason) if status.isdecimal() and reason else cls(500, text)
        found.retry_after = retry_after if found.status in (429, 503) else None
        return found


@dataclass(frozen=True, slots=True)
class Deployment:
    """A model and where its checkpoint is; `spec.name` is its name everywhere. `source` is a folder, which nodes that see it
    have on disk, or an address, of 4,096 characters at most. With a `tier` (DISK or DRAM) each node's store brings it there and never evicts it from there, as far as
    it has such a place and room. `keep_alive` is that of an `Ask` to begin with; None: as the policy says. Raises ValueError for
    another tier, for what is no time, and for names and sources that no message to a node carries.

    With a `base`, the name of another deployed model, `source` is a folder with a LoRA adapter of that: a model of its own, whose weights are the
    base's where those are, in the same memory, and its adapter beside them. Stores know the base alone, so such a one has no `tier`."""

    spec: ModelSpec
    source: str
    tier: Tier | None = None
    keep_alive: float | None = None
    base: str = ""

    def __post_init__(self) -> None:
        keep_alive_seconds(self.keep_alive)
        for what, text, most in (("name", self.spec.name, 1024), ("source", self.source, 4096)):
            if not 1 <= len(text) <= most:
                raise ValueError(f"the {what} of a model has {len(text):,} characters; give 1 to {most:,}")
        if not 1 <= self.spec.concurrency <= 4096:
            raise ValueError(f"the model {self.spec.name} would run {self.spec.concurrency:,} requests at once; give 1 to 4,096")
        if self.tier not in (None, Tier.DISK, Tier.DRAM):
            raise ValueError(f"the tier of {self.spec.name} is {self.tier!r}; stores keep models in DISK or DRAM")


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. A text as `prompt` needs the deployment's tokenizer, which is read when the first text comes; token ids do
    not. `request_id` is drawn where None."""

    model: str
    prompt: str | Sequence[int]
    max_new_tokens: int = 128
    sampling: SamplingOptions = _GREEDY
    stop: tuple[str, ...] = ()
    stop_at_eos: bool = True
    prefix: str = ""
    request_id: str | None = None
    keep_alive: float | None = None
    """For how many seconds from now on idle instances of the model stay, until another request says otherwise: 0 not at all, below 0
    or infinite for good, None: as it was. So Ollama has it."""
    logprobs: int | None = None
    """Each piece has the `logprob` of its token, from the model's own logits in float32, and so many of the likeliest as `top`; at most 20. Simulated ones
    have none."""
    embed: bool = False
    """The only piece has no text and the prompt's embedding as `vector`: the mean of the last hidden states after the final norm, of length 1, float32.
    With `max_new_tokens` 1. Raises UnsupportedError at `submit` where the cluster's engines have no hidden states (`Cluster.embeds`)."""


@dataclass(frozen=True, slots=True)
class RequestReport:
    """What became of a request so far; times are seconds since the cluster was opened, NaN for what has not come. `rung` is how
    warm the start was that it waited for (READY: none), `tier` where that read the weights and `load_seconds` for how long.
    `outcome` is None while it goes on; `reason` says why it was not answered."""

    request_id: str
    model: str
    arrived: float
    assigned: float = nan
    first: float = nan
    ended: float = nan
    rung: Warmth = Warmth.READY
    tier: Tier | None = None
    load_seconds: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    migrations: int = 0
    restarts: int = 0
    """How often it began again: its instance was lost, or it was preempted."""
    outcome: Outcome | None = None
    reason: str = ""
    finish: Finish | None = None
    """How its text ended, where it has one to its end."""

    @property
    def queue_seconds(self) -> float:
        """From arrival to the first assignment."""
        return self.assigned - self.arrived

    @property
    def prefill_seconds(self) -> float:
        """From the first assignment to the first token."""
        return self.first - self.assigned

    @property
    def decode_seconds(self) -> float:
        """From the first token to the last."""
        return self.ended - self.first


Listener = Callable[[Sequence[LedgerPiece], RequestReport | None], object]
"""Is told the next pieces of a request, and its report when they are all. It returns soon and raises nothing."""


class Stream(Protocol):
    """One request's answer: iterate for its pieces, from the first to the last, each as soon as it is there. May be iterated
    several times, and by several threads. Iterating raises RefusedError where it was refused or failed."""

    @property
    def request_id(self) -> str: ...

    def __iter__(self) -> Iterator[LedgerPiece]: ...

    def wait(self, timeout: float | None = None) -> RequestReport:
        """Waits for its end, however it ends. Raises TimeoutError."""
        ...

    def cancel(self) -> None:
        """The client went away: it ends as far as it came. Nothing where it is over."""
        ...

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """From now on `listener(pieces, None)` is called for each delivery, at first with all that was delivered before, and at the
        end, however it ends, once with what is left and the report. No thread of its own: it is called on the one that delivers
        (simulated: on the one that lets time pass), by one at a time, in order; an asyncio server hands on by
        `call_soon_threadsafe`. What is returned ends it. Raises ModelError for a request that is forgotten."""
        ...

    @property
    def report(self) -> RequestReport: ...


@dataclass(frozen=True, slots=True)
class InstanceReport:
    """A worker as the controller knows it; `private_nbytes` is what its end would give back, 0 where not measured."""

    instance: int
    model: str | None
    warmth: Warmth
    climbing_to: Warmth | None
    requests: int
    private_nbytes: int = 0
    ends_at: float | None = None
    """When an idle one ends or keeps less, in the cluster's time; None: not by itself."""


@dataclass(frozen=True, slots=True)
class StoreReport:
    """What a node's store uses of its budgets for models, and what is kept running for all its workers (a zygote's memory)."""

    dram_used_nbytes: int
    dram_budget_nbytes: int
    disk_used_nbytes: int
    disk_budget_nbytes: int
    shared_nbytes: int


@dataclass(frozen=True, slots=True)
class NodeReport:
    """A node; one that was lost stays listed until one of its name joins. `incarnation` counts how often one of this name has joined.
    `cached` is what its store holds, with the fastest tier."""

    name: str
    alive: bool
    incarnation: int
    spec: NodeSpec
    instances: tuple[InstanceReport, ...] = ()
    cached: dict[str, Tier] = field(default_factory=dict)
    reason: str = ""
    """Why it is not alive."""
    store: StoreReport | None = None
    """As it said last; None where it has not, as simulated ones do not."""
    returns_at: float | None = None
    """When one that was lost is started again, in the cluster's time; in the past: it is coming up. None: nobody does that, or not any more."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """Counters since the cluster was opened, and how many requests there are now; what a scrape takes. `starts` are of instances, by the
    warmth they climbed from, `loads` and `loaded_nbytes` by the tier that the weights were read from; `cold_requests` are requests
    that were answered, by the warmth of the start that they waited for (READY: none)."""

    outcomes: dict[Outcome, int]
    turned_away: int
    """Requests that were not taken because so many waited."""
    waiting: int
    """Requests that have not run yet."""
    running: int
    """All others that are not over."""
    input_tokens: int
    output_tokens: int
    restarts: int
    starts: dict[Warmth, int]
    cold_requests: dict[Warmth, int]
    loads: dict[Tier, int]
    loaded_nbytes: dict[Tier, int]
    migrations: int
    failed_migrations: int
    preemptions: int
    latencies: dict[str, Latencies]
    """By model, of requests that are over."""
    revivals: int = 0
    """Nodes that were lost and came back by themselves (`LiveOptions.revive`)."""
    failed_revivals: int = 0


def keep_alive_seconds(seconds: float | None) -> float | None:
    """As a controller is told: below 0 for good, as infinity cannot be written in a log. Raises ValueError for what is no time."""
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or seconds != seconds:
        raise ValueError(f"keep_alive is {seconds!r}; give seconds, 0 to unload at once, -1 for good")
    return -1.0 if seconds < 0 or seconds == inf else float(seconds)


class Cluster(Protocol):
    """Safe from several threads. Times are seconds since it was opened (`now`); simulated ones pass only in `wait`, `sleep` and
    when a stream is read. As a context manager it closes itself."""

    def deploy(self, deployment: Deployment) -> None:
        """A model, or new figures of one. Returns when the controller and every node know it. Raises SllmError, StoreError or
        what reading the source raises, ModelError for a base that is not deployed or that the adapter does not fit, InUseError for other weights
        under a base that has adapters; nothing is deployed then."""
        ...

    def delete(self, model: str) -> None:
        """What it has is run to the end; new requests are refused. Nothing for one that is unknown. Raises InUseError while adapters of it are
        deployed."""
        ...

    def prewarm(self, model: str, warmth: Warmth = Warmth.READY, keep_alive: float | None = None) -> None:
        """An instance as warm as that is wanted now, though no request has come; idle ones of others give way for it. Returns when it has
        been asked for: where there is no room, none comes. `keep_alive` is that of an `Ask`. Raises RefusedError(404), ValueError."""
        ...

    def unload(self, model: str) -> None:
        """Its idle instances end now, but for its `min_instances`; what its requests run on, and what stores hold, stays. Raises
        RefusedError(404)."""
        ...

    def submit(self, ask: Ask) -> Stream:
        """Never waits for a start. Raises ValueError and ModelError for a request that cannot be, RefusedError(404) for a model that is
        not deployed; what is refused later shows in the stream."""
        ...

    def stream(self, request_id: str) -> Stream:
        """The stream of a request again. Raises ModelError for one that is unknown, or forgotten."""
        ...

    def add_node(self, spec: NodeSpec) -> None:
        """Returns when it has joined and knows the models. Raises SllmError where it does not come up, or one of its name is
        alive."""
        ...

    def kill_node(self, name: str) -> None:
        """Ends a node as a machine that fails would; it comes back by itself where `LiveOptions.revive` says so. Raises SllmError for one that is not alive."""
        ...

    def nodes(self) -> list[NodeReport]: ...

    @property
    def embeds(self) -> bool:
        """Whether its engines make embeddings."""
        ...

    def models(self) -> list[Deployment]:
        """What is deployed, as it was deployed. Asks nobody, and waits for nothing."""
        ...

    def wait(self, until: Callable[[Cluster], bool], timeout: float) -> bool:
        """Whether `until(cluster)` came true within so many seconds of this cluster's time. Not from within `until`."""
        ...

    def sleep(self, seconds: float) -> None: ...

    @property
    def now(self) -> float: ...

    def metrics(self) -> Metrics:
        """Costs the same however long the cluster has been open, wakes no model and is in no log."""
        ...

    def result(self) -> SimulationResult:
        """All requests that ended so far, and where device time and memory went: of the same type live and simulated."""
        ...

    def log(self) -> Iterable[bytes]:
        """The event log so far, as `control.replay.replay` takes it."""
        ...

    def close(self) -> None:
        """Ends all. Requests that go on fail. Safe to call twice."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...
