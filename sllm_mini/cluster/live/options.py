"""How a live cluster behaves, and each of its nodes: frozen figures that check themselves. Taught in chapter 08."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal, get_args

from sllm_mini.checkpoint.hashing import CHUNK_NBYTES
from sllm_mini.cluster.simulated.policies import make_policies
from sllm_mini.control.controller import Controller
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.messages import SpecError
from sllm_mini.control.policy import Autoscaler, KeepAlive, Placement
from sllm_mini.control.replay import LogHeader
from sllm_mini.eviction import POLICIES
from sllm_mini.inference.ownership.ledger import MAX_RESTARTS

LauncherKind = Literal["zygote", "spawn", "thread"]
MoveMode = Literal["tokens", "kv", "auto"]
MulticastKind = Literal["", "binomial", "chain", "tree", "store"]


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """One node. Its store has `store_dram_nbytes` for models (on a CPU also for those that instances serve from) and
    `store_disk_nbytes` for what it fetched, 0 for no such place; `eviction` names a policy of `sllm_mini.eviction`. Of a remote model it
    asks for `remote_ranges` at once, 0 for as many as it has readers.

    Workers are forks of a zygote, fresh interpreters (`spawn`) or threads of the agent. The zygote is the node's own, or the one that listens at the
    path `zygote` and that others keep: nodes of one machine may share it. `engine` names a
    `module:function(order: ClimbRung) -> Engine` for engines that are not ours, whose workers import no torch. `threads` are
    torch's in a worker; `pace_seconds` is slept after each step, so that devices can be played by one CPU. Tokens between
    a request's first and its last gather for `stream_interval_seconds` before they are sent: each message costs the CPU that also computes. With `cuda` an instance's
    devices are the GPUs of their numbers, else CPU memory is the device.
    What nodes send each other goes in blocks of `block_nbytes`, of which `link_bytes_per_second` leave a node and as many come in.
    The agent says every `beat_seconds` that it lives and ends itself after `silent_seconds` without a word of its driver; a worker that
    ends no step for `stuck_seconds` is killed. Raises SpecError for what cannot be.
    """

    store_dram_nbytes: int = 1 << 30
    store_disk_nbytes: int = 0
    remote_ranges: int = 0
    eviction: str = "gdsf"
    launcher: LauncherKind = "zygote"
    zygote: str = ""
    engine: str = ""
    threads: int = 1
    pace_seconds: float = 0.0
    stream_interval_seconds: float = 0.02
    cuda: bool = False
    block_nbytes: int = 16 << 20
    link_bytes_per_second: float | None = None
    beat_seconds: float = 0.2
    silent_seconds: float = 1.5
    stuck_seconds: float = 30.0

    def __post_init__(self) -> None:
        _whole(self, "store_dram_nbytes", 0)
        _whole(self, "store_disk_nbytes", 0)
        _whole(self, "remote_ranges", 0)
        _whole(self, "threads", 1)
        _whole(self, "block_nbytes", CHUNK_NBYTES)
        if self.link_bytes_per_second is not None:
            _seconds(self, "link_bytes_per_second")
        _seconds(self, "pace_seconds", least=0.0)
        _seconds(self, "stream_interval_seconds", least=0.0)
        for name in ("beat_seconds", "silent_seconds", "stuck_seconds"):
            _seconds(self, name)
        if self.silent_seconds < 3 * self.beat_seconds:
            raise SpecError(f"a node that beats every {self.beat_seconds:g} s would be given up after {self.silent_seconds:g} s; wait for at least three beats")
        if self.eviction not in POLICIES:
            raise SpecError(f"there is no eviction policy {self.eviction!r}; choose one of {', '.join(POLICIES)}")
        _one_of(self, "launcher", LauncherKind)
        if self.zygote and self.launcher != "zygote":
            raise SpecError(f"workers are forked from {self.zygote} with the launcher 'zygote' alone; leave the launcher out")


@dataclass(frozen=True, slots=True)
class LiveOptions:
    """The driver. `node` is how each node behaves. What must survive it is written every `snapshot_seconds`; a request that is over is kept for
    `remember_seconds`, so that a reader may come back. Moves go by `move_mode` ("auto": whichever was faster between the two nodes), and stop the source once the target is
    `move_gap_tokens` behind. Starts of one model that read from afar within `gather_seconds` are one plan of the kind `multicast`, in which nodes
    feed each other (see `control.multicast.gather`; "": each reads for itself); with `overlap` a start takes requests while its bytes arrive. With `joint`, which needs both, the nodes that nodes with the model
    feed serve it as one pipeline while none of them has it whole. A node has `join_seconds` to come up. One that was lost is started again after
    `revive_seconds`, and is given up once that was in vain `revive` times in a row (see `reviving`; 0: nobody does). Raises SpecError for what cannot be."""

    node: NodeOptions = field(default_factory=NodeOptions)
    host: str = ""
    """An address of this machine at which agents and workers reach the driver over TCP, and each other at theirs; "" is Unix sockets."""
    snapshot_seconds: float = 5.0
    remember_seconds: float = 60.0
    journal_nbytes: int = 64 << 20
    """The journal is rewritten without what is over once it is larger."""
    move_mode: MoveMode = "tokens"
    move_gap_tokens: int = 4
    join_seconds: float = 30.0
    max_waiting: int = 4096
    """Requests that have not run yet; beyond so many none is taken (503)."""
    max_restarts: int = MAX_RESTARTS
    """A request whose instance was lost so often without a new token from it fails (500): it may be what they die of. Give more where machines die often."""
    keep_spans: int = 100_000
    """At least so many of the latest stretches of instances' lives are in `result`."""
    multicast: MulticastKind = ""
    gather_seconds: float = 0.02
    overlap: bool = False
    joint: bool = False
    revive: int = 0
    revive_seconds: float = 0.5

    def __post_init__(self) -> None:
        for name in ("snapshot_seconds", "join_seconds", "revive_seconds"):
            _seconds(self, name)
        _seconds(self, "remember_seconds", least=0.0)
        _whole(self, "journal_nbytes", 1)
        _whole(self, "revive", 0)
        for name in ("move_gap_tokens", "max_waiting", "max_restarts", "keep_spans"):
            _whole(self, name, 1)
        _one_of(self, "move_mode", MoveMode)
        _one_of(self, "multicast", MulticastKind)
        _seconds(self, "gather_seconds", least=0.0)
        if self.joint and not (self.multicast and self.overlap):
            raise SpecError("nodes serve a model together while it comes to them by one plan; give multicast and overlap with joint")
        if self.joint and self.node.cuda:
            raise SpecError("layers that arrive are served from CPU memory; leave joint out where devices are GPUs")


@dataclass(frozen=True, slots=True)
class ControlOptions:
    """Which policies decide: names, or functions that make new ones (of the estimator: a placement or a keep-alive; of nothing: an
    autoscaler), so that a controller can be made again. Objects that learn must not be shared between two controllers, so
    none are taken."""

    placement: str | Callable[[Estimator], Placement] = "serverlessllm"
    keep_alive: str | Callable[[Estimator], KeepAlive] = "fixed-10min"
    autoscaler: str | Callable[[], Autoscaler] = "per-request"
    estimator: Callable[[], Estimator] = Estimator
    max_failures: int = 3
    retry_seconds: float = 1.0

    def controller(self) -> Controller:
        """A new one, without a past. Raises SllmError for a name that no policy has."""
        estimator = self.estimator()
        policies = make_policies(
            self.placement if isinstance(self.placement, str) else self.placement(estimator),
            self.keep_alive if isinstance(self.keep_alive, str) else self.keep_alive(estimator),
            self.autoscaler if isinstance(self.autoscaler, str) else self.autoscaler(),
            estimator,
        )
        return Controller(policies.placement, policies.keep_alive, policies.autoscaler, estimator, max_failures=self.max_failures, retry_seconds=self.retry_seconds)

    def names(self) -> dict[str, str]:
        """What the three are called in a result."""
        roles = {"placement": self.placement, "keep_alive": self.keep_alive, "autoscaler": self.autoscaler}
        return {role: given if isinstance(given, str) else getattr(given, "__name__", type(given).__name__) for role, given in roles.items()}

    def header(self) -> LogHeader | None:
        """What makes a log say by itself how to replay it; None where a policy has no name."""
        named = [given for given in (self.placement, self.keep_alive, self.autoscaler) if isinstance(given, str)]
        if len(named) < 3:
            return None
        return LogHeader(placement=named[0], keep_alive=named[1], autoscaler=named[2], max_failures=self.max_failures, retry_seconds=self.retry_seconds)


def _whole(options: Any, field: str, least: int) -> None:
    number = getattr(options, field)
    if type(number) is not int or number < least:
        raise SpecError(f"{field} is {number!r}; give a whole number of {least} or more")


def _seconds(options: Any, field: str, least: float | None = None) -> None:
    number = getattr(options, field)
    if not isinstance(number, int | float) or not (0 if least is None else least) <= number < inf or (least is None and not number):
        raise SpecError(f"{field} is {number!r}; give a number {'above 0' if least is None else f'of {least:g} or more'}")


def _one_of(options: Any, field: str, choices: Any) -> None:
    given, named = getattr(options, field), get_args(choices)
    if given not in named:
        raise SpecError(f"{field} is {given!r}; give {', '.join(map(repr, named[:-1]))} or {named[-1]!r}")
