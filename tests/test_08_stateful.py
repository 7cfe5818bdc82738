"""Chapter 08: the controller under every shipped policy, by a hypothesis state machine that shrinks what it breaks.

The rules are those of `control_world.World`, with chances that hypothesis draws; the policies are drawn from the three tables.
`test_08_controller` does the same by seeded chance with policies that try everything.
"""

from __future__ import annotations

import hypothesis
import pytest
from control_world import World, recount
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from msgspec.structs import replace

from sllm_mini.cluster.simulated.policies import AUTOSCALERS, KEEP_ALIVES, PLACEMENTS, make_policies
from sllm_mini.control.controller import Controller
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.replay import replay


class Shipped(World):
    """A world whose controller has policies of the tables, made anew for each controller."""

    def __init__(self, names: tuple[str, str, str]) -> None:
        self.names = names
        super().__init__(0)

    def fresh(self) -> Controller:
        estimator = Estimator()
        policies = make_policies(*self.names, estimator)
        return Controller(policies.placement, policies.keep_alive, policies.autoscaler, estimator, retry_seconds=2.0)

    def calm_down(self) -> None:
        """And nothing is kept for others: these policies leave alone what `min_instances` keeps, locality also where it waits."""
        self.specs = {name: replace(spec, min_instances=0) for name, spec in self.specs.items()}
        super().calm_down()


class Control(RuleBasedStateMachine):
    """Any order of what can happen. Each rule's own chances are hypothesis's too, so that a failure shrinks."""

    world: Shipped
    saved: tuple[bytes, int] | None = None

    @initialize(names=st.tuples(*map(st.sampled_from, (PLACEMENTS, KEEP_ALIVES, AUTOSCALERS))), chances=st.randoms(use_true_random=False))
    def begin(self, names: tuple[str, str, str], chances: st.DataObject) -> None:
        self.world = Shipped(names)
        self.world.random = chances  # type: ignore[assignment]
        for _ in range(3):
            self.world.do_join()
            self.world.do_deploy()

    @rule(seconds=st.sampled_from([0.0, 0.1, 1.0, 6.0, 70.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @rule(count=st.integers(1, 6))
    def requests_come(self, count: int) -> None:
        for _ in range(count):
            self.world.do_arrive()

    @rule(kind=st.sampled_from(["join", "deploy", "delete", "cache", "ask", "late"]))
    def something_happens(self, kind: str) -> None:
        getattr(self.world, f"do_{kind}")()

    @precondition(lambda self: self.world.nodes)
    @rule()
    def a_node_is_lost(self) -> None:
        self.world.do_lose()

    @precondition(lambda self: self.world.started)
    @rule(count=st.integers(1, 4))
    def starts_end(self, count: int) -> None:
        for _ in range(count):
            self.world.do_reach()

    @precondition(lambda self: self.world.running)
    @rule(kind=st.sampled_from(["finish", "finish", "finish", "progress", "fail", "cancel"]))
    def a_request_goes_on(self, kind: str) -> None:
        getattr(self.world, f"do_{kind}")()

    @precondition(lambda self: self.world.moving)
    @rule(kind=st.sampled_from(["moved", "moved", "stuck"]))
    def a_move_ends(self, kind: str) -> None:
        getattr(self.world, f"do_{kind}")()

    @precondition(lambda self: self.world.processes)
    @rule()
    def an_instance_breaks(self) -> None:
        self.world.do_break()

    @precondition(lambda self: self.world.timers)
    @rule()
    def a_timer_fires(self) -> None:
        self.world.do_timer()

    @precondition(lambda self: self.saved is None)
    @rule()
    def the_controller_is_saved(self) -> None:
        self.saved = self.world.controller.to_bytes(), len(self.world.log)
        other = self.world.fresh()
        other.restore(self.saved[0])
        assert other.snapshot() == self.world.controller.snapshot()
        recount(other)

    @invariant()
    def all_is_true(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        """Nothing fails any more: each request ends once, and the log gives the same actions, from its begin and from the restart."""
        if not hasattr(self, "world"):
            return
        world = self.world
        world.calm_down()
        assert world.area == pytest.approx(world.waited), "Little's law: requests over time are their times in the system"
        assert sorted(world.over) == list(range(world.requests)), "each request has one end"
        again = world.fresh()
        assert replay(world.log, again) == len(world.log) and again.snapshot() == world.controller.snapshot()
        if self.saved is not None:
            other = world.fresh()
            other.restore(self.saved[0])
            assert replay(world.log[self.saved[1] :], other) == len(world.log) - self.saved[1]


def run(examples: int, steps: int = 40) -> None:
    slow_to_draw = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large]
    run_state_machine_as_test(Control, settings=hypothesis.settings(max_examples=examples, stateful_step_count=steps, suppress_health_check=slow_to_draw))


def test_any_order_of_events_under_any_policies() -> None:
    run(150)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_any_order_of_events_at_length() -> None:
    run(3000, 60)
