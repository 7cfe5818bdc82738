"""Chapter 10: a link that is measured, blocks that are counted, autoscalers in virtual time, and what the page says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest

from sllm_mini.control.autoscale import BoundedQueue, KnativePodAutoscaler, PerRequest, QueueLength, TargetConcurrency
from sllm_mini.control.messages import ModelSpec
from sllm_mini.control.multicast import binomial_pipeline, check, plan_seconds
from sllm_mini.control.multicast.zigzag import best_effort, zigzag
from sllm_mini.control.policy import Autoscaler
from sllm_mini.control.state import ModelState
from sllm_mini.lab import autoscaling_plots, local_link, local_link_plots
from sllm_mini.lab.autoscaling import Course, FixedStart, PlannedStart, Starts, drive, evenly
from sllm_mini.lab.local_link import LocalLink, measure_link
from sllm_mini.lab.multicast_plots import build_plan

CHAPTER = next((Path(__file__).parents[1] / "chapters").glob("10_*.ipynb"))
PHASES = ((60, 0.5), (180, 8), (100, 0.5), (10, 20), (130, 0.5))


# --- the link --------------------------------------------------------------------------------------------------------


def test_a_link_is_measured_for_each_size_of_block_and_its_process_ends() -> None:
    link = measure_link(2**20, [1, 4, 256], rounds=1)
    assert set(link.seconds) == {2**20, 2**18, 2**12} and link.fixed_seconds > 0
    assert link.seconds[2**20] > link.seconds[2**12], "a block of 256 times the bytes takes longer"
    for counts in ([], [3], [0], [2**21]):
        with pytest.raises(ValueError, match="counts that divide"):
            measure_link(2**20, counts)


def test_a_link_that_breaks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_link.sys, "executable", "/bin/false")
    with pytest.raises(ConnectionError):
        measure_link(2**20, [1], rounds=1)


def test_a_link_is_two_figures() -> None:
    link = LocalLink({1000: 0.3, 10: 0.101}, 0.1)
    assert link.bytes_per_second == pytest.approx(5000)


@pytest.mark.parametrize("name", ["store", "chain", "binomial"])
def test_ticks_by_formula_are_those_of_the_plan(name: str) -> None:
    for instances in (1, 2, 3, 6, 7, 15):
        for blocks in (1, 4, 9):
            assert local_link_plots.plan_ticks(name, instances, blocks) == build_plan(name, instances, blocks).ticks
    with pytest.raises(ValueError, match="no formula"):
        local_link_plots.plan_ticks("tree", 3, 4)


def test_the_best_number_of_blocks_is_where_the_seconds_are_least() -> None:
    """3 · 1 s / 0.0003 s: 100 blocks; and no number beside it is quicker."""
    link = LocalLink({2**20: 1.0003}, 0.0003)
    assert local_link_plots.best_blocks(link, 15, 2**20) == pytest.approx(100)

    def seconds(blocks: int) -> float:
        return plan_seconds(local_link_plots.plan_ticks("binomial", 15, blocks), 2**20 / blocks, link.bytes_per_second, tick_seconds=link.fixed_seconds)

    assert min(range(1, 2000), key=seconds) == 100
    assert local_link_plots.best_blocks(link, 1, 2**20) == 1, "one link, one copy: nothing to overlap"


def test_block_counts_are_said_as_they_are_drawn() -> None:
    from matplotlib import pyplot

    link = LocalLink({1600: 1.6, 400: 0.5, 100: 0.2}, 0.1)
    axes = local_link_plots.plot_block_counts(link, 7, 1600, [1, 4, 16])
    marks = {str(line.get_label()): list(line.get_ydata()) for line in axes.lines if line.get_marker() in ("o", "s", "v")}  # type: ignore[arg-type]
    assert marks["binomial pipeline"] == pytest.approx([3 * 1.6, 6 * 0.5, 18 * 0.2])
    assert marks["everyone reads the store"] == pytest.approx([7 * 1.6, 28 * 0.5, 112 * 0.2])
    said = local_link_plots.block_counts_text(link, 7, 1600, [1, 4, 16])
    assert "4 blocks are, with 3.00 s, where one copy takes at least 1.60 s. 1 takes x1.6 that and 16 take x1.2" in said
    pyplot.close(axes.figure)  # type: ignore[arg-type]


def test_no_mark_lies_below_the_limit_where_small_blocks_move_faster() -> None:
    from matplotlib import pyplot

    link = LocalLink({2**20: 1.1, 2**16: 0.04, 2**12: 0.1}, 0.001)
    axes = local_link_plots.plot_block_counts(link, 15, 2**20, [1, 16, 256])
    limit = next(line for line in axes.lines if line.get_linestyle() == ":")
    assert list(limit.get_ydata()) == pytest.approx([16 * 0.04] * 2)  # type: ignore[arg-type]
    drawn: list[Any] = [line.get_ydata() for line in axes.lines]
    assert all(min(seconds) >= 16 * 0.04 for seconds in drawn)
    pyplot.close(axes.figure)  # type: ignore[arg-type]


# --- autoscalers in virtual time ---------------------------------------------------------------------------------------


def course(scaler: Autoscaler, arrivals: list[float], starts: Starts, *, ready: int = 0, end: float = 200, keep_alive_seconds: float = 60.0) -> Course:
    return drive("c", scaler, arrivals, starts, service_seconds=4, concurrency=1, end=end, ready=ready, keep_alive_seconds=keep_alive_seconds)


def test_arrivals_are_evenly_spaced() -> None:
    assert evenly((2, 1), (1, 4)) == [0.5, 1.5, 2.125, 2.375, 2.625, 2.875]


def test_a_request_waits_for_its_instance_and_the_next_for_none() -> None:
    """At 1 nothing is there: ready at 11, idle from 15 to 25 (keep-alive 10), gone at 25. At 20 it is warm, at 60 it is not."""
    found = course(PerRequest(), [1.0, 20.0, 60.0], FixedStart(10), keep_alive_seconds=10)
    assert found.waits == (10.0, 0.0, 10.0) and found.starts == 2 and found.refused == 0
    ready = {moment.time: moment.ready for moment in found.moments}
    assert ready[11.0] == 1 and ready[24.0] == 1 and ready[34.0] == 0
    assert found.instance_seconds == pytest.approx((34 - 1) + (84 - 60))


def test_the_instance_used_last_stays_the_longest() -> None:
    """Two are ready at 11 and idle from 15; one takes the request of 20 and is idle again from 24: gone at 25 and at 34."""
    found = course(PerRequest(), [1.0, 1.0, 20.0], FixedStart(10), keep_alive_seconds=10)
    ready = {moment.time: moment.ready for moment in found.moments}
    assert (ready[25.0], ready[34.0]) == (1, 0)
    assert found.instance_seconds == pytest.approx((25 - 1) + (34 - 1))


def test_every_request_runs_or_is_refused_and_none_too_soon() -> None:
    arrivals = evenly((5, 4), (40, 0))
    for scaler in (PerRequest(), TargetConcurrency(target=1), KnativePodAutoscaler(target=1), QueueLength(target=2), BoundedQueue(queue_seconds=3)):
        found = course(scaler, arrivals, FixedStart(5))
        assert len(found.waits) + found.refused == len(arrivals) and min(found.waits) >= 0
        assert found.wait(1.0) == max(found.waits) and found.wait(0.5) <= found.wait(0.99)
        assert all(moment.running <= moment.ready for moment in found.moments)
    assert found.refused and found.wait(1.0) <= 3


def test_an_instance_of_a_plan_is_ready_with_its_last_block_and_a_batch_after_the_last() -> None:
    chain = PlannedStart("chain", 4, 0.5)
    assert list(chain.begin(10.0, 3)) == [12.0, 12.5, 13.0]
    assert list(chain.begin(11.0, 1)) == [15.0], "the source's link is free at 13"
    assert list(chain.begin(20.0, 1)) == [22.0]
    assert list(PlannedStart("store", 4, 0.5).begin(0.0, 2)) == [3.5, 4.0]


def test_one_more_a_second_is_no_more_where_nobody_asks() -> None:
    """Between two ticks the keep-alive may let instances go: what was allowed at the last tick is not asked for again."""
    scaler, model = TargetConcurrency(target=4), ModelState(ModelSpec(name="m", nbytes=1))
    model.ready, model.running = 30, 1
    assert scaler.desired(model, 10.0) == 30
    model.ready = 15
    assert scaler.desired(model, 10.5) == 15


@pytest.fixture(scope="module")
def races() -> dict[float, list[Course]]:
    space: dict[str, Any] = {}
    for words in ("import BoundedQueue", "def race"):
        exec("from sllm_mini.control.autoscale import KnativePodAutoscaler\n" + cell_with(words).source, space)  # the chapter's own cells
    return {seconds: space["race"](seconds) for seconds in (15, 2)}


def test_a_slow_start_asks_for_too_much(races: dict[float, list[Course]]) -> None:
    """What sections 7 and 8 say in words."""
    slow, fast = races[15], races[2]
    for one in slow:
        assert max(moment.desired for moment in one.moments if moment.time < 300) > 2 * 8, one.name
        after = min(moment.time for moment in one.moments if moment.time > 340 and moment.ready > max(m.ready for m in one.moments if 330 < m.time < 340))
        assert after > 350, "what is started for the burst is ready after its last request"
    named = {one.name: one for one in slow}
    assert max(slow, key=lambda one: one.most_ready).name == "bounded queue" and named["bounded queue"].refused
    assert min(slow, key=lambda one: one.instance_seconds).name == "queue length" == max(slow, key=lambda one: one.mean_wait).name
    for before, after_ in zip(slow, fast, strict=True):
        assert after_.instance_seconds < before.instance_seconds and after_.mean_wait < before.mean_wait
        assert after_.starts < 0.7 * before.starts or (before.name == "queue length" and abs(after_.starts - before.starts) < 4)


@pytest.mark.parametrize("tick_seconds", [0.2, 0.5, 1.0])
def test_the_store_leaves_the_longest_queue(tick_seconds: float) -> None:
    """Section 8, for links of any such speed."""
    found = {
        name: drive(name, KnativePodAutoscaler(target=4), evenly(*PHASES), PlannedStart(name, 16, tick_seconds), service_seconds=4, concurrency=4, end=480, ready=1)
        for name in ("store", "tree", "chain", "binomial")
    }
    waits = [one.mean_wait for one in found.values()]
    assert waits[0] > 1.2 * waits[1] and waits[1] > 1.2 * max(waits[2:]) and abs(waits[2] - waits[3]) < 0.2 * waits[2]


def test_courses_are_said_as_they_are_drawn(races: dict[float, list[Course]]) -> None:
    from matplotlib import pyplot

    courses = races[15]
    figure = autoscaling_plots.plot_courses(courses, PHASES, service_seconds=4, concurrency=4)
    said, table = autoscaling_plots.courses_text(courses), autoscaling_plots.courses_table(courses)
    for ax, one, row in zip(figure.axes, courses, table.rows, strict=True):
        most = max(moment.desired for moment in one.moments)
        assert ax.get_title(loc="left") == f"{one.name}: at most {most} desired" and f"{one.name}: at most {most} desired" in said
        assert max(ax.lines[0].get_ydata()) == most and row[:3] == (one.name, str(one.starts), str(one.most_ready))  # type: ignore[arg-type, type-var]
    assert autoscaling_plots.needed(PHASES, 4, 4) == ([0, 60, 240, 340, 350, 480], [0.5, 8, 0.5, 20, 0.5])
    panels = autoscaling_plots.plot_starts(courses[:2], 50, 100).axes
    assert [len(panel.lines) for panel in panels] == [2, 2] and panels[1].get_xlim() == (50, 100)
    for one, said_of in zip(courses[:2], autoscaling_plots.starts_text(courses[:2], 50, 100).split(";"), strict=True):
        shown = [moment for moment in one.moments if 50 <= moment.time <= 100]
        assert f"{one.name}: at most {max(m.ready for m in shown)} ready and {max(m.queued for m in shown)} queued" in said_of
    assert "at most 1 ready and 0 queued" in autoscaling_plots.starts_text(courses[:1], 0.6, 0.7), "what began before lasts into it"
    for draw in (lambda: autoscaling_plots.plot_courses([], PHASES, service_seconds=4, concurrency=4), lambda: autoscaling_plots.plot_starts([], 0, 1)):
        with pytest.raises(ValueError, match="nothing to draw"):
            draw()
    pyplot.close("all")


# --- the page ------------------------------------------------------------------------------------------------------------


def cell_with(words: str) -> Any:
    return next(cell for cell in nbformat.read(CHAPTER, as_version=4).cells if cell.cell_type == "code" and words in cell.source)


def test_its_wrong_answer_is_slow_because_the_source_repeats_itself() -> None:
    space: dict[str, Any] = {}
    exec("from sllm_mini.control.multicast import Transfer\n" + cell_with("def repeating_step").source, space)  # the chapter's own cell
    plan = binomial_pipeline(8, 8, step=space["repeating_step"])
    check(plan)
    assert plan.ticks == 24 and binomial_pipeline(8, 8).ticks == 10

    def lowest(tick: int, nodes: int, blocks: int, held: Any) -> Any:
        found = space["repeating_step"](tick, nodes, blocks, held)
        if found and found[0].source == 0:
            new = min(tick, blocks) - 1
            found = [*([type(found[0])(tick, 0, found[0].target, new)] if new not in held[found[0].target] else []), *found[1:]]
        return found

    assert binomial_pipeline(8, 8, step=lowest).ticks == 10, "a source that counts is enough"


def test_what_the_page_says_of_zigzag() -> None:
    arrivals = range(7)
    assert best_effort(arrivals, layers=7, load=6).times(arrivals)[5] == 32 and zigzag(arrivals, layers=7, load=6).times(arrivals)[5] == 22
    lead = {load: sum(best_effort(arrivals, layers=7, load=load).ends) - sum(zigzag(arrivals, layers=7, load=load).ends) for load in (1, 2, 6, 12, 50)}
    assert lead[50] == 0 and lead[1] > 0 and max(lead, key=lead.__getitem__) == 6


def test_the_chapter_is_numbered_and_says_what_was_not_measured() -> None:
    cells = nbformat.read(CHAPTER, as_version=4).cells
    assert [cell.id for cell in cells] == [f"c10-{number:02d}" for number in range(len(cells))]
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert prose.count("**Predict") >= 6 and "Nothing on this page was measured on several machines, no run on a GPU is recorded" in prose
    assert "What falls short" in prose and "control.multicast:binomial_step" in prose
