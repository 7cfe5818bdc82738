"""Chapter 08's table of promises, cell by cell: what random traces could not break, and a case that breaks the rest."""

from __future__ import annotations

import math

import pytest

from sllm_mini.cluster.trace import TraceRequest
from sllm_mini.control.cluster import Cluster
from sllm_mini.control.placement import POLICIES, AvailabilityFirst, Preempting
from sllm_mini.control.policy import Plan
from sllm_mini.control.state import ModelState
from sllm_mini.lab.scheduling import promises
from sllm_mini.lab.scheduling.machine import make_controller
from sllm_mini.lab.scheduling.promises import MOST_MOVES, PROMISES, PROPERTIES, Kept, flooded_wait, random_case, watched
from sllm_mini.lab.scheduling.worked import GB, llm, machine

SEEDS = range(24)
_RUNS: dict[tuple[str, int], Kept] = {}


def run(placement: str, seed: int) -> Kept:
    """One random case under watch, kept for the other properties."""
    if (placement, seed) not in _RUNS:
        _RUNS[placement, seed] = watched(placement, *random_case(seed))
    return _RUNS[placement, seed]


def promised(name: str) -> list[str]:
    """The policies that promise it."""
    place = list(PROPERTIES).index(name)
    return [policy for policy, cells in PROMISES.items() if cells[place]]


def test_every_policy_has_a_row_and_every_property_a_cell() -> None:
    assert list(PROMISES) == list(POLICIES) and all(len(cells) == len(PROPERTIES) for cells in PROMISES.values())


@pytest.mark.parametrize("placement", PROMISES)
def test_every_request_of_every_random_case_is_answered(placement: str) -> None:
    for seed in SEEDS:
        kept = run(placement, seed)
        assert kept.answered == kept.arrived == 60, seed


@pytest.mark.parametrize("name", [name for name in PROPERTIES if name != "no starvation"])
@pytest.mark.parametrize("placement", PROMISES)
def test_what_is_promised_random_traces_do_not_break(placement: str, name: str) -> None:
    if placement not in promised(name):
        assert name in {"work conservation", "no lost work"}, "broken by a case of its own below"
        return
    for seed in SEEDS:
        assert not run(placement, seed).broken()[name], f"seed {seed} breaks {name}"


def test_the_random_cases_have_what_could_break_a_promise() -> None:
    """Migrations, preemptions, requests that wait: else nothing is shown."""
    assert sum(run("serverlessllm", seed).most_moves > 0 for seed in SEEDS) >= 3
    assert sum(run("shepherd", seed).preemptions for seed in SEEDS) > 100
    assert sum(run("locality", seed).idle_while_wanted for seed in SEEDS) > 100


def test_locality_leaves_a_machine_idle_that_has_room() -> None:
    """A runs where its weights are, a second request for B waits there; the free machine has neither."""
    nodes, models = [machine("near", "A", "B"), machine("free")], [llm("A", 5 * GB), llm("B", 5 * GB)]
    trace = [TraceRequest(0.0, "A", 0, 0, None, 100.0), TraceRequest(5.0, "B", 0, 0, None, 1.0)]
    assert "locality" not in promised("work conservation")
    assert watched("locality", trace, nodes, models).idle_while_wanted > 0
    for placement in promised("work conservation"):
        assert watched(placement, trace, nodes, models).idle_while_wanted == 0, placement


def test_who_was_stopped_takes_a_free_machine_where_its_policy_would_rather_preempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has just been stopped may not stop others in its turn: without a second choice it would wait beside a free machine."""
    assert sum(watched("shepherd", *random_case(seed)).idle_while_wanted for seed in SEEDS) == 0
    monkeypatch.setattr(Preempting, "choose_harmless", lambda *_: None)
    assert sum(watched("shepherd", *random_case(seed)).idle_while_wanted for seed in SEEDS) > 0


def test_shepherd_throws_work_away() -> None:
    nodes, models = [machine("one", "A", "B")], [llm("A", 5 * GB), llm("B", 5 * GB)]
    trace = [TraceRequest(0.0, "B", 10, 500), TraceRequest(8.0, "A", 10, 10)]
    assert promised("no lost work") == [placement for placement in POLICIES if placement != "shepherd"]
    for placement in POLICIES:
        assert (watched(placement, trace, nodes, models).preemptions > 0) == (placement == "shepherd")


@pytest.mark.parametrize("placement", PROMISES)
def test_a_flood_starves_whoever_asks_for_another_model_unless_it_is_stopped(placement: str) -> None:
    short, long = flooded_wait(placement, 20), flooded_wait(placement, 80)
    assert math.isfinite(long)
    if placement in promised("no starvation"):
        assert long == pytest.approx(short) and short < 5
    else:
        assert long > 3 * short > 60, "four times the flood, and nearly four times the wait"


def test_bounds_are_reached_and_not_passed() -> None:
    assert max(run("serverlessllm", seed).most_moves for seed in SEEDS) <= MOST_MOVES
    assert all(run(placement, seed).most_moves == 0 for placement in POLICIES if placement != "serverlessllm" for seed in SEEDS)


class Late(AvailabilityFirst):
    """Starts nothing before second 6."""

    def choose_node(self, model: ModelState, cluster: Cluster, now: float) -> Plan | None:
        return super().choose_node(model, cluster, now) if now > 6 else None


def test_a_watch_sees_what_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that starts nothing while there is room: the watch itself is tested."""
    monkeypatch.setattr(promises, "make_controller", lambda _: make_controller(Late()))
    trace = [TraceRequest(at, "A", 0, 0, None, 1.0) for at in (0.0, 5.0, 7.0)]
    kept = watched("late", trace, [machine("one", "A")], [llm("A", 5 * GB)])
    assert kept.broken() == {"work conservation": 2, "arrival order": 0, "bounded moves": 0, "no lost work": 0} and kept.answered == 3
