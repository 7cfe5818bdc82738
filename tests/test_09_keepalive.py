"""Keep-alive policies: formulas and hand-worked histograms, and what each does with one idle instance."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from sllm_mini.control import messages as m
from sllm_mini.control.autoscale import PerRequest
from sllm_mini.control.cluster import Cluster
from sllm_mini.control.controller import Controller
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.keepalive import (
    POLICIES,
    Buffered,
    Clairvoyant,
    FixedKeepAlive,
    Forever,
    GreedyDual,
    HybridHistogram,
    RainbowCake,
    StemCells,
    from_snapshot,
    layer_ttl,
)
from sllm_mini.control.keepalive.histogram import IdleTimes, Windows
from sllm_mini.control.keepalive.rainbowcake import Layer, beta_seconds, quantile_seconds
from sllm_mini.control.messages import ModelSpec, NodeSpec
from sllm_mini.control.placement import AvailabilityFirst
from sllm_mini.control.policy import KeepAlive, Move, Plan, Prewarm, Stay
from sllm_mini.control.state import InstanceState, ModelState, RequestState
from sllm_mini.lab.forecast import autoregression
from sllm_mini.types import Tier, Warmth

MB = 1_000_000


def spec_of(name: str, runtime: str = "python") -> ModelSpec:
    return ModelSpec(
        name=name, nbytes=100 * MB, runtime=runtime, process_nbytes=10 * MB, runtime_nbytes=40 * MB, process_seconds=0.5, runtime_seconds=2.0, ready_seconds=1.0
    )


def cluster(*names: str, runtime: str = "python") -> Cluster:
    made = Cluster()
    made.add_node(NodeSpec(name="n", devices=4, dram_nbytes=10**12, remote_bytes_per_second=100 * MB, disk_bytes_per_second=1e9, dram_bytes_per_second=1e10))
    for name in names:
        made.add_model(spec_of(name, runtime))
    return made


def instance(model: str | None = "m", warmth: Warmth = Warmth.READY, uses: int = 1) -> InstanceState:
    runtime = "python" if warmth >= Warmth.RUNTIME else None
    return InstanceState(1, "n", spec_of(model or "m"), model, runtime, warmth, warmth, uses=uses)


class Planned(AvailabilityFirst):
    """A placement that is told its next plans."""

    plans: list[Plan]

    def choose_node(self, model: ModelState, cluster: Cluster, now: float) -> Plan | None:
        return self.plans.pop(0) if self.plans else super().choose_node(model, cluster, now)


class Run:
    """A controller under this policy, with machines and models; each start takes no time unless `climb` is False."""

    def __init__(self, keep: KeepAlive, names: str = "m", devices: Sequence[int] = (4,)) -> None:
        self.placement = Planned()
        self.placement.plans = []
        self.controller = Controller(self.placement, keep, PerRequest())
        self.climb, self.now = True, 0.0
        self.started: list[m.Start] = []
        for number, count in enumerate(devices):
            spec = m.NodeSpec(name=f"n{number}", devices=count, dram_nbytes=10**12, remote_bytes_per_second=100 * MB, disk_bytes_per_second=1e9, dram_bytes_per_second=1e10)
            self.tell(m.NodeJoined(spec))
        for name in names:
            self.tell(m.ModelDeployed(spec_of(name)))

    def tell(self, event: m.AnyEvent) -> None:
        """And what follows at once: timers that are due, starts."""
        for action in self.controller.handle(event, self.now):
            if isinstance(action, m.SetTimer) and action.at <= self.now:
                self.tell(m.TimerFired(action.timer))
            elif isinstance(action, m.Start):
                self.started.append(action)
                if self.climb:
                    self.reach()

    def reach(self) -> None:
        start = self.started.pop(0)
        self.tell(m.InstanceReached(start.instance, Tier.REMOTE, 1.0, 0.0, start.epoch))

    def arrive(self, request: int, model: str = "m") -> None:
        self.tell(m.RequestArrived(request, model, 5))

    def finish(self, request: int) -> None:
        self.tell(m.RequestFinished(request, 5, 1.0, self.controller.cluster.requests[request].epoch))


# --- formulas -------------------------------------------------------------------------------------------------------


def test_the_quantile_of_a_poisson_process() -> None:
    assert quantile_seconds(0.8, 1.0) == pytest.approx(1.609, abs=5e-4)
    draw = random.Random(0)
    gaps = [draw.expovariate(1 / 7) for _ in range(20_000)]
    assert sum(gap <= quantile_seconds(0.8, 7.0) for gap in gaps) / len(gaps) == pytest.approx(0.8, abs=0.01)


def test_beta_weighs_a_start_against_its_memory() -> None:
    assert beta_seconds(2.0, 100 * MB) == math.ceil(0.996 * 2.0 / (0.004 * 100)) == 5
    assert beta_seconds(30.0, 16_000 * MB) == 1.0 and 0.996 * 30 / (0.004 * 16_000) < 1  # alpha is bound to its units
    assert beta_seconds(1.0, 0) == math.inf


@given(st.floats(0, 1e5), st.floats(0, 1e5), st.floats(0, 1e3))
def test_a_layer_stays_within_floor_and_beta(alive: float, beta: float, floor: float) -> None:
    ttl = layer_ttl(alive, beta, floor)
    assert ttl <= beta and (ttl >= min(floor, beta)) and (ttl == alive or ttl in (floor, beta))
    quirk = layer_ttl(alive, beta, floor, floor_first=True)
    assert quirk == (floor if alive < floor else min(alive, beta))
    assert quirk == ttl or beta < floor  # only there does the quirk show


@pytest.mark.parametrize("make", [lambda: quantile_seconds(1.0, 1.0), lambda: quantile_seconds(0.5, -1.0), lambda: beta_seconds(1.0, 1, 1.0), lambda: beta_seconds(-1.0, 1)])
def test_formulas_refuse_what_cannot_be(make: object) -> None:
    with pytest.raises(ValueError, match="give"):
        make()  # type: ignore[operator]


def test_a_mean_gap_is_over_the_last_arrivals_only() -> None:
    layer = Layer(deque(maxlen=6))
    assert layer.mean_gap(1.0) is None
    for now in (0.0, 100.0, 110.0, 120.0, 130.0, 140.0, 150.0):
        layer.times.append(now)
    assert layer.mean_gap(160.0) == pytest.approx((160 - 100) / 6)


# --- RainbowCake ----------------------------------------------------------------------------------------------------


def test_rainbowcake_sheds_layer_after_layer() -> None:
    policy, there = RainbowCake(), cluster("m")
    policy.on_deploy(there.models["m"], there, 0.0)
    for warmth, first, below in ((Warmth.READY, 300.0, Warmth.RUNTIME), (Warmth.RUNTIME, 180.0, Warmth.PROCESS), (Warmth.PROCESS, 120.0, Warmth.COLD)):
        assert policy.stay(instance("m" if warmth is Warmth.READY else None, warmth), there, 0.0) == Stay(first, below)


def test_rainbowcake_shares_arrivals_by_runtime() -> None:
    policy, there = RainbowCake(alpha=0.99999), cluster("a", "b")
    other = cluster("c", runtime="java")
    for made in (there, other):
        for model in made.models.values():
            policy.on_deploy(model, made, 0.0)
    for now in range(0, 600, 100):  # a and b take turns, each every 200 s; c never
        policy.on_arrival(there.models["ab"[now // 100 % 2]], there, float(now), Warmth.COLD)
    t = quantile_seconds(0.8, 1.0)
    assert policy.ttl(Warmth.READY, "a", "python", 500.0) == pytest.approx(t * 500 / 3)
    assert policy.ttl(Warmth.RUNTIME, "", "python", 500.0) == pytest.approx(t * 500 / 6)
    assert policy.ttl(Warmth.PROCESS, "", "java", 500.0) == pytest.approx(t * 500 / 6)  # all share the processes
    assert policy.ttl(Warmth.RUNTIME, "", "java", 500.0) == 180.0  # nobody of that runtime has come


def test_rainbowcake_keeps_no_longer_than_beta() -> None:
    policy, there = RainbowCake(), cluster("m")
    policy.on_deploy(there.models["m"], there, 0.0)
    for now in (0.0, 1000.0, 2000.0):
        policy.on_arrival(there.models["m"], there, now, Warmth.COLD)
    assert policy.ttl(Warmth.READY, "m", "python", 2000.0) == beta_seconds(1.0 + 1.0, 100 * MB)
    assert policy.ttl(Warmth.READY, "m", "python", 2000.0) == 5.0
    for now in range(2001, 2010):
        policy.on_arrival(there.models["m"], there, float(now), Warmth.COLD)
    assert policy.ttl(Warmth.READY, "m", "python", 2010.0) == 5.0


def test_the_quirk_of_the_floor_outlives_beta() -> None:
    policy, there = RainbowCake(floor_first=True), cluster("m")
    policy.on_deploy(there.models["m"], there, 0.0)
    for now in (0.0, 1.0, 2.0):
        policy.on_arrival(there.models["m"], there, now, Warmth.COLD)
    assert policy.ttl(Warmth.READY, "m", "python", 2.0) == 60.0


def test_without_figures_a_layer_stays_ten_minutes_at_most() -> None:
    policy, there = RainbowCake(), cluster("m")  # nobody has told it of the model
    for now in (0.0, 1000.0, 2000.0):
        policy.on_arrival(there.models["m"], there, now, Warmth.COLD)
    assert [policy.ttl(warmth, "m", "python", 2000.0) for warmth in (Warmth.READY, Warmth.RUNTIME, Warmth.PROCESS)] == [600.0] * 3


def test_what_gives_way_sheds_one_layer() -> None:
    policy = RainbowCake()
    assert policy.gave_way(instance(), 0.0, 0.0) == Stay(0.0, Warmth.RUNTIME)
    assert policy.gave_way(instance(None, Warmth.RUNTIME), 0.0, 0.0) == Stay(0.0, Warmth.PROCESS)
    assert policy.gave_way(instance(None, Warmth.PROCESS), 0.0, 0.0) == Stay(0.0, Warmth.COLD)


def test_layers_are_of_the_models_there_are() -> None:
    """A model that comes again counts once, with its last figures and in its last runtime; one that is deleted not at all."""
    policy, there = RainbowCake(alpha=0.9999), cluster("a", "b")
    for model in there.models.values():
        policy.on_deploy(model, there, 0.0)
    alone = RainbowCake(alpha=0.9999)
    alone.on_deploy(there.models["a"], there, 0.0)
    before = {warmth: dict(layers) for warmth, layers in alone._layers.items()}
    slow = structs.replace(spec_of("b", runtime="java"), runtime_seconds=90.0, process_seconds=9.0)
    policy.on_deploy(ModelState(slow), there, 1.0)
    assert policy._layers[Warmth.RUNTIME]["python"] == alone._layers[Warmth.RUNTIME]["python"]
    assert policy._layers[Warmth.RUNTIME]["java"].beta == beta_seconds(90.0, 40 * MB, 0.9999)
    assert policy._layers[Warmth.PROCESS][""].beta == beta_seconds((9.0 + 0.5) / 2, 10 * MB, 0.9999)
    policy.on_deploy(there.models["a"], there, 2.0)
    assert policy._layers[Warmth.PROCESS][""].beta == beta_seconds((9.0 + 0.5) / 2, 10 * MB, 0.9999)
    policy.on_delete(ModelState(slow))
    assert policy._layers == before
    policy.on_delete(there.models["a"])
    policy.on_delete(there.models["a"])
    assert policy == RainbowCake(alpha=0.9999)


def test_rainbowcake_prewarms_by_the_quantile() -> None:
    quirk, there = RainbowCake(prewarm_always=True), cluster("m")
    assert quirk.on_arrival(there.models["m"], there, 0.0, Warmth.COLD) == ()
    there.models["m"].open[1] = instance()
    (prewarm,) = quirk.on_arrival(there.models["m"], there, 60.0, Warmth.READY)
    assert prewarm.at == pytest.approx(60 + 1.6094 * 30, abs=1e-2) and (prewarm.model, prewarm.warmth, prewarm.count) == ("m", Warmth.READY, 2)
    assert quirk.stay(instance(), there, 61.0).again is None


def test_rainbowcake_prewarms_only_what_will_be_gone() -> None:
    policy, there = RainbowCake(), cluster("m")
    model = there.models["m"]
    policy.on_deploy(model, there, 0.0)
    beta = beta_seconds(1.0 + 1.0, 100 * MB)
    assert beta == 5.0
    policy.on_arrival(model, there, 0.0, Warmth.COLD)
    assert policy.stay(instance(), there, 1.0) == Stay(300.0, Warmth.RUNTIME)  # nothing is expected after one arrival
    assert policy.on_arrival(model, there, 4.0, Warmth.READY) == ()
    assert policy.stay(instance(), there, 5.0) == Stay(beta, Warmth.RUNTIME)  # it is there by 4 + 1.609 x 2
    stay = policy.gave_way(instance(), 0.0, 5.0)
    assert stay.again is not None and stay.again.at == pytest.approx(4 + 1.6094 * 2, abs=1e-3)
    (later,) = policy.on_arrival(model, there, 5.5, Warmth.COLD)  # before that: the next is expected later
    assert later.at == pytest.approx(5.5 + 1.6094 * 5.5 / 3, abs=1e-3)
    assert policy.on_arrival(model, there, 100.0, Warmth.COLD) == ()  # that one was due long ago
    stay = policy.stay(instance(), there, 101.0)
    assert stay.seconds == beta and stay.again is not None
    assert stay.again.at == pytest.approx(100 + 1.6094 * 100 / 4, abs=1e-2) and stay.again.count == 1


# --- hybrid histogram -----------------------------------------------------------------------------------------------


def histogram(**minutes: int) -> IdleTimes:
    """`m5=3`: three idle times of five minutes and a half."""
    idle = IdleTimes([0] * 240)
    for name, count in minutes.items():
        for _ in range(count):
            idle.add((int(name[1:]) + 0.5) * 60)
    return idle


def test_hand_worked_histograms() -> None:
    policy = HybridHistogram()
    whole = Windows(0.0, 240 * 60.0)
    assert policy.windows(None) == whole
    assert policy.windows(histogram(m10=9)) == whole  # too few
    # 100 times in minute 10: P5 is its beginning, 0.9 x 10 = 9; P99 its end, 1.1 x 11 = 12.1 -> 13.
    assert policy.windows(histogram(m10=100)) == Windows(9 * 60.0, 13 * 60.0)
    # 6 of 100 in minute 3: the 5th percentile falls there, 0.9 x 3 = 2.7 -> 2; 1 of 100 in minute 60 lies beyond the 99th.
    assert policy.windows(histogram(m3=6, m20=93, m60=1)) == Windows(2 * 60.0, math.ceil(1.1 * 21) * 60.0)
    assert policy.windows(histogram(m3=6, m20=92, m60=2)) == Windows(2 * 60.0, math.ceil(1.1 * 61) * 60.0)
    # P5 in the first minute: it never goes.
    assert policy.windows(histogram(m0=6, m20=94)).prewarm == 0.0
    flat = IdleTimes([5] * 240)
    assert flat.variation() == 0.0 and policy.windows(flat) == whole


def test_idle_times_outside_are_forecast() -> None:
    idle = histogram(m10=4, m300=6)
    assert idle.outside == 6
    seen: list[tuple[float, ...]] = []

    def forecaster(times: Sequence[float]) -> float | None:
        seen.append(tuple(times))
        return 20_000.0

    windows = HybridHistogram(forecaster).windows(idle)
    assert (windows.prewarm, windows.alive) == pytest.approx((0.85 * 20_000, 1.15 * 20_000))
    assert seen == [tuple([630.0] * 4 + [18_030.0] * 6)]
    for silent in (None, lambda _: None, lambda _: -5.0):
        assert HybridHistogram(silent).windows(idle) == Windows(0.0, 14_400.0)
    assert HybridHistogram(forecaster).windows(histogram(m10=6, m300=4)) != HybridHistogram(forecaster).windows(idle)


def test_hybrid_histogram_goes_and_is_back_in_time() -> None:
    policy, there = HybridHistogram(), cluster("m")
    model = there.models["m"]
    now = 0.0
    for _ in range(20):
        policy.on_arrival(model, there, now, Warmth.READY)
        policy.stay(instance(), there, now + 5)
        now += 5 + 10.5 * 60
    policy.on_arrival(model, there, now, Warmth.READY)
    stay = policy.stay(instance(), there, now + 5)
    assert stay == Stay(0.0, again=Prewarm(now + 5 + 9 * 60, "m", Warmth.READY))
    assert policy.stay(instance(uses=0), there, now + 5 + 9 * 60) == Stay(4 * 60.0)  # until 13 minutes after its work


def test_an_early_request_takes_the_place_of_its_pre_warm() -> None:
    policy, there = HybridHistogram(), cluster("m")
    model = there.models["m"]
    policy._idle["m"] = histogram(m10=20)
    assert policy.stay(instance(), there, 100.0).again == Prewarm(640.0, "m", Warmth.READY)
    assert policy.on_arrival(model, there, 300.0, Warmth.COLD) == (Prewarm(300.0, "m", Warmth.READY, 0),)
    assert policy.on_arrival(model, there, 301.0, Warmth.COLD) == ()
    policy.stay(instance(), there, 400.0)
    assert policy.on_arrival(model, there, 940.0, Warmth.READY) == (), "it was there in time"


def test_a_cancelled_pre_warm_starts_nothing() -> None:
    policy = HybridHistogram()
    run = Run(policy)
    policy._idle["m"] = histogram(m10=20)
    run.arrive(0)
    run.finish(0)
    (timer,) = (id for id, each in run.controller.timers.pending.items() if each.at == 540.0)
    run.now = 300.0
    run.arrive(1)  # it runs on when the pre-warm would have been due
    run.now, run.climb = 540.0, False
    run.tell(m.TimerFired(timer))
    assert not run.started


def test_only_the_end_of_all_work_begins_an_idle_time() -> None:
    policy, there = HybridHistogram(), cluster("m")
    model = there.models["m"]
    model.running = 1
    policy.stay(instance(), there, 10.0)
    policy.on_arrival(model, there, 100.0, Warmth.READY)
    assert "m" not in policy._idle
    model.running = 0
    policy.stay(instance(), there, 200.0)
    policy.on_arrival(model, there, 500.0, Warmth.READY)
    assert policy._idle["m"].counts[5] == sum(policy._idle["m"].counts) == 1
    policy.stay(instance(), there, 600.0)
    policy.on_delete(model)
    assert policy == HybridHistogram()


def test_an_autoregression_follows_what_alternates() -> None:
    draw = random.Random(3)
    values = [300.0]
    for _ in range(60):
        values.append(600 - values[-1] + 200 + draw.gauss(0, 5))  # x' = 800 - x
    ahead = autoregression()(values)
    assert ahead == pytest.approx(800 - values[-1], abs=25)
    second = [10.0, 20.0]
    for _ in range(40):
        second.append(0.5 * second[-1] - 0.3 * second[-2] + 12)
    assert autoregression(2)(second[:30]) == pytest.approx(second[30], rel=1e-6)
    assert autoregression()([]) is None and autoregression()([5.0, 7.0]) == 6.0
    with pytest.raises(ValueError, match="order"):
        autoregression(0)


# --- the others -----------------------------------------------------------------------------------------------------


def test_fixed_keep_alive() -> None:
    there = cluster("m")
    assert FixedKeepAlive(600).stay(instance(), there, 0.0) == Stay(600)
    assert FixedKeepAlive(600, Warmth.DRAM).stay(instance(), there, 0.0) == Stay(600, Warmth.DRAM)
    assert FixedKeepAlive(600, Warmth.DRAM).stay(instance(warmth=Warmth.DRAM), there, 0.0) == Stay(600, Warmth.COLD)
    assert POLICIES["scale-to-zero"](Estimator()).stay(instance(), there, 0.0) == Stay(0.0)
    assert Forever().stay(instance(), there, 0.0).seconds is None


@pytest.mark.parametrize("policy", [FixedKeepAlive(600, Warmth.DRAM), Forever(Warmth.DRAM)])
def test_what_gives_way_keeps_what_the_policy_lets_it(policy: KeepAlive) -> None:
    assert policy.gave_way(instance(), 0.0, 5.0) == Stay(0.0, Warmth.DRAM)
    assert policy.gave_way(instance(warmth=Warmth.DRAM), 0.0, 5.0) == Stay(0.0, Warmth.COLD)
    assert FixedKeepAlive(600).gave_way(instance(), 0.0, 5.0) == Stay(0.0, Warmth.COLD)


def test_a_buffer_asks_for_spare_instances() -> None:
    there, policy = cluster("m"), Buffered(FixedKeepAlive(1), 2)
    model = there.models["m"]
    assert policy.on_deploy(model, there, 0.0) == [Prewarm(0.0, "m", Warmth.READY, 2)]
    assert policy.on_arrival(model, there, 7.0, Warmth.READY) == [Prewarm(7.0, "m", Warmth.READY, 2)]
    model.spec = structs.replace(model.spec, concurrency=2)
    model.queue.extend(RequestState(number, "m", 1, "", 7.0) for number in range(3))
    assert policy.on_arrival(model, there, 7.0, Warmth.READY)[0].count == 2 + 2


def test_a_buffer_has_its_spare_beside_what_climbs_for_a_request() -> None:
    run = Run(Buffered(FixedKeepAlive(600.0)))
    assert len(run.controller.cluster.instances) == 1, "the spare is there from the first day"
    run.now, run.climb = 10.0, False
    run.arrive(0)
    assert len(run.started) == 1, "a new spare for the one that was taken"
    run.arrive(1)
    assert len(run.started) == 2, "the one that climbs is for the request that waits, so one more is the spare"
    while run.started:
        run.reach()
    idle = [each for each in run.controller.cluster.instances.values() if each.idle_since is not None]
    assert len(idle) == 1 and run.controller.cluster.models["m"].running == 2


def test_stem_cells_follow_the_cold_starts_of_the_last_minute() -> None:
    policy, there = StemCells(FixedKeepAlive(600), initial=0, least=1, most=5, threshold=2, increment=2), cluster("m")
    model = there.models["m"]
    assert policy.wanted("python", 0.0) == 0
    counts = [policy.on_arrival(model, there, now, Warmth.RUNTIME)[0].count for now in (0.0, 10.0, 20.0, 30.0, 40.0)]
    assert counts == [1, 3, 3, 5, 5]  # 1 + floor(n / 2) x 2, at most 5
    assert policy.wanted("python", 75.0) == 3 and policy.wanted("python", 101.0) == 0
    assert policy.on_arrival(model, there, 80.0, Warmth.READY) == ()
    assert StemCells(FixedKeepAlive(1), initial=3).on_deploy(model, there, 0.0) == [Prewarm(0.0, "m", Warmth.RUNTIME, 3)]
    assert list(policy.on_deploy(model, there, 0.0)) == []
    assert StemCells(FixedKeepAlive(1), initial=3).on_arrival(model, there, 0.0, Warmth.COLD)[0].count == 3, "the initial ones are made anew"
    assert policy.on_arrival(model, there, 200.0, Warmth.DRAM) == (), "weights in memory need no stem cell"


def test_a_minute_of_cold_starts_ends_after_a_minute() -> None:
    policy, there = StemCells(FixedKeepAlive(600), initial=0), cluster("m")
    policy.on_arrival(there.models["m"], there, 100.0, Warmth.PROCESS)
    assert (policy.wanted("python", 159.9), policy.wanted("java", 159.9), policy.wanted("python", 160.0)) == (2, 0, 0)


def test_the_initial_stem_cells_stay_and_others_go() -> None:
    there = cluster("m")
    node, spec = there.nodes["n"], there.models["m"].spec
    cells = [there.spawn(node, spec, 0.0) for _ in range(4)]
    policy = StemCells(FixedKeepAlive(7.0), initial=2, ttl_seconds=30.0)
    stays = []
    for cell, warmth in zip(cells, (Warmth.PROCESS, Warmth.RUNTIME, Warmth.RUNTIME, Warmth.RUNTIME), strict=True):
        there.climb(cell, spec, warmth)
        there.book(cell)
        there.reached(cell)
        there.rest(cell, 0.0, 0.0)
        stays.append(policy.stay(cell, there, 0.0).seconds)
    assert stays == [30.0, None, None, 30.0], "a process without a runtime is no stem cell"
    assert policy.stay(instance(None, Warmth.PROCESS), cluster("m"), 0.0) == Stay(30.0)
    assert policy.stay(instance(), there, 0.0) == Stay(7.0)


def test_greedy_dual_ages_by_what_gave_way() -> None:
    policy, there = GreedyDual(Estimator()), cluster("a", "b")
    for _ in range(4):
        policy.on_arrival(there.models["a"], there, 0.0, Warmth.COLD)
    policy.on_arrival(there.models["b"], there, 0.0, Warmth.COLD)
    seconds, nbytes = 0.5 + 2.0 + 1.0 + 1.0, 150 * MB
    rank = {name: policy.rank(instance(name), there, 0.0) for name in "ab"}
    assert rank["a"] == pytest.approx(4 * seconds / nbytes) and rank["b"] == pytest.approx(seconds / nbytes)
    policy.gave_way(instance("a"), rank["a"], 1.0)
    assert policy.rank(instance("b"), there, 1.0) == pytest.approx(rank["a"] + seconds / nbytes)  # b was used since
    policy.gave_way(instance("b"), rank["b"], 2.0)
    assert policy._clock == rank["a"], "the clock never goes back"
    assert policy.rank(instance(None, Warmth.RUNTIME), there, 2.0) == rank["a"]
    assert policy.stay(instance("a"), there, 2.0) == Stay(None)
    policy.on_delete(there.models["a"])
    assert policy.rank(instance("a"), there, 2.0) == policy._clock


def test_what_a_start_saves_is_what_was_learned_and_not_who_loads_now() -> None:
    estimator, there = Estimator(), cluster("a")
    policy, model = POLICIES["greedy-dual"](estimator), there.models["a"]
    policy.on_arrival(model, there, 0.0, Warmth.COLD)
    quiet = policy.rank(instance("a"), there, 5.0)
    there.nodes["n"].loads_until = 500.0
    assert policy.rank(instance("a"), there, 5.0) == quiet == pytest.approx(4.5 / (150 * MB))
    estimator.observe_start(there.nodes["n"], model.spec, Warmth.COLD, Tier.REMOTE, 11.0, 0.0, 0.0, 1, 1.0)
    assert policy.rank(instance("a"), there, 5.0) == pytest.approx(11.0 / (150 * MB))


def test_the_clock_of_greedy_dual_is_of_idle_ones_that_gave_way() -> None:
    """One that was at work, and was preempted or moved, is no measure of what the cache holds."""
    policy = GreedyDual(Estimator())
    run = Run(policy, "ab", devices=(1, 1))
    run.placement.plans = [Plan("n0")]
    run.arrive(0, "a")
    run.finish(0)
    rank = run.controller.cluster.instances[0].rank
    assert rank > 0
    run.arrive(1, "a")
    run.placement.plans = [Plan("n0", preempted=(0,)), Plan("n1")]
    run.arrive(2, "b")
    assert 0 not in run.controller.cluster.instances and policy._clock == 0.0

    run = Run(policy, "ab", devices=(1, 1))
    run.placement.plans = [Plan("n0")]
    run.arrive(0, "a")
    run.finish(0)
    run.arrive(1, "a")
    run.placement.plans = [Plan("n0", moves=(Move(0, "n1"),))]
    run.arrive(2, "b")
    run.tell(m.MigrationFinished(1, 0.5, 3, run.controller.cluster.requests[1].epoch))
    assert 0 not in run.controller.cluster.instances and policy._clock == 0.0
    run.finish(1)
    (moved,) = run.controller.cluster.models["a"].instances.values()
    rank = moved.rank
    run.placement.plans = [Plan("n1", give_way=(moved.id,))]
    run.arrive(3, "b")
    assert policy._clock == rank > 0


def test_an_idle_one_that_others_moved_to_is_at_work() -> None:
    policy = GreedyDual(Estimator())
    run = Run(policy, "ab", devices=(1, 1))
    run.placement.plans = [Plan("n0"), Plan("n1")]
    run.arrive(0, "a")
    run.arrive(1, "a")
    run.finish(1)  # instance 1 is idle, and ranked
    run.placement.plans = [Plan("n0", moves=(Move(0, "n1", 1),)), Plan("n1", preempted=(1,))]
    run.arrive(2, "b")
    run.tell(m.MigrationFinished(0, 0.5, 3, run.controller.cluster.requests[0].epoch))
    run.arrive(3, "b")
    assert not run.controller.cluster.models["a"].instances and policy._clock == 0.0


def test_a_snapshot_replaces_the_rungs_it_holds() -> None:
    spec = cluster("m").models["m"].spec
    restored = from_snapshot(spec, 50 * MB, 0.1)
    assert restored.process_seconds == pytest.approx(1.1) and restored.runtime_seconds == restored.ready_seconds == 0.0
    assert restored.nbytes == spec.nbytes
    with pytest.raises(ValueError, match="bandwidth"):
        from_snapshot(spec, 0.0)


def test_clairvoyant_is_back_just_in_time() -> None:
    arrivals = [100.0, 102.0, 500.0]
    policy, there = Clairvoyant(lambda _, now: next((at for at in arrivals if at > now), None), Estimator()), cluster("m")
    start = 0.5 + 2.0 + 1.0 + 1.0
    assert policy.on_deploy(there.models["m"], there, 0.0) == [Prewarm(100 - start, "m", Warmth.READY)]
    assert policy.stay(instance(), there, 101.0).seconds == pytest.approx(1.0, abs=0.01)  # sooner than a start would take
    assert policy.stay(instance(), there, 103.0) == Stay(0.0, again=Prewarm(500 - start, "m", Warmth.READY))
    assert policy.stay(instance(), there, 501.0) == Stay(0.0)
    assert policy.rank(instance(), there, 0.0) > policy.rank(instance(), there, 103.0) > policy.rank(instance(), there, 501.0)
    policy.first = False
    assert policy.on_deploy(there.models["m"], there, 0.0) == (), "the first request is to find it cold"
    late = Clairvoyant(lambda _, now: now + 1.0, Estimator())
    assert late.on_deploy(there.models["m"], there, 7.0) == [Prewarm(7.0, "m", Warmth.READY)]
    empty = Cluster()
    empty.add_model(spec_of("m"))
    assert late.on_deploy(empty.models["m"], empty, 7.0) == [Prewarm(8.0, "m", Warmth.READY)]


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_answers_every_question(name: str) -> None:
    policy, there = POLICIES[name](Estimator()), cluster("m", "k")
    for now in (0.0, 1.0, 70.0, 5000.0):
        for model in there.models.values():
            for prewarm in (*policy.on_deploy(model, there, now), *policy.on_arrival(model, there, now, Warmth.COLD)):
                assert prewarm.at >= now and prewarm.count >= 0
            for warmth in (Warmth.READY, Warmth.RUNTIME, Warmth.PROCESS):
                one = instance(model.spec.name if warmth is Warmth.READY else None, warmth)
                stay = policy.stay(one, there, now)
                assert (stay.seconds is None or stay.seconds >= 0) and stay.then < warmth
                assert policy.gave_way(one, policy.rank(one, there, now), now).then < warmth


@pytest.mark.parametrize(
    "make",
    [
        lambda: FixedKeepAlive(-1), lambda: FixedKeepAlive(float("nan")), lambda: Buffered(FixedKeepAlive(1), 0), lambda: StemCells(FixedKeepAlive(1), least=5, most=4),
        lambda: StemCells(FixedKeepAlive(1), threshold=0), lambda: HybridHistogram(bins=0), lambda: RainbowCake(window=1), lambda: RainbowCake(alpha=1.0), lambda: RainbowCake(p=1.0),
    ],
)  # fmt: skip
def test_what_keeps_nothing_is_refused(make: object) -> None:
    with pytest.raises(ValueError, match=r"give|need"):
        make()  # type: ignore[operator]
