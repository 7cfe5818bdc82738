"""Chapter 08: the case worked by hand, the log and its replay, estimates that are learnt, who must leave, the contest, pictures, the page."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

from sllm_mini.control.estimate import Estimator
from sllm_mini.control.replay import replay
from sllm_mini.errors import SllmError
from sllm_mini.lab.scheduling import contest_plots, cover, gantt, learning, oracle, others, promises
from sllm_mini.lab.scheduling.contest import (
    SHAPES,
    Outcome,
    Setting,
    cluster_for,
    contest,
    play,
    ratio,
    reported_order,
    sweep,
    trace_for,
)
from sllm_mini.lab.scheduling.machine import log_table, make_controller
from sllm_mini.lab.scheduling.worked import NAMED, POLICIES, delays, delays_table, small_burst, two_nodes, undisturbed

CHAPTER = Path(__file__).parents[1] / "chapters" / "08_start_up_time_optimised_scheduling.ipynb"


# --- two machines ------------------------------------------------------------------------------------------------------


def test_the_collision_comes_out_as_it_does_by_hand() -> None:
    """A load of 26 GB: 5.2 s from disk, 20.8 s from the network; 0.2 s more to be ready; B has 28 s of its own from 5.4 s on."""
    found = {one.placement: one for one in delays({name: two_nodes(name) for name in POLICIES})}
    token = 200 * 0.0045 + 0.045  # A's prompt and its first step
    assert found["availability"].first_token_seconds == pytest.approx(20.8 + 0.2 + token)
    assert found["shepherd"].first_token_seconds == pytest.approx(5.4 + token)
    alone = 5.4 + 200 * 0.0045 + 600 * 0.045
    assert found["locality"].first_token_seconds == pytest.approx(alone - 10 + 5.4 + token)
    assert found["serverlessllm"].first_token_seconds == pytest.approx(17.51 - 10 + 5.4 + token, abs=0.02)
    assert next(iter(undisturbed().requests)).end == pytest.approx(alone)
    assert [round(found[name].b_later_seconds, 1) for name in POLICIES] == [0.0, 0.0, 10.0, 0.0]
    assert min(found.values(), key=lambda one: one.together_seconds).placement == "serverlessllm"
    table = delays_table(list(found.values()))
    assert table.emphasis == {POLICIES.index("serverlessllm")} and table.rows[2][3] == "10.0 s"


def test_the_log_can_be_read_and_replayed() -> None:
    log: list[bytes] = []
    result = two_nodes("serverlessllm", log.append)
    assert result.account.migrations == 1
    assert replay(log, make_controller("serverlessllm")) == len(log)
    with pytest.raises(SllmError, match="event 7"):
        replay(log, make_controller("shepherd"))
    table = log_table(log, caption="c")
    said = {row[1]: row[2] for row in table.rows}
    assert said["RequestArrived(request 1, A, input tokens 200)"] == "Start(instance 2, b, B, COLD, READY, DISK, devices 0)"
    assert said["NodeJoined(b)"] == "nothing" and "timers" in table.note
    assert not any("epoch" in cell for row in table.rows for cell in row)


def test_one_chart_has_a_row_for_every_device_and_what_happened_in_words() -> None:
    from matplotlib import pyplot

    results = {name: two_nodes(name) for name in ("locality", "serverlessllm")}
    figure = gantt.plot_gantts(results)
    for ax in figure.axes:
        assert [text.get_text() for text in ax.get_yticklabels()] == ["b", "a"]
    bars = [patch for collection in figure.axes[1].collections for patch in collection.get_paths()]
    assert len(bars) == sum(len(span.devices) for span in results["serverlessllm"].spans)
    said = gantt.gantt_alt_text(results)
    assert "serverlessllm: from arrival to the first token B 6.35 s, A 13.9 s; 1 moved, 0 stopped" in said
    pyplot.close(figure)
    burst = small_burst("serverlessllm")
    ax = gantt.plot_gantt(burst)
    assert len(ax.get_yticks()) == 6 and len(set(gantt.model_colors([burst]).values())) == 4
    pyplot.close("all")
    for name, held in (("serverlessllm", True), ("locality", False)):
        legend = gantt.plot_gantts({name: small_burst(name)}).legends[0]
        assert ("held for a request that ended before it moved" in [text.get_text() for text in legend.get_texts()]) is held
    pyplot.close("all")
    with pytest.raises(ValueError, match="no spans"):
        gantt.plot_gantt(play(Setting(requests=5), "random", 0))


# --- what is exact, and what is learnt ---------------------------------------------------------------------------------


def test_erlang_lies_in_the_interval() -> None:
    (one,) = oracle.against_erlang((0.5,), requests=3000, replications=5)
    assert one.inside and one.half_width < one.expected
    assert oracle.erlang_table([one]).rows[0][0] == "50%"
    off = oracle.Against(0.5, 2 * one.expected + one.half_width, one.found)
    assert not off.inside and oracle.erlang_table([off]).rows[0][-1] == "no"


def test_a_slow_disk_is_found_out_by_one_start() -> None:
    runs = {"learns": learning.learn(Estimator()), "believes": learning.learn(learning.DataSheet())}
    learns, believes = ([one for one in run.starts if one.node == "worn"] for run in runs.values())
    assert learning.error_share(learns[:1]) > 0.5 > 0.1 > learning.error_share(learns[1:])
    assert learning.error_share(believes[1:]) > 0.5 and len(believes) > 2 * len(learns)
    assert runs["learns"].believed["worn"] == pytest.approx(learning.TRUE["worn"], rel=0.1)
    assert runs["believes"].believed["worn"] == learning.DATA_SHEET
    assert len(learning.learning_table(runs).rows) == 2 and learning.error_share([]) == 0
    assert "start from COLD by DISK" in {row[0] for row in runs["learns"].errors.rows}
    figure = contest_plots.plot_estimates({name: run.starts for name, run in runs.items()})
    assert len(figure.axes) == 2
    assert "learns, worn disk: " in contest_plots.estimates_alt_text({name: run.starts for name, run in runs.items()})
    assert learning.worth((0.05,), (0, 1)).rows[0][0] == "0.05"


def test_the_programme_finds_what_all_subsets_find_and_greed_does_not() -> None:
    rows = {row[0]: row for row in cover.cover_table().rows}
    assert rows["dynamic programme"][1:] == rows["every subset"][1:] and rows["cheapest first"][3] > rows["every subset"][3]
    assert re.match(r"of 200 random cases the programme finds the least sum in 200; cheapest first pays more in \d\d", cover.compared(200))
    assert cover.cheapest_first([1.0], [1], 2) is None and cover.every_subset([1.0], [1], 2) is None


# --- the contest -------------------------------------------------------------------------------------------------------


def test_a_contest_gives_everybody_the_same() -> None:
    setting = Setting(requests=60)
    first, again = contest(setting, (1,)), contest(setting, (1,))
    assert first == again and [one.placement for one in first] == list(POLICIES)
    assert all(not one.unanswered for one in first)
    nodes, models = cluster_for(setting, 1)
    assert len(nodes) == 4 and all(node.devices == 4 for node in nodes) and len(models) == SHAPES[0].models
    assert sum(len(node.disk) for node in nodes) == setting.copies * len(models)
    assert list(trace_for(setting, models, 1)) != list(trace_for(setting, models, 2))
    by_name = {one.placement: one for one in contest(setting, (1,), ("serverlessllm", "without moving", "patient"))}
    assert by_name["without moving"].migrations == 0 and by_name["patient"].remote_share() == 0 < by_name["serverlessllm"].remote_share()


def outcome(placement: str, seed: int, p99: float) -> Outcome:
    return Outcome(placement, seed, p99, p99, p99, 0, 0, (0, 1, 0, 1), 0)


def told(*ratios: tuple[float, float, float]) -> list[Outcome]:
    """Per seed: Serverless, Shepherd*, locality over ServerlessLLM."""
    names = ("availability", "shepherd", "locality")
    return [outcome(name, seed, 10 * times) for seed, line in enumerate(ratios) for name, times in zip(("serverlessllm", *names), (1.0, *line), strict=True)]


def test_an_order_holds_is_tied_or_is_reversed() -> None:
    assert reported_order(told((3, 2, 1))) == "holds"
    assert reported_order(told((3, 1.001, 1))) == "tied"
    assert reported_order(told((1.5, 2, 1))) == reported_order(told((3, 0.9, 1))) == "reversed"
    assert reported_order(told((10, 9, 1), (2, 1.9, 1), (1.1, 5, 1))) == "reversed", "the medians that are drawn count, not those of other ratios"
    one = ratio(told((3, 2, 1), (1, 4, 1), (2, 0.5, 1)), "shepherd")
    assert (one.low, one.median, one.high) == (0.5, 2, 4) and one.times_behind == "2 of 3 seeds" and one.text == "x2.00 (0.50 to 4.00)"


def test_what_is_drawn_is_what_was_found() -> None:
    from matplotlib import pyplot

    found = {"OPT": told((3, 2, 0.5), (4, 1.5, 0.5))}
    table = contest_plots.contest_table(found)
    assert [row[1] for row in table.rows] == [NAMED[policy] for policy in POLICIES] and table.rows[0][3] == "x3.50 (3.00 to 4.00)"
    assert "Serverless behind ServerlessLLM in 2 of 2 seeds (x3.50 (3.00 to 4.00))" in contest_plots.order_text(found)
    ax = contest_plots.plot_contest(found)
    dots = [line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 1]  # type: ignore[arg-type, index]
    assert dots == [0.5, 1.75, 3.5]
    assert "OPT, locality x0.50" in contest_plots.contest_alt_text(found)
    grid = {("CV 1", "0.2"): told((3, 2, 0.5)), ("CV 1", "1"): told((3, 1, 1)), ("CV 8", "0.2"): told((0.5, 2, 2)), ("CV 8", "1"): told((3, 2, 1), (3, 0.5, 1), (3, 2, 1))}
    figure = contest_plots.plot_sweep(grid, rows="r", columns="c")
    shepherd = [(text.get_text(), text.get_fontweight()) for text in figure.axes[1].texts]
    assert shepherd == [("2.00", "bold"), ("1.00", "normal"), ("2.00", "bold"), ("2.00", "normal")]
    assert "holds in 2 of 4 settings, with ties in 1, reversed somewhere in 1. Locality is ahead of ServerlessLLM in 1, behind in 1." in contest_plots.sweep_text(grid)
    assert "CV 8, 0.2: Serverless 0.50" in contest_plots.sweep_alt_text(grid)
    variants = contest_plots.variants_table(found)
    assert variants.rows[0][1] == "ServerlessLLM"
    assert all("P99: median of seeds; ratios: median (least to largest) of those within each seed" in each.caption for each in (table, variants))
    assert sweep({("a", "b"): Setting(requests=5)}, (0,)).keys() == {("a", "b")}
    pyplot.close("all")


# --- other policies, promises, and the page ----------------------------------------------------------------------------


def test_what_the_other_policies_are_for() -> None:
    rendezvous, modulo = others.moved_by_a_loss(400)
    assert rendezvous < 0.25 < 0.75 < modulo
    last, algorithm, least = others.prefix_table((0, 1)).rows
    assert float(algorithm[1].split()[0]) > float(least[1].split()[0]) + 10 and int(algorithm[2]) < 0.7 * int(last[2])
    waits = [float(row[2].split()[0]) for row in others.split_table().rows]
    assert waits == pytest.approx([0.2 + 20.8 / parts for parts in (1, 2, 4)], abs=0.06)
    random, affinity = others.sharded_table(("random", "affinity"), (0,)).rows
    assert float(random[1].split()[0]) > 3 * float(affinity[1].split()[0])


def test_a_promise_that_is_broken_is_told() -> None:
    counts = {policy: dict.fromkeys(promises.PROPERTIES, 0) for policy in promises.PROMISES}
    counts["random"]["arrival order"] = 3
    counts["locality"]["no starvation"] = 120
    rows = {row[0]: row for row in promises.promises_table(counts).rows}
    assert rows["random"][3] == "BROKEN (3)" and rows["locality"][2] == "no (+120 s)" and rows["serverlessllm"][1] == "yes"


def test_the_page_holds_what_it_says() -> None:
    notebook = nbformat.read(CHAPTER, as_version=4)
    assert [cell.id for cell in notebook.cells] == [f"c08-{number:02}" for number in range(len(notebook.cells))]
    shown = "\n".join(str(output.get("data", {}).get("text/plain", output.get("text", ""))) for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs)
    assert "BROKEN" not in shown and "formula inside" in shown and " no\n" not in shown.split("formula inside")[1].split("\n\n")[0]
    pictures = sum("data:image/png;base64," in str(output.get("data", {}).get("text/html", "")) for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs)
    assert pictures == 8
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for path, word in re.findall(r"`pytest (tests/\S+)(?: -k (\w+))?`", text):
        tests = (CHAPTER.parents[1] / path).read_text()
        assert not word or re.search(rf"^def test_\w*{word}", tests, flags=re.MULTILINE), f"{path} has no test of {word}"
