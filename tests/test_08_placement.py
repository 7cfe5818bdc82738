"""Placement: each policy on clusters made by hand, what ServerlessLLM's scheduler must not forget, and plans for random clusters."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from sllm_mini.control.cluster import Cluster
from sllm_mini.control.controller_check import check_plan
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.messages import ModelSpec, NodeSpec
from sllm_mini.control.placement import (
    POLICIES,
    Affinity,
    Anywhere,
    AvailabilityFirst,
    Candidate,
    LocalityFirst,
    Preempting,
    PrefixOrLeastLoaded,
    SplitFetch,
    StartupTimeOptimised,
    choose_node,
)
from sllm_mini.control.placement.affinity import node_order
from sllm_mini.control.placement.fit import fit, near_nodes, soonest
from sllm_mini.control.placement.simple import Draws, shuffled
from sllm_mini.control.placement.victims import cheapest_cover, shortage, victims
from sllm_mini.control.policy import Move, Placement, Plan
from sllm_mini.control.state import InstanceState, ModelState, Phase, RequestState, held_nbytes
from sllm_mini.types import Tier, Warmth

GB = 10**9
NOW = 10.0


@dataclass
class World:
    """A cluster built with its own moves. A model of 20 GB loads in 20 s from REMOTE, 4 s from DISK, 1 s from DRAM."""

    cluster: Cluster = field(default_factory=Cluster)
    ids: Iterator[int] = field(default_factory=lambda: iter(range(10**6)))

    def node(self, name: str, devices: int = 1, *, disk: tuple[str, ...] = (), dram: tuple[str, ...] = (), nbytes: int = 1000 * GB, remote: float = GB) -> None:
        spec = NodeSpec(name=name, devices=devices, dram_nbytes=nbytes, remote_bytes_per_second=remote, disk_bytes_per_second=5 * GB, dram_bytes_per_second=20 * GB, disk=disk)
        self.cluster.add_node(spec)
        for model in dram:
            self.cluster.cached(name, model, Tier.DRAM)

    def model(self, name: str, devices: int = 1, *, nbytes: int = 20 * GB, concurrency: int = 1, least: int = 0, process: int = 0) -> ModelState:
        return self.cluster.add_model(
            ModelSpec(
                name=name, nbytes=nbytes, devices=devices, concurrency=concurrency, min_instances=least, process_nbytes=process, decode_seconds_per_token=0.05
            )
        )

    def start(self, node: str, model: str, warmth: Warmth = Warmth.READY) -> InstanceState:
        """Climbed to `warmth`, neither idle nor busy yet."""
        instance = self.cluster.spawn(self.cluster.nodes[node], self.cluster.models[model].spec, 0.0)
        self.cluster.climb(instance, self.cluster.models[model].spec, warmth)
        assert self.cluster.book(instance)
        self.cluster.reached(instance)
        return instance

    def idle(self, node: str, model: str, rank: float = 0.0, warmth: Warmth = Warmth.READY) -> int:
        instance = self.start(node, model, warmth)
        self.cluster.rest(instance, rank, 0.0)
        return instance.id

    def request(self, model: str, tokens: int = 100, prefix: str = "") -> RequestState:
        return self.cluster.add_request(next(self.ids), self.cluster.models[model], tokens, prefix, 0.0)

    def busy(self, node: str, model: str, *tokens: int, since: float = 0.0) -> int:
        """Runs a request of each so many tokens (one of 100)."""
        instance = self.start(node, model)
        for each in tokens or (100,):
            self.cluster.assign(self.request(model, each), instance, self.cluster.models[model], since)
        return instance.id

    def requests(self, instance: int) -> list[RequestState]:
        return list(self.cluster.instances[instance].requests.values())

    def plan(self, policy: Placement, model: str, now: float = 0.0) -> Plan | None:
        plan = policy.choose_node(self.cluster.models[model], self.cluster, now)
        if plan is not None:
            valid(self.cluster, self.cluster.models[model], plan)
        return plan


def valid(cluster: Cluster, model: ModelState, plan: Plan) -> None:
    """What any plan must be, said once more and apart from the controller's own check."""
    node, spec = cluster.nodes[plan.node], model.spec
    used = [*plan.give_way, *plan.preempted, *(move.victim for move in plan.moves)]
    assert len(set(used)) == len(used) and plan.reuse not in used
    for id in plan.give_way:
        one = cluster.instances[id]
        assert one.node == plan.node and one.idle_since is not None
        assert not (one.warmth is Warmth.READY and one.model == spec.name), "it would throw itself out"
    for id in (*plan.preempted, *(move.victim for move in plan.moves)):
        one = cluster.instances[id]
        assert one.node == plan.node and one.requests and one.model != spec.name and not one.draining and not one.incoming
    if plan.reuse is not None:
        one = cluster.instances[plan.reuse]
        assert one.node == plan.node and one.idle_since is not None and one.warmth < Warmth.READY
        assert one.model == spec.name and one.spec == spec if one.model else one.runtime in (None, spec.runtime)
    own = [] if plan.reuse is None else [plan.reuse]
    assert len(node.free_devices) + sum(len(cluster.instances[id].devices) for id in [*used, *own]) >= spec.devices
    assert node.free_nbytes + sum(cluster.instances[id].held_nbytes for id in [*used, *own]) >= held_nbytes(spec, Warmth.READY)
    for name in {move.node for move in plan.moves if move.instance is None}:
        coming = [cluster.models[cluster.instances[move.victim].spec.name].spec for move in plan.moves if move.node == name and move.instance is None]
        assert name != plan.node and sum(each.devices for each in coming) <= len(cluster.nodes[name].free_devices)
        assert sum(held_nbytes(each, Warmth.READY) for each in coming) <= cluster.nodes[name].free_nbytes
    for target in {move.instance for move in plan.moves if move.instance is not None}:
        one = cluster.instances[target]
        moved = [cluster.instances[move.victim] for move in plan.moves if move.instance == target]
        assert one.node != plan.node and one.id in cluster.models[one.spec.name].open and {each.model for each in moved} == {one.model}
        assert sum(len(each.requests) for each in moved) <= one.room
    kept: dict[str, int] = {}
    for id in used:
        one = cluster.instances[id]
        if one.warmth is Warmth.READY and one.model is not None:
            kept[one.model] = kept.get(one.model, cluster.models[one.model].ready) - 1
            least = cluster.models[one.model].spec.min_instances
            assert not least or kept[one.model] >= least, "its min_instances stay"
    check_plan(cluster, model, plan, Warmth.READY)


def state(cluster: Cluster) -> object:
    return [
        {name: (list(one.free_devices), one.free_nbytes, one.idle_devices, one.loads_until) for name, one in cluster.nodes.items()},
        {id: (one.warmth, one.target, one.draining, one.idle_since, list(one.requests), list(one.incoming)) for id, one in cluster.instances.items()},
        {name: (list(one.open), list(one.asleep), one.ready) for name, one in cluster.models.items()},
    ]


# --- the knapsack ---------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 4)), max_size=9), st.integers(0, 9))
def test_the_cheapest_cover_is_what_trying_all_finds(items: list[tuple[int, int]], needed: int) -> None:
    costs, devices = [cost for cost, _ in items], [gives for _, gives in items]
    covers = [
        taken for count in range(len(items) + 1) for taken in combinations(range(len(items)), count) if sum(devices[one] for one in taken) >= needed
    ]
    found = cheapest_cover(costs, devices, needed)
    if not covers:
        assert found is None
        return
    assert found is not None and tuple(found) in covers
    assert sum(costs[one] for one in found) == min(sum(costs[one] for one in taken) for taken in covers)
    assert all(sum(devices[each] for each in found if each != one) < needed for one in found), "one was taken for nothing"


def test_of_equal_covers_the_order_of_items_decides() -> None:
    assert cheapest_cover([1.0, 1.0, 1.0], [1, 1, 1], 2) == [0, 1]
    assert cheapest_cover([3.0, 1.0, 1.9], [2, 1, 1], 2) == [1, 2]
    assert cheapest_cover([2.0, 1.0, 1.9], [2, 1, 1], 2) == [0]


# --- which candidate ------------------------------------------------------------------------------------------------


def candidate(node: str, seconds: float, moved: int = 0, give_way: tuple[int, ...] = ()) -> Candidate:
    return Candidate(Plan(node, give_way=give_way), seconds, moved)


def test_the_soonest_node_is_chosen_then_who_disturbs_least() -> None:
    assert choose_node([]) is None
    for wanted, other in [
        (candidate("b", 1.0, 5), candidate("a", 2.0)),
        (candidate("b", 1.0, 0), candidate("a", 1.0, 1)),
        (candidate("b", 1.0), candidate("a", 1.0, give_way=(7,))),
        (candidate("b", 1.0 + 1e-9), candidate("a", 1.0, 1)),
        (candidate("a", 1.0), candidate("b", 1.0)),
    ]:
        assert choose_node([wanted, other]) is choose_node([other, wanted]) is wanted
    assert choose_node(iter([candidate("a", 1.0)])) is not None


# --- what fits on one node ------------------------------------------------------------------------------------------


def fitted(world: World, model: str, node: str) -> Plan | None:
    found = fit(world.cluster.models[model], world.cluster.nodes[node], world.cluster, Estimator(), 0.0)
    if found is not None:
        valid(world.cluster, world.cluster.models[model], found.plan)
        assert found.seconds == found.plan.estimate_seconds
    return None if found is None else found.plan


def test_idle_instances_give_way_in_order_of_rank() -> None:
    world = World()
    world.node("n", 4)
    for name in "abc":
        world.model(name)
    world.model("pair", 2)
    ids = {name: world.idle("n", name, rank) for name, rank in [("a", 3.0), ("b", 1.0), ("c", 2.0)]}
    world.busy("n", "a")
    assert fitted(world, "pair", "n") == Plan("n", give_way=(ids["b"], ids["c"]), tier=Tier.REMOTE, estimate_seconds=20.0)
    world.cluster.wake(world.cluster.instances[ids["b"]])
    world.cluster.rest(world.cluster.instances[ids["b"]], 9.0, 0.0)
    plan = fitted(world, "pair", "n")
    assert plan is not None and plan.give_way == (ids["c"], ids["a"])


def test_nobody_gives_way_for_nothing() -> None:
    world = World()
    world.node("n", 3)
    world.model("small")
    world.model("pair", 2)
    world.model("wide", 2)
    world.idle("n", "small", 1.0)
    pair = world.idle("n", "pair", 2.0)
    plan = fitted(world, "wide", "n")
    assert plan is not None and plan.give_way == (pair,), "small was first in rank, but pair alone is enough"


def test_free_devices_are_taken_before_anybody_gives_way_and_too_few_are_none() -> None:
    world = World()
    world.node("n", 2)
    world.model("a")
    world.model("b", 2)
    world.model("c", 3)
    world.busy("n", "a")
    plan = fitted(world, "a", "n")
    assert plan is not None and plan.give_way == ()
    assert fitted(world, "b", "n") is None and fitted(world, "c", "n") is None


def test_memory_is_had_from_those_who_hold_it() -> None:
    world = World()
    world.node("n", 2, nbytes=50 * GB)
    world.model("asleep", nbytes=20 * GB, process=GB)
    world.model("device", process=5 * GB)
    world.model("function", 0, nbytes=40 * GB)
    first = world.idle("n", "asleep", 1.0, Warmth.DRAM)
    world.idle("n", "device", 2.0)
    plan = fitted(world, "function", "n")
    assert plan is not None and plan.give_way == (first,), "24 GB are free, 21 more are the first's"
    world.model("larger", 0, nbytes=51 * GB)
    assert fitted(world, "larger", "n") is None


def test_a_start_climbs_from_the_warmest_that_is_its_to_use() -> None:
    world = World()
    world.node("n", 2)
    world.node("other", 2)
    world.model("a", process=GB)
    world.model("b", process=GB)
    world.idle("other", "a", 0.0, Warmth.DEVICE)
    world.idle("n", "b", 0.0, Warmth.DRAM)
    assert fitted(world, "a", "n") == Plan("n", tier=Tier.REMOTE, estimate_seconds=20.0)
    process = world.idle("n", "b", 0.0, Warmth.PROCESS)
    runtime = world.idle("n", "b", 0.0, Warmth.RUNTIME)
    plan = fitted(world, "a", "n")
    assert plan is not None and plan.reuse == runtime != process
    world.idle("n", "a", 0.0, Warmth.DRAM)
    warmest = world.idle("n", "a", 0.0, Warmth.DEVICE)
    plan = fitted(world, "a", "n")
    assert plan is not None and plan.reuse == warmest and plan.estimate_seconds == 0.0
    world.cluster.wake(world.cluster.instances[warmest])
    plan = fitted(world, "a", "n")
    assert plan is not None and plan.reuse not in (warmest, runtime) and plan.estimate_seconds == 1.0


def test_one_asleep_with_old_figures_is_not_climbed_from() -> None:
    world = World()
    world.node("n")
    world.model("a")
    world.idle("n", "a", 0.0, Warmth.DRAM)
    world.model("a", nbytes=30 * GB)
    assert fitted(world, "a", "n") == Plan("n", tier=Tier.REMOTE, estimate_seconds=30.0)


def test_an_idle_instance_does_not_give_way_to_one_of_the_same_model() -> None:
    world = World()
    world.node("n")
    world.model("a")
    world.idle("n", "a")
    assert all(world.plan(made(Estimator()), "a") is None for made in POLICIES.values())


def test_what_min_instances_keep_does_not_give_way_and_is_no_victim() -> None:
    world = World()
    for name in ("n", "free"):
        world.node(name, 2 if name == "n" else 1, dram=("a", "b"))
    world.model("a", least=1)
    world.model("b", 2)
    for each in range(2):
        assert world.idle("n", "a", each) == each
    assert fitted(world, "b", "n") is None, "one of the two stays"
    world.cluster.fall(world.cluster.instances[1], Warmth.COLD)
    world.cluster.fall(world.cluster.instances[0], Warmth.COLD)
    world.busy("n", "a")
    for policy in (StartupTimeOptimised(), Preempting()):
        assert world.plan(policy, "b", 10.0) is None
    world.model("a")
    assert world.plan(StartupTimeOptimised(), "b", 10.0) is not None and world.plan(Preempting(), "b", 10.0) is not None


def test_memory_of_what_it_climbs_from_is_counted_once() -> None:
    world = World()
    world.node("n", 1, dram=("a",), nbytes=10 * GB)
    world.model("small", process=6 * GB)
    world.model("busy")
    world.model("a", process=11 * GB)
    world.busy("n", "busy")
    world.idle("n", "small", 0.0, Warmth.PROCESS)
    assert shortage(world.cluster.models["a"], world.cluster.nodes["n"], world.cluster, Estimator(), 0.0) is None
    assert world.plan(Preempting(), "a", 1.0) is None


# --- which nodes are looked at --------------------------------------------------------------------------------------


def test_near_nodes_are_few_and_the_nearest() -> None:
    world = World()
    world.model("a")
    for place in range(300):
        world.node(f"n{place:03}", 1, disk=("a",) if place % 2 else ())
    world.cluster.cached("n299", "a", Tier.DRAM)
    model = world.cluster.models["a"]
    names = [node.spec.name for node in near_nodes(model, world.cluster, 4)]
    assert len(names) <= 4 + 4 + 16
    model.cached_on.clear()
    for place in (280, 290):
        world.cluster.cached(f"n{place}", "a", Tier.DISK)
    world.cluster.cached("n285", "a", Tier.DRAM)
    world.cluster.set_loads_until(world.cluster.nodes["n280"], 50.0)
    world.cluster.set_loads_until(world.cluster.nodes["n001"], -1.0)
    names = [node.spec.name for node in near_nodes(model, world.cluster, 4)]
    assert names[:4] == ["n285", "n290", "n280", "n001"] and len(names) == 7


# --- the simple policies --------------------------------------------------------------------------------------------


def test_the_draws_are_a_function_of_seed_and_count_and_nearly_uniform() -> None:
    one, two, other = Draws(3), Draws(3), Draws(4)
    first = [one.below(10) for _ in range(5000)]
    assert first == [two.below(10) for _ in range(5000)] != [other.below(10) for _ in range(5000)]
    again = Draws(3)
    again.count = 4000
    assert first[4000:] == [again.below(10) for _ in range(1000)]
    counts = [first.count(each) for each in range(10)]
    assert sum((each - 500) ** 2 / 500 for each in counts) < 27.9, "chi squared of 9 degrees, p = 0.001"


def test_random_goes_to_every_node_that_could_and_to_no_other() -> None:
    world = World()
    for name in "abcd":
        world.node(name)
    world.model("m")
    world.model("other")
    world.busy("a", "other")
    world.idle("b", "other")
    policy = Anywhere()
    chosen = [world.plan(policy, "m") for _ in range(600)]
    counts = {name: sum(one is not None and one.node == name for one in chosen) for name in "abcd"}
    assert counts["a"] == 0 and all(150 < counts[name] < 250 for name in "bcd")
    assert [world.plan(Anywhere(draws=Draws(9)), "m") for _ in range(3)] == [world.plan(Anywhere(draws=Draws(9)), "m")] * 3
    assert sorted(node.spec.name for node in shuffled(world.cluster, Draws())) == list("abcd")


def test_availability_takes_a_free_node_whatever_is_stored_where() -> None:
    world = World()
    for name in "abc":
        world.node(name, dram=("m",) if name == "a" else ())
    world.model("m")
    world.model("other")
    idle = world.idle("a", "other")
    policy = AvailabilityFirst()
    assert {plan.node for _ in range(50) if (plan := world.plan(policy, "m"))} == {"b", "c"}
    world.busy("b", "other")
    world.busy("c", "other")
    plan = world.plan(policy, "m")
    assert plan is not None and (plan.node, plan.give_way) == ("a", (idle,))
    world.cluster.assign(world.request("other"), world.cluster.instances[idle], world.cluster.models["other"], 0.0)
    assert world.plan(policy, "m") is None


def test_locality_waits_for_the_node_that_has_the_weights() -> None:
    world = World()
    world.node("dram", dram=("m",))
    world.node("disk", disk=("m",))
    world.node("small", 0, dram=("wide",))
    world.node("wide", 2)
    world.model("m")
    world.model("other")
    world.model("wide", 2)
    policy = LocalityFirst()
    plan = world.plan(policy, "m")
    assert plan is not None and plan.node == "dram" and plan.estimate_seconds == 1.0
    world.busy("dram", "other")
    assert world.plan(policy, "m") is None
    plan = world.plan(policy, "other")
    assert plan is not None and plan.tier is Tier.REMOTE, "stored nowhere: anywhere"
    plan = world.plan(policy, "wide")
    assert plan is not None and plan.node == "wide", "stored only where it can never run"


def test_the_instance_used_last_takes_the_next_request() -> None:
    world = World()
    world.node("n", 3)
    model = world.model("m", concurrency=2)
    first, second = world.idle("n", "m"), world.idle("n", "m")
    policy = StartupTimeOptimised()
    assert policy.choose_instance(model, world.request("m"), world.cluster, 0.0) is world.cluster.instances[second]
    world.cluster.assign(world.request("m"), world.cluster.instances[first], model, 0.0)
    assert policy.choose_instance(model, world.request("m"), world.cluster, 0.0) is world.cluster.instances[first]
    anywhere = Anywhere()
    chosen = [anywhere.choose_instance(model, world.request("m"), world.cluster, 0.0) for _ in range(40)]
    assert {one.id for one in chosen if one is not None} == {first, second}


# --- ServerlessLLM, worked by hand ----------------------------------------------------------------------------------


def figure(tokens: int = 100) -> tuple[World, int]:
    """As the paper's example: the first node has A in memory and a free device; the second has B in memory and runs A."""
    world = World()
    world.node("first", dram=("A",))
    world.node("second", dram=("B",))
    world.model("A")
    world.model("B")
    return world, world.busy("second", "A", tokens)


def test_live_migration_beats_waiting_preempting_and_loading_from_afar() -> None:
    world, running = figure()
    far = world.plan(AvailabilityFirst(), "B", 10.0)
    assert far is not None and (far.node, far.estimate_seconds) == ("first", 20.0)
    assert world.plan(LocalityFirst(), "B", 10.0) is None, "it waits"
    rude = world.plan(Preempting(), "B", 10.0)
    assert rude == Plan("second", preempted=(running,), tier=Tier.DRAM, estimate_seconds=1.0), "ten seconds of work are lost"
    # A is loaded in 1 s; by then it has 11 s / 0.05 = 220 tokens, and moves in 0.01 * (100 + 220) + 0.1 = 3.3 s; B takes 1 s.
    plan = world.plan(StartupTimeOptimised(), "B", 10.0)
    assert plan is not None and plan.estimate_seconds == pytest.approx(5.3)
    assert structs.replace(plan, estimate_seconds=0.0) == Plan("second", moves=(Move(running, "first"),), tier=Tier.DRAM)
    still = world.plan(StartupTimeOptimised(migrate=False), "B", 10.0)
    assert still == far


def test_a_request_that_would_take_longer_to_move_is_left() -> None:
    world, _ = figure(tokens=1700)
    plan = world.plan(StartupTimeOptimised(), "B", 10.0)
    assert plan is not None and (plan.node, plan.moves) == ("first", ()), "0.01 * 1920 + 0.1 + 2 s are more than 20 s"


def test_a_ready_instance_with_room_is_moved_to_without_a_load() -> None:
    world, running = figure()
    ready = world.idle("first", "A")
    plan = world.plan(StartupTimeOptimised(), "B", 10.0)
    assert plan is not None and plan.moves == (Move(running, "first", ready),)
    assert plan.estimate_seconds == pytest.approx(0.01 * (100 + 200) + 0.1 + 1.0)


def test_loads_queued_at_the_destination_count() -> None:
    world, running = figure()
    world.cluster.set_loads_until(world.cluster.nodes["first"], 40.0)
    plan = world.plan(StartupTimeOptimised(), "B", 10.0)
    # 30 s of queue, 1 s of load, then 0.01 * (100 + 41 / 0.05) + 0.1; loading B there would take 50 s.
    assert plan is not None and plan.moves == (Move(running, "first"),)
    assert plan.estimate_seconds == pytest.approx(31 + 9.3 + 1)
    world.node("third", disk=("A",))
    plan = world.plan(StartupTimeOptimised(), "B", 10.0)
    assert plan is not None and plan.moves == (Move(running, "third"),), "from disk, but with no queue"
    assert plan.estimate_seconds == pytest.approx(4 + 0.01 * (100 + 14 / 0.05) + 0.1 + 1)


def test_the_queue_of_the_node_itself_shortens_while_victims_leave() -> None:
    world, _ = figure()
    world.cluster.set_loads_until(world.cluster.nodes["second"], 13.0)
    plan = world.plan(StartupTimeOptimised(), "B", 10.0)
    assert plan is not None and plan.estimate_seconds == pytest.approx(5.3), "3 s of queue are over after 4.3 s"
    world.cluster.set_loads_until(world.cluster.nodes["second"], 16.0)
    plan = world.plan(StartupTimeOptimised(), "B", 10.0)
    assert plan is not None and plan.estimate_seconds == pytest.approx(7.0)


def test_without_a_target_nobody_is_moved() -> None:
    world, _ = figure()
    world.model("C")
    world.busy("first", "C")
    assert world.plan(StartupTimeOptimised(), "B", 10.0) is None


def two_victims(*free: tuple[str, int, tuple[str, ...]]) -> tuple[World, int, int]:
    world = World()
    world.node("busy", 2, dram=("wide",))
    for name, devices, dram in free:
        world.node(name, devices, dram=dram)
    for name in ("A", "B"):
        world.model(name)
    world.model("wide", 2, nbytes=200 * GB)
    return world, world.busy("busy", "A"), world.busy("busy", "B")


def test_a_destination_is_used_up_by_the_first_that_goes_there() -> None:
    world, a, b = two_victims(("near", 1, ("A", "B")), ("far", 1, ()))
    plan = world.plan(StartupTimeOptimised(), "wide", 10.0)
    assert plan is not None and plan.moves == (Move(a, "near"), Move(b, "far"))
    # The slowest of the two: 20 s of load, then 0.01 * (100 + 30 / 0.05) + 0.1; then 10 s from memory.
    assert plan.estimate_seconds == pytest.approx(20 + 7.1 + 10)
    world, _, _ = two_victims(("near", 1, ("A", "B")))
    assert world.plan(StartupTimeOptimised(), "wide", 10.0) is None, "there is one device for two"


def test_loads_of_one_plan_queue_behind_each_other() -> None:
    world, a, b = two_victims(("near", 2, ("A", "B")))
    plan = world.plan(StartupTimeOptimised(), "wide", 10.0)
    assert plan is not None and plan.moves == (Move(a, "near"), Move(b, "near"))
    assert plan.estimate_seconds == pytest.approx(2 + 0.01 * (100 + 12 / 0.05) + 0.1 + 10), "the second's load takes 1 s after the first's"


def test_memory_and_seats_of_a_destination_are_used_up_too() -> None:
    world, _, _ = two_victims()
    world.model("A", process=6 * GB)
    world.model("B", process=6 * GB)
    world.node("tight", 2, dram=("A", "B"), nbytes=10 * GB)
    plan = world.plan(StartupTimeOptimised(), "wide", 10.0)
    assert plan is not None and plan.node == "tight" and not plan.moves, "memory for one process of 6 GB, so wide waits 200 s for REMOTE"
    world = World()
    world.node("busy", 2, dram=("wide",))
    world.node("ready")
    world.node("free", disk=("A",))
    world.model("A")
    world.model("wide", 2, nbytes=200 * GB)
    first, second = world.busy("busy", "A"), world.busy("busy", "A")
    seat = world.idle("ready", "A")
    plan = world.plan(StartupTimeOptimised(), "wide", 10.0)
    assert plan is not None and plan.moves == (Move(first, "ready", seat), Move(second, "free"))


def test_a_victim_that_finds_no_place_is_left_and_the_next_is_taken() -> None:
    world = World()
    world.node("busy", 3, dram=("wide",))
    world.node("near", 1, dram=("A", "B"))
    world.node("ready")
    for name in ("A", "B", "C"):
        world.model(name)
    world.model("wide", 2, nbytes=200 * GB)
    a, _, c = world.busy("busy", "A"), world.busy("busy", "B"), world.busy("busy", "C", 3000)
    seat = world.idle("ready", "C")
    plan = world.plan(StartupTimeOptimised(), "wide", 10.0)
    assert plan is not None and plan.moves == (Move(a, "near"), Move(c, "ready", seat)), "A and B were cheaper, but near takes one"


def test_victims_with_several_devices() -> None:
    world = World()
    world.node("busy", 4, dram=("whole",))
    world.node("free", 3, dram=("pair", "A", "B"))
    world.model("pair", 2)
    world.model("A")
    world.model("B")
    world.model("whole", 4)
    pair, a, b = world.busy("busy", "pair"), world.busy("busy", "A"), world.busy("busy", "B")
    assert world.plan(StartupTimeOptimised(), "whole", 10.0) is None, "four devices leave, three are free elsewhere"
    world.node("other", 1)
    plan = world.plan(StartupTimeOptimised(), "whole", 10.0)
    assert plan is not None and plan.moves == (Move(pair, "free"), Move(a, "free"), Move(b, "other"))


def test_one_victim_of_two_devices_goes_where_that_is_cheaper_than_two_of_one() -> None:
    for tokens, expected in [(200, "pair"), (900, "both")]:
        world = World()
        world.node("busy", 4, dram=("wide",))
        world.node("free", 2, dram=("pair", "A", "B"))
        world.model("pair", 2)
        world.model("A")
        world.model("B")
        world.model("wide", 2, nbytes=900 * GB)
        pair, a, b = world.busy("busy", "pair", tokens), world.busy("busy", "A"), world.busy("busy", "B")
        plan = world.plan(StartupTimeOptimised(), "wide", 10.0)
        assert plan is not None
        assert [move.victim for move in plan.moves] == ([pair] if expected == "pair" else [a, b])


def test_free_devices_and_idle_instances_are_used_before_victims() -> None:
    world = World()
    world.node("busy", 3, dram=("wide",))
    world.node("free", 3, dram=("A",))
    world.model("A")
    world.model("idle")
    world.model("wide", 3, nbytes=900 * GB)
    idle, victim = world.idle("busy", "idle"), world.busy("busy", "A")
    world.busy("free", "A")
    plan = world.plan(StartupTimeOptimised(), "wide", 10.0)
    assert plan is not None and plan.give_way == (idle,) and [move.victim for move in plan.moves] == [victim]


def test_a_request_that_has_moved_often_enough_is_left_alone() -> None:
    world, running = figure()
    (request,) = world.requests(running)
    request.migrations = 1
    plan = world.plan(StartupTimeOptimised(), "B", 10.0)
    assert plan is not None and plan.moves
    request.migrations = 2
    plan = world.plan(StartupTimeOptimised(), "B", 10.0)
    assert plan is not None and plan.node == "first" and not plan.moves
    request.migrations, request.failed_moves = 0, 2  # what failed twice is not tried a third time
    assert world.plan(StartupTimeOptimised(), "B", 10.0) == plan
    request.migrations, request.failed_moves = 2, 0
    assert world.plan(StartupTimeOptimised(most_migrations=3), "B", 10.0) != plan


@pytest.mark.parametrize("what", ["draining", "migrating", "reserved", "climbing"])
def test_who_is_on_the_move_is_no_victim(what: str) -> None:
    world, running = figure()
    instance = world.cluster.instances[running]
    if what == "draining":
        world.cluster.drain(instance, True)
    elif what == "migrating":
        world.requests(running)[0].phase = Phase.MIGRATING
    elif what == "reserved":
        instance.incoming[99] = world.request("A")
    else:
        instance.target, instance.warmth = Warmth.READY, Warmth.RUNTIME
    assert victims(world.cluster.nodes["second"], world.cluster.models["B"], world.cluster) == []
    for policy in (StartupTimeOptimised(), Preempting()):
        plan = world.plan(policy, "B", 10.0)
        assert plan is not None and (plan.node, plan.moves, plan.preempted) == ("first", (), ())


def test_victims_are_looked_at_in_order_of_arrival() -> None:
    world = World()
    world.node("n", 3)
    for name in "abc":
        world.model(name)
    early, late = world.request("a"), world.request("b")
    ids = []
    for request in (late, early):
        instance = world.start("n", request.model)
        world.cluster.assign(request, instance, world.cluster.models[request.model], 0.0)
        ids.append(instance.id)
    world.busy("n", "c")
    assert [one.id for one in victims(world.cluster.nodes["n"], world.cluster.models["c"], world.cluster)] == ids[::-1]


# --- Shepherd* ------------------------------------------------------------------------------------------------------


def test_who_has_run_least_is_preempted_and_only_once() -> None:
    world = World()
    world.node("n", 2, dram=("m",))
    for name in ("m", "a", "b"):
        world.model(name)
    old, young = world.busy("n", "a", since=1.0), world.busy("n", "b", since=5.0)
    plan = world.plan(Preempting(), "m", 10.0)
    assert plan is not None and plan.preempted == (young,)
    world.requests(young)[0].preemptions = 1
    plan = world.plan(Preempting(), "m", 10.0)
    assert plan is not None and plan.preempted == (old,)
    world.requests(old)[0].preemptions = 1
    assert world.plan(Preempting(), "m", 10.0) is None
    assert world.plan(Preempting(most_preemptions=2), "m", 10.0) is not None


def test_no_more_are_preempted_than_must_be() -> None:
    world = World()
    world.node("n", 3, dram=("m",))
    world.model("m", 2)
    world.model("a")
    world.model("pair", 2)
    world.busy("n", "a", since=9.0)
    pair = world.busy("n", "pair", since=8.0)
    plan = world.plan(Preempting(), "m", 10.0)
    assert plan is not None and plan.preempted == (pair,), "a has run less, but pair must go anyway"


def test_nobody_is_preempted_where_the_weights_are_far_or_another_node_is_as_quick() -> None:
    world = World()
    world.node("n")
    world.model("m")
    world.model("a")
    world.busy("n", "a")
    assert world.plan(Preempting(), "m", 10.0) is None
    world.cluster.cached("n", "m", Tier.DRAM)
    assert world.plan(Preempting(), "m", 10.0) is not None
    world.node("free", dram=("m",))
    plan = world.plan(Preempting(), "m", 10.0)
    assert plan is not None and (plan.node, plan.preempted) == ("free", ())


# --- affinity -------------------------------------------------------------------------------------------------------


def test_only_the_models_of_a_lost_node_move() -> None:
    nodes, models = [f"node-{each}" for each in range(10)], [f"model-{each}" for each in range(2000)]
    before = {model: node_order(model, nodes) for model in models}
    after = {model: node_order(model, [node for node in nodes if node != "node-4"]) for model in models}
    for model in models:
        assert after[model] == [node for node in before[model] if node != "node-4"]
        assert node_order(model, nodes, 3) == before[model][:3]
    firsts = [order[0] for order in before.values()]
    assert all(140 < firsts.count(node) < 260 for node in nodes), "each has its share"
    seconds = [order[1] for order in before.values() if order[0] == "node-4"]
    assert len(set(seconds)) == 9, "what one node had goes to all others"
    shuffled_nodes = nodes.copy()
    random.Random(0).shuffle(shuffled_nodes)
    assert node_order("model-7", shuffled_nodes) == before["model-7"]


def test_a_model_meets_itself_where_it_was_and_goes_on_to_its_next_node() -> None:
    world = World()
    for each in range(5):
        world.node(f"n{each}")
    world.model("m")
    world.model("other")
    order = node_order("m", world.cluster.nodes)
    policy, waiting = Affinity(), Affinity(patience=2)
    for place, name in enumerate(order):
        plan = world.plan(policy, "m")
        assert plan is not None and plan.node == name
        plan = world.plan(waiting, "m")
        assert (plan is None) == (place >= 2)
        world.busy(name, "other")
    assert world.plan(policy, "m") is None
    world.node("new")
    plan = world.plan(policy, "m")
    assert plan is not None and plan.node == "new", "it notices nodes that come"
    for _ in range(2):
        order = node_order("m", world.cluster.nodes)
        for instance in list(world.cluster.nodes[order[0]].instances.values()):
            for request in list(instance.requests.values()):
                world.cluster.leave(request)
            world.cluster.fall(instance, Warmth.COLD)
        world.cluster.remove_node(order[0])
        plan = world.plan(policy, "m")
        assert plan is None or plan.node in order[1:], "and that go"
    with pytest.raises(ValueError, match="patience"):
        Affinity(patience=0)


def test_beyond_its_first_nodes_affinity_goes_where_there_is_room() -> None:
    world = World()
    world.model("m")
    world.model("other")
    for each in range(8):
        world.node(f"n{each}")
    order = node_order("m", world.cluster.nodes)
    for name in order[:7]:
        world.busy(name, "other")
    plan = world.plan(Affinity(most_considered=2), "m")
    assert plan is not None and plan.node == order[7]


# --- DeepServe ------------------------------------------------------------------------------------------------------


def served(world: World, policy: PrefixOrLeastLoaded, prefix: str) -> int:
    model = world.cluster.models["m"]
    request = world.request("m", prefix=prefix)
    chosen = policy.choose_instance(model, request, world.cluster, 0.0)
    assert chosen is not None
    world.cluster.assign(request, chosen, model, 0.0)
    return chosen.id


def test_the_longest_prefix_wins_while_load_is_balanced() -> None:
    world = World()
    world.node("n", 3)
    world.model("m", concurrency=20)
    a, b, c = (world.idle("n", "m") for _ in range(3))
    policy = PrefixOrLeastLoaded(imbalance=2)
    assert served(world, policy, "") == a and served(world, policy, "sys") == b and served(world, policy, "sys/long") == b
    assert served(world, policy, "sys/long/er") != c, "two requests to none is balanced"
    assert served(world, policy, "sys/long") in (a, c), "three to none is not"


def test_prefixes_are_forgotten_when_there_are_many_and_when_the_instance_starts_anew() -> None:
    world = World()
    world.node("n", 2)
    model = world.model("m", concurrency=500)
    a = world.cluster.instances[world.idle("n", "m")]
    policy = PrefixOrLeastLoaded(remembered=3)
    for each in range(100):
        served(world, policy, f"p{each:03}")
    assert [policy._shared(a, f"p{each:03}") for each in (96, 97, 99)] == [0, 4, 4]
    a.epoch += 1
    assert policy._shared(a, "p099") == 0
    for _ in range(300):
        one = world.cluster.instances[world.idle("n", "m")]
        policy.choose_instance(model, world.request("m", prefix="x"), world.cluster, 0.0)
        world.cluster.fall(one, Warmth.COLD)
    assert len(policy._prefixes) <= 2 * len(world.cluster.instances) + 17


# --- HydraServe -----------------------------------------------------------------------------------------------------


def test_a_fetch_is_split_among_idle_links_as_far_as_that_helps() -> None:
    world = World()
    world.model("m")
    world.node("home")
    plan = world.plan(SplitFetch(), "m")
    assert plan == Plan("home", tier=Tier.REMOTE, estimate_seconds=20.0)
    for name in ("b", "c", "d", "e", "f"):
        world.node(name, 0)
    plan = world.plan(SplitFetch(), "m")
    assert plan is not None and plan.parts == ("home", "b", "c", "d") and plan.estimate_seconds == 5.0
    world.cluster.set_loads_until(world.cluster.nodes["b"], 3.0)
    plan = world.plan(SplitFetch(most_parts=3), "m")
    assert plan is not None and plan.parts == ("home", "c", "d"), "b's link is busy"
    with pytest.raises(ValueError, match="at least 1"):
        SplitFetch(most_parts=0)


def test_a_slow_link_is_not_asked_for_a_share() -> None:
    world = World()
    world.model("m")
    world.node("home")
    world.node("quick", 0)
    world.node("slow", 0, remote=GB / 10)
    plan = world.plan(SplitFetch(), "m")
    assert plan is not None and plan.parts == ("home", "quick") and plan.estimate_seconds == 10.0


def test_split_or_whole_the_soonest_start_is_chosen() -> None:
    world = World()
    world.model("m", nbytes=60 * GB)
    world.node("disk", disk=("m",))
    for name in ("a", "b", "c", "d"):
        world.node(name, remote=4 * GB)
    plan = world.plan(SplitFetch(), "m")
    assert plan is not None and plan.node == "a" and len(plan.parts) == 4, "15 GB at 4 GB/s are sooner than 60 GB at 5"
    plan = world.plan(SplitFetch(most_parts=1), "m")
    assert plan is not None and plan.node == "disk" and not plan.parts
    world.idle("d", "m", 0.0, Warmth.DRAM)
    plan = world.plan(SplitFetch(), "m")
    assert plan is not None and plan.node == "d" and not plan.parts, "nothing is fetched for one that is asleep"


# --- any cluster ----------------------------------------------------------------------------------------------------


def any_world(rng: random.Random) -> World:
    world = World()
    names = [f"m{each}" for each in range(rng.randint(1, 5))]
    for name in names:
        world.model(
            name, rng.choice([0, 1, 1, 1, 2, 3, 4]), nbytes=rng.choice([1, 5, 30, 300]) * GB, concurrency=rng.randint(1, 3), least=rng.choice([0, 0, 0, 0, 0, 1]), process=rng.randint(0, 4) * GB
        )
    cluster = world.cluster
    crowded = rng.random() < 0.7  # nearly all run something
    for each in range(rng.randint(1, 4)):
        world.node(f"n{each}", rng.randint(1, 4), nbytes=rng.choice([8, 100, 400]) * GB, remote=GB / (50 if crowded else rng.choice([1, 10])))
        for name in names:
            if rng.random() < ((0.4 if each == 0 else 0.9) if crowded else 0.5):
                cluster.cached(f"n{each}", name, rng.choice([Tier.DISK, Tier.DRAM]))
        cluster.set_loads_until(cluster.nodes[f"n{each}"], rng.choice([0.0, 12.0, 30.0]))
    for _ in range(rng.randint(0, 20)):
        node, spec = rng.choice(list(cluster.nodes.values())[crowded and len(cluster.nodes) > 1 :]), cluster.models[rng.choice(names)].spec
        target = Warmth.READY if crowded else rng.choice(list(Warmth)[1:])
        needs = max(held_nbytes(spec, target), held_nbytes(spec, Warmth.DEVICE))
        if (target >= Warmth.DEVICE and len(node.free_devices) < spec.devices) or node.free_nbytes < needs:
            continue
        instance = cluster.spawn(node, spec, 0.0)
        cluster.climb(instance, spec, target)
        assert cluster.book(instance)
        if rng.random() < 0.1:
            continue
        cluster.reached(instance)
        if target is Warmth.READY and rng.random() < (0.95 if crowded else 0.7):
            for _ in range(rng.randint(1, spec.concurrency)):
                request = world.request(spec.name, rng.randint(1, 500))
                request.migrations, request.preemptions = rng.choice([0, 0, 0, 0, 0, 1, 2]), rng.choice([0, 0, 0, 0, 0, 1])
                cluster.assign(request, instance, cluster.models[spec.name], rng.uniform(0, 10))
            if rng.random() < 0.1:
                cluster.drain(instance, True)
        else:
            cluster.rest(instance, rng.uniform(0, 5), 0.0)
    if rng.random() < 0.3:
        name = rng.choice(names)
        cluster.add_model(structs.replace(cluster.models[name].spec, nbytes=rng.randint(1, 30) * GB, concurrency=rng.randint(1, 3)))
    return world


worlds = st.randoms(use_true_random=False).map(any_world)


def test_random_clusters_bring_about_every_kind_of_plan() -> None:
    """Else what follows would prove little."""
    rng = random.Random(1)
    seen = dict.fromkeys(["reuse", "give_way", "moves", "several moves", "moves to ready", "preempted", "parts", "none"], 0)
    for _ in range(1000):
        world = any_world(rng)
        for make in POLICIES.values():
            for model in world.cluster.models.values():
                plan = make(Estimator()).choose_node(model, world.cluster, NOW)
                seen["none"] += plan is None
                if plan is not None:
                    seen["reuse"] += plan.reuse is not None
                    seen["several moves"] += len(plan.moves) > 1
                    seen["moves to ready"] += any(move.instance is not None for move in plan.moves)
                    for what in ("give_way", "moves", "preempted", "parts"):
                        seen[what] += bool(getattr(plan, what))
    assert all(count >= 10 for count in seen.values()), seen


@settings(max_examples=400, deadline=None)
@given(worlds)
def test_every_plan_can_be_carried_out_and_is_the_same_again(world: World) -> None:
    cluster, now = world.cluster, NOW
    before = state(cluster)
    for name, make in POLICIES.items():
        policy, again = make(Estimator()), make(Estimator())
        for model in cluster.models.values():
            plan = policy.choose_node(model, cluster, now)
            assert plan == again.choose_node(model, cluster, now)
            if plan is not None:
                valid(cluster, model, plan)
                if name != "serverlessllm":
                    assert not plan.moves
                if name != "shepherd":
                    assert not plan.preempted
            for victim in () if plan is None else (*plan.preempted, *(move.victim for move in plan.moves)):
                for request in cluster.instances[victim].requests.values():
                    assert request.migrations < 2 if name == "serverlessllm" else request.preemptions < 1
    assert state(cluster) == before, "a policy changed what it may only read"


@settings(max_examples=200, deadline=None)
@given(worlds)
def test_what_could_start_at_once_is_started_and_no_later_than_anywhere_else(world: World) -> None:
    cluster, now = world.cluster, NOW
    for model in cluster.models.values():
        fits = [one for node in cluster.nodes.values() if (one := fit(model, node, cluster, Estimator(), now)) is not None]
        for node in cluster.nodes.values():
            if any(one.plan.node == node.spec.name for one in fits):
                continue
            gone: dict[str, int] = {}
            devices, nbytes = len(node.free_devices), node.free_nbytes
            for idle in cluster.idle_instances(node.spec.name):
                if idle.warmth is Warmth.READY and idle.model is not None:
                    gone[idle.model] = gone.get(idle.model, 0) + 1
                    theirs = cluster.models[idle.model]
                    if idle.model == model.spec.name or (theirs.spec.min_instances and theirs.ready - gone[idle.model] < theirs.spec.min_instances):
                        continue
                devices, nbytes = devices + len(idle.devices), nbytes + idle.held_nbytes
            assert devices < model.spec.devices or nbytes < held_nbytes(model.spec, Warmth.READY)
        for name, make in POLICIES.items():
            plan = make(Estimator()).choose_node(model, cluster, now)
            if fits and name != "locality":
                assert plan is not None, f"{name} leaves it waiting although there is room"
            if fits and name in ("serverlessllm", "shepherd", "deepserve", "hydraserve"):
                assert plan is not None and plan.estimate_seconds <= min(one.seconds for one in fits) + 1e-3


@settings(max_examples=300, deadline=None)
@given(worlds)
def test_the_soonest_fit_is_found_without_a_look_at_all(world: World) -> None:
    cluster, nodes = world.cluster, list(world.cluster.nodes.values())
    for model in cluster.models.values():
        fits = {node.spec.name: fit(model, node, cluster, Estimator(), NOW) for node in nodes}
        best, busy = soonest(model, nodes, cluster, Estimator(), NOW)
        assert best == choose_node(one for one in fits.values() if one is not None)
        assert all(fits[node.spec.name] is None for node in busy)
        if best is None:
            assert len(busy) == len(nodes)


def test_of_nodes_that_are_ready_as_soon_the_free_one_is_taken() -> None:
    world = World()
    world.node("a", 1)
    world.node("b", 1)
    world.model("A")
    world.model("B")
    world.idle("a", "A")
    plan = world.plan(StartupTimeOptimised(), "B", 10.0)
    assert plan is not None and plan.node == "b" and not plan.give_way


# --- what a review found ---------------------------------------------------------------------------------------------


def test_who_gives_way_counts_among_the_least_that_stay() -> None:
    """Of two ready instances of a model that is to have one, one idle and one busy, not both can go."""
    world = World()
    world.node("n", 2, dram=("wide",))
    world.node("free", 1, dram=("a",))
    world.model("a", least=1)
    world.model("wide", 2)
    idle = world.idle("n", "a")
    world.busy("n", "a")
    for policy in (StartupTimeOptimised(), Preempting()):
        assert world.plan(policy, "wide", 10.0) is None
    world.model("a")
    for policy in (StartupTimeOptimised(), Preempting()):
        plan = world.plan(policy, "wide", 10.0)
        assert plan is not None and plan.give_way == (idle,)


def test_a_sleeping_process_is_found_on_any_of_many_nodes() -> None:
    world = World()
    world.model("a", process=GB)
    world.model("b", process=GB)
    for place in range(40):
        world.node(f"n{place:02}", 2)
    world.cluster.set_loads_until(world.cluster.nodes["n30"], 40.0)
    asleep = world.idle("n30", "b", 0.0, Warmth.RUNTIME)
    world.cluster.advance(50.0)
    model = world.cluster.models["a"]
    assert "n30" in [node.spec.name for node in near_nodes(model, world.cluster, 8)]
    for policy in (StartupTimeOptimised(), Preempting(), PrefixOrLeastLoaded(), SplitFetch()):
        assert policy.choose_node(structs_slower(world, model), world.cluster, 50.0).reuse == asleep  # type: ignore[union-attr]


def structs_slower(world: World, model: ModelState) -> ModelState:
    """With a process that takes seconds, so that a warm one is sooner."""
    return world.cluster.add_model(structs.replace(model.spec, process_seconds=2.0, runtime_seconds=3.0))


def test_a_load_that_should_be_over_counts_as_none() -> None:
    world = World()
    for name in "abc":
        world.node(name)
    for name, until in (("a", 20.0), ("b", 5.0)):
        world.cluster.set_loads_until(world.cluster.nodes[name], until)
    world.cluster.advance(4.0)
    assert [node.spec.name for node in world.cluster.open_nodes(1)] == ["c", "b", "a"]
    world.cluster.advance(5.0)
    assert [node.spec.name for node in world.cluster.open_nodes(1)] == ["b", "c", "a"]
    again = Cluster.from_snapshot(world.cluster.snapshot())
    again.advance(20.0)
    assert [node.spec.name for node in again.open_nodes(1)] == ["a", "b", "c"]


@settings(max_examples=100, deadline=None)
@given(worlds)
def test_a_harmless_plan_disturbs_nobody_and_is_there_where_one_fits(world: World) -> None:
    for model in world.cluster.models.values():
        fits = [one for node in world.cluster.nodes.values() if (one := fit(model, node, world.cluster, Estimator(), NOW)) is not None]
        for policy in (StartupTimeOptimised(), Preempting()):
            plan = policy.choose_harmless(model, world.cluster, NOW)
            assert (plan is None) == (not fits) and (plan is None or not (plan.moves or plan.preempted))


@pytest.mark.parametrize("name", POLICIES)
def test_a_placement_that_is_saved_goes_on_as_it_was(name: str) -> None:
    """Every one, whether it learns or not: made anew and given what was saved, it answers as the one that was saved does."""
    world = World()
    for node in "abcdef":
        world.node(node, 2)
    models = [world.model(f"m{each}", concurrency=9) for each in range(4)]
    for model in models:
        for node in ("a", "b"):
            world.busy(node, model.spec.name) if world.cluster.nodes[node].free_devices else None

    def answers(policy: Placement, count: int) -> list[object]:
        said: list[object] = []
        for each in range(count):
            model = models[each % 4]
            said.append(policy.choose_node(model, world.cluster, NOW))
            if model.open:
                chosen = policy.choose_instance(model, world.request(model.spec.name, prefix=f"prefix {each % 7}"), world.cluster, NOW)
                said.append(None if chosen is None else chosen.id)
        return said

    policy, again = POLICIES[name](Estimator()), POLICIES[name](Estimator())
    answers(policy, 37)
    if hasattr(policy, "save"):
        again.restore(policy.save())  # type: ignore[attr-defined]
    assert answers(again, 40) == answers(policy, 40)


def test_an_affinity_forgets_deleted_models() -> None:
    world = World()
    world.node("a")
    policy = Affinity()
    world.plan(policy, world.model("m").spec.name)
    assert policy._orders
    policy.on_delete(world.cluster.models["m"])
    assert not policy._orders
