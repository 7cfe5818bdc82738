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
from math import nan
from types import TracebackType
from typing import Literal, Protocol, Self

from sllm_mini.cluster.simulated.result import SimulationResult
from sllm_mini.control.messages import ModelSpec, NodeSpec
from sllm_mini.errors import SllmError
from sllm_mini.inference.ownership.ledger import LedgerPiece
from sllm_mini.inference.sampler import SamplingOptions
from sllm_mini.types import Tier, Warmth

Outcome = Literal["answered", "cancelled", "refused", "failed"]
_GREEDY = SamplingOptions()


class RefusedError(SllmError):
    """The request was not taken, or was given up: `status` is that of HTTP (404 unknown, 429 too many, 503 it cannot start, 500 it
    failed too often), `reason` the sentence."""

    def __init__(self, status: int, reason: str) -> None:
        self.status, self.reason = status, reason
        super().__init__(reason)

    @classmethod
    def read(cls, text: str) -> RefusedError:
        """Of the controller's words, "429: too many …"."""
        status, _, reason = text.partition(": ")
        return cls(int(status), reason) if status.isdecimal() and reason else cls(500, text)


@dataclass(frozen=True, slots=True)
class Deployment:
    """A model and where its checkpoint is; `spec.name` is its name everywhere. `source` is a folder, which nodes that see it
    have on disk, or an address."""

    spec: ModelSpec
    source: str


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


class Cluster(Protocol):
    """Safe from several threads. Times are seconds since it was opened (`now`); simulated ones pass only in `wait`, `sleep` and
    when a stream is read. As a context manager it closes itself."""

    def deploy(self, deployment: Deployment) -> None:
        """A model, or new figures of one. Returns when the controller and every node know it. Raises SllmError, StoreError or
        what reading the source raises; nothing is deployed then."""
        ...

    def delete(self, model: str) -> None:
        """What it has is run to the end; new requests are refused. Nothing for one that is unknown."""
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
        """Ends a node as a machine that fails would; it does not come back by itself. Raises SllmError for one that is not alive."""
        ...

    def nodes(self) -> list[NodeReport]: ...

    def wait(self, until: Callable[[Cluster], bool], timeout: float) -> bool:
        """Whether `until(cluster)` came true within so many seconds of this cluster's time. Not from within `until`."""
        ...

    def sleep(self, seconds: float) -> None: ...

    @property
    def now(self) -> float: ...

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
