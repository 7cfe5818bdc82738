"""Keep-alive policies: formulas and hand-worked histograms, and what each does with one idle instance."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_mini.control.cluster import Cluster
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
from sllm_mini.control.policy import Prewarm, Stay
from sllm_mini.control.state import InstanceState
from sllm_mini.lab.forecast import autoregression
from sllm_mini.types import Warmth

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
    layer = Layer(6)
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
    assert RainbowCake(floor_first=True).floor_first


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
    assert POLICIES["scale-to-zero"]().stay(instance(), there, 0.0) == Stay(0.0)
    assert Forever().stay(instance(), there, 0.0).seconds is None


def test_a_buffer_asks_for_spare_instances() -> None:
    there = cluster("m")
    assert Buffered(FixedKeepAlive(1), 2).on_arrival(there.models["m"], there, 7.0, Warmth.READY) == [Prewarm(7.0, "m", Warmth.READY, 2)]


def test_stem_cells_follow_the_cold_starts_of_the_last_minute() -> None:
    policy, there = StemCells(FixedKeepAlive(600), initial=0, least=1, most=5, threshold=2, increment=2), cluster("m")
    model = there.models["m"]
    assert policy.wanted("python", 0.0) == 0
    counts = [policy.on_arrival(model, there, now, Warmth.RUNTIME)[0].count for now in (0.0, 10.0, 20.0, 30.0, 40.0)]
    assert counts == [1, 3, 3, 5, 5]  # 1 + floor(n / 2) x 2, at most 5
    assert policy.wanted("python", 75.0) == 3 and policy.wanted("python", 101.0) == 0
    assert policy.on_arrival(model, there, 80.0, Warmth.READY) == ()
    assert StemCells(FixedKeepAlive(1), initial=3).on_deploy(model, there, 0.0) == [Prewarm(0.0, "m", Warmth.RUNTIME, 3)]


def test_greedy_dual_ages_by_what_gave_way() -> None:
    policy, there = GreedyDual(), cluster("a", "b")
    for _ in range(4):
        policy.on_arrival(there.models["a"], there, 0.0, Warmth.COLD)
    policy.on_arrival(there.models["b"], there, 0.0, Warmth.COLD)
    seconds, nbytes = 0.5 + 2.0 + 1.0 + 1.0, 150 * MB
    rank = {name: policy.rank(instance(name), there, 0.0) for name in "ab"}
    assert rank["a"] == pytest.approx(4 * seconds / nbytes) and rank["b"] == pytest.approx(seconds / nbytes)
    policy.gave_way(instance("a"), rank["a"], 1.0)
    assert policy.rank(instance("b"), there, 1.0) == pytest.approx(rank["a"] + seconds / nbytes)  # b was used since


def test_a_snapshot_replaces_the_rungs_it_holds() -> None:
    spec = cluster("m").models["m"].spec
    restored = from_snapshot(spec, 50 * MB, 0.1)
    assert restored.process_seconds == pytest.approx(1.1) and restored.runtime_seconds == restored.ready_seconds == 0.0
    assert restored.nbytes == spec.nbytes
    with pytest.raises(ValueError, match="bandwidth"):
        from_snapshot(spec, 0.0)


def test_clairvoyant_is_back_just_in_time() -> None:
    arrivals = [100.0, 102.0, 500.0]
    policy, there = Clairvoyant(lambda _, now: next((at for at in arrivals if at > now), None)), cluster("m")
    start = 0.5 + 2.0 + 1.0 + 1.0
    assert policy.on_deploy(there.models["m"], there, 0.0) == [Prewarm(100 - start, "m", Warmth.READY)]
    assert policy.stay(instance(), there, 101.0).seconds == pytest.approx(1.0, abs=0.01)  # sooner than a start would take
    assert policy.stay(instance(), there, 103.0) == Stay(0.0, again=Prewarm(500 - start, "m", Warmth.READY))
    assert policy.stay(instance(), there, 501.0) == Stay(0.0)
    assert policy.rank(instance(), there, 0.0) > policy.rank(instance(), there, 103.0) > policy.rank(instance(), there, 501.0)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_answers_every_question(name: str) -> None:
    policy, there = POLICIES[name](), cluster("m", "k")
    for now in (0.0, 1.0, 70.0, 5000.0):
        for model in there.models.values():
            for prewarm in (*policy.on_deploy(model, there, now), *policy.on_arrival(model, there, now, Warmth.COLD)):
                assert prewarm.at >= now and prewarm.count >= 1
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
