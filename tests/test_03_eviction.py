"""Chapter 03: what eviction policies choose, against slow literal models of what each should choose."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_mini.eviction import (
    GDSF,
    LFU,
    LRU,
    POLICIES,
    Policy,
    Resident,
    Victim,
    choose_victims,
    greedy_dual_priority,
    keep_prefix,
    next_clock,
)

EVERY_POLICY = [*POLICIES.values(), keep_prefix(LRU), keep_prefix(LFU, 25)]
WHOLE = [LRU, LFU, GDSF]


@st.composite
def cached(draw: st.DrawFn) -> list[Resident]:
    """Up to eight models with many ties; all, none or a tail of each may go."""
    residents = []
    for name in draw(st.lists(st.sampled_from("abcdefghij"), unique=True, max_size=8)):
        nbytes = draw(st.integers(1, 60))
        evictable = draw(st.one_of(st.just(nbytes), st.just(0), st.integers(0, nbytes)))
        cost, clock = draw(st.sampled_from([0.0, 1.0, 2.5])), draw(st.sampled_from([0.0, 0.5, 3.0]))
        residents.append(Resident(name, nbytes, evictable, float(draw(st.integers(0, 3))), draw(st.integers(0, 3)), cost, clock))
    return residents


NAN = float("nan")
NEEDS = st.integers(1, 300)
GRANULES = st.integers(1, 9)
ANY_POLICY = st.sampled_from(EVERY_POLICY)


def pinned_granules(resident: Resident, granule: int) -> int:
    """Bytes that must stay: what is pinned, and what shares a granule with it."""
    least = 0
    while least < resident.nbytes - resident.evictable_nbytes:
        least += granule
    return min(least, resident.nbytes)


def in_order(residents: Sequence[Resident], policy: Policy) -> list[Resident]:
    """Selection, one by one: lower priority, then longer ago, then the name."""
    left, order = list(residents), []
    while left:
        first = left[0]
        for other in left[1:]:
            if (policy.priority(other), other.last_used, other.name) < (policy.priority(first), first.last_used, first.name):
                first = other
        left.remove(first)
        order.append(first)
    return order


def literal(residents: Sequence[Resident], needed: int, policy: Policy, granule: int) -> dict[str, int]:
    """What goes, by dropping one granule at a time from whoever is next, and looking at everybody again after each."""
    least = {r.name: pinned_granules(r, granule) for r in residents}
    stays = {r.name: r.nbytes for r in residents}
    if sum(stays.values()) - sum(least.values()) < needed:
        return {}
    order = [r.name for r in in_order(residents, policy)]
    prefix = policy.prefix_nbytes
    floors = [0] if prefix is None else [max(prefix, 1), 1, 0]
    while sum(r.nbytes for r in residents) - sum(stays.values()) < needed:
        name, _ = next((name, floor) for floor in floors for name in order if can_shrink(stays[name], least[name], floor, granule))
        stays[name] = least[name] if prefix is None else stays[name] - (stays[name] % granule or granule)
    return {r.name: r.nbytes - stays[r.name] for r in residents if stays[r.name] < r.nbytes}


def can_shrink(stays: int, least: int, floor: int, granule: int) -> bool:
    """True if a granule can go and `floor` bytes, or what is pinned, stay."""
    after = stays - (stays % granule or granule)
    return stays > least and after >= max(least, floor) if floor else stays > least


# Every policy


@given(cached(), NEEDS, ANY_POLICY, GRANULES)
def test_never_more_than_may_go_and_each_model_once(residents: list[Resident], needed: int, policy: Policy, granule: int) -> None:
    victims = choose_victims(residents, needed, policy, granule)
    may_go = {r.name: r.evictable_nbytes for r in residents}
    assert len({victim.name for victim in victims}) == len(victims)
    assert all(0 < victim.nbytes <= may_go[victim.name] for victim in victims)


@given(cached(), NEEDS, ANY_POLICY, GRANULES)
def test_the_need_is_met_exactly_when_it_can_be_and_nothing_goes_when_it_cannot(
    residents: list[Resident], needed: int, policy: Policy, granule: int
) -> None:
    victims = choose_victims(residents, needed, policy, granule)
    available = sum(r.nbytes - pinned_granules(r, granule) for r in residents)
    if available >= needed:
        assert sum(victim.nbytes for victim in victims) >= needed
    else:
        assert victims == []


@given(cached(), NEEDS, ANY_POLICY, GRANULES)
def test_the_same_bytes_go_as_when_dropped_one_granule_at_a_time(residents: list[Resident], needed: int, policy: Policy, granule: int) -> None:
    victims = choose_victims(residents, needed, policy, granule)
    assert {victim.name: victim.nbytes for victim in victims} == literal(residents, needed, policy, granule)
    listed = [r.name for r in in_order(residents, policy) if any(victim.name == r.name for victim in victims)]
    assert [victim.name for victim in victims] == listed
    assert {v.name: v.priority for v in victims} == {r.name: policy.priority(r) for r in residents if r.name in listed}


@given(cached(), NEEDS, ANY_POLICY, GRANULES, st.randoms(use_true_random=False))
def test_the_order_in_which_models_are_listed_changes_nothing(
    residents: list[Resident], needed: int, policy: Policy, granule: int, chance: random.Random
) -> None:
    shuffled = list(residents)
    chance.shuffle(shuffled)
    assert choose_victims(shuffled, needed, policy, granule) == choose_victims(residents, needed, policy, granule)


def model(name: str, nbytes: int = 10, *, evictable: int | None = None, last_used: float = 0, uses: int = 1, cost: float = 1.0, clock: float = 0.0) -> Resident:
    return Resident(name, nbytes, nbytes if evictable is None else evictable, last_used, uses, cost, clock)


@pytest.mark.parametrize("policy", EVERY_POLICY, ids=lambda policy: policy.name)
def test_a_leased_model_stays_even_if_it_is_the_first_in_line(policy: Policy) -> None:
    leased = model("a", 100, evictable=0, uses=0)
    other = model("b", 10, last_used=9, uses=9)
    assert [victim.name for victim in choose_victims([leased, other], 10, policy)] == ["b"]
    assert choose_victims([leased, other], 11, policy) == []


@pytest.mark.parametrize("policy", EVERY_POLICY, ids=lambda policy: policy.name)
def test_an_empty_model_is_in_nobodys_way(policy: Policy) -> None:
    assert choose_victims([model("empty", 0), model("full", 10)], 5, policy, 5)[0].name == "full"


@pytest.mark.parametrize("policy", EVERY_POLICY, ids=lambda policy: policy.name)
def test_ties_go_by_name(policy: Policy) -> None:
    assert [v.name for v in choose_victims([model(name) for name in "cab"], 20, policy, 10)] == ["a", "b"]
    assert choose_victims([model(name) for name in "cab"], 1, policy, 10)[0].name == "a"


def test_each_order() -> None:
    old, rare, cheap = model("old", uses=5, cost=2), model("rare", last_used=2, uses=1, cost=9), model("cheap", last_used=1, uses=3, cost=0.1)
    first = {name: choose_victims([old, rare, cheap], 1, policy)[0].name for name, policy in POLICIES.items()}
    assert first == {"lru": "old", "lfu": "rare", "gdsf": "cheap", "prefix": "cheap"}


@given(cached(), NEEDS, st.sampled_from(WHOLE))
def test_whole_models_go_and_no_more_of_them_than_are_needed(residents: list[Resident], needed: int, policy: Policy) -> None:
    victims = choose_victims(residents, needed, policy)
    order = [r for r in in_order(residents, policy) if r.evictable_nbytes]
    assert [(v.name, v.nbytes) for v in victims] == [(r.name, r.evictable_nbytes) for r in order[: len(victims)]]
    assert sum(v.nbytes for v in victims[:-1]) < needed


# Keeping the prefix


@given(cached(), NEEDS, GRANULES, st.integers(0, 70), st.sampled_from(WHOLE))
def test_tails_go_in_granules_and_no_more_than_a_granule_too_much(
    residents: list[Resident], needed: int, granule: int, prefix: int, order: Policy
) -> None:
    victims = choose_victims(residents, needed, keep_prefix(order, prefix), granule)
    sizes = {r.name: r.nbytes for r in residents}
    assert all((sizes[v.name] - v.nbytes) % granule == 0 for v in victims)
    assert sum(v.nbytes for v in victims) < needed + granule


@given(cached(), NEEDS, GRANULES, st.integers(0, 70), st.sampled_from(WHOLE))
def test_a_model_loses_its_prefix_only_when_all_others_are_down_to_theirs(
    residents: list[Resident], needed: int, granule: int, prefix: int, order: Policy
) -> None:
    victims = {v.name: v.nbytes for v in choose_victims(residents, needed, keep_prefix(order, prefix), granule)}
    stays = {r.name: r.nbytes - victims.get(r.name, 0) for r in residents}
    for floor in (prefix, granule):
        kept = -(-floor // granule) * granule
        if any(stays[name] < max(kept, granule) for name in victims):
            assert all(stays[r.name] <= max(kept, granule, pinned_granules(r, granule)) for r in residents)


def test_the_least_valuable_tails_go_first_and_the_last_granules_last() -> None:
    models = [model("a", 100, last_used=1), model("b", 100, last_used=2), model("c", 100, last_used=3)]
    policy = keep_prefix(LRU, 30)

    def taken(needed: int) -> list[tuple[str, int]]:
        return [(victim.name, victim.nbytes) for victim in choose_victims(models, needed, policy, 10)]

    assert taken(1) == [("a", 10)]
    assert taken(75) == [("a", 70), ("b", 10)]
    assert taken(210) == [("a", 70), ("b", 70), ("c", 70)]
    assert taken(211) == [("a", 80), ("b", 70), ("c", 70)]
    assert taken(270) == [("a", 90), ("b", 90), ("c", 90)]
    assert taken(271) == [("a", 100), ("b", 90), ("c", 90)]
    assert taken(300) == [("a", 100), ("b", 100), ("c", 100)]
    assert taken(301) == []


def test_a_last_chunk_that_is_partly_used_goes_first() -> None:
    assert choose_victims([model("a", 95)], 1, keep_prefix(LRU), 10) == [Victim("a", 5, 0.0)]
    assert choose_victims([model("a", 95)], 6, keep_prefix(LRU), 10) == [Victim("a", 15, 0.0)]


# Greedy-dual


class GreedyDualCache:
    """Greedy-dual-size-frequency as its paper writes it: a value H for each object, an inflation L, the lowest H goes."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.inflation = capacity, 0.0
        self.value: dict[str, float] = {}
        self.frequency: dict[str, int] = {}
        self.size: dict[str, int] = {}
        self.asked: dict[str, int] = {}

    def request(self, now: int, name: str, size: int, cost: float) -> list[str]:
        evicted = []
        if name not in self.value:
            while sum(self.size[other] for other in self.value) + size > self.capacity:
                victim = min(self.value, key=lambda other: (self.value[other], self.asked[other], other))
                self.inflation = self.value.pop(victim)
                evicted.append(victim)
            self.frequency[name] = 0
        self.size[name], self.asked[name] = size, now
        self.frequency[name] += 1
        self.value[name] = self.inflation + self.frequency[name] * cost / size
        return evicted


class Owner:
    """The least owner of a cache: residents, a clock, and `choose_victims`."""

    def __init__(self, capacity: int, policy: Policy) -> None:
        self.capacity, self.policy, self.clock = capacity, policy, 0.0
        self.residents: dict[str, Resident] = {}

    def request(self, now: int, name: str, size: int, cost: float) -> list[str]:
        victims: list[Victim] = []
        old = self.residents.pop(name, None)
        needed = sum(r.nbytes for r in self.residents.values()) + size - self.capacity
        if needed > 0:
            victims = choose_victims(list(self.residents.values()), needed, self.policy)
            self.clock = next_clock(self.clock, victims)
            for victim in victims:
                del self.residents[victim.name]
        self.residents[name] = Resident(name, size, size, now, old.uses + 1 if old else 1, cost, self.clock)
        return [victim.name for victim in victims]


KINDS = st.lists(st.tuples(st.integers(1, 30), st.sampled_from([0.0, 0.5, 1.0, 4.0, 20.0])), min_size=2, max_size=7)


@given(KINDS, st.integers(30, 90), st.lists(st.integers(0, 6), max_size=80))
def test_greedy_dual_evicts_what_its_paper_evicts(kinds: list[tuple[int, float]], capacity: int, asked: list[int]) -> None:
    paper, ours = GreedyDualCache(capacity), Owner(capacity, GDSF)
    for now, number in enumerate(asked):
        size, cost = kinds[number % len(kinds)]
        name = f"m{number % len(kinds)}"
        assert ours.request(now, name, size, cost) == paper.request(now, name, size, cost)
        assert ours.clock == paper.inflation
        assert {r.name: greedy_dual_priority(r) for r in ours.residents.values()} == paper.value


@given(cached(), NEEDS)
def test_with_equal_density_and_uses_greedy_dual_is_lru(residents: list[Resident], needed: int) -> None:
    alike = [Resident(r.name, r.nbytes, r.evictable_nbytes, r.last_used, 2, r.nbytes * 0.5, clock=r.last_used / 4) for r in residents]
    assert [v.name for v in choose_victims(alike, needed, GDSF)] == [v.name for v in choose_victims(alike, needed, LRU)]


@given(cached(), NEEDS)
def test_with_equal_density_and_clock_greedy_dual_is_lfu(residents: list[Resident], needed: int) -> None:
    alike = [Resident(r.name, r.nbytes, r.evictable_nbytes, r.last_used, r.uses, r.nbytes * 0.5) for r in residents]
    assert [v.name for v in choose_victims(alike, needed, GDSF)] == [v.name for v in choose_victims(alike, needed, LFU)]


def test_a_favourite_that_nobody_asks_for_any_more_goes_in_the_end() -> None:
    """LFU keeps it for ever; the clock of greedy-dual reaches it."""
    left_after = {}
    for policy in (GDSF, LFU):
        owner = Owner(40, policy)
        for now in range(50):
            owner.request(now, "favourite", 10, 1.0)
        evicted_at = next((now for now in range(50, 2000) if "favourite" in owner.request(now, f"other-{now % 5}", 10, 1.0)), None)
        left_after[policy.name] = evicted_at
    assert left_after["lfu"] is None
    assert left_after["gdsf"] is not None and left_after["gdsf"] > 100


def test_the_clock_never_runs_backwards() -> None:
    assert next_clock(2.0, []) == 2.0
    assert next_clock(2.0, [Victim("a", 1, 1.0)]) == 2.0
    assert next_clock(2.0, [Victim("a", 1, 3.0), Victim("b", 1, 2.5)]) == 3.0


# Bad input


@pytest.mark.parametrize(("needed", "granule"), [(0, 1), (-1, 1), (1, 0), (1, -4)])
def test_a_need_or_a_granule_below_one_is_refused(needed: int, granule: int) -> None:
    with pytest.raises(ValueError, match="give at least 1"):
        choose_victims([model("a")], needed, LRU, granule)


def test_nothing_can_be_taken_from_nothing() -> None:
    assert choose_victims([], 1, LRU) == []


@pytest.mark.parametrize("wrong", [{"nbytes": 5, "evictable": 6}, {"evictable": -1}, {"uses": -1}, {"cost": -0.5}, {"cost": NAN}, {"last_used": NAN}, {"clock": NAN}])
def test_residents_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"^a "):
        model("a", **wrong)  # type: ignore[arg-type]


def test_a_negative_prefix_is_refused() -> None:
    with pytest.raises(ValueError, match="-1 bytes cannot be kept"):
        keep_prefix(LRU, -1)
