"""Estimates: the formulas, what observations make of them, and that their error is told."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_mini.control.estimate import MIGRATION_SECONDS, Estimator, load_seconds
from sllm_mini.control.messages import ModelSpec, NodeSpec
from sllm_mini.control.state import ModelState, NodeState, RequestState
from sllm_mini.types import Tier, Warmth

SPEC = ModelSpec(
    name="m", nbytes=1000, process_seconds=1.0, runtime_seconds=2.0, ready_seconds=0.5, prefill_seconds_per_token=0.001, decode_seconds_per_token=0.1
)


def node(loads_until: float = 0.0) -> NodeState:
    spec = NodeSpec(name="n", devices=1, dram_nbytes=10_000, remote_bytes_per_second=10.0, disk_bytes_per_second=100.0, dram_bytes_per_second=1000.0)
    return NodeState(spec, [0], 10_000, loads_until=loads_until)


@given(st.floats(0, 1e4), st.integers(0, 10**13), st.floats(1e-3, 1e12))
def test_a_load_waits_and_then_moves_its_bytes(queue: float, nbytes: int, bandwidth: float) -> None:
    assert load_seconds(queue, nbytes, bandwidth) == queue + nbytes / bandwidth


@pytest.mark.parametrize("arguments", [(-1.0, 1, 1.0), (0.0, -1, 1.0), (0.0, 1, 0.0), (0.0, 1, float("nan")), (float("nan"), 1, 1.0)])
def test_figures_that_cannot_be_are_refused(arguments: tuple[float, int, float]) -> None:
    with pytest.raises(ValueError, match="cannot be"):
        load_seconds(*arguments)


def test_a_start_is_the_sum_of_the_rungs_still_to_climb() -> None:
    estimator, there = Estimator(), node(loads_until=7.0)
    seconds = {warmth: estimator.start(there, SPEC, warmth, Tier.DISK, 5.0) for warmth in Warmth}
    load = 2.0 + 1000 / 100
    assert seconds[Warmth.COLD] == 1.0 + 2.0 + load + 0.5
    assert seconds[Warmth.PROCESS] == 2.0 + load + 0.5
    assert seconds[Warmth.RUNTIME] == load + 0.5
    assert seconds[Warmth.DRAM] == 2.0 + 1000 / 1000 + 0.5
    assert seconds[Warmth.DEVICE] == 0.5 and seconds[Warmth.READY] == 0.0
    assert estimator.load(there, SPEC, Tier.REMOTE, 9.0) == 1000 / 10
    assert estimator.load(there, SPEC, Tier.REMOTE, 9.0, parts=4) == 250 / 10


@pytest.mark.parametrize("warmth", [Warmth.COLD, Warmth.RUNTIME, Warmth.DRAM])
def test_observed_starts_teach_the_bandwidth(warmth: Warmth) -> None:
    """The machine is three times slower than its spec says, give or take a tenth: predictions come to that."""
    estimator, there, draw = Estimator(), node(), random.Random(1)
    true = estimator.base(SPEC, warmth) + 1000 / ({Warmth.DRAM: 1000.0}.get(warmth, 100.0) / 3)
    for _ in range(30):
        predicted = estimator.start(there, SPEC, warmth, Tier.DISK, 0.0)
        estimator.observe_start(there, ModelState(SPEC), warmth, Tier.DISK, true * draw.uniform(0.9, 1.1) + 4.0, 4.0, predicted)
    assert estimator.start(there, SPEC, warmth, Tier.DISK, 0.0) == pytest.approx(true, rel=0.1)
    assert estimator.start(there, SPEC, Warmth.READY, Tier.DISK, 0.0) == 0.0


def test_a_start_without_bytes_teaches_its_rungs() -> None:
    estimator = Estimator(weight=1.0)
    estimator.observe_start(node(), ModelState(SPEC), Warmth.DEVICE, Tier.DEVICE, 3.0, 0.0, 0.5)
    assert estimator.start(node(), SPEC, Warmth.DEVICE, Tier.DEVICE, 0.0) == 3.0
    (name, errors), = estimator.errors().items()
    assert name == "start from DEVICE" and errors.count == 1 and errors.mean_seconds == 2.5 and errors.worst_seconds == 2.5


def test_errors_shrink_as_it_learns() -> None:
    estimator, there = Estimator(), node()
    shares = []
    for _ in range(5):
        predicted = estimator.start(there, SPEC, Warmth.COLD, Tier.DISK, 0.0)
        estimator.observe_start(there, ModelState(SPEC), Warmth.COLD, Tier.DISK, 43.5, 0.0, predicted)
        shares.append(estimator.errors()["start from COLD by DISK"].mean_share)
    assert shares[0] == pytest.approx((43.5 - 13.5) / 43.5) and shares == sorted(shares, reverse=True) and shares[-1] < shares[0] / 4


def test_a_migration_counts_the_tokens_that_nobody_has_reported_yet() -> None:
    estimator = Estimator()
    request = RequestState(1, "m", input_tokens=100, prefix="", arrived=0.0, assigned=10.0)
    assert estimator.output_tokens(request, SPEC, 15.1) == pytest.approx(50)  # 0.1 s of prefill, then 0.1 s a token
    assert estimator.migration(request, SPEC, 15.1) == pytest.approx(0.01 * 150 + MIGRATION_SECONDS)
    request.output_tokens = 80
    assert estimator.output_tokens(request, SPEC, 15.1) == 80
    estimator.observe_migration(request, 80, 180 * 0.02 + MIGRATION_SECONDS, 1.0)
    assert estimator.migration(request, SPEC, 15.1) == pytest.approx(180 * 0.02 + MIGRATION_SECONDS)


def test_only_whole_runs_teach_decoding() -> None:
    estimator = Estimator()
    request = RequestState(1, "m", input_tokens=1000, prefix="", arrived=0.0)
    estimator.observe_finished(request, SPEC, 10, 3.0)
    assert estimator.decode(SPEC) == pytest.approx(0.2)
    request.migrations = 1
    estimator.observe_finished(request, SPEC, 10, 30.0)
    assert estimator.decode(SPEC) == pytest.approx(0.2)


@pytest.mark.parametrize("weight", [0.0, -1.0, 1.5, float("nan")])
def test_a_weight_that_learns_nothing_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="weight"):
        Estimator(weight=weight)
