"""Autoscalers: Knative's windows and panic against sequences worked by hand, and what the others promise."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm_mini.control.autoscale import (
    POLICIES,
    BoundedQueue,
    KnativePodAutoscaler,
    PerRequest,
    QueueLength,
    TargetConcurrency,
)
from sllm_mini.control.autoscale.knative import Windows
from sllm_mini.control.messages import ModelSpec
from sllm_mini.control.state import InstanceState, ModelState, RequestState
from sllm_mini.types import Warmth


def model(running: int = 0, queued: int = 0, ready: int = 0, starting: int = 0, **spec: int) -> ModelState:
    state = ModelState(ModelSpec(name="m", nbytes=1, **spec))  # type: ignore[arg-type]
    state.running, state.ready = running, ready
    state.queue = deque(RequestState(n, "m", 1, "", 0.0) for n in range(queued))
    state.starting = {n: InstanceState(n, "n", state.spec, "m", "python", Warmth.COLD, Warmth.READY) for n in range(starting)}
    return state


class Driven:
    """One model under a KPA with 10 requests per instance: ready is whatever was desired at the last tick."""

    def __init__(self, ready: int = 0) -> None:
        self.scaler = KnativePodAutoscaler(target=10, utilisation=1.0)
        self.model = model(ready=ready)
        self.now = 0.0

    def tick(self, concurrency: int, seconds: float = 2.0) -> int:
        """That many requests run from now on; the decision after `seconds` of ticks of 2 s, which becomes what is ready."""
        self.model.running = concurrency
        self.scaler.observe(self.model, self.now)
        desired = self.model.ready
        for _ in range(round(seconds / 2)):
            self.now += 2.0
            desired = self.scaler.desired(self.model, self.now)
            self.model.ready = desired
        return desired


def test_steady_load_is_divided_by_the_target() -> None:
    driven = Driven(ready=3)
    assert driven.tick(30, 60) == 3
    assert driven.tick(31, 120) == 4  # a mean of 31 over a whole window: 3.1 instances


def test_panic_follows_the_short_window_and_never_goes_down() -> None:
    driven = Driven(ready=1)
    assert driven.tick(10, 60) == 1
    # 2 s at 100: the last 6 s hold (4*10 + 2*100)/6 = 40 -> 4 instances, 4/1 >= 2: panic. Stable: (58*10 + 2*100)/60 = 13 -> 2.
    assert driven.tick(100, 2) == 4
    # 4 s at 100: (2*10 + 4*100)/6 = 70 -> 7; 7/4 < 2 is not over the threshold, but panic goes on and takes the maximum.
    assert driven.tick(100, 2) == 7
    assert driven.tick(100, 2) == 10
    # The load falls away: in panic nothing goes down until a full stable window after the last tick over the threshold (t = 62).
    assert driven.tick(0, 56) == 10 and driven.now == 122.0
    # t = 124 is the first tick more than 60 s after 62. Stable holds 64..66 at 100: 200/60 = 3.3 -> 4, no lower than half of 10.
    assert driven.tick(0, 2) == 5
    # From now on at most halved at each tick: floor(5/2) = 2 while the window still holds what came; then nothing for 60 s: 0.
    assert driven.tick(0, 2) == 2
    assert driven.tick(0, 60) == 0


def test_panic_goes_on_while_ticks_are_over_the_threshold() -> None:
    driven = Driven(ready=1)
    driven.model.running = 0
    driven.tick(0, 60)
    driven.tick(50, 2)
    desired = []
    for _ in range(60):  # what is ready never follows, so each tick is over the threshold and starts the window again
        desired.append(driven.tick(50, 2))
        driven.model.ready = 1
    assert set(desired[3:]) == {5}
    assert driven.scaler._models["m"].over_since == driven.now


def test_the_last_instance_goes_only_after_a_stable_window_without_traffic() -> None:
    driven = Driven(ready=1)
    driven.tick(1, 10)
    assert [driven.tick(0, 2) for _ in range(29)] == [1] * 29
    assert driven.tick(0, 2) == 0 and driven.now == 70.0


def test_from_zero_the_first_request_starts_one_at_once() -> None:
    scaler = KnativePodAutoscaler()
    state = model()
    scaler.observe(state, 0.0)
    assert scaler.desired(state, 0.0) == 0
    state.queue.append(RequestState(1, "m", 1, "", 0.5))
    scaler.observe(state, 0.5)
    assert scaler.desired(state, 0.5) == 1


def test_scale_up_and_down_are_bounded_by_factors() -> None:
    scaler = KnativePodAutoscaler(target=1, utilisation=1.0, max_scale_up=3)
    state = model(running=1000, ready=2)
    scaler.observe(state, 0.0)
    assert scaler.desired(state, 60.0) == 6
    assert Driven(ready=9).tick(0, 2) == 4


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 9), st.integers(0, 50)), min_size=1, max_size=60), st.integers(1, 60))
def test_a_window_is_the_integral_of_what_was_set(steps: list[tuple[float, int]], seconds: int) -> None:
    windows, now, history = Windows(60, 0.0), 0.0, [(0.0, 0.0)]
    for gap, value in steps:
        now += gap
        windows.set(value, now)
        history.append((now, value))
    end_of_all = float(math.ceil(now + 0.001))
    begin = max(end_of_all - seconds, 0.0)
    area = 0.0
    for (start, held), (end, _) in zip(history, [*history[1:], (end_of_all, 0)], strict=True):
        area += held * max(min(end, end_of_all) - max(start, begin), 0.0)
    assert windows.mean(seconds, end_of_all) == pytest.approx(area / (end_of_all - begin), abs=1e-9)


def test_windows_of_a_long_silence_cost_no_more_than_a_short_one() -> None:
    windows = Windows(60, 0.0)
    windows.set(7.0, 1.5)
    assert windows.mean(60, 1e9) == pytest.approx(7.0)
    assert len(windows.areas) <= 63


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 5), st.integers(0, 5), st.integers(0, 4), st.integers(1, 9), st.integers(1, 8))
def test_every_answer_is_within_what_the_spec_allows(running: int, queued: int, ready: int, starting: int, least: int, most: int, concurrency: int) -> None:
    for make in POLICIES.values():
        state = model(running, queued, ready, starting, min_instances=min(least, most), max_instances=most, concurrency=concurrency)
        scaler = make()
        for now in (0.0, 2.0, 61.0):
            scaler.observe(state, now)
            assert min(least, most) <= scaler.desired(state, now) <= most


def test_per_request_has_room_for_everyone() -> None:
    for _ in range(200):
        running, queued, concurrency = random.Random(_).randrange(50), random.Random(_ + 1).randrange(50), 1 + _ % 7
        wanted = PerRequest().desired(model(running, queued, concurrency=concurrency), 0.0)
        assert wanted * concurrency >= running + queued > (wanted - 1) * concurrency or running + queued == wanted == 0


def test_a_decision_holds_until_the_next_tick() -> None:
    scaler, state = KnativePodAutoscaler(target=10, utilisation=1.0), model(running=100, ready=10)
    scaler.observe(state, 0.0)
    assert scaler.desired(state, 2.0) == 10
    state.running = 0
    scaler.observe(state, 2.0)
    state.ready = 4  # so that a decision would be another
    assert scaler.desired(state, 3.99) == 10
    assert scaler.desired(state, 4.0) == 5, "2 s at 100 and 2 s at 0 are a mean of 50"


def test_panic_takes_the_larger_window_and_each_panic_begins_anew() -> None:
    scaler, state = KnativePodAutoscaler(target=10, utilisation=1.0), model(running=60, ready=1)
    scaler.observe(state, 0.0)
    state.running = 20
    scaler.observe(state, 54.0)
    assert scaler.desired(state, 60.0) == 6, "the short window says 2, twice what is ready; the long one (54 x 60 + 6 x 20) / 60 = 56"
    state.running = 0
    scaler.observe(state, 60.0)
    for tick in range(62, 300, 2):
        state.ready = scaler.desired(state, float(tick))
    assert state.ready == 0
    state.running = 30
    scaler.observe(state, 300.0)
    assert scaler.desired(state, 302.0) == 1, "(4 x 0 + 2 x 30) / 6 = 10; no more of the panic that is long over"
    assert scaler.desired(state, 304.0) == 2, "(2 x 0 + 4 x 30) / 6 = 20: panic"


def test_a_step_that_was_taken_starts_nothing_that_nobody_asks_for() -> None:
    scaler = TargetConcurrency(target=2)
    state = model(queued=9, ready=1)
    assert scaler.desired(state, 0.0) == 2
    state.ready, state.queue = 0, deque()  # the keep-alive has let it go and nobody waits
    assert scaler.desired(state, 0.5) == 0
    state.queue.append(RequestState(1, "m", 1, "", 0.6))
    assert scaler.desired(state, 0.6) == 1
    state.ready, state.queue = 5, deque()
    assert scaler.desired(state, 0.9) == 2, "what was allowed at the tick"
    assert scaler.desired(state, 1.0) == 5, "nobody is sent away"


@pytest.mark.parametrize("make", [KnativePodAutoscaler, TargetConcurrency])
def test_a_deleted_model_begins_anew(make: Callable[[], KnativePodAutoscaler | TargetConcurrency]) -> None:
    scaler, state = make(), model(running=90, queued=9, ready=3)
    for now in (0.0, 2.0, 4.5):
        scaler.observe(state, now)
        scaler.desired(state, now)
    assert scaler != make()
    scaler.on_delete(state)
    assert scaler == make()
    scaler.on_delete(state)


def test_target_concurrency_goes_one_step_a_tick() -> None:
    scaler = TargetConcurrency(target=2)
    state = model(queued=9)
    assert scaler.desired(state, 0.0) == 1
    state.ready = 1
    assert [scaler.desired(state, now) for now in (0.1, 0.9, 1.0, 1.5)] == [1, 1, 2, 2]
    assert TargetConcurrency(target=2, tick_seconds=None).desired(state, 0.0) == 5


def test_queue_length_counts_the_queue_and_those_at_work() -> None:
    assert QueueLength(target=4).desired(model(running=3, queued=9, concurrency=2), 0.0) == 2 + 3


def test_a_bounded_queue_refuses_what_does_not_fit() -> None:
    scaler = BoundedQueue(most_queued=2)
    assert scaler.admits(model(queued=1), 0.0) and not scaler.admits(model(queued=2), 0.0)
    assert scaler.desired(model(running=6, concurrency=10), 0.0) == 1 and scaler.desired(model(running=7, concurrency=10), 0.0) == 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: KnativePodAutoscaler(target=0), lambda: KnativePodAutoscaler(utilisation=1.5), lambda: KnativePodAutoscaler(tick_seconds=0), lambda: KnativePodAutoscaler(panic_threshold=1),
        lambda: TargetConcurrency(target=0), lambda: QueueLength(target=0), lambda: BoundedQueue(utilisation=0), lambda: BoundedQueue(most_queued=-1),
    ],
)  # fmt: skip
def test_what_scales_nothing_is_refused(make: object) -> None:
    with pytest.raises(ValueError, match=r"give|needs"):
        make()  # type: ignore[operator]
