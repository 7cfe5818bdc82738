"""Chapter 11: its switches are options of a live cluster, its forecasts have the same parts, its page says what was played. Engines are
doubles (`fake_engine`) in threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_process import eventually

from sllm_mini.checkpoint import Checkpoint, convert_checkpoint
from sllm_mini.cluster.trace.request import TraceRequest
from sllm_mini.control.placement import StartupTimeOptimised
from sllm_mini.errors import SllmError
from sllm_mini.lab.livebench.figures import Figures
from sllm_mini.lab.livebench.play import Played, play
from sllm_mini.lab.platform import (
    SWITCHES,
    Costs,
    Platform,
    Row,
    Run,
    bursts,
    contest,
    forecast,
    platform_with,
    stretched,
    switched,
)
from sllm_mini.lab.platform.choosing import a_budget, check_choice, choices, forecast_choices, without_each
from sllm_mini.lab.platform.contest import expected_run, live_run
from sllm_mini.lab.platform.forecast import Launched, practice
from sllm_mini.lab.platform.opened import OpenPlatform, nodes_table, timing_table
from sllm_mini.lab.platform.providers import APPROACHES, LEAD_SECONDS, serve
from sllm_mini.lab.platform.shown import (
    cost_table,
    costs_alt_text,
    idle_switches,
    left_out_table,
    noise_text,
    open_table,
    plot_costs,
    plot_rows,
    providers_table,
    rows_alt_text,
    rows_table,
    worth_table,
)
from sllm_mini.lab.survey import load_survey
from sllm_mini.resources import resource
from sllm_mini.storage.source_http import HttpSource

RUNGS = Figures(0.4, 4.0, 0.15, 2.5e6, 1e-4, 0.025)
COSTS = Costs(
    Launched(RUNGS, 0.03, 270_000_000, 0),
    Launched(Figures(0.03, 0.001, 0.15, 12e6, 1e-4, 0.025), 0.03, 27_000_000, 180_000_000),
)
"""Much as they were measured."""
FAKE: dict[str, Any] = {"cluster": "inprocess:2", "engine": "fake_engine:make", "pace_seconds": 0.001, "remote_bytes_per_second": 100e6, "models": 3}
REQUESTS = [TraceRequest(0.05 * number, f"model-0{number % 3}", 20, 6) for number in range(6)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return convert_checkpoint(resource("data/models/tiny"), tmp_path_factory.mktemp("tiny") / "tiny.sllm")


@pytest.fixture(scope="module")
def rows(tiny: Checkpoint) -> list[Row]:
    return contest(REQUESTS, {name: replace(switched()[name], **FAKE) for name in ("nothing", "keep-alive")}, tiny, COSTS)


@pytest.fixture(scope="module")
def practised(tiny: Checkpoint) -> Played:
    platform = replace(Platform(), **FAKE)
    return play(practice(platform), tiny, platform)


@pytest.fixture
def most_at_once(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many ranges of weights were under way at once, at most."""
    lock, plain, counts = threading.Lock(), HttpSource.stream, {"now": 0, "most": 0}

    def stream(self: HttpSource, file: str, *given: Any) -> Iterator[int]:
        with lock:
            counts["now"] += file.startswith("data-")
            counts["most"] = max(counts.values())
        try:
            yield from plain(self, file, *given)
        finally:
            with lock:
                counts["now"] -= file.startswith("data-")

    monkeypatch.setattr(HttpSource, "stream", stream)
    return lambda: counts["most"]


# Switches


def test_each_row_has_one_switch_more_and_a_switch_is_an_option_of_the_live_cluster(tiny: Checkpoint) -> None:
    platforms = switched()
    assert list(platforms) == ["nothing", *SWITCHES] and list(platforms.values())[-1] == platform_with(SWITCHES)
    first, last = (platform.live(tiny) for platform in (platforms["nothing"], platforms["keep-alive"]))
    assert (first.node.launcher, first.node.remote_ranges, first.node.store_disk_nbytes, first.overlap) == ("spawn", 1, 0, False)
    assert (last.node.launcher, last.node.remote_ranges, last.overlap) == ("zygote", 0, True)
    assert last.node.store_dram_nbytes == 3 * first.node.store_dram_nbytes and last.node.store_disk_nbytes >= 10 * tiny.nbytes
    moving = [platforms[name].control().controller().placement for name in ("overlap", "scheduler", "migration")]
    assert not isinstance(moving[0], StartupTimeOptimised)
    assert [isinstance(each, StartupTimeOptimised) and each.migrate for each in moving[1:]] == [False, True]


def test_what_cannot_be_switched_is_refused() -> None:
    with pytest.raises(ValueError, match="no switch 'turbo'"):
        platform_with(["turbo"])
    with pytest.raises(ValueError, match="scheduler"):
        platform_with(["migration"])


def test_the_trace_is_seeded_bursty_and_can_be_stretched() -> None:
    requests = bursts()
    assert requests == bursts() != bursts(seed=9) and len(requests) == 18
    gaps = [after.arrival_seconds - before.arrival_seconds for before, after in pairwise(requests)]
    assert max(gaps) > 5 * sorted(gaps)[len(gaps) // 2]
    slow = stretched(requests, 3.0, later=5.0)
    assert slow[-1].arrival_seconds == pytest.approx(5 + 3 * requests[-1].arrival_seconds) and [each.model for each in slow] == [each.model for each in requests]


@pytest.mark.parametrize(("ranges", "one"), [(1, True), (0, False)])
def test_a_slow_loader_asks_for_one_range_at_a_time(tiny: Checkpoint, most_at_once: Callable[[], int], ranges: int, one: bool) -> None:
    played = play(REQUESTS[:1], tiny, replace(Platform(), **{**FAKE, "remote_bytes_per_second": 20e6}, ranges=ranges))
    assert played.reports[0].outcome == "answered" and (most_at_once() == 1) == one and most_at_once() >= 1


# Live beside the forecast


def test_rows_hold_every_request_and_the_memory_that_processes_held(rows: list[Row], tiny: Checkpoint) -> None:
    for row in rows:
        assert len(row.live.firsts) == len(row.expected.firsts) == len(REQUESTS) and min(row.live.firsts) > 0
        assert row.live.worker_mb_seconds > 0 and row.live.end >= max(row.live.firsts)
        store = row.platform.live(tiny).node.store_dram_nbytes * 2e-6
        assert row.live.standing_mb_seconds == pytest.approx(store * row.live.end)  # threads have no zygote
    assert rows[1].expected.standing_mb_seconds == pytest.approx((360 + 6 * 12.582912 * 10 / 12) * rows[1].expected.end, rel=0.05)


def test_a_row_without_all_its_requests_says_nothing(practised: Played, tiny: Checkpoint) -> None:
    with pytest.raises(SllmError, match="all its requests"):
        live_run(replace(practised, reports=[replace(practised.reports[0], outcome="failed", reason="it broke")]), tiny, Platform())


def test_a_row_is_forecast_from_its_launcher_and_its_loader(tiny: Checkpoint) -> None:
    platforms = switched()
    plain, fast, hidden, forked = (COSTS.figures(platforms[name], tiny) for name in ("nothing", "fast loader", "overlap", "zygote"))
    assert plain == RUNGS and fast.remote_bytes_per_second == 12e6 and fast.runtime_seconds == 4.0
    seconds = tiny.nbytes / 12e6
    assert tiny.nbytes / hidden.remote_bytes_per_second == pytest.approx(seconds - 0.15) and forked.runtime_seconds == 0.001
    assert COSTS.heavier(4).fast.figures.remote_bytes_per_second == 3e6 and COSTS.heavier(4).slow.figures.runtime_seconds == 4.0
    means = [forecast(bursts(), tiny, platform, COSTS).totals()["first_token_seconds_mean"] for platform in platforms.values()]
    assert means[0] > means[1] > means[3] > 3 * means[4] and means[-1] == min(means)


def test_what_practice_measures_is_one_request_and_a_full_batch(practised: Played, tiny: Checkpoint) -> None:
    found = Launched.of(practised, tiny)
    assert [report.model for report in practised.reports] == ["model-00"] + ["model-01"] * Platform().concurrency
    alone = practised.reports[0]
    assert found.figures.decode_seconds_per_token == pytest.approx(alone.decode_seconds / (alone.output_tokens - 1)) and found.batch_slowdown >= 0


# What the page says


def test_tables_and_figures_say_the_rows(rows: list[Row], tiny: Checkpoint) -> None:
    from matplotlib import pyplot

    table = rows_table(rows)
    assert [row[0] for row in table.rows] == ["nothing", "keep-alive"] and f"x{rows[0].live.mean / rows[1].live.mean:.2f}" in table.rows[1]
    ax = plot_rows(rows)
    drawn = sorted(float(x) for line in ax.lines if line.get_marker() == "o" for x in np.asarray(line.get_xdata()))
    assert drawn == pytest.approx(sorted(first for row in rows for first in row.live.firsts))
    assert "nothing" in rows_alt_text(rows)
    assert [row[4] for row in cost_table(rows).rows] == [f"{row.live.mb_seconds:,.0f}" for row in rows]
    points = plot_costs(rows).collections
    assert np.allclose([np.asarray(each.get_offsets())[0] for each in points], [(row.live.mb_seconds, row.live.mean) for row in rows])
    assert "MB-seconds" in costs_alt_text(rows)
    opened = open_table(rows[-1], REQUESTS, tiny, COSTS)
    first = sum(rows[-1].live.firsts[:3]) / sum(rows[-1].live.firsts)
    assert len(opened.rows) == 5 and f"{first:.0%}" in opened.rows[0][2]
    pyplot.close("all")


def test_a_switch_that_does_not_help_is_named(tiny: Checkpoint) -> None:
    def row(name: str, *firsts: float) -> Row:
        run = Run(firsts, 4, 0, {"remote": 3, "disk": 1}, 9.0, 10.0, 5.0, (3.0, 4.5))
        return Row(name, Platform(), run, replace(run, firsts=tuple(2 * first for first in firsts)))

    played = [row(name, mean, mean) for name, mean in zip(["nothing", *SWITCHES], (8.0, 5.0, 4.9, 4.0, 1.0, 0.5, 0.55, 0.4), strict=True)]
    assert idle_switches(played) == ["tiers", "migration"] and played[0].error == pytest.approx(1.0)
    assert "imported for 3.0 to 4.5 s" in noise_text(played)
    assert "migration, which had nothing to do, differs from the row above by 10%" in noise_text(played) and "tiers" not in noise_text(played)
    said = {line[0]: line for line in worth_table(played, COSTS, tiny).rows}
    assert list(said) == list(SWITCHES) and said["zygote"][1] == "x4.00" and "1 of 4 loads" in said["tiers"][2] and "2 of 2 requests sooner" in said["scheduler"][2]


def test_without_each_is_forecast_for_every_size(tiny: Checkpoint) -> None:
    means = {times: without_each(bursts(), tiny, COSTS, times) for times in (1.0, 16.0)}
    worth = {name: [each[name] / each["all of them"] for each in means.values()] for name in ("zygote", "fast loader")}
    assert worth["zygote"][0] > worth["zygote"][1] and worth["fast loader"][0] < worth["fast loader"][1]
    table = left_out_table(means)
    assert [line[0] for line in table.rows[1:]] == list(SWITCHES) and table.headers[-1] == "weights x16"


# Providers


def test_every_approach_is_a_row_of_the_survey_and_answers_all(tiny: Checkpoint) -> None:
    assert {one.system for one in APPROACHES} <= {row.system for row in load_survey()} and all(one.assumed for one in APPROACHES)
    served = serve(bursts(), tiny, COSTS)
    named = {one.name: one for one in served}
    assert all(one.answered == 18 for one in served)
    plain, snapshot, stem = (named[f"{name}"] for name in ("AWS Lambda keep-alive", "AWS Lambda SnapStart", "Apache OpenWhisk stem cells"))
    assert snapshot.mean < 0.5 * plain.mean and stem.mean < plain.mean and stem.idle_mb_seconds > plain.idle_mb_seconds
    ours = named["this chapter, up to zygote"]
    assert ours.idle_mb_seconds > 2 * 180 * LEAD_SECONDS  # what stands by is counted
    slowed = serve(bursts(), tiny, COSTS, slower=100)
    assert {one.name: one for one in slowed}["Knative pod autoscaler"].starts > named["Knative pod autoscaler"].starts
    assert len(providers_table(served, slowed).rows) == len(APPROACHES) + 2


# The exercise


def test_a_choice_is_checked_against_all_that_there_are(tiny: Checkpoint) -> None:
    runs = forecast_choices(bursts(), tiny, COSTS)
    assert list(runs) == choices() and len(runs) == 2 ** len(SWITCHES) * 3 // 4
    assert runs[frozenset(SWITCHES)] == expected_run(bursts(), tiny, platform_with(SWITCHES), COSTS)
    budget = a_budget(runs)
    within = {choice: run for choice, run in runs.items() if run.mb_seconds <= budget}
    best = min(within, key=lambda choice: within[choice].mean)
    assert "right" in check_choice(best, budget, runs) and "choose otherwise" in check_choice((), budget, runs)
    least = min(runs, key=lambda choice: runs[choice].mb_seconds)
    assert runs[least].mean > 1.02 * runs[best].mean and "right" in check_choice(least, runs[least].mb_seconds, runs)
    worst = max(within, key=lambda choice: within[choice].mean)
    assert within[worst].mean > 1.02 * within[best].mean and "times what the best" in check_choice(worst, budget, runs)
    with pytest.raises(ValueError, match="scheduler"):
        check_choice({"migration"}, budget, runs)


# The server


def test_a_model_at_an_address_is_asked_in_words(tiny: Checkpoint) -> None:
    with OpenPlatform(replace(switched()["keep-alive"], **FAKE), tiny) as house:
        answers = [(name, house.client.completions.create(model=name, prompt="Once upon a time", max_tokens=3)) for name in ("model-00", "model-00")]
        assert all(answer.usage is not None and answer.usage.completion_tokens == 3 for _, answer in answers)
        told = timing_table(answers).rows
        assert [line[1] for line in told] == ["cold", "ready"] and told[0][2] == "remote"
        assert len(nodes_table(house.cluster.nodes()).rows) == 2
        eventually(lambda: any("model-00 in dram" in line[2] for line in nodes_table(house.cluster.nodes()).rows))  # a node tells a moment after the load
    house.close()


def test_importing_it_costs_no_torch_and_no_plots(tmp_path: Path) -> None:
    import subprocess
    import sys

    program = "import sys, sllm_mini.lab.platform, sllm_mini.lab.platform.shown, sllm_mini.lab.platform.opened; assert not {'torch', 'matplotlib', 'openai', 'uvicorn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, cwd=tmp_path)
