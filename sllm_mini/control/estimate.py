"""How long things will take: loads, starts, migrations, decoding; learned from what was observed, with the error kept.

A load takes `q + n/b` (ServerlessLLM, OSDI'24): the queue of loads on that node, then bytes over the bandwidth of the slowest
tier on the way. A live migration takes `a * (t_in + t_out) + b`, where `t_out` is not asked for but estimated: the seconds
it has decoded over the seconds a token takes. First guesses come from the specs; the first observation replaces them, each
later one moves them by `weight` (`a` and `b` are fitted to the last migrations, see `estimate_line`). Pure; constant time
and memory per node, tier and model. Taught in chapter 08.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sllm_mini.control.estimate_errors import Dimension, Errors, ErrorTable, Subject
from sllm_mini.control.estimate_line import Line
from sllm_mini.control.messages import ModelSpec
from sllm_mini.control.saveable import Saveable
from sllm_mini.control.state import ModelState, NodeState, RequestState
from sllm_mini.types import Tier, Warmth

_PROCESS, _RUNTIME, _DRAM, _DEVICE, _READY = Warmth.PROCESS, Warmth.RUNTIME, Warmth.DRAM, Warmth.DEVICE, Warmth.READY
_DISK_TIER, _DRAM_TIER, _DEVICE_TIER = Tier.DISK, Tier.DRAM, Tier.DEVICE
MIGRATION_SECONDS_PER_TOKEN = 0.01
"""First guess of `a`, as in ServerlessLLM's code."""
MIGRATION_SECONDS = 0.1
"""First guess of `b`, as there."""


def load_seconds(queue_seconds: float, nbytes: int, bytes_per_second: float) -> float:
    """`q + n/b`. Raises ValueError for a bandwidth that is not above 0, or a queue or size below 0."""
    if not (bytes_per_second > 0 and queue_seconds >= 0 and nbytes >= 0):
        raise ValueError(f"{nbytes} bytes at {bytes_per_second} bytes/s behind {queue_seconds} s cannot be; give a bandwidth above 0 and nothing below 0")
    return queue_seconds + nbytes / bytes_per_second


@dataclass(slots=True)
class Learned:
    """A figure that is guessed, then observed."""

    value: float
    count: int = 0

    def learn(self, observed: float, weight: float) -> None:
        self.value = observed if not self.count else self.value + weight * (observed - self.value)
        self.count += 1


@dataclass(slots=True)
class Estimator(Saveable):
    """One cluster's figures. `weight` of a new observation: 1 keeps only the last one. Without `learning` what was restored
    stays as it is, and only the errors of its predictions are kept."""

    weight: float = 0.3
    learning: bool = True
    _bandwidth: dict[tuple[str, Tier], Learned] = field(default_factory=dict, init=False)
    _decode: dict[str, Learned] = field(default_factory=dict, init=False)
    _base: dict[tuple[str, Warmth], Learned] = field(default_factory=dict, init=False)
    _migration: Line = field(default_factory=lambda: Line(MIGRATION_SECONDS_PER_TOKEN, MIGRATION_SECONDS), init=False)
    _errors: ErrorTable = field(default_factory=ErrorTable, init=False)

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise ValueError(f"a weight of {self.weight} learns nothing sensible; give one above 0 and up to 1")

    # --- predictions ------------------------------------------------------------------------------------------------

    def bandwidth(self, node: NodeState, tier: Tier) -> float:
        """Bytes a second from this tier to where a model runs on this node: the slowest link on the way."""
        learned = self._bandwidth.get((node.spec.name, tier))
        return learned.value if learned is not None else _guess(node, tier)

    def load(self, node: NodeState, spec: ModelSpec, tier: Tier, now: float, parts: int = 1) -> float:
        """Seconds until the weights are there, were the load asked for now; `parts` nodes fetch a share each."""
        if tier is _DEVICE_TIER:
            return 0.0
        queue = node.loads_until - now
        return load_seconds(queue if queue > 0.0 else 0.0, -(-spec.nbytes // parts), self.bandwidth(node, tier))

    def start(self, node: NodeState, spec: ModelSpec, warmth: Warmth, tier: Tier, now: float, parts: int = 1) -> float:
        """Seconds from `warmth` to READY: the rungs below, the load with its queue, the rung above."""
        seconds = self.base(spec, warmth)
        if warmth < _DEVICE:
            seconds += self.load(node, spec, _DRAM_TIER if warmth is _DRAM else tier, now, parts)
        return seconds

    def base(self, spec: ModelSpec, warmth: Warmth) -> float:
        """Seconds of a start from `warmth` that do not depend on bytes."""
        learned = self._base.get((spec.name, warmth))
        if learned is not None:
            return learned.value
        return (
            (spec.process_seconds if warmth < _PROCESS else 0.0)
            + (spec.runtime_seconds if warmth < _RUNTIME else 0.0)
            + (spec.ready_seconds if warmth < _READY else 0.0)
        )

    def decode(self, spec: ModelSpec) -> float:
        """Seconds a token."""
        learned = self._decode.get(spec.name)
        return learned.value if learned is not None else spec.decode_seconds_per_token

    def output_tokens(self, request: RequestState, spec: ModelSpec, now: float) -> float:
        """How many tokens a request should have generated by now, from the seconds it has run."""
        per_token = self.decode(spec)
        if not per_token:
            return float(request.output_tokens)
        running = now - request.assigned - request.input_tokens * spec.prefill_seconds_per_token
        return max(request.output_tokens, running / per_token)

    def migration(self, request: RequestState, spec: ModelSpec, now: float) -> float:
        """Seconds that moving a running request would take."""
        return self._migration.at(request.input_tokens + self.output_tokens(request, spec, now))

    # --- observations -----------------------------------------------------------------------------------------------

    def observe_start(
        self, node: NodeState, spec: ModelSpec, warmth: Warmth, tier: Tier, seconds: float, queued_seconds: float, predicted: float, parts: int = 1,
        load_seconds: float | None = None,
    ) -> None:  # fmt: skip
        """A start by `spec` from `warmth` took `seconds`, `queued_seconds` of them behind other loads and `load_seconds` while
        the weights moved; `predicted` were expected.

        Bytes over `load_seconds` are the bandwidth, and what is left are the rungs' own. Where nobody says how long the
        weights moved, it is what the rungs leave; where they leave no time at all, the seconds are the rungs' own.
        """
        own = max(seconds - queued_seconds, 0.0)
        base = self.base(spec, warmth)
        source = Tier.DRAM if warmth is Warmth.DRAM else tier
        moved = -(-spec.nbytes // parts) if warmth < Warmth.DEVICE and source is not Tier.DEVICE else 0
        loading = max(own - base, 0.0) if load_seconds is None else load_seconds
        if moved and loading > 0:
            self._learn(self._bandwidth, (node.spec.name, source), moved / loading, _guess(node, source))
        if load_seconds is not None or not (moved and loading > 0):
            self._learn(self._base, (spec.name, warmth), max(own - (load_seconds or 0.0), 0.0), base)
        self._errors.note(Subject("start", spec.name, warmth, source if moved else None, node.spec.name), predicted, seconds)

    def observe_finished(self, request: RequestState, spec: ModelSpec, output_tokens: int, seconds: float) -> None:
        """A request ran `seconds` for its tokens. Only one that nothing interrupted teaches."""
        if output_tokens <= 1 or request.migrations or request.preemptions or request.failures:
            return
        decoding = seconds - request.input_tokens * spec.prefill_seconds_per_token
        if decoding > 0:
            self._errors.note(Subject("decode", spec.name), self.decode(spec) * output_tokens, decoding)
            self._learn(self._decode, spec.name, decoding / output_tokens, spec.decode_seconds_per_token)

    def observe_migration(self, request: RequestState, output_tokens: int, seconds: float, predicted: float) -> None:
        """Moving a request with so many tokens took `seconds`."""
        if self.learning:
            self._migration.learn(request.input_tokens + output_tokens, seconds)
        self._errors.note(Subject("migration", request.model), predicted, seconds)

    def on_delete(self, model: ModelState) -> None:
        """What was learned of it is forgotten; its errors are from now on those of others."""
        name = model.spec.name
        self._decode.pop(name, None)
        for warmth in Warmth:
            self._base.pop((name, warmth), None)
        self._errors.forget(name)

    def errors(self, *by: Dimension) -> Mapping[str, Errors]:
        """What was predicted against what came, of starts (their queue included), migrations and decoding: in groups by model,
        rung, tier, node and what it is of, as far as asked; see `ErrorTable.by`. Without a word by kind, rung and tier."""
        return self._errors.by(*(by or ("what", "rung", "tier")))

    def _learn(self, table: dict[Any, Learned], key: object, observed: float, guess: float) -> None:
        if not self.learning:
            return
        learned = table.get(key)
        if learned is None:
            learned = table[key] = Learned(guess)
        learned.learn(observed, self.weight)


def _guess(node: NodeState, tier: Tier) -> float:
    spec = node.spec
    slowest = spec.dram_bytes_per_second
    if tier is not _DRAM_TIER:
        slowest = min(slowest, spec.disk_bytes_per_second)
        if tier is not _DISK_TIER:
            slowest = min(slowest, spec.remote_bytes_per_second)
    return slowest
