"""Estimates: the formulas, what observations make of them, and that their error is told."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_mini.cluster.simulated import SimulatedCluster, SimulationOptions
from sllm_mini.cluster.trace import TraceRequest
from sllm_mini.control import estimate_errors
from sllm_mini.control import messages as m
from sllm_mini.control.autoscale import PerRequest
from sllm_mini.control.controller import Controller
from sllm_mini.control.estimate import MIGRATION_SECONDS, MIGRATION_SECONDS_PER_TOKEN, Estimator, load_seconds
from sllm_mini.control.estimate_errors import Errors, ErrorTable, Subject
from sllm_mini.control.estimate_line import FORGETTING, Line
from sllm_mini.control.keepalive import FixedKeepAlive
from sllm_mini.control.messages import ModelSpec, NodeSpec
from sllm_mini.control.placement import AvailabilityFirst
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
        estimator.observe_start(there, SPEC, warmth, Tier.DISK, true * draw.uniform(0.9, 1.1) + 4.0, 4.0, predicted)
    assert estimator.start(there, SPEC, warmth, Tier.DISK, 0.0) == pytest.approx(true, rel=0.1)
    assert estimator.start(there, SPEC, Warmth.READY, Tier.DISK, 0.0) == 0.0


def test_a_start_without_bytes_teaches_its_rungs() -> None:
    estimator = Estimator(weight=1.0)
    estimator.observe_start(node(), SPEC, Warmth.DEVICE, Tier.DEVICE, 3.0, 0.0, 0.5)
    assert estimator.start(node(), SPEC, Warmth.DEVICE, Tier.DEVICE, 0.0) == 3.0
    (name, errors), = estimator.errors().items()
    assert name == "start from DEVICE" and errors.count == 1 and errors.mean_seconds == 2.5 and errors.worst_seconds == 2.5


def test_errors_shrink_as_it_learns() -> None:
    estimator, there = Estimator(), node()
    shares = []
    for _ in range(5):
        predicted = estimator.start(there, SPEC, Warmth.COLD, Tier.DISK, 0.0)
        estimator.observe_start(there, SPEC, Warmth.COLD, Tier.DISK, 43.5, 0.0, predicted)
        shares.append(estimator.errors()["start from COLD by DISK"].mean_share)
    assert shares[0] == pytest.approx((43.5 - 13.5) / 43.5) and shares == sorted(shares, reverse=True) and shares[-1] < shares[0] / 4


def test_a_new_observation_weighs_as_much_as_it_is_told() -> None:
    estimator = Estimator(weight=0.25)
    for seconds, expected in ((4.0, 4.0), (8.0, 5.0), (1.0, 4.0)):  # the first replaces the guess
        estimator.observe_start(node(), SPEC, Warmth.DEVICE, Tier.DEVICE, seconds, 0.0, 0.0)
        assert estimator.base(SPEC, Warmth.DEVICE) == expected


@pytest.mark.parametrize(("warmth", "tier", "parts"), [(Warmth.COLD, Tier.DISK, 1), (Warmth.RUNTIME, Tier.REMOTE, 4), (Warmth.DRAM, Tier.DRAM, 1)])
def test_a_start_that_tells_its_load_teaches_rungs_and_bandwidth_apart(warmth: Warmth, tier: Tier, parts: int) -> None:
    """The rungs take twice what the spec says; the bandwidth is right, and stays so for another model."""
    estimator, there, draw = Estimator(), node(), random.Random(2)
    guess, bandwidth = estimator.base(SPEC, warmth), estimator.bandwidth(there, tier)
    for _ in range(30):
        rungs, load = 2 * guess * draw.uniform(0.95, 1.05), 1000 / parts / bandwidth
        estimator.observe_start(there, SPEC, warmth, tier, 3.0 + rungs + load, 3.0, 0.0, parts, load)
    assert estimator.base(SPEC, warmth) == pytest.approx(2 * guess, rel=0.05)
    assert estimator.bandwidth(there, tier) == pytest.approx(bandwidth)
    another = ModelSpec(name="k", nbytes=5000, process_seconds=1.0)
    assert estimator.start(there, another, warmth, tier, 0.0) == pytest.approx(Estimator().start(there, another, warmth, tier, 0.0))


def test_a_load_without_bytes_or_time_teaches_no_bandwidth() -> None:
    estimator, there = Estimator(), node()
    estimator.observe_start(there, SPEC, Warmth.DEVICE, Tier.DISK, 4.0, 1.0, 0.0, 1, 0.0)
    estimator.observe_start(there, SPEC, Warmth.COLD, Tier.DISK, 6.0, 1.0, 0.0, 1, 0.0)
    assert estimator.bandwidth(there, Tier.DISK) == 100.0
    assert (estimator.base(SPEC, Warmth.DEVICE), estimator.base(SPEC, Warmth.COLD)) == (3.0, 5.0)
    estimator.observe_start(there, SPEC, Warmth.DRAM, Tier.DRAM, 1.0, 0.0, 0.0, 1, 4.0)  # clocks that do not agree
    assert estimator.base(SPEC, Warmth.DRAM) == 0.0


def machine(name: str, devices: int = 1) -> NodeSpec:
    return NodeSpec(name=name, devices=devices, dram_nbytes=10_000, remote_bytes_per_second=10.0, disk_bytes_per_second=100.0, dram_bytes_per_second=1000.0)


@pytest.mark.parametrize("links", ["link", "shared"])
def test_the_simulator_tells_how_long_the_weights_moved(links: str) -> None:
    """Two starts at once on one node: what they waited for each other is neither the load nor the rungs."""
    estimator = Estimator()
    seen: list[m.InstanceReached] = []

    class Watched(Controller):
        def handle(self, event: m.AnyEvent, now: float) -> list[m.AnyAction]:
            if isinstance(event, m.InstanceReached):
                seen.append(event)
            return super().handle(event, now)

    slow = [ModelSpec(name=name, nbytes=1000, process_seconds=1.0, runtime_seconds=2.0, ready_seconds=0.5) for name in "ab"]
    controller = Watched(AvailabilityFirst(estimator), FixedKeepAlive(0.0), PerRequest(), estimator)
    cluster = SimulatedCluster(controller, [machine("n", 2)], slow, SimulationOptions(links=links))
    cluster.run([TraceRequest(1.0, "a", 1, 1), TraceRequest(1.0, "b", 1, 1)])
    together = 100.0 if links == "link" else 200.0
    assert [event.load_seconds for event in seen] == pytest.approx([together, together])
    assert [event.queued_seconds for event in seen] == pytest.approx([0.0, 100.0 if links == "link" else 0.0])
    assert estimator.bandwidth(controller.cluster.nodes["n"], Tier.REMOTE) == pytest.approx(1000 / together)
    assert [estimator.base(spec, Warmth.COLD) for spec in slow] == pytest.approx([3.5, 3.5])


def test_a_model_deployed_anew_while_it_climbs_teaches_by_what_it_was() -> None:
    estimator = Estimator()
    controller = Controller(AvailabilityFirst(estimator), FixedKeepAlive(9.0), PerRequest(), estimator)
    controller.handle(m.NodeJoined(machine("n")), 0.0)
    controller.handle(m.ModelDeployed(SPEC), 0.0)
    controller.handle(m.RequestArrived(0, "m", 1), 0.0)
    controller.handle(m.ModelDeployed(ModelSpec(name="m", nbytes=9000, process_seconds=1.0)), 1.0)
    controller.handle(m.InstanceReached(0, Tier.REMOTE, 60.0, 3.0, 1, 50.0), 60.0)
    assert estimator.bandwidth(controller.cluster.nodes["n"], Tier.REMOTE) == pytest.approx(1000 / 50)
    assert estimator.base(SPEC, Warmth.COLD) == pytest.approx(7.0)


# --- migrations -----------------------------------------------------------------------------------------------------


def test_a_migration_counts_the_tokens_that_nobody_has_reported_yet() -> None:
    estimator = Estimator()
    request = RequestState(1, "m", input_tokens=100, prefix="", arrived=0.0, assigned=10.0)
    assert estimator.output_tokens(request, SPEC, 15.1) == pytest.approx(50)  # 0.1 s of prefill, then 0.1 s a token
    assert estimator.migration(request, SPEC, 15.1) == pytest.approx(0.01 * 150 + MIGRATION_SECONDS)
    request.output_tokens = 80
    assert estimator.output_tokens(request, SPEC, 15.1) == 80
    estimator.observe_migration(request, 80, 180 * 0.02 + 2 * MIGRATION_SECONDS, 1.0)
    assert estimator.migration(request, SPEC, 15.1) == pytest.approx(180 * 0.02 + 2 * MIGRATION_SECONDS)


@pytest.mark.parametrize(("a", "b"), [(0.02, 0.3), (1e-4, 0.05), (0.0, 0.08), (0.005, 0.0), (0.0, 0.0)])
def test_both_figures_of_a_migration_are_learned(a: float, b: float) -> None:
    """Also where each takes less than the guess of `b`."""
    estimator, draw = Estimator(), random.Random(4)
    request = RequestState(1, "m", input_tokens=0, prefix="", arrived=0.0)
    for _ in range(60):
        request.input_tokens = draw.randrange(50, 2000)
        tokens = request.input_tokens + 30
        estimator.observe_migration(request, 30, (a * tokens + b) * draw.uniform(0.995, 1.005), 0.0)
    for request.input_tokens in (10, 500, 1900):
        request.output_tokens = 0
        assert estimator.migration(request, SPEC, 0.0) == pytest.approx(a * request.input_tokens + b, rel=0.15, abs=0.02)


def test_migrations_of_one_length_scale_both_guesses() -> None:
    line = Line(MIGRATION_SECONDS_PER_TOKEN, MIGRATION_SECONDS)
    for _ in range(5):
        line.learn(90.0, 0.5)  # half of what was guessed
    assert (line.slope, line.offset) == pytest.approx((MIGRATION_SECONDS_PER_TOKEN / 2, MIGRATION_SECONDS / 2))
    for _ in range(40):  # a tenth apart and more: now the slope is seen
        for x in (60.0, 120.0):
            line.learn(x, 1.0 + x / 100)
    assert (line.slope, line.offset) == pytest.approx((0.01, 1.0), rel=0.05)


def test_a_line_follows_what_changes_and_falls_nowhere_below_zero() -> None:
    line = Line(1.0, 1.0)
    for number in range(400):
        x = 10.0 + number % 7
        line.learn(x, 3 * x + 5 if number < 200 else x + 2)
    assert (line.slope, line.offset) == pytest.approx((1.0, 2.0), rel=0.01)
    assert line.weight == pytest.approx(1 / (1 - FORGETTING), rel=1e-3)


@given(st.lists(st.tuples(st.integers(0, 5000), st.floats(0, 100)), min_size=1, max_size=40))
def test_no_figure_of_a_line_is_negative(points: list[tuple[int, float]]) -> None:
    line = Line(0.01, 0.1)
    for x, y in points:
        line.learn(x, y)
        assert line.slope >= 0 and line.offset >= 0


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0, 10)), min_size=3, max_size=12), st.randoms(use_true_random=False))
def test_no_other_line_is_closer(points: list[tuple[int, float]], draw: random.Random) -> None:
    """Of those that fall nowhere below 0, by squares weighted by age."""
    line = Line(0.1, 0.1)
    for x, y in points:
        line.learn(x, y)
    if line.xx <= (0.1 * line.x) ** 2 * line.weight:
        return

    def distance(slope: float, offset: float) -> float:
        return sum(FORGETTING**age * (slope * x + offset - y) ** 2 for age, (x, y) in enumerate(reversed(points)))

    best = distance(line.slope, line.offset)
    for _ in range(50):
        near = max(line.slope + draw.uniform(-0.1, 0.1), 0.0), max(line.offset + draw.uniform(-0.5, 0.5), 0.0)
        assert distance(*near) >= best - 1e-6 * (1 + best)


# --- decoding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interrupted", ["migrations", "preemptions", "failures"])
def test_only_whole_runs_teach_decoding(interrupted: str) -> None:
    estimator = Estimator()
    request = RequestState(1, "m", input_tokens=1000, prefix="", arrived=0.0)
    estimator.observe_finished(request, SPEC, 10, 3.0)
    assert estimator.decode(SPEC) == pytest.approx(0.2)
    for tokens, seconds in ((1, 30.0), (10, 0.9)):  # of one token, or in no time after the prefill, nothing is learned
        estimator.observe_finished(request, SPEC, tokens, seconds)
    setattr(request, interrupted, 1)
    estimator.observe_finished(request, SPEC, 10, 30.0)
    assert estimator.decode(SPEC) == pytest.approx(0.2)
    assert estimator.errors("what", "model")["decode of m"] == Errors(1, 1.0, 0.5, 1.0)  # 10 x 0.1 s predicted, 2 s came


# --- errors ---------------------------------------------------------------------------------------------------------


def test_errors_are_grouped_by_what_is_asked() -> None:
    estimator, there = Estimator(), node()
    other = NodeState(machine("k"), [0], 10_000)
    request = RequestState(1, "m", input_tokens=10, prefix="", arrived=0.0)
    big = ModelSpec(name="big", nbytes=10)
    for where, spec, warmth, tier, predicted in (
        (there, SPEC, Warmth.COLD, Tier.DISK, 1.0), (there, SPEC, Warmth.COLD, Tier.DISK, 4.0), (there, big, Warmth.COLD, Tier.DISK, 3.0),
        (other, SPEC, Warmth.DRAM, Tier.DISK, 8.0), (other, SPEC, Warmth.DEVICE, Tier.DISK, 12.0),
    ):  # fmt: skip
        estimator.observe_start(where, spec, warmth, tier, 10.0, 0.0, predicted)
    estimator.observe_migration(request, 5, 2.0, 1.0)

    def seconds(*by: estimate_errors.Dimension) -> dict[str, tuple[int, float]]:
        return {name: (one.count, round(one.mean_seconds, 9)) for name, one in estimator.errors(*by).items()}

    by_disk = {"start from COLD by DISK": (3, round(22 / 3, 9)), "start from DEVICE": (1, 2.0), "start from DRAM by DRAM": (1, 2.0)}
    assert seconds() == {"migration": (1, 1.0), **by_disk}
    assert seconds("tier") == {"by DISK": (3, round(22 / 3, 9)), "by DRAM": (1, 2.0)}
    assert seconds("node") == {"on k": (2, 2.0), "on n": (3, round(22 / 3, 9))}
    assert seconds("model") == {"of big": (1, 7.0), "of m": (5, round((9 + 6 + 2 + 2 + 1) / 5, 9))}
    assert seconds("rung", "node") == {"from COLD on n": (3, round(22 / 3, 9)), "from DEVICE on k": (1, 2.0), "from DRAM on k": (1, 2.0)}
    assert estimator.errors("what")["start"].worst_seconds == 9.0 and estimator.errors("what")["start"].mean_share == pytest.approx(26 / 50)
    with pytest.raises(ValueError, match="not told apart by colour; give"):
        estimator.errors("colour")  # type: ignore[arg-type]


def test_the_table_of_errors_does_not_grow_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate_errors, "MOST_ROWS", 20)
    table, alone = ErrorTable(), Errors()
    for number in range(1000):
        table.note(Subject("start", f"m{number % 90}", Warmth.COLD, Tier.DISK, f"n{number % 7}"), number, 10.0)
        alone.add(number, 10.0)
        assert len(table.rows) <= 20
    (whole,) = table.by("what").values()
    assert (whole.count, whole.worst_seconds) == (1000, alone.worst_seconds)
    assert (whole.mean_seconds, whole.mean_share) == pytest.approx((alone.mean_seconds, alone.mean_share))
    assert table.by("model")["of others"].count == 1000 - 19 and table.by("node")["on others"].count == 1000 - 19
    assert set(table.by("model")) - {"of others"} == {f"of m{number % 90}" for number in range(981, 1000)}


def test_what_is_deleted_begins_anew() -> None:
    estimator, there = Estimator(), node()
    request = RequestState(1, "m", input_tokens=0, prefix="", arrived=0.0)
    estimator.observe_start(there, SPEC, Warmth.COLD, Tier.DISK, 30.0, 0.0, 13.5, 1, 20.0)
    estimator.observe_finished(request, SPEC, 10, 9.0)
    estimator.on_delete(ModelState(SPEC))
    fresh = Estimator()
    assert estimator.base(SPEC, Warmth.COLD) == fresh.base(SPEC, Warmth.COLD) and estimator.decode(SPEC) == fresh.decode(SPEC)
    assert estimator.bandwidth(there, Tier.DISK) == 50.0, "the machine is still there"
    assert {name: one.count for name, one in estimator.errors("what", "model").items()} == {"start of others": 1, "decode of others": 1}


@pytest.mark.parametrize("weight", [0.0, -1.0, 1.5, float("nan")])
def test_a_weight_that_learns_nothing_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="weight"):
        Estimator(weight=weight)
