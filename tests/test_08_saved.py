"""A controller that is saved in the middle of a log and restored goes on exactly as recorded, with all that was learned."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from random import Random
from typing import ClassVar

import pytest

from sllm_mini.cluster.simulated import SimulatedCluster, SimulationOptions, even_cluster, make_policies
from sllm_mini.cluster.trace import TraceRequest
from sllm_mini.control import autoscale, keepalive
from sllm_mini.control import messages as m
from sllm_mini.control.controller import Controller
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.keepalive import Buffered, HybridHistogram, RainbowCake, StemCells
from sllm_mini.control.policy import Autoscaler, KeepAlive
from sllm_mini.control.replay import Recorder, read_log, replay
from sllm_mini.control.saveable import Saveable
from sllm_mini.control.state import ModelState
from sllm_mini.errors import SllmError
from sllm_mini.types import Tier, Warmth

GB = 10**9
MODELS = [
    m.ModelSpec(
        name=f"model-{number}", nbytes=(4 + number) * GB, concurrency=1 + number % 2, process_seconds=1.0, runtime_seconds=2.0, ready_seconds=0.5,
        process_nbytes=GB // 10, runtime_nbytes=GB, prefill_seconds_per_token=2e-4, decode_seconds_per_token=0.02, runtime="torch" if number % 3 else "vllm",
    )
    for number in range(6)
]  # fmt: skip


def requests() -> Iterator[TraceRequest]:
    """Each of the first three models comes every quarter of an hour or so, now and then early, the others in bursts."""
    chance = Random(7)
    rows: list[tuple[float, str]] = []
    for number in range(3):
        now = 100.0 * number
        while now < 8 * 3600:
            rows.append((now, f"model-{number}"))
            now += chance.uniform(200, 400) if chance.random() < 0.1 else 900.0 + chance.uniform(-20, 20)
    for number in range(3, 6):
        now = 0.0
        while now < 8 * 3600:
            rows += [(now + chance.uniform(0, 20), f"model-{number}") for _ in range(chance.randrange(1, 9))]
            now += chance.expovariate(1 / 900)
    for at, name in sorted(rows):
        yield TraceRequest(at, name, chance.randrange(10, 800), chance.randrange(20, 400))


Made = Callable[[], Controller]


def made(keep_alive: KeepAlive | str = "fixed-10min", autoscaler: Autoscaler | str = "per-request") -> Controller:
    estimator = Estimator()
    policies = make_policies("serverlessllm", keep_alive, autoscaler, estimator)
    return Controller(policies.placement, policies.keep_alive, policies.autoscaler, estimator)


ESTIMATOR = "the estimator"
"""Where its memory is tried; that of the policies in the others."""
CONTROLLERS: dict[str, Made] = {
    ESTIMATOR: lambda: made("scale-to-zero"),
    **{f"keep-alive {name}": partial(made, name) for name in keepalive.POLICIES},
    **{f"autoscaler {name}": partial(made, "fixed-10min", name) for name in autoscale.POLICIES},
    "keep-alive buffered rainbowcake": lambda: made(Buffered(RainbowCake())),
    "keep-alive stem-cells over hybrid-histogram": lambda: made(StemCells(HybridHistogram())),
}  # fmt: skip
LEARN = [ESTIMATOR, *(name for name in CONTROLLERS if name.split()[1] in ("hybrid-histogram", "greedy-dual", "rainbowcake", "stem-cells", "knative", "target-concurrency"))]


@cache
def recorded(name: str) -> tuple[bytes, ...]:
    log: list[bytes] = []
    options = SimulationOptions(keep="summary", store_dram_nbytes=14 * GB, store_disk_nbytes=30 * GB, jitter=0.3)
    cluster = SimulatedCluster(Recorder(CONTROLLERS[name](), log.append), even_cluster(2, devices=2, dram_nbytes=40 * GB), MODELS, options)
    cluster.run(requests(), [(3600.0, m.ModelDeleted("model-1")), (3700.0, m.ModelDeployed(MODELS[1])), (9000.0, m.NodeLost("node-0001")), (9060.0, m.NodeJoined(even_cluster(2)[1]))])
    return tuple(log)


def restored(name: str, cut: int) -> tuple[Controller, Controller]:
    """One that has seen the log up to `cut`, and another made of what it saved."""
    before, after = CONTROLLERS[name](), CONTROLLERS[name]()
    replay(recorded(name)[:cut], before)
    after.restore(before.to_bytes())
    return before, after


def differs_without_memory(name: str, cut: int) -> bool:
    """Whether one restored without what its policies (or its estimator) learned does something else after `cut`."""
    kept = Saveable.restore
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saveable, "restore", lambda self, data: None if isinstance(self, Estimator) == (name == ESTIMATOR) else kept(self, data))
        _, after = restored(name, cut)
    try:
        replay(recorded(name)[cut:], after)
    except SllmError:
        return True
    return False


@cache
def telling_cut(name: str) -> int | None:
    """The first arrival after the middle at which it matters what was learned before. Some policies remember a second only."""
    log = list(read_log(recorded(name)))
    arrivals = [at for at in range(len(log) // 2, len(log)) if isinstance(log[at].event, m.RequestArrived)]
    arrivals = [at for at in arrivals if not log[at].actions][:50] + arrivals[:50]
    return next((cut for cut in arrivals if differs_without_memory(name, cut)), None)


@pytest.mark.parametrize("name", CONTROLLERS)
def test_one_that_was_saved_goes_on_as_recorded(name: str) -> None:
    log = recorded(name)
    cut = telling_cut(name) if name in LEARN else len(log) // 2
    assert cut is not None, "this log does not tell whether what was learned is saved"
    before, after = restored(name, cut)
    assert after.snapshot() == before.snapshot()
    assert (after.keep_alive, after.autoscaler, after.estimator) == (before.keep_alive, before.autoscaler, before.estimator)
    assert replay(log[cut:], after) == len(log) - cut > 500


def test_every_policy_with_a_memory_offers_to_save_it() -> None:
    """What a policy keeps is what the log changes in it: one that changes and cannot be saved would begin anew."""
    for name in CONTROLLERS:
        before, after = CONTROLLERS[name](), CONTROLLERS[name]()
        for record in list(read_log(recorded(name)))[:400]:
            after.handle(record.event, record.now)
        for mine, theirs in ((before.keep_alive, after.keep_alive), (before.autoscaler, after.autoscaler), (before.estimator, after.estimator)):
            assert mine == theirs or isinstance(mine, Saveable), f"{type(mine).__name__} learns and is not saved"


# What is saved


@dataclass
class Part:
    seen: int = 0

    def save(self) -> bytes:
        return str(self.seen).encode()

    def restore(self, data: bytes) -> None:
        self.seen = int(data)


@dataclass(slots=True)
class Known(Saveable):
    saved_parts: ClassVar[tuple[str, ...]] = ("part",)
    part: object = None
    option: int = 5
    tables: dict[tuple[str, Tier | None], deque[float]] = field(default_factory=dict, init=False)
    rungs: dict[Warmth, int] = field(default_factory=dict, init=False)
    clock: float = field(default=0.0, init=False)


def test_what_is_learned_comes_back_as_it_was_and_options_do_not() -> None:
    known = Known(Part(3), option=7)
    known.tables = {("n", Tier.DISK): deque([0.1, 1e300], maxlen=2), ("n", None): deque()}
    known.rungs, known.clock = {Warmth.READY: 2}, float("-inf")
    again = Known(Part(), option=9)
    again.restore(known.save())
    assert (again.tables, again.rungs, again.clock, again.option, again.part) == (known.tables, known.rungs, known.clock, 9, Part(3))
    assert again.tables["n", Tier.DISK].maxlen == 2 and again.tables["n", None].maxlen is None
    assert again.save() == known.save()


def test_a_forecaster_that_remembers_is_saved_with_its_policy() -> None:
    class Counting(Part):
        def __call__(self, times: Sequence[float]) -> float | None:
            self.seen += 1
            return float(self.seen)

    policy, again = HybridHistogram(Counting(8)), HybridHistogram(Counting())
    again.restore(policy.save())
    assert again.forecaster is not None and again.forecaster(()) == 9.0
    HybridHistogram(lambda _: 5.0).restore(HybridHistogram(lambda _: 7.0).save())  # one that remembers nothing has nothing to save


GARBAGE = [b"", b"\x00", b"nonsense", b"\x92\x80\x80", b"\x92\x81\xa1x\x01\x80"]


@pytest.mark.parametrize("data", GARBAGE, ids=range(len(GARBAGE)))
@pytest.mark.parametrize("make", [Estimator, RainbowCake, HybridHistogram, lambda: keepalive.GreedyDual(Estimator()), autoscale.KnativePodAutoscaler, autoscale.TargetConcurrency])
def test_bytes_from_elsewhere_are_refused_and_change_nothing(make: Callable[[], Saveable], data: bytes) -> None:
    policy = make()
    before = policy.save()
    with pytest.raises(SllmError, match="sav"):
        policy.restore(data)
    assert policy.save() == before


def test_what_another_kind_saved_is_refused() -> None:
    known = Known()
    known.clock = 4.0
    whole = known.save()
    for cut in range(len(whole)):
        with pytest.raises(SllmError):
            Known().restore(whole[:cut])
    with pytest.raises(SllmError, match="a Known is restored from what a Known saved"):
        known.restore(RainbowCake().save())
    with pytest.raises(SllmError, match="but not both"):
        Known().restore(Known(Part(1)).save())
    with pytest.raises(SllmError, match="but not both"):
        Known(Part(1)).restore(Known().save())
    with pytest.raises(SllmError, match="is restored from what a Known saved"):
        known.restore(whole.replace(b"clock", b"clack").replace(b"\xcb@\x10\x00\x00\x00\x00\x00\x00", b"\xa94.0seven!"))
    assert known.clock == 4.0


def test_what_cannot_be_saved_is_said_at_once() -> None:
    known = Known()
    known.rungs = {Warmth.READY: {1.0}.__iter__()}  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="cannot be saved"):
        known.save()


# What is forgotten with a model


@pytest.mark.parametrize("name", CONTROLLERS)
def test_a_deleted_model_leaves_nothing_behind(name: str) -> None:
    """Of a log with a model that is used and deleted: no policy still knows its name."""
    controller = CONTROLLERS[name]()
    replay(recorded(name)[:1500], controller)
    for part in (controller.keep_alive, controller.autoscaler, controller.estimator):
        if isinstance(part, Saveable):
            for spec in MODELS:
                part.on_delete(ModelState(spec))
            assert not any(spec.name.encode() in part.save() for spec in MODELS), f"{type(part).__name__} still knows a model that is gone"
