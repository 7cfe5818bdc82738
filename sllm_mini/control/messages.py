"""What the controller is told and what it decides: events in, actions out, as plain data that can be saved and compared.

Neither carries a time: `Controller.handle(event, now)` is told it. A request and an instance each have an epoch that grows
with every decision about them; an event that carries an older one comes from before that decision and is ignored. What a
driver does: carry out actions on one node in order, answer each `Start` with `InstanceReached` (and, where that was not `whole`,
`InstanceLoaded` after it) or `InstanceFailed`, each `Assign` with `RequestFinished` or `RequestFailed`, each `Migrate` with `MigrationFinished` or `MigrationFailed`, and each
`SetTimer` with `TimerFired`. `Descend` and `Preempt` are not answered: they hold from the moment they are given.
Pure. Costs 0.2 us a message. Taught in chapter 08.
"""

from __future__ import annotations

from math import inf
from typing import Any

from msgspec import Struct

from sllm_mini.errors import SllmError
from sllm_mini.types import Tier, Warmth


class SpecError(SllmError, ValueError):
    """Figures that no model, node or simulation can have; the sentence names the field and what to give."""


class ModelSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model, or a function of a FaaS platform (`devices=0`: it needs only memory).

    `nbytes` are its weights; `devices` how many it takes, whole. `concurrency` requests run at once in one instance.
    Instances of one `runtime` share what is warm up to RUNTIME. Seconds are first guesses, corrected by what is observed:
    the rungs PROCESS, RUNTIME and READY of the ladder (the rungs between are bytes over a bandwidth). Raises SpecError for
    figures that no model can have. Costs 2 us.
    """

    name: str
    nbytes: int
    devices: int = 1
    concurrency: int = 1
    min_instances: int = 0
    max_instances: int = 1_000_000
    runtime: str = "python"
    process_nbytes: int = 0
    runtime_nbytes: int = 0
    process_seconds: float = 0.0
    runtime_seconds: float = 0.0
    ready_seconds: float = 0.0
    prefill_seconds_per_token: float = 0.0
    decode_seconds_per_token: float = 0.0

    def __post_init__(self) -> None:
        _check(self, "model", _MODEL_NAMES, _MODEL_WHOLE, _MODEL_SECONDS)
        if self.max_instances < self.min_instances:
            raise SpecError(f"the model {self.name!r} always has {self.min_instances} instances and {self.max_instances} at most; give min_instances no larger than max_instances")


class NodeSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A machine: whole devices, bytes of memory, and bytes a second from each tier (first guesses). `disk` names the models
    whose checkpoints lie on it. Raises SpecError for figures that no machine can have. Costs 2 us."""

    name: str
    devices: int
    dram_nbytes: int
    remote_bytes_per_second: float
    disk_bytes_per_second: float
    dram_bytes_per_second: float
    disk: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check(self, "node", ("name",), _NODE_WHOLE, ())
        for field in _NODE_RATES:
            rate = getattr(self, field)
            if not _is_number(rate) or not 0 < rate < inf:
                raise SpecError(f"the node {self.name!r} has {field} {rate!r}; give a number above 0")
        if type(self.disk) is not tuple or not {str}.issuperset(map(type, self.disk)):
            raise SpecError(f"the node {self.name!r} has on its disk {self.disk!r}; give a tuple of names of models")


_MODEL_NAMES = ("name", "runtime")
_MODEL_WHOLE = (("nbytes", 0), ("devices", 0), ("concurrency", 1), ("min_instances", 0), ("max_instances", 1), ("process_nbytes", 0), ("runtime_nbytes", 0))
_MODEL_SECONDS = ("process_seconds", "runtime_seconds", "ready_seconds", "prefill_seconds_per_token", "decode_seconds_per_token")
_NODE_WHOLE = (("devices", 0), ("dram_nbytes", 0))
_NODE_RATES = ("remote_bytes_per_second", "disk_bytes_per_second", "dram_bytes_per_second")


def _check(spec: Any, what: str, names: tuple[str, ...], whole: tuple[tuple[str, int], ...], seconds: tuple[str, ...]) -> None:
    """Raises SpecError for the first field that cannot be: what a reader of JSON has typed, a caller of Python has not."""
    for field in names:
        text = getattr(spec, field)
        if type(text) is not str or not text or not text.isprintable() or text != text.strip():
            raise SpecError(f"a {what} has the {field} {text!r}; name it in printable text without spaces around it")
    for field, least in whole:
        number = getattr(spec, field)
        if type(number) is not int or number < least:
            raise SpecError(f"the {what} {spec.name!r} has {field} {number!r}; give a whole number of {least} or more")
    for field in seconds:
        number = getattr(spec, field)
        if not _is_number(number) or not 0 <= number < inf:
            raise SpecError(f"the {what} {spec.name!r} has {field} {number!r}; give a number of 0 or more")


def _is_number(value: object) -> bool:
    return isinstance(value, float) or type(value) is int


class Event(Struct, frozen=True, gc=False, tag=True):
    """Something that happened."""


class NodeJoined(Event, frozen=True):
    node: NodeSpec


class NodeLost(Event, frozen=True, gc=False):
    """All that was on it is gone; its requests go back to the queue. Those of `also` went with it: nothing is decided as if they were there."""

    node: str
    also: tuple[str, ...] = ()


class ModelDeployed(Event, frozen=True):
    """A new model, or new figures of one."""

    model: ModelSpec


class ModelDeleted(Event, frozen=True, gc=False):
    """It takes no more requests; those it has are finished."""

    model: str


class PrewarmAsked(Event, frozen=True, gc=False):
    """Somebody wants an instance of the model as warm as `warmth` now, though no request has come; below DRAM one without a model will
    do. Where there is none, idle ones of others give way for it; where there is no room even so, nothing is started."""

    model: str
    warmth: Warmth


class UnloadAsked(Event, frozen=True, gc=False):
    """Its idle instances are to end now, but for those that its `min_instances` keep."""

    model: str


class KeepAliveAsked(Event, frozen=True, gc=False):
    """From now on its idle instances stay for so long and end then, whatever the keep-alive policy says, but for those that its
    `min_instances` keep. Below 0: for good; None: as the policy says again."""

    model: str
    seconds: float | None


class RequestArrived(Event, frozen=True, gc=False):
    """`prefix` names the beginning of the prompt that it shares with others, "" if none."""

    request: int
    model: str
    input_tokens: int
    prefix: str = ""


class RequestProgressed(Event, frozen=True, gc=False):
    """How many tokens have been generated so far."""

    request: int
    output_tokens: int
    epoch: int


class RequestFinished(Event, frozen=True, gc=False):
    """`seconds`: from the assignment to the last token; all tokens, also those that came before a move."""

    request: int
    output_tokens: int
    seconds: float
    epoch: int


class RequestFailed(Event, frozen=True, gc=False):
    """Its instance could not finish it, though it may be tried again; the instance lives."""

    request: int
    epoch: int


class RequestCancelled(Event, frozen=True, gc=False):
    """The client went away."""

    request: int


class InstanceReached(Event, frozen=True, gc=False):
    """A start has climbed to its target. `seconds` it took, of which `queued_seconds` waiting for the node's loads before
    it, and `load_seconds`, where known, moving the weights; `tier` is where they were read from. Not `whole`: it takes requests while
    its last bytes are still on their way, and teaches nothing before they are there."""

    instance: int
    tier: Tier
    seconds: float
    queued_seconds: float
    epoch: int
    load_seconds: float | None = None
    whole: bool = True


class InstanceLoaded(Event, frozen=True, gc=False):
    """The last byte of an instance that was reached before it was whole; what such a start took, as in `InstanceReached`."""

    instance: int
    tier: Tier
    seconds: float
    queued_seconds: float
    epoch: int
    load_seconds: float | None = None


class InstanceFailed(Event, frozen=True, gc=False):
    """It is gone, whether while starting or later; its requests go back to the queue."""

    instance: int
    reason: str
    epoch: int


class MigrationFinished(Event, frozen=True, gc=False):
    """The request runs on the target now. `epoch` is the request's."""

    request: int
    seconds: float
    output_tokens: int
    epoch: int


class MigrationFailed(Event, frozen=True, gc=False):
    """The request goes on where it was."""

    request: int
    epoch: int


class Cached(Event, frozen=True, gc=False):
    """The node's store holds all of the model's bytes in this tier now."""

    node: str
    model: str
    tier: Tier


class Evicted(Event, frozen=True, gc=False):
    """The node's store no longer does."""

    node: str
    model: str
    tier: Tier


class TimerFired(Event, frozen=True, gc=False):
    timer: int


AnyEvent = (
    NodeJoined | NodeLost | ModelDeployed | ModelDeleted | PrewarmAsked | UnloadAsked | KeepAliveAsked | RequestArrived | RequestProgressed | RequestFinished | RequestFailed
    | RequestCancelled | InstanceReached | InstanceLoaded | InstanceFailed | MigrationFinished | MigrationFailed | Cached | Evicted | TimerFired
)  # fmt: skip


class Action(Struct, frozen=True, gc=False, tag=True):
    """Something to be done."""


class Start(Action, frozen=True):
    """An instance climbs from `warmth` (COLD: it is new) to `target` for `model`, reading the weights from `tier` of this
    node, on these `devices`. Where `parts` names several nodes, each fetches an equal share over its own link (HydraServe)."""

    instance: int
    node: str
    model: str
    warmth: Warmth
    target: Warmth
    tier: Tier
    devices: tuple[int, ...]
    epoch: int
    parts: tuple[str, ...] = ()


class Descend(Action, frozen=True, gc=False):
    """An idle instance keeps less: down to `warmth`, COLD for nothing. Below DEVICE its devices are free, below DRAM it has
    no model, below RUNTIME no runtime."""

    instance: int
    warmth: Warmth
    epoch: int


class Assign(Action, frozen=True, gc=False):
    """Runs a request, from its last known token on."""

    request: int
    instance: int
    epoch: int


class Migrate(Action, frozen=True, gc=False):
    """Moves a running request to a ready instance of the same model, live."""

    request: int
    source: int
    target: int
    epoch: int


class Preempt(Action, frozen=True, gc=False):
    """Stops a running request now; what it generated counts for nothing, it is queued again (Shepherd)."""

    request: int
    instance: int
    epoch: int


class Refuse(Action, frozen=True, gc=False):
    """The request is answered with an error; `reason` is a sentence."""

    request: int
    reason: str


class SetTimer(Action, frozen=True, gc=False):
    """`TimerFired(timer)` is wanted at `at`, in the controller's time."""

    timer: int
    at: float


AnyAction = Start | Descend | Assign | Migrate | Preempt | Refuse | SetTimer
