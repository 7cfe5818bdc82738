"""Chapter 08: the controller, by random histories of a driver that believes only its actions, and by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
from control_world import GB, AnyKeepAlive, AnyPlacement, Concurrency, World, recount

from sllm_mini.control import messages as m
from sllm_mini.control.cluster import Cluster
from sllm_mini.control.controller import Controller
from sllm_mini.control.policy import Move, Plan, Prewarm, Stay
from sllm_mini.control.ranked import Ranked
from sllm_mini.control.replay import Recorder, read_log, replay
from sllm_mini.control.state import InstanceState, ModelState, RequestState, held_nbytes
from sllm_mini.errors import SllmError
from sllm_mini.types import Tier, Warmth

COLD, PROCESS, RUNTIME, DRAM, DEVICE, READY = Warmth

# Random histories

USUAL = dict.fromkeys(("lose", "delete", "break", "stuck", "progress"), 1) | {
    "join": 2, "deploy": 2, "fail": 2, "cancel": 2, "cache": 2, "ask": 2, "late": 4, "moved": 8, "timer": 8, "finish": 10, "reach": 20, "arrive": 30,
}  # fmt: skip
STORMY = USUAL | {"lose": 5, "join": 8, "break": 5, "stuck": 4, "delete": 3, "deploy": 6, "late": 10}
BUSY = USUAL | {"arrive": 60, "finish": 30, "moved": 3, "late": 1}


def history(seed: int) -> World:
    """A random one with all checks after each event; then replayed, gone on with after a restart in its midst, and ended well."""
    world = World(seed, tick_seconds=3.0 if seed % 3 == 0 else None)
    weights = (USUAL, STORMY, BUSY, USUAL)[seed % 4]
    for _ in range(3):
        world.do_join()
        world.do_deploy()
    steps = world.random.randrange(20, 120)
    restart = world.random.randrange(steps)
    saved, line = b"", 0
    for step in range(steps):
        world.step(weights)
        world.check()
        if step == restart:
            saved, line = world.controller.to_bytes(), len(world.log)
            other = world.fresh()
            other.restore(saved)
            assert other.snapshot() == world.controller.snapshot()
            recount(other)
    world.calm_down()
    assert world.area == pytest.approx(world.waited), "Little's law: requests over time are their times in the system"
    assert sorted(world.over) == list(range(world.requests)), "each request has one end"
    other = world.fresh()
    other.restore(saved)
    assert replay(world.log[line:], other) == len(world.log) - line
    again = world.fresh()
    assert replay(world.log, again) == len(world.log)
    assert again.snapshot() == other.snapshot() == world.controller.snapshot()
    return world


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_random_histories(first: int) -> None:
    for seed in range(first, first + 50):
        history(seed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("first", range(1000, 11000, 1000))
def test_ten_thousand_random_histories(first: int) -> None:
    for seed in range(first, first + 1000):
        history(seed)


def test_the_histories_go_everywhere() -> None:
    """The test above would pass on histories in which nothing happens."""
    seen: dict[str, int] = {}
    for seed in range(180):
        world = history(seed)
        for record in read_log(world.log):
            for each in (record.event, *record.actions):
                name = type(each).__name__
                seen[name] = seen.get(name, 0) + 1
        for how in world.over.values():
            seen[how[:3]] = seen.get(how[:3], 0) + 1
    messages = [each.__name__ for base in (m.Event, m.Action) for each in base.__subclasses__()]
    assert {name: seen.get(name, 0) for name in [*messages, "404", "429", "500", "ans", "can"] if seen.get(name, 0) < 2} == {}


# By hand


class First:
    """The first node that has it free, after what is idle has given way; counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.plans: list[Plan | None] = []

    def choose_instance(self, model: ModelState, request: RequestState, cluster: Cluster, now: float) -> InstanceState | None:
        return next(reversed(model.open.values()))

    def choose_node(self, model: ModelState, cluster: Cluster, now: float) -> Plan | None:
        self.asked += 1
        if self.plans:
            return self.plans.pop(0)
        spec = model.spec
        for node in cluster.open_nodes(spec.devices, held_nbytes(spec, READY)):
            devices, nbytes, give_way = len(node.free_devices), node.free_nbytes, []
            for each in cluster.idle_instances(node.spec.name):
                if devices < spec.devices or nbytes < held_nbytes(spec, READY):
                    give_way.append(each.id)
                    devices, nbytes = devices + len(each.devices), nbytes + each.held_nbytes
            return Plan(node.spec.name, give_way=tuple(give_way))
        return None


class Keep:
    def __init__(self, seconds: float | None = 10.0, then: Warmth = COLD) -> None:
        self.seconds, self.then = seconds, then
        self.prewarms: list[Prewarm] = []
        self.told: list[Warmth] = []

    def on_arrival(self, model: ModelState, cluster: Cluster, now: float, warmth: Warmth) -> Sequence[Prewarm]:
        self.told.append(warmth)
        return [self.prewarms.pop(0)] if self.prewarms else []

    def on_deploy(self, model: ModelState, cluster: Cluster, now: float) -> Sequence[Prewarm]:
        return ()

    def stay(self, instance: InstanceState, cluster: Cluster, now: float) -> Stay:
        return Stay(self.seconds, self.then)

    def gave_way(self, instance: InstanceState, rank: float, now: float) -> Stay:
        return Stay(0.0, self.then)

    def rank(self, instance: InstanceState, cluster: Cluster, now: float) -> float:
        return now


class Hand:
    """A controller and what its actions were; events by short names."""

    def __init__(self, *, nodes: Sequence[int] = (1,), keep: Keep | None = None, models: str = "a", queue: int = 100, **spec: Any) -> None:
        self.placement, self.keep = First(), keep or Keep()
        self.controller = Controller(self.placement, self.keep, Concurrency(queue=queue))
        self.cluster = self.controller.cluster
        self.now = 0.0
        for number, devices in enumerate(nodes):
            self.join(f"n{number}", devices)
        for name in models:
            self.deploy(name, **spec)

    def __call__(self, event: m.AnyEvent, now: float | None = None) -> list[m.AnyAction]:
        self.now = self.now if now is None else now
        actions = self.controller.handle(event, self.now)
        recount(self.controller)
        return actions

    def join(self, name: str, devices: int, gigabytes: int = 100) -> list[m.AnyAction]:
        spec = m.NodeSpec(
            name=name, devices=devices, dram_nbytes=gigabytes * GB, remote_bytes_per_second=GB, disk_bytes_per_second=4 * GB, dram_bytes_per_second=20 * GB
        )
        return self(m.NodeJoined(spec))

    def deploy(self, name: str, **spec: Any) -> list[m.AnyAction]:
        return self(m.ModelDeployed(m.ModelSpec(name=name, **({"nbytes": 8 * GB, "process_nbytes": GB, "runtime_nbytes": GB} | spec))))

    def arrive(self, request: int, model: str = "a", now: float | None = None) -> list[m.AnyAction]:
        return self(m.RequestArrived(request, model, 10), now)

    def reach(self, instance: int) -> list[m.AnyAction]:
        return self(m.InstanceReached(instance, Tier.REMOTE, 8.0, 0.0, self.cluster.instances[instance].epoch))

    def finish(self, request: int, now: float | None = None) -> list[m.AnyAction]:
        return self(m.RequestFinished(request, 5, 1.0, self.cluster.requests[request].epoch), now)


def test_a_cold_start_then_a_warm_request() -> None:
    hand = Hand()
    (start,) = hand.arrive(0)
    assert start == m.Start(0, "n0", "a", COLD, READY, Tier.REMOTE, (0,), 1)
    assert hand.cluster.nodes["n0"].loads_until == 8.0
    assert hand.reach(0) == [m.Assign(0, 0, 1)]
    assert hand.finish(0, 9.0) == [m.SetTimer(0, 19.0)]
    assert hand.arrive(1, now=12.0) == [m.Assign(1, 0, 1)]
    assert hand.finish(1, 13.0) == [], "the timer it has serves again"
    assert hand(m.TimerFired(0), 19.0) == [m.SetTimer(1, 23.0)], "used since, it stays longer"
    assert hand(m.TimerFired(1), 23.0) == [m.Descend(0, COLD, 2)]
    assert hand.keep.told == [COLD, READY] and not hand.cluster.instances and not hand.controller.timers.pending


def test_warm_requests_leave_nothing_behind() -> None:
    """Flat in the length of the trace: what is kept after ten requests is kept after a thousand."""
    hand = Hand(nodes=(4,), models="abc")
    sizes = []
    timers = 0
    for request in range(1000):
        now = request * 0.5
        model = "abc"[request % 3]
        actions = hand.controller.handle(m.RequestArrived(request, model, 10), now)
        for action in actions:
            if isinstance(action, m.Start):
                hand.reach(action.instance)
        actions = hand.finish(request, now + 0.2)
        timers += len([each for each in actions if isinstance(each, m.SetTimer)])
        sizes.append(len(hand.controller.to_bytes()))
    assert timers == 3, "one timer for each instance, not for each request"
    assert sizes[-1] <= sizes[20] + 20  # numbers have grown longer
    orders: list[Any] = [*hand.cluster._idle_of.values(), *hand.cluster._open]
    assert max(len(order) for ranked in orders for order in (ranked._order, ranked._placed, ranked._noted)) < 40


def test_an_instance_descends_the_ladder_rung_by_rung() -> None:
    hand = Hand(keep=Keep(5.0, DRAM))
    hand.arrive(0)
    hand.reach(0)
    hand.finish(0)
    node = hand.cluster.nodes["n0"]
    assert node.free_devices == [] and node.free_nbytes == 98 * GB
    hand.keep.then = RUNTIME
    assert hand(m.TimerFired(0), 5.0)[0] == m.Descend(0, DRAM, 2)
    assert node.free_devices == [0] and node.free_nbytes == 90 * GB, "its weights are in memory now"
    hand.keep.then = PROCESS
    assert hand(m.TimerFired(1), 10.0)[0] == m.Descend(0, RUNTIME, 3)
    assert [each.id for each in hand.cluster.sleeping("n0", "python")] == [0] and node.free_nbytes == 98 * GB
    assert hand(m.TimerFired(2), 15.0)[0] == m.Descend(0, PROCESS, 4)
    hand.keep.then = PROCESS  # no descent: the rung below is taken
    assert hand(m.TimerFired(3), 20.0) == [m.Descend(0, COLD, 5)]
    assert node.free_nbytes == 100 * GB


def test_weights_for_which_memory_has_no_room_are_not_kept() -> None:
    hand = Hand(nodes=(), keep=Keep(5.0, DRAM))
    hand.join("small", 1, gigabytes=4)
    hand.arrive(0)
    hand.reach(0)
    hand.finish(0)
    assert hand(m.TimerFired(0), 5.0)[0] == m.Descend(0, RUNTIME, 2)


def test_refusals_say_why() -> None:
    hand = Hand(nodes=(), queue=1)
    assert "no model b" in hand.arrive(0, "b")[0].reason  # type: ignore[union-attr]
    assert hand.arrive(1) == []
    (refusal,) = hand.arrive(2)
    assert isinstance(refusal, m.Refuse) and refusal.request == 2 and "429" in refusal.reason
    hand(m.ModelDeleted("a"))
    assert "404" in hand.arrive(3)[0].reason  # type: ignore[union-attr]
    assert list(hand.cluster.requests) == [1], "what was there before is still served"
    (start,) = hand.join("n", 1)
    assert hand.reach(start.instance) == [m.Assign(1, 0, 1)]  # type: ignore[union-attr]
    assert hand.finish(1) == [m.Descend(0, COLD, 2)] and not hand.cluster.models, "and then it is gone"


def test_what_was_interrupted_comes_before_what_came_later() -> None:
    hand = Hand(nodes=(1, 1), concurrency=2, max_instances=2)
    for request in range(3):
        hand.arrive(request)
    hand.reach(0)
    hand.reach(1)
    for request in range(3, 7):
        hand.arrive(request)
    queue = hand.cluster.models["a"].queue
    assert [r.id for r in queue] == [4, 5, 6]
    hand(m.RequestProgressed(1, 7, 1))
    actions = hand(m.NodeLost("n0"))
    assert [r.id for r in queue] == [0, 1, 4, 5, 6] and actions == []
    assert hand.cluster.requests[1].output_tokens == 7, "what is known of its progress stays known"
    assert hand(m.RequestFailed(2, 1)) == [m.Assign(0, 1, 3)], "the one that failed goes to its place, and the longest wait is over"
    assert [r.id for r in queue] == [1, 2, 4, 5, 6]
    assert hand(m.RequestFinished(1, 9, 1.0, 1)) == [], "an answer from the node that is gone"


def test_a_plan_with_moves_starts_when_all_are_done() -> None:
    hand = Hand(nodes=(2, 1), models="ab", concurrency=2)
    hand.deploy("big", devices=2)
    hand.placement.plans = [Plan("n0")]
    hand.arrive(0)
    hand.reach(0)
    hand.arrive(1)
    hand.placement.plans = [Plan("n0", moves=(Move(0, "n1"),))]
    (start,) = hand.arrive(2, "big")
    assert start == m.Start(2, "n1", "a", COLD, READY, Tier.REMOTE, (0,), 1), "first the target of the move"
    assert hand.cluster.nodes["n0"].free_devices == [], "what the plan has is nobody else's"
    assert hand.arrive(3) == [] and not hand.cluster.models["a"].open, "the victim takes no more, the target is kept for what moves"
    assert hand.reach(2) == [m.Migrate(0, 0, 2, 2), m.Migrate(1, 0, 2, 2)]
    assert hand(m.MigrationFinished(0, 0.1, 4, 2)) == []
    assert hand(m.MigrationFinished(1, 0.1, 4, 2)) == [m.Descend(0, COLD, 2), m.Start(1, "n0", "big", COLD, READY, Tier.REMOTE, (0, 1), 1)]
    assert hand.cluster.requests[0].migrations == 1 and hand.cluster.requests[0].instance == 2
    assert hand.reach(1) == [m.Assign(2, 1, 1)]


@pytest.mark.parametrize("what", ["migration", "target", "target's node", "victim", "node"])
def test_a_plan_whose_move_fails_is_given_up_and_nothing_is_lost(what: str) -> None:
    hand = Hand(nodes=(1, 1), keep=Keep(None))
    hand.deploy("b")
    hand.arrive(0)
    hand.reach(0)
    hand.placement.plans = [Plan("n0", moves=(Move(0, "n1"),)), None, None, None]
    hand.arrive(1, "b")
    if what == "migration":
        hand.reach(2)
        actions = hand(m.MigrationFailed(0, 2))
        assert hand.cluster.requests[0].instance == 0 and hand.cluster.instances[2].idle_since is not None
        assert hand.cluster.requests[0].failed_moves == 1, "counted, so that a policy can give it up"
    elif what == "target":
        actions = hand(m.InstanceFailed(2, "out of memory", 1))
        assert hand.cluster.requests[0].instance == 0
    elif what == "victim":
        actions = hand(m.InstanceFailed(0, "crashed", 1))
        assert hand.cluster.requests[0].instance is None
    else:
        actions = hand(m.NodeLost("n0" if what == "node" else "n1"))
    assert not hand.controller.plans.pending and sorted(hand.cluster.requests) == [0, 1]
    assert not any(each.draining or each.incoming for each in hand.cluster.instances.values())
    assert not any(isinstance(each, m.Refuse) for each in actions)
    hand.placement.plans = []
    hand.join("n9", 2)
    for _ in range(4):
        for id in [id for id, each in hand.cluster.instances.items() if each.climbing]:
            hand.reach(id)
    assert all(each.instance is not None for each in hand.cluster.requests.values())


def test_an_instance_that_is_booked_for_later_is_not_taken_for_a_start() -> None:
    """It climbs from a warm process once the moves are done; a late or doubled answer about that process is not its own."""
    hand = Hand(nodes=(1, 1), models="ab", keep=Keep(None))
    hand.keep.prewarms = [Prewarm(0.5, "a", RUNTIME)]
    hand.arrive(0)
    hand.reach(0)
    hand(m.TimerFired(0), 0.5)
    hand.reach(1)
    hand.placement.plans = [Plan("n0", reuse=1, moves=(Move(0, "n1"),)), None, None]
    hand.arrive(1, "b")
    assert hand.reach(1) == [] and hand.cluster.instances[1].climbing and 1 in hand.controller.plans.pending
    hand.deploy("b", process_nbytes=3 * GB)  # new figures: what was booked by the old ones is given up
    assert hand.cluster.instances[1].warmth == RUNTIME and hand.cluster.instances[1].spec.name == "a"


def test_the_least_stay_and_ticks_take_the_surplus() -> None:
    hand = Hand(nodes=(3,), keep=Keep(5.0), min_instances=1)
    hand.controller.autoscaler.tick_seconds, hand.controller.autoscaler.scales_down = 2.0, True  # type: ignore[misc]
    hand.reach(0)
    assert not hand.controller.timers.pending, "one stays ready, whatever the keep-alive says"
    for request in range(2):
        hand.arrive(request)
    hand.reach(1)
    hand.finish(0, 1.0)
    hand.finish(1, 1.0)
    tick = next(timer for timer, what in hand.controller.timers.pending.items() if what.at == 2.0)
    assert [type(each) for each in hand(m.TimerFired(tick), 2.0)] == [m.Descend, m.SetTimer] and len(hand.cluster.instances) == 1


def test_requests_do_not_queue_for_ever_where_the_autoscaler_says_so() -> None:
    hand = Hand(nodes=())
    hand.controller.autoscaler.queue_seconds = 5.0  # type: ignore[misc]
    assert hand.arrive(0) == [m.SetTimer(0, 5.0)]
    assert hand.arrive(1, now=2.0) == []
    refusal, again = hand(m.TimerFired(0), 5.0)
    assert isinstance(refusal, m.Refuse) and refusal.request == 0 and again == m.SetTimer(1, 7.0)


def test_a_preempted_request_begins_anew_at_its_old_place() -> None:
    hand = Hand(nodes=(1,), models="ab")
    hand.arrive(0)
    hand.reach(0)
    hand(m.RequestProgressed(0, 7, 1))
    hand.arrive(1)
    hand.placement.plans = [Plan("n0", preempted=(0,)), None]
    actions = hand.arrive(2, "b")
    assert actions == [m.Preempt(0, 0, 2), m.Descend(0, COLD, 2), m.Start(1, "n0", "b", COLD, READY, Tier.REMOTE, (0,), 1)]
    request = hand.cluster.requests[0]
    assert [r.id for r in hand.cluster.models["a"].queue] == [0, 1]
    assert (request.preemptions, request.output_tokens) == (1, 0)


def test_who_needs_much_does_not_stop_who_needs_little() -> None:
    hand = Hand(nodes=(2,), models="ab", keep=Keep(None))
    hand.deploy("huge", devices=2)
    hand.arrive(0, "a")
    hand.arrive(1, "a")
    hand.reach(0)
    hand.reach(1)
    hand.arrive(2, "huge")
    hand.arrive(3, "b")
    assert [type(each) for each in hand.finish(0)] == [m.Descend, m.Start], "one device is free: not enough for the first in line, enough for the next"
    assert hand.cluster.models["b"].starting and not hand.cluster.models["huge"].starting


def test_whom_a_policy_refuses_stops_nobody() -> None:
    hand = Hand(nodes=(1,), models="abc", keep=Keep(None))
    hand.arrive(0, "a")
    hand.reach(0)
    hand.arrive(1, "b")
    hand.arrive(2, "c")
    hand.placement.plans = [None]  # b wants another node
    assert [each.model for each in hand.finish(0) if isinstance(each, m.Start)] == ["c"]
    assert hand.cluster.models["b"].short and not hand.cluster.models["c"].short


def test_a_retry_does_not_ask_every_model() -> None:
    hand = Hand(nodes=(1,), keep=Keep(None))
    hand.arrive(0)
    hand.reach(0)
    for number in range(200):
        hand.controller.handle(m.ModelDeployed(m.ModelSpec(name=f"m{number}", nbytes=GB)), 0.0)
        hand.controller.handle(m.RequestArrived(number + 1, f"m{number}", 1), 0.0)
    asked = hand.placement.asked
    (_, start) = hand.finish(0)
    assert isinstance(start, m.Start) and start.model == "m0", "who waits longest is first"
    assert hand.placement.asked - asked <= 3


def test_a_model_that_does_not_start_waits_longer_and_is_given_up() -> None:
    hand = Hand(nodes=(1,))
    hand.arrive(0)
    assert hand(m.InstanceFailed(0, "bad weights", 1)) == [m.SetTimer(0, 1.0)]
    (start,) = hand(m.TimerFired(0), 1.0)
    assert hand(m.InstanceFailed(start.instance, "bad weights", 1)) == [m.SetTimer(1, 3.0)]  # type: ignore[union-attr]
    assert hand.arrive(1, now=2.0) == []
    (start,) = hand(m.TimerFired(1), 3.0)
    refusals = [each for each in hand(m.InstanceFailed(start.instance, "bad weights", 1)) if isinstance(each, m.Refuse)]  # type: ignore[union-attr]
    assert [each.request for each in refusals] == [0, 1] and "bad weights" in refusals[0].reason
    assert not hand.cluster.requests


def test_a_request_that_fails_again_and_again_is_refused() -> None:
    hand = Hand()
    hand.arrive(0)
    hand.reach(0)
    for _ in range(2):
        assert [type(each) for each in hand(m.RequestFailed(0, hand.cluster.requests[0].epoch))] == [m.Assign]
    actions = hand(m.RequestFailed(0, hand.cluster.requests[0].epoch))
    assert isinstance(actions[0], m.Refuse) and not hand.cluster.requests
    assert hand.cluster.instances[0].idle_since is not None


def test_prewarming_has_one_timer_and_happens_where_nothing_is_warm() -> None:
    hand = Hand(nodes=(2,), keep=Keep(1.0))
    hand.keep.prewarms = [Prewarm(20.0, "a", READY), Prewarm(30.0, "a", READY)]
    assert hand.arrive(0)[0] == m.SetTimer(0, 20.0)
    assert not any(isinstance(each, m.SetTimer) for each in hand.arrive(1, now=1.0)), "the later one takes its place"
    hand.reach(0)
    hand.reach(1)
    hand.finish(0, 2.0)
    hand.finish(1, 2.0)
    assert [hand(m.TimerFired(each), 3.0) for each in (1, 2)] == [[m.Descend(0, COLD, 2)], [m.Descend(1, COLD, 2)]]
    assert hand(m.TimerFired(0), 20.0) == [m.SetTimer(3, 30.0)]
    (start,) = hand(m.TimerFired(3), 30.0)
    assert start == m.Start(2, "n0", "a", COLD, READY, Tier.REMOTE, (0,), 1)
    hand.reach(2)
    hand.keep.prewarms = [Prewarm(31.0, "a", READY), Prewarm(31.0, "a", RUNTIME)]
    hand.arrive(2, now=30.5)
    hand.finish(2)
    timer = max(timer for timer, what in hand.controller.timers.pending.items() if what.at == 31.0)
    assert hand(m.TimerFired(timer), 31.0) == [], "there is one already"


def test_a_prewarmed_runtime_needs_memory_alone() -> None:
    hand = Hand(nodes=(0,), keep=Keep(None))
    hand(m.NodeJoined(m.NodeSpec(name="n2", devices=1, dram_nbytes=10 * GB, remote_bytes_per_second=GB, disk_bytes_per_second=GB, dram_bytes_per_second=GB)))
    hand.placement.plans = [None]
    hand.keep.prewarms = [Prewarm(1.0, "a", RUNTIME), Prewarm(2.0, "a", PROCESS)]
    hand.arrive(0)
    assert hand(m.TimerFired(0), 1.0) == [m.Start(0, "n0", "a", COLD, RUNTIME, Tier.REMOTE, (), 1)]
    assert hand.cluster.nodes["n0"].loads_until == 0, "nothing is loaded for it"
    hand.reach(0)
    assert [each.id for each in hand.cluster.sleeping(None, "python")] == [0] and not list(hand.cluster.sleeping(None, "node"))
    assert hand.cluster.warmest(hand.cluster.models["a"]) == RUNTIME
    hand.arrive(1, now=1.5)
    assert hand(m.TimerFired(1), 2.0) == [], "a runtime is a process"
    hand.placement.plans = [Plan("n1", reuse=0), Plan("n0", reuse=0)]
    with pytest.raises(SllmError, match="instance 0 is not there"):
        hand.join("n1", 1)


def test_loads_queue_behind_one_another() -> None:
    hand = Hand(nodes=(3,), models="ab")
    hand.arrive(0, "a")
    hand(m.Cached("n0", "b", Tier.DISK))
    (start,) = hand.arrive(1, "b", now=1.0)
    node = hand.cluster.nodes["n0"]
    assert start.tier == Tier.DISK and node.loads_until == 8.0 + 2.0  # type: ignore[union-attr]
    hand(m.Cached("n0", "b", Tier.DRAM))
    assert hand.cluster.models["b"].cached_on == {"n0": Tier.DRAM}
    hand(m.Evicted("n0", "b", Tier.DRAM))
    assert node.tier("b") == Tier.DISK
    hand(m.Evicted("n0", "b", Tier.DISK))
    assert node.tier("b") == Tier.REMOTE and not hand.cluster.models["b"].cached_on
    hand.reach(0)
    hand.now = 4.0
    hand.reach(1)
    assert node.loads_until == 0.0, "nothing climbs any more, so nothing is loaded"


def test_what_was_observed_is_told_to_the_estimator() -> None:
    class Estimates:
        def __init__(self) -> None:
            self.seen: list[tuple[Any, ...]] = []

        def load(self, *args: Any) -> float:
            return 8.0

        def start(self, *args: Any) -> float:
            return 9.0

        def migration(self, *args: Any) -> float:
            return 0.5

        def observe_start(self, node: Any, spec: Any, warmth: Any, tier: Any, *figures: Any) -> None:
            self.seen.append((node.spec.name, spec.name, warmth, tier, *figures))

        def observe_finished(self, request: Any, spec: Any, *figures: Any) -> None:
            self.seen.append((request.id, spec.name, *figures))

        def observe_migration(self, request: Any, *figures: Any) -> None:
            self.seen.append((request.id, *figures))

    hand = Hand(nodes=(1, 1))
    estimates = Estimates()
    placement = First()
    hand.controller = Controller(placement, Keep(), Concurrency(), estimates)  # type: ignore[arg-type]
    hand.cluster = hand.controller.cluster
    hand.join("n0", 1)
    hand.join("n1", 1)
    hand.deploy("a")
    hand.deploy("b")
    hand.arrive(0)
    hand.reach(0)
    placement.plans = [Plan("n0", moves=(Move(0, "n1"),))]
    hand.arrive(1, "b")
    hand.reach(2)
    hand(m.MigrationFinished(0, 0.7, 4, 2))
    hand.finish(0)
    assert estimates.seen == [("n0", "a", COLD, Tier.REMOTE, 8.0, 0.0, 9.0, 1, None), ("n1", "a", COLD, Tier.REMOTE, 8.0, 0.0, 9.0, 1, None), (0, 4, 0.7, 0.5), (0, "a", 5, 1.0)]


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        (Plan("n7"), "no such node"),
        (Plan("n1", reuse=0), "not there"),
        (Plan("n0", give_way=(0,)), "not idle"),
        (Plan("n0", give_way=(0, 0)), "twice"),
        (Plan("n0", reuse=0), "cannot be reused"),
        (Plan("n0"), "gives 0 devices"),
        (Plan("n1", preempted=(1,)), "runs nothing"),
        (Plan("n0", moves=(Move(0, "n0"),)), "not another node"),
        (Plan("n0", moves=(Move(0, "n1"),)), "no free room"),
        (Plan("n0", moves=(Move(0, "n1", 1),)), "cannot take"),
    ],
)
def test_a_wrong_plan_is_an_error_that_changes_nothing(plan: Plan, problem: str) -> None:
    hand = Hand(nodes=(1, 1), models="abc", keep=Keep(None))
    for request, model in enumerate("ab"):
        hand.arrive(request, model)
        hand.reach(request)
    hand.finish(1)
    hand.arrive(2, "b")
    hand.finish(2)
    before = hand.cluster.snapshot()["instances"]
    hand.placement.plans = [plan]
    with pytest.raises(SllmError, match=problem):
        hand.arrive(3, "c")
    assert hand.cluster.snapshot()["instances"] == before
    recount(hand.controller)


def test_the_log_is_json_and_its_replay_is_exact() -> None:
    lines: list[bytes] = []
    recorder = Recorder(Controller(AnyPlacement(), AnyKeepAlive(), Concurrency()), lines.append)
    node = m.NodeSpec(name="n", devices=2, dram_nbytes=50 * GB, remote_bytes_per_second=GB, disk_bytes_per_second=GB, dram_bytes_per_second=GB)
    recorder.handle(m.NodeJoined(node), 0.0)
    recorder.handle(m.ModelDeployed(m.ModelSpec(name="a", nbytes=GB)), 0.1)
    recorder.handle(m.RequestArrived(0, "a", 10), 1 / 3)
    recorder.handle(m.InstanceReached(0, Tier.DISK, 1.0, 0.0, 1), 1.5)
    assert json.loads(lines[2])["event"] == {"type": "RequestArrived", "request": 0, "model": "a", "input_tokens": 10, "prefix": ""}
    assert replay(lines, Controller(AnyPlacement(), AnyKeepAlive(), Concurrency())) == 4
    with pytest.raises(SllmError, match=r"event 3 of the log.*Start.*as recorded"):
        replay([*lines[:1], *lines[2:]][:1] + lines[1:2] + [lines[2].replace(b'"devices":[0]', b'"devices":[1]')], Controller(AnyPlacement(), AnyKeepAlive(), Concurrency()))
    with pytest.raises(SllmError, match="line 2 of the event log is not a record"):
        list(read_log([lines[0], lines[1][:-30]]))


def test_policies_that_learn_are_saved_with_the_controller() -> None:
    class Learning(Keep):
        def save(self) -> bytes:
            return str(self.seconds).encode()

        def restore(self, data: bytes) -> None:
            self.seconds = float(data)

    saved = Controller(First(), Learning(7.0), Concurrency()).to_bytes()
    learning = Learning(1.0)
    Controller(First(), learning, Concurrency()).restore(saved)
    assert learning.seconds == 7.0


def test_ranked_is_in_order_whatever_happened_before() -> None:
    random = Random(5)
    for number in range(50):
        ranked: Ranked[int] = Ranked()
        truth: dict[int, float] = {}
        for _ in range(400):
            key = random.randrange(12 if number % 2 else 200)  # few keys are sorted anew, of many some are moved
            if random.random() < 0.6:
                truth[key] = float(random.randrange(5))
                ranked.add(key, truth[key])
            else:
                truth.pop(key, None)
                ranked.discard(key)
            assert len(ranked) == len(truth) and len(ranked._noted) <= 2 * max(len(truth), 1) + 17
            if random.random() < 0.7:
                continue  # what changes between two readings
            assert list(ranked) == sorted(truth, key=lambda key: (truth[key], key)) and ranked.first() == next(iter(ranked), None)
            assert ranked.ordered() == sorted((rank, key) for key, rank in truth.items()) and not ranked._noted


def test_held_memory_by_warmth() -> None:
    on_device = m.ModelSpec(name="a", nbytes=100, process_nbytes=1, runtime_nbytes=10)
    function = m.ModelSpec(name="a", nbytes=100, process_nbytes=1, runtime_nbytes=10, devices=0)
    assert [held_nbytes(on_device, each) for each in Warmth] == [0, 1, 11, 111, 11, 11]
    assert [held_nbytes(function, each) for each in Warmth] == [0, 1, 11, 111, 111, 111]


# What a review found


def test_who_has_been_idle_longest_gives_way_first_also_after_it_descended() -> None:
    hand = Hand(nodes=(2,), models="ab", keep=Keep(5.0, DRAM))
    hand.arrive(0, "a")
    hand.arrive(1, "b")
    hand.reach(0)
    hand.reach(1)
    hand.finish(0, 10.0)
    hand.finish(1, 12.0)
    hand.keep.seconds = None
    timer = next(timer for timer, what in hand.controller.timers.pending.items() if what.key == 0)
    assert hand(m.TimerFired(timer), 15.0) == [m.Descend(0, DRAM, 2)]
    assert hand.cluster.instances[0].idle_since == hand.cluster.instances[0].rank == 10.0
    assert [each.id for each in hand.cluster.idle_instances("n0")] == [0, 1]


def test_what_a_plan_that_was_given_up_had_kept_is_idle_since_before() -> None:
    hand = Hand(nodes=(2, 1), models="ac", keep=Keep(None))
    hand.deploy("b", devices=2)
    hand.arrive(0, "a")
    hand.placement.plans = [Plan("n0")]
    hand.arrive(1, "c")
    hand.reach(0)
    hand.reach(1)
    hand.finish(1, 3.0)
    hand.placement.plans = [Plan("n0", give_way=(1,), moves=(Move(0, "n1"),)), None, None]
    hand.arrive(2, "b", now=6.0)
    hand(m.NodeLost("n1"), 7.0)
    assert hand.cluster.instances[1].idle_since == 3.0


def test_loads_that_fail_or_are_lost_leave_no_queue() -> None:
    hand = Hand(nodes=(1, 1, 1))
    hand.placement.plans = [Plan("n0", parts=("n0", "n1", "n2"))]
    hand.arrive(0)
    assert [node.loads_until > 2 for node in hand.cluster.nodes.values()] == [True] * 3
    hand(m.NodeLost("n2"))
    hand.join("n2", 1)
    hand.placement.plans = [Plan("n2")]
    hand.deploy("b")
    hand.arrive(1, "b")
    hand(m.InstanceFailed(0, "no memory", 1))
    assert [node.loads_until > 0 for node in hand.cluster.nodes.values()] == [False, False, True], "its helper's link is free, another's load goes on"


def test_a_load_that_should_be_over_is_no_queue() -> None:
    hand = Hand(nodes=(2, 2), models="ab", process_nbytes=0)
    hand.arrive(0)
    assert [node.spec.name for node in hand.cluster.open_nodes(1)] == ["n1", "n0"]
    hand(m.RequestArrived(9, "nobody", 1), 8.5)
    assert [node.spec.name for node in hand.cluster.open_nodes(1)] == ["n0", "n1"], "late, so nobody knows when it is over"


def test_pre_warming_keeps_to_max_instances_and_waits_for_a_model_that_fails() -> None:
    hand = Hand(nodes=(4,), keep=Keep(None), max_instances=1)
    hand.keep.prewarms = [Prewarm(1.0, "a", READY, 3), Prewarm(5.0, "a", DRAM, 3)]
    hand.arrive(0)
    hand.reach(0)
    assert hand(m.TimerFired(0), 1.0) == [], "one there is at most, and it is busy"
    hand.arrive(1)
    timer = next(iter(hand.controller.timers.pending))
    assert hand(m.TimerFired(timer), 5.0) == []
    hand.deploy("a", max_instances=3)
    hand.keep.prewarms = [Prewarm(6.0, "a", READY, 3)]
    hand.arrive(2)
    prewarm = next(timer for timer, what in hand.controller.timers.pending.items() if what.at == 6.0)
    for id in list(hand.cluster.models["a"].starting):
        hand(m.InstanceFailed(id, "no memory", 1))
    assert hand.cluster.models["a"].held_back and hand(m.TimerFired(prewarm), 6.0) == []


def test_fewer_least_instances_are_let_go_and_more_are_started() -> None:
    hand = Hand(nodes=(3,), keep=Keep(5.0), min_instances=2)
    hand.reach(0)
    hand.reach(1)
    assert not hand.controller.timers.pending
    assert hand.deploy("a", min_instances=1) == [m.SetTimer(0, 5.0), m.SetTimer(1, 5.0)]
    hand(m.TimerFired(0), 5.0)
    hand(m.TimerFired(1), 5.0)
    assert len(hand.cluster.models["a"].open) == 1
    hand.controller.autoscaler.desired = lambda model, now: 0  # type: ignore[method-assign]
    assert [each.target for each in hand.deploy("a", min_instances=3) if isinstance(each, m.Start)] == [READY, READY]
    hand.deploy("a", min_instances=0)
    for id in list(hand.cluster.models["a"].starting):
        hand.reach(id)
    while hand.controller.timers.pending:
        hand(m.TimerFired(next(iter(hand.controller.timers.pending))), hand.now + 10.0)
    assert not hand.cluster.instances


def test_a_model_that_fits_no_node_is_refused_and_named() -> None:
    hand = Hand(nodes=())
    assert hand.arrive(0) == [], "nodes may come"
    hand.deploy("wide", devices=4)
    hand.arrive(1, "wide")
    refusals = hand.join("n0", 1) + hand.join("n1", 0, gigabytes=900)
    assert [(each.request, each.reason) for each in refusals if isinstance(each, m.Refuse)] == [
        (1, "503: model wide needs 4 devices and 2,000,000,000 bytes of memory on one node, and the largest has 1 and 100,000,000,000; add a larger node")
    ]
    (refusal,) = hand.arrive(2, "wide")
    assert isinstance(refusal, m.Refuse)
    hand.join("n2", 4, gigabytes=1)
    hand.deploy("function", devices=1, process_nbytes=500 * GB)
    assert isinstance(hand.arrive(3, "function")[0], m.Refuse), "one has the devices, another the memory"
    (start,) = hand.join("n3", 8) + hand.arrive(4, "wide")
    assert isinstance(start, m.Start) and start.node == "n3"
    hand.reach(start.instance)
    hand.deploy("b", devices=8)
    hand.arrive(5, "b")
    lost = hand(m.NodeLost("n3"))
    assert sorted(each.request for each in lost if isinstance(each, m.Refuse)) == [4, 5], "with the only node that is large enough goes the hope"


def test_a_node_that_joins_anew_is_not_missed_in_between() -> None:
    hand = Hand(nodes=(1,))
    hand.join("large", 4)
    hand.deploy("wide", devices=4)
    hand.arrive(0, "wide")
    hand.reach(0)
    (start,) = hand.join("large", 4)
    assert isinstance(start, m.Start) and hand.cluster.requests[0].instance is None


def test_what_is_learned_of_a_deleted_model_is_forgotten_when_it_is_gone() -> None:
    gone: list[str] = []

    class Learning(Keep):
        def on_delete(self, model: ModelState) -> None:
            gone.append(model.spec.name)

    hand = Hand(keep=Learning(None))
    hand.keep.prewarms = [Prewarm(50.0, "a", READY)]
    hand.arrive(0)
    hand.reach(0)
    hand(m.ModelDeleted("a"))
    assert not gone, "it still runs"
    hand.finish(0)
    assert gone == ["a"] and not hand.controller.timers.pending and not hand.controller.warming.prewarms


def test_an_early_request_cancels_what_was_to_be_there_for_it() -> None:
    hand = Hand(keep=Keep(None))
    hand.keep.prewarms = [Prewarm(9.0, "a", READY), Prewarm(2.0, "a", READY, 0), Prewarm(20.0, "a", READY, 0), Prewarm(30.0, "a", READY, 2)]
    assert hand.arrive(0)[0] == m.SetTimer(0, 9.0)
    hand.arrive(1, now=2.0)
    assert hand(m.TimerFired(0), 9.0) == [] and not hand.controller.warming.prewarms
    assert not any(isinstance(each, m.SetTimer) for each in hand.arrive(2, now=10.0)), "nothing is to be cancelled"
    assert m.SetTimer(1, 30.0) in hand.arrive(3, now=11.0)


def test_who_was_stopped_starts_where_there_is_plain_room() -> None:
    class Rude(First):
        def choose_harmless(self, model: ModelState, cluster: Cluster, now: float) -> Plan | None:
            return Plan("n1") if model.spec.name == "a" and cluster.nodes["n1"].free_devices else None

    hand = Hand(nodes=(1, 1), models="ab")
    hand.controller.placement = hand.placement = Rude()
    hand.controller._build(hand.controller.cluster)
    hand.arrive(0)
    hand.reach(0)
    hand.placement.plans = [Plan("n0", preempted=(0,)), Plan("n0", preempted=(1,)), None, None]
    actions = hand.arrive(1, "b")
    assert [(each.model, each.node) for each in actions if isinstance(each, m.Start)] == [("b", "n0"), ("a", "n1")]


def test_a_request_that_cannot_be_moved_is_not_moved_for_ever() -> None:
    hand = Hand(nodes=(1, 1), models="ab", keep=Keep(0.0))
    hand.arrive(0)
    hand.reach(0)
    tried = 0
    hand.placement.plans = [Plan("n0", moves=(Move(0, "n1"),))]
    hand.arrive(1, "b")
    while hand.cluster.requests[0].failed_moves < 10:
        target = next((each.id for each in hand.cluster.instances.values() if each.climbing and each.node == "n1"), None)
        if target is None:
            break
        hand.reach(target)
        hand.placement.plans = [Plan("n0", moves=(Move(0, "n1"),)), None, None, None]
        hand(m.MigrationFailed(0, hand.cluster.requests[0].epoch))
        hand.placement.plans = [] if hand.cluster.requests[0].failed_moves >= 3 else hand.placement.plans
        tried += 1
    assert tried == hand.cluster.requests[0].failed_moves == 3


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ({"stay": Stay(float("nan"))}, "keeps instance 0 of a for nan s"),
        ({"stay": Stay(-1.0)}, "keeps instance 0 of a for -1"),
        ({"rank": float("nan")}, "ranks instance 0 of a as nan"),
        ({"stay": Stay(1.0, COLD, Prewarm(float("nan"), "a", READY))}, "pre-warms 1 of a at nan"),
        ({"on_arrival": [Prewarm(5.0, "a", READY, -2)]}, "pre-warms -2 of a"),
        ({"on_arrival": [Prewarm(float("inf"), "a", READY)]}, "at inf"),
        ({"desired": -1}, "desires -1 instances of a"),
        ({"desired": 3}, "desires 3 instances of a; let it answer from 0 up to its max_instances, 2"),
        ({"choose_node": Plan("nowhere")}, "no such node"),
    ],
)
def test_an_answer_that_cannot_be_is_an_error_of_one_sentence(answer: dict[str, Any], problem: str) -> None:
    hand = Hand(max_instances=2)
    for name, value in answer.items():
        part = next(each for each in (hand.keep, hand.controller.autoscaler, hand.placement) if hasattr(each, name))
        setattr(part, name, lambda *_, value=value: value)
    with pytest.raises(SllmError, match=problem) as raised:
        hand.arrive(0)
        hand.reach(0)
        hand.finish(0)
    assert "\n" not in str(raised.value) and raised.type is SllmError
