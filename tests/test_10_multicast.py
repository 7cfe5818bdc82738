"""Chapter 10: scale-out plans against their formulas, a judge that misses nothing, ZigZag by hand, and what is drawn of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from math import ceil, log2
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm_mini.control.multicast import (
    Plan,
    Transfer,
    binary_tree,
    binomial_pipeline,
    binomial_step,
    check,
    hydraserve_ttft,
    k_way_pipeline,
    plan_seconds,
    serial_chain,
    store_reads,
    summarize,
)
from sllm_mini.control.multicast.binomial import Step
from sllm_mini.control.multicast.zigzag import Run, best_effort, zigzag
from sllm_mini.lab import multicast_frames as frames
from sllm_mini.lab import multicast_plots as plots
from sllm_mini.lab.figure import Described
from sllm_mini.lab.widgets import Slider, explore

some_nodes = st.integers(1, 48)
some_blocks = st.integers(1, 33)


def least_ticks(nodes: int, blocks: int) -> int:
    """No plan from one source is quicker: the last block leaves it in tick b at best, and its holders at most double a tick."""
    return 0 if nodes == 1 else blocks + ceil(log2(nodes)) - 1


# --- the binomial pipeline -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [2, 4, 8, 16, 32])
def test_binomial_a_power_of_two_takes_b_plus_log_n_minus_1(nodes: int) -> None:
    for blocks in range(1, 33):
        plan = binomial_pipeline(nodes, blocks)
        check(plan)
        assert plan.ticks == blocks + nodes.bit_length() - 2


def test_binomial_every_number_of_nodes_up_to_64_is_as_quick_as_can_be() -> None:
    for nodes in range(1, 65):
        for blocks in (1, 2, 3, 4, 7, 16):
            plan = binomial_pipeline(nodes, blocks)
            check(plan)
            assert plan.ticks == least_ticks(nodes, blocks)
            assert len(plan.transfers) == (nodes - 1) * blocks


@given(some_nodes, some_blocks)
@settings(max_examples=60, deadline=None)
def test_binomial_every_node_ends_with_every_block(nodes: int, blocks: int) -> None:
    plan = binomial_pipeline(nodes, blocks)
    check(plan)
    figures = summarize(plan)
    assert plan.ticks == least_ticks(nodes, blocks) == max(figures.complete)
    assert figures.joint == (blocks if nodes > 1 else 0)


def test_binomial_step_by_hand() -> None:
    """Four nodes, three blocks: partners differ in bit 1, bit 0, bit 1, bit 0."""
    everything = {0, 1, 2}
    assert binomial_step(1, 4, 3, [everything, set(), set(), set()]) == [Transfer(1, 0, 2, 0)]
    assert binomial_step(2, 4, 3, [everything, set(), {0}, set()]) == [Transfer(2, 0, 1, 1), Transfer(2, 2, 3, 0)]
    assert binomial_step(3, 4, 3, [everything, {1}, {0}, {0}]) == [Transfer(3, 0, 2, 2), Transfer(3, 1, 3, 1), Transfer(3, 3, 1, 0)]
    assert binomial_step(4, 4, 3, [everything, {0, 1}, {0, 2}, {0, 1}]) == [Transfer(4, 0, 1, 2), Transfer(4, 2, 3, 2), Transfer(4, 3, 2, 1)]
    plan = binomial_pipeline(4, 3)
    assert [transfer for transfer in plan.transfers if transfer.tick == 3] == binomial_step(3, 4, 3, [everything, {1}, {0}, {0}])


def test_binomial_step_sends_the_newest_that_is_lacking_and_nothing_to_the_source() -> None:
    assert binomial_step(2, 2, 9, [set(range(9)), {0, 1, 2, 3}]) == []  # the source's turn is block 1, which is there
    assert binomial_step(2, 4, 9, [set(range(9)), {1}, {0, 4, 7}, {7}]) == [Transfer(2, 2, 3, 4)]
    assert binomial_step(1, 1, 5, [set(range(5))]) == []
    for nodes in (6, 0):
        with pytest.raises(ValueError, match="give a power of two"):
            binomial_step(1, nodes, 5, [set(range(5))] * nodes)


def test_binomial_between_two_twins_neither_is_ever_two_blocks_ahead() -> None:
    for nodes in (3, 5, 6, 7, 11, 29):
        count = 1 << nodes.bit_length() - 1
        plan = binomial_pipeline(nodes, 9)
        arrivals = plan.arrivals()
        for tick in range(plan.ticks + 1):
            held = [{block for block, came in blocks.items() if came <= tick} for blocks in arrivals]
            for twin in range(count, nodes):
                assert len(held[twin] - held[twin - count + 1]) <= 1 and len(held[twin - count + 1] - held[twin]) <= 1


def source_repeats(tick: int, nodes: int, blocks: int, held: Sequence[AbstractSet[int]]) -> list[Transfer]:
    """A plausible mistake: the source, too, looks at what its partner lacks, and sends it the oldest of that."""
    others = [transfer for transfer in binomial_step(tick, nodes, blocks, held) if transfer.source]
    target = 1 << tick % (nodes.bit_length() - 1)
    lacking = set(held[0]) - held[target]
    return [Transfer(tick, 0, target, min(lacking)), *others] if lacking else others


def one_dimension(tick: int, nodes: int, blocks: int, held: Sequence[AbstractSet[int]]) -> list[Transfer]:
    return binomial_step(1, nodes, blocks, held)


def to_the_source_too(tick: int, nodes: int, blocks: int, held: Sequence[AbstractSet[int]]) -> list[Transfer]:
    return [*binomial_step(tick, nodes, blocks, held), Transfer(tick, 1 << tick % (nodes.bit_length() - 1), 0, 0)]


def out_of_thin_air(tick: int, nodes: int, blocks: int, held: Sequence[AbstractSet[int]]) -> list[Transfer]:
    return [*binomial_step(tick, nodes, blocks, held), Transfer(tick, nodes - 1, nodes - 2, blocks - 1)]


def beyond_the_cube(tick: int, nodes: int, blocks: int, held: Sequence[AbstractSet[int]]) -> list[Transfer]:
    return [Transfer(tick, 0, nodes, 0)]


def test_binomial_a_new_block_from_the_source_each_tick_is_what_makes_it_quick() -> None:
    for nodes in (4, 12, 16, 32):
        slow = binomial_pipeline(nodes, 12, step=source_repeats)
        check(slow)
        assert slow.ticks > least_ticks(nodes, 12)


def test_binomial_no_node_but_the_source_ever_has_a_choice() -> None:
    """So "the highest that its partner lacks" says no more than "the one that it lacks"; a reader's rule may differ there."""
    choices: list[int] = []

    def counting(tick: int, nodes: int, blocks: int, held: Sequence[AbstractSet[int]]) -> list[Transfer]:
        pairs = [(source, source ^ 1 << tick % (nodes.bit_length() - 1)) for source in range(1, nodes)]
        choices.extend(len(held[source] - held[target]) for source, target in pairs if target)
        return binomial_step(tick, nodes, blocks, held)

    for nodes in (2, 4, 7, 8, 16, 32):
        for blocks in (1, 2, 5, 12, 33):
            binomial_pipeline(nodes, blocks, step=counting)
    assert max(choices) == 1


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (one_dimension, "brings nobody a block although"),
        (to_the_source_too, "does not hold it; send only what is in held"),
        (out_of_thin_air, "does not hold it; send only what is in held"),
        (beyond_the_cube, "the nodes of this step are 0 to 7"),
        (lambda *_: [], "every step must bring the group further"),
    ],
)
def test_binomial_a_readers_wrong_step_ends_in_a_sentence(step: Step, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        binomial_pipeline(8, 6, step=step)


# --- the k-way form ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(0, 30), some_blocks)
@settings(max_examples=60, deadline=None)
def test_k_way_the_group_holds_a_model_after_a_kth_of_the_blocks(sources: int, more: int, blocks: int) -> None:
    nodes = 2 * sources + more
    plan = k_way_pipeline(nodes, blocks, sources)
    check(plan)
    figures = summarize(plan)
    assert figures.joint == ceil(blocks / sources)
    assert plan.ticks == blocks + ceil(log2(1 + ceil((nodes - sources) / sources))) - 1
    assert set(figures.complete[:sources]) == {0}


def test_k_way_sub_group_i_is_sent_groups_i_and_on_around_the_circle() -> None:
    plan = k_way_pipeline(6, 7, 3)  # a source and one node each
    arrived = [[block for block, _ in sorted(held.items(), key=lambda pair: pair[1])] for held in plan.arrivals()[3:]]
    assert arrived == [[0, 3, 6, 1, 4, 2, 5], [1, 4, 2, 5, 0, 3, 6], [2, 5, 0, 3, 6, 1, 4]]


def test_k_way_with_one_source_is_the_binomial_pipeline_and_a_source_without_nodes_is_refused() -> None:
    assert k_way_pipeline(11, 5, 1).transfers == binomial_pipeline(11, 5).transfers
    with pytest.raises(ValueError, match="give at least 8 nodes"):
        k_way_pipeline(7, 5, 4)


# --- chain, tree, store --------------------------------------------------------------------------------------------------


@given(some_nodes, some_blocks)
@settings(max_examples=40, deadline=None)
def test_a_chain_takes_b_plus_its_targets_minus_1(nodes: int, blocks: int) -> None:
    plan = serial_chain(nodes, blocks)
    check(plan)
    assert plan.ticks == (blocks + (nodes - 1) - 1 if nodes > 1 else 0)
    assert summarize(plan).complete[1:] == tuple(range(blocks, blocks + nodes - 1))


@given(some_nodes, some_blocks)
@settings(max_examples=40, deadline=None)
def test_a_trees_nodes_are_whole_when_the_turns_on_their_way_say(nodes: int, blocks: int) -> None:
    plan = binary_tree(nodes, blocks)
    check(plan)
    for node, complete in enumerate(summarize(plan).complete):
        way, place = 0, node
        while place:
            way += 1 if place % 2 else 2
            place = (place - 1) // 2
        assert complete == (0 if node == 0 else blocks if nodes == 2 else 2 * (blocks - 1) + way)


@given(some_nodes, some_blocks, st.integers(1, 50))
@settings(max_examples=40, deadline=None)
def test_a_stores_link_is_shared_and_a_readers_own_is_the_other_bound(nodes: int, blocks: int, sends: int) -> None:
    plan = store_reads(nodes, blocks, sends)
    check(plan)
    assert plan.ticks == (max(blocks, ceil((nodes - 1) * blocks / sends)) if nodes > 1 else 0)
    assert summarize(plan).source_blocks == (nodes - 1) * blocks


def test_what_many_small_blocks_cost() -> None:
    """The orders that chapter 10 speaks of: 1 + log n / b copies' time, 1 + n / b, 2, and n."""
    instances, blocks = 31, 64
    ticks = {name: plots.build_plan(name, instances, blocks).ticks / blocks for name in plots.PLAN_NAMES}
    assert ticks["binomial"] == pytest.approx(1 + 4 / 64)
    assert ticks["chain"] == pytest.approx(1 + 30 / 64)
    assert 2 < ticks["tree"] < 2.2
    assert ticks["store"] == 31
    assert ticks["k-way"] <= ticks["binomial"] < ticks["chain"] < ticks["tree"] < ticks["store"]


# --- the judge and the figures -------------------------------------------------------------------------------------------

PLANS: dict[str, Callable[[], Plan]] = {
    "binomial": lambda: binomial_pipeline(11, 6),
    "k-way": lambda: k_way_pipeline(10, 6, 2),
    "chain": lambda: serial_chain(6, 5),
    "tree": lambda: binary_tree(8, 5),
    "store": lambda: store_reads(7, 4, 3),
}


def with_transfers(plan: Plan, transfers: Sequence[Transfer]) -> Plan:
    return replace(plan, transfers=tuple(transfers))


@given(st.sampled_from(sorted(PLANS)), st.data())
@settings(max_examples=150, deadline=None)
def test_check_sees_a_transfer_that_was_left_out_doubled_or_came_too_soon(name: str, data: st.DataObject) -> None:
    plan = PLANS[name]()
    check(plan)
    place = data.draw(st.integers(0, len(plan.transfers) - 1))
    one = plan.transfers[place]
    rest = [*plan.transfers[:place], *plan.transfers[place + 1 :]]
    elsewhere = data.draw(st.integers(0, plan.nodes - 1).filter(lambda node: node != one.target))
    for broken in (rest, [*plan.transfers, replace(one, tick=plan.ticks + 1)], [*plan.transfers, one], [*rest, replace(one, target=elsewhere)]):
        with pytest.raises(ValueError):
            check(with_transfers(plan, broken))
    check(with_transfers(plan, data.draw(st.permutations(plan.transfers))))  # the order they are listed in says nothing
    if one.source >= plan.sources:
        held_from = plan.arrivals()[one.source][one.block]
        with pytest.raises(ValueError):
            check(with_transfers(plan, [*rest, replace(one, tick=held_from)]))


@pytest.mark.parametrize(
    ("transfers", "words"),
    [
        ([(1, 0, 1, 0), (1, 0, 2, 0)], "node 0 sends more than 1 in this tick"),
        ([(1, 0, 1, 0), (1, 1, 2, 0)], "node 1 does not hold block 0 when the tick begins"),
        ([(1, 0, 1, 0), (2, 0, 1, 0)], "node 1 has block 0 already"),
        ([(1, 0, 1, 0), (2, 0, 2, 0), (3, 0, 2, 1), (3, 1, 2, 0)], "node 2 receives block 1 in this tick already"),
        ([(1, 0, 1, 0), (2, 1, 0, 0)], "node 0 has block 0 already"),
        ([(1, 0, 0, 0)], "a node sends to another node"),
        ([(0, 0, 1, 0)], "ticks count from 1"),
        ([(1, 0, 3, 0)], "the nodes are 0 to 2"),
        ([(1, -1, 2, 0)], "the nodes are 0 to 2"),
        ([(1, 0, 1, 2)], "the blocks are 0 to 1"),
        ([(1, 0, 1, 0), (2, 0, 1, 1), (3, 0, 2, 0)], "ends after tick 3 and node 2 has 1 of 2 blocks; block 1 is missing"),
    ],
)
def test_check_names_the_rule(transfers: list[tuple[int, int, int, int]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check(Plan("by hand", 3, 2, tuple(Transfer(*transfer) for transfer in transfers)))


def test_check_only_a_source_may_be_faster() -> None:
    sends = (Transfer(1, 0, 1, 0), Transfer(1, 0, 2, 0))
    check(Plan("fast", 3, 1, sends, source_sends=2))
    with pytest.raises(ValueError, match="node 1 sends more than 1"):
        check(Plan("fast", 4, 1, (Transfer(1, 0, 1, 0), Transfer(2, 1, 2, 0), Transfer(2, 1, 3, 0)), source_sends=2))


def test_a_summary_by_hand() -> None:
    figures = summarize(serial_chain(4, 3))
    assert (figures.ticks, figures.complete, figures.joint, figures.source_blocks) == (5, (0, 3, 4, 5), 3, 3)
    assert [figures.complete_by(tick) for tick in range(6)] == [1, 1, 1, 2, 3, 4]
    alone = summarize(serial_chain(1, 3))
    assert (alone.ticks, alone.complete, alone.joint) == (0, (0,), 0)
    assert summarize(binary_tree(3, 2)).source_blocks == 4
    assert summarize(k_way_pipeline(6, 4, 3)).source_blocks == 3 * 4
    with pytest.raises(ValueError, match="leaves node 1 with 0 of 3 blocks"):
        summarize(Plan("nothing", 2, 3, ()))


def test_seconds_are_ticks_times_a_block_and_its_fixed_cost() -> None:
    assert plan_seconds(10, 5e8, 1e9) == pytest.approx(5.0)
    assert plan_seconds(10, 5e8, 1e9, tick_seconds=0.1) == pytest.approx(6.0)
    for wrong in ((-1, 1.0, 1.0), (1, -1.0, 1.0), (1, 1.0, 0.0), (1, 1.0, float("nan"))):
        with pytest.raises(ValueError, match="give a speed above 0"):
            plan_seconds(*wrong)


def test_a_fixed_cost_makes_a_best_number_of_blocks() -> None:
    def seconds(blocks: int) -> float:
        return plan_seconds(binomial_pipeline(16, blocks).ticks, 1e9 / blocks, 1e9, tick_seconds=0.01)

    assert seconds(17) < seconds(4) and seconds(17) < seconds(64)  # sqrt(3 · 1 s / 0.01 s) = 17.3


@pytest.mark.parametrize("plan", [binomial_pipeline, serial_chain, binary_tree, store_reads])
def test_no_node_or_no_block_is_refused(plan: Callable[[int, int], Plan]) -> None:
    for nodes, blocks in ((0, 3), (3, 0), (-1, 3)):
        with pytest.raises(ValueError, match="give at least one of each"):
            plan(nodes, blocks)
    with pytest.raises(ValueError, match="give a whole number of 1 or more"):
        store_reads(3, 3, 0)
    with pytest.raises(ValueError, match="give a whole number of 1 or more"):
        Plan("still", 2, 1, (), source_sends=0)


# --- ZigZag and HydraServe -----------------------------------------------------------------------------------------------


def test_zigzag_the_papers_figures() -> None:
    """7 layers; loading one = 6 layer computations; a request arrives each unit. Worked by hand:

    Best effort. Layer 2 comes at 6, so requests 1 to 6, whose turn comes at 0 to 5, get one layer on the new instance and six on the
    old, which is never idle from 1 on: they end at 1 + 6 · 1 = 7, 13, 19, 25, 31, 37. Request 6 arrived at 5: 37 − 5 = 32.

    ZigZag. The old instance takes request 1 (0 to 7). The new one runs layer 1 of 2, 3, 4, 5, 6 at 1, 2, 3, 4, 5; layer 2 comes at 6 and
    it comes back: 2 (at 6), 3, 4, 5, 6 (at 10). The old one at 7 pulls 2, five layers left: 12; then 3: 17. Layer 3 is there from 12:
    4 (at 12), 5, 6 (at 14). At 17 it pulls 4, four left: 21. Layer 4 from 18: 5 (at 18), 6 (at 19). At 21 it pulls 5, three left: 24,
    and then 6, three left: 27. Request 6 takes 27 − 5 = 22.
    """
    arrivals = range(6)
    assert best_effort(arrivals, layers=7, load=6) == Run((7, 13, 19, 25, 31, 37), (1,) * 6, (6,) * 6)
    assert zigzag(arrivals, layers=7, load=6) == Run((7, 12, 17, 21, 24, 27), (0, 2, 2, 3, 4, 4), (7, 5, 5, 4, 3, 3))
    assert best_effort(arrivals, layers=7, load=6).times(arrivals)[5] == 32
    assert zigzag(arrivals, layers=7, load=6).times(arrivals)[5] == 22


def test_zigzag_where_all_wait_from_the_start() -> None:
    """The lists that chapter 04 prints; request 3 ends at 17, as in the paper; and 22 would be below what two instances can do."""
    plain, found = (run([0] * 7, layers=7, load=6) for run in (best_effort, zigzag))
    assert plain.ends == (7, 13, 19, 25, 31, 37, 42)
    assert found.ends == (7, 12, 17, 21, 24, 27, 29)
    assert found.ends[6] >= 7 * 7 / 2 > 22


gaps = st.lists(st.integers(0, 9), min_size=1, max_size=12)


@given(gaps, st.integers(2, 12), st.integers(1, 12))
@settings(max_examples=120, deadline=None)
def test_zigzag_serves_in_order_and_beats_the_old_instance_alone(waits: list[int], layers: int, load: int) -> None:
    arrivals = [sum(waits[: number + 1]) for number in range(len(waits))]
    alone, free = [], 0
    for arrival in arrivals:
        free = max(free, arrival) + layers
        alone.append(free)
    run = zigzag(arrivals, layers=layers, load=load)
    assert all(new + old == layers for new, old in zip(run.new, run.old, strict=True))
    assert all(end <= late for end, late in zip(run.ends, alone, strict=True))
    assert all(end - arrival >= layers for end, arrival in zip(run.ends, arrivals, strict=True))
    # A request is done when its layers are, and two instances do two a unit at most.
    assert all(2 * end >= layers * sum(other <= end for other in run.ends) for end in run.ends)


def test_zigzag_with_a_layer_that_never_comes_is_best_effort_from_the_second_on() -> None:
    never = 10**6
    assert zigzag([0] * 3, layers=7, load=never).ends == best_effort([0] * 3, layers=7, load=never).ends


def test_zigzag_refuses_what_cannot_be() -> None:
    for run in (best_effort, zigzag):
        with pytest.raises(ValueError, match="ascend"):
            run([3, 1], layers=7, load=6)
        with pytest.raises(ValueError, match="at least 2 layers"):
            run([0], layers=1, load=6)
        assert run([], layers=7, load=6).ends == ()


@given(st.floats(0.1, 400), st.floats(0.5, 800), st.floats(0, 9000), st.integers(1, 4), st.data())
@settings(max_examples=60, deadline=None)
def test_hydraserve_in_its_own_units(gb: float, gbit: float, prefill_ms: float, workers: int, data: st.DataObject) -> None:
    full = data.draw(st.integers(0, workers))
    published = 8000 * gb / (workers * gbit) + prefill_ms * (workers - full + full / workers) + 70 + 2000
    found = hydraserve_ttft(gb * 1e9, gbit * 1e9 / 8, prefill_ms / 1e3, workers=workers, full_memory_workers=full, wait_seconds=0.07)
    assert found * 1e3 == pytest.approx(published)


def test_hydraserve_by_hand_and_what_it_refuses() -> None:
    assert hydraserve_ttft(16e9, 2e9, 0.5) == pytest.approx(8 + 0.5 + 2)
    assert hydraserve_ttft(16e9, 2e9, 0.5, workers=4, full_memory_workers=1) == pytest.approx(2 + 0.5 * 3.25 + 2)
    impossible: tuple[dict[str, Any], ...] = ({"workers": 0}, {"workers": 2, "full_memory_workers": 3}, {"wait_seconds": -1.0})
    for wrong in impossible:
        with pytest.raises(ValueError, match="give"):
            hydraserve_ttft(16e9, 2e9, 0.5, **wrong)
    with pytest.raises(ValueError, match="give a speed above 0"):
        hydraserve_ttft(16e9, 0.0, 0.5)


def test_what_is_no_number_of_things_is_refused_in_a_sentence() -> None:
    half: Any = 2.5
    for build in (binomial_pipeline, serial_chain, binary_tree, store_reads):
        for shape in ((half, 3), (3, half)):
            with pytest.raises(ValueError, match="give whole numbers"):
                build(*shape)
    with pytest.raises(ValueError, match="give whole numbers"):
        k_way_pipeline(9, 3, half)
    for wrong in (lambda: store_reads(3, 3, half), lambda: Plan("p", 2, 1, (), source_sends=half)):
        with pytest.raises(ValueError, match="give a whole number of 1 or more"):
            wrong()
    for place in ("tick", "source", "target", "block"):
        changed: dict[str, Any] = {place: 1.5}
        plan = Plan("p", 3, 1, (replace(Transfer(1, 0, 1, 0), **changed), Transfer(2, 0, 2, 0)))
        with pytest.raises(ValueError, match="tick, nodes and block are whole numbers"):
            check(plan)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_makes_no_seconds(wrong: float) -> None:
    for figures in ((wrong, 1e6, 1e9), (3, wrong, 1e9), (3, 1e6, wrong)):
        with pytest.raises(ValueError, match="all finite"):
            plan_seconds(*figures)
        with pytest.raises(ValueError, match="all finite"):
            hydraserve_ttft(figures[1], figures[2], figures[0])
    with pytest.raises(ValueError, match="all finite"):
        plan_seconds(3, 1e6, 1e9, tick_seconds=wrong)
    for name in ("wait_seconds", "start_seconds"):
        option: dict[str, Any] = {name: wrong}
        with pytest.raises(ValueError, match="all finite"):
            hydraserve_ttft(16e9, 2e9, 0.5, **option)


# --- what chapter 10 draws -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", plots.PLAN_NAMES)
def test_a_schedule_is_drawn_and_said(name: str) -> None:
    plan = plots.build_plan(name, 5, 4, ways=2, store_sends=2)
    drawn = plots.draw_schedule(plan)
    assert isinstance(drawn, Described) and drawn.png
    assert f"5 new instances hold all 4 blocks after {plan.ticks} ticks" in drawn.alt_text and "node 5:" in drawn.alt_text


def test_a_schedules_picture_has_a_cell_for_each_transfer() -> None:
    from matplotlib import pyplot

    plan = binomial_pipeline(6, 4)
    axes = plots.plot_schedule(plan)
    words = [text.get_text() for text in axes.texts]
    source_ticks = len({transfer.tick for transfer in plan.transfers if transfer.source == 0})
    assert len(words) == len(plan.transfers) + source_ticks
    assert axes.get_yticklabels()[0].get_text() == "source 0"
    pyplot.close("all")


def test_blocks_keep_their_order_in_greyscale() -> None:
    from sllm_mini.lab.style import luminance

    for blocks in (1, 2, 5, 16):
        shades = [luminance(plots.block_color(block, blocks)) for block in range(blocks)]
        assert shades == sorted(shades) and len(set(shades)) == blocks


def test_all_plans_side_by_side() -> None:
    table = plots.plans_table(8, 16)
    assert [row[4] for row in table.rows] == ["128", "34", "23", "19", "17"]
    with pytest.raises(ValueError, match="no plan called 'ring'"):
        plots.build_plan("ring", 4, 4)


def test_the_curves_say_what_they_show() -> None:
    points = plots.serve_curves((1, 8), 16, model_nbytes=16e9, bytes_per_second=1e9)
    at = {(point.name, point.instances): point for point in points}
    assert at["store", 8].seconds == pytest.approx(128) and at["binomial", 8].seconds == pytest.approx(19)
    assert at["k-way", 8].joint_seconds == pytest.approx(4)
    text = plots.serve_text(points)
    assert "everyone reads the store 128 s (x8.00 against 1)" in text and "after 4.00 s" in text
    with pytest.raises(ValueError, match="no plans to draw"):
        plots.plot_serve_curves([])


@pytest.mark.parametrize("name", plots.PLAN_NAMES)
def test_ticks_of_the_curves_are_those_of_the_plans(name: str) -> None:
    for instances in (1, 2, 3, 7, 12):
        for blocks in (1, 5, 16):
            figures = summarize(plots.build_plan(name, instances, blocks, ways=3, store_sends=2))
            assert plots.ticks_until_served(name, instances, blocks, ways=3, store_sends=2) == (figures.ticks, figures.joint)


def test_in_enough_blocks_chain_and_cube_nearly_meet() -> None:
    """What section 5 says of 32 new instances; blocks are counts, said in full."""
    ticks = {blocks: [plots.ticks_until_served(name, 32, blocks)[0] for name in ("chain", "binomial")] for blocks in (32, 1140)}
    assert ticks[32] == [63, 37] and ticks[1140][0] < 1.03 * ticks[1140][1]
    slider = plots.serve_controls()["blocks"]
    assert slider.log and slider.text(1140.2) == "1,140" and slider.range_text == "1 to 4,096"


def test_each_widget_has_a_page_without_a_kernel() -> None:
    for draw, controls in ((plots.draw_serve_curves, plots.serve_controls()), (frames.draw_tick, frames.tick_controls())):
        page = explore(draw, **controls).render()
        assert "<img" in page["text/html"] and "Drawn with" in page["text/plain"]


@pytest.mark.parametrize("name", plots.PLAN_NAMES)
def test_the_last_frame_of_a_plan_shows_everybody_whole(name: str) -> None:
    plan = plots.build_plan(name, 3, 2, ways=1)
    assert "3 of 3 new nodes hold every block" in frames.tick_text(plan, plan.ticks)
    assert "0 of 3 new nodes hold every block, and between them they hold 0 of 2" in frames.tick_text(plan, 0)
    late = frames.draw_tick(plan=name, tick=40, instances=3, blocks=2, ways=1)
    assert f"tick {plan.ticks} of {plan.ticks}" in late.alt_text
    with pytest.raises(ValueError, match="and no tick"):
        frames.plot_tick(plan, plan.ticks + 1)


def test_the_player_moves_its_slider_and_is_heard() -> None:
    heard: list[str] = []
    controls = {**frames.tick_controls(), "blocks": Slider("blocks", 3, 1, 16, step=1)}
    explorer = explore(frames.draw_tick, **controls)
    box = explorer.panel(lambda page: heard.append(page["text/plain"]))
    player = box.children[1]
    slider = player.children[0]
    slider.value = 2
    assert explorer.values["tick"] == 2 and "tick 2 of 5" in heard[-1]
