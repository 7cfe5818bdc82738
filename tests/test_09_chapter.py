"""Chapter 09: what its page says of policies is what the simulations said, and its arithmetic is right."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from sllm_mini.cluster.simulated import InstanceSpan
from sllm_mini.cluster.trace import TraceRequest, faas_functions, faas_trace
from sllm_mini.control.keepalive import FixedKeepAlive
from sllm_mini.control.keepalive.rainbowcake import ALPHA, beta_seconds
from sllm_mini.lab.keeping import CONTENDERS, Outcome, run_contender
from sllm_mini.lab.keeping import order as order_module
from sllm_mini.lab.keeping.contenders import Contender, fitting_alpha, fixed, next_arrivals, refitted_alpha
from sllm_mini.lab.keeping.decisions import (
    by_hand,
    decide,
    decisions_text,
    layer_times_text,
    plot_decisions,
    plot_layer_times,
    windows_text,
)
from sllm_mini.lab.keeping.frontier import (
    draw_length,
    fixed_line,
    frontier_alt_text,
    frontier_table,
    frontier_text,
    length_controls,
    plot_frontier,
    start_at_waste,
)
from sllm_mini.lab.keeping.functions import (
    AMPLE_NBYTES,
    PROCESS,
    RUNTIMES,
    function_specs,
    functions_table,
    start_seconds,
)
from sllm_mini.lab.keeping.gpus import NBYTES, ThenInMemory, gpus_table, large_models, load_seconds, run_gpus
from sllm_mini.lab.keeping.life import POLICIES, lives, lives_text, plot_lives, warmth_spans
from sllm_mini.lab.keeping.order import OURS, RIVALS, SCARCE_NBYTES, layers_contest, layers_table, order_table, ratios
from sllm_mini.lab.keeping.pressure import plot_squeeze, squeeze, squeeze_text
from sllm_mini.lab.keeping.single import simulate_single, single_table
from sllm_mini.types import Warmth

HOUR = 3600.0
FUNCTIONS = faas_functions(9)
SPECS = function_specs(FUNCTIONS)
REQUESTS = list(faas_trace(seconds=HOUR, functions=FUNCTIONS, seed=9))


def outcome(name: str, start: float, waste: float) -> Outcome:
    """One with these figures; whatever else it says is another's."""
    return replace(run_contender("scale to zero", REQUESTS[:5], SPECS), name=name, start_seconds=start, waste_gb_seconds=waste)


def test_one_function_is_simulated_as_theory_has_it() -> None:
    points = simulate_single((0.0, 3.0), requests=1500, replications=4)
    for point in points:
        assert sum(point.colds) / 4 == pytest.approx(point.exact.cold_fraction, rel=0.1)
        assert sum(point.waits) / 4 == pytest.approx(point.exact.wait_seconds, rel=0.15)
    table = single_table(points)
    assert [row[1] for row in table.rows] == ["0.1429", "0.0716"]


def test_functions_cost_what_the_page_says() -> None:
    assert len(SPECS) == 20 and {spec.runtime for spec in SPECS} == set(RUNTIMES)
    for spec in SPECS:
        assert 50e6 <= spec.nbytes <= 300e6 and 0.5 <= spec.ready_seconds <= 4 and spec.process_nbytes == PROCESS.nbytes
        assert start_seconds(spec) > spec.process_seconds + spec.runtime_seconds + spec.ready_seconds
    alone = function_specs(FUNCTIONS, shared=False)
    assert len({spec.runtime for spec in alone}) == 20
    assert [(spec.nbytes, spec.ready_seconds) for spec in alone] == [(spec.nbytes, spec.ready_seconds) for spec in SPECS]
    assert len(functions_table(FUNCTIONS, SPECS).rows) == 21


def test_a_fitted_alpha_gives_the_beta_it_was_fitted_to() -> None:
    alpha = fitting_alpha(600.0, 30.0, 16e9)
    assert beta_seconds(30.0, 16e9, alpha) in (600.0, 601.0)  # rounded up
    assert alpha / (1 - alpha) == pytest.approx(320_000)
    betas = sorted(beta_seconds(spec.ready_seconds + spec.nbytes / 5e9, spec.nbytes, refitted_alpha(SPECS)) for spec in SPECS)
    assert betas[9] <= 601 and betas[10] >= 600
    with pytest.raises(ValueError, match="no alpha makes"):
        fitting_alpha(0.0, 1.0, 1.0)


def test_a_function_of_16_gb_is_not_worth_a_second_at_the_codes_alpha() -> None:
    assert ALPHA / (1 - ALPHA) * load_seconds() / (NBYTES / 1e6) < 1
    assert beta_seconds(load_seconds(), NBYTES) == 1.0


def test_the_next_request_is_the_one_at_now_or_later() -> None:
    ask = next_arrivals([TraceRequest(1.0, "a", 0, 0), TraceRequest(2.0, "b", 0, 0), TraceRequest(3.0, "a", 0, 0)])
    assert [ask("a", now) for now in (0.0, 1.0, 1.5, 3.0, 3.5)] == [1.0, 1.0, 3.0, 3.0, None]
    assert ask("c", 0.0) is None


def test_keeping_longer_means_fewer_cold_starts_and_more_waste() -> None:
    line = fixed_line(REQUESTS, SPECS, HOUR, (15.0, 120.0, 900.0))
    colds, wastes = [one.cold_fraction for _, one in line], [one.waste_gb_seconds for _, one in line]
    assert colds == sorted(colds, reverse=True) and wastes == sorted(wastes)
    never = run_contender("scale to zero", REQUESTS, SPECS, until=HOUR)
    account = never.result.account
    assert account.idle_mb_seconds == 0 and never.cold_fraction > colds[0]
    assert never.waste_gb_seconds == pytest.approx(account.unused_climb_byte_seconds / 1e9) and never.waste_gb_seconds > 0  # starts whose request another instance served
    assert never.cost(ALPHA) == pytest.approx(ALPHA * never.start_seconds + (1 - ALPHA) * 1000 * never.waste_gb_seconds)


def test_a_start_from_below_is_counted_where_it_began() -> None:
    cells = run_contender("stem cells", REQUESTS, SPECS, until=HOUR)
    assert cells.cold[Warmth.RUNTIME] > 0 and cells.cold_fraction == sum(cells.cold.values()) / len(REQUESTS)
    snapshot, usual = (run_contender(name, REQUESTS, SPECS, until=HOUR) for name in ("fixed 10 min, snapshots", "fixed 10 min"))
    assert snapshot.start_seconds < usual.start_seconds / 3


def test_who_knows_the_future_unloads_and_is_back() -> None:
    bound, never = (run_contender(name, REQUESTS, SPECS, until=HOUR) for name in ("clairvoyant", "scale to zero"))
    assert bound.start_seconds < never.start_seconds / 4
    quickest = run_contender("shortest", REQUESTS, SPECS, contender=fixed(5.0), until=HOUR)
    assert bound.result.account.idle_mb_seconds < quickest.result.account.idle_mb_seconds / 10
    assert bound.waste_gb_seconds < quickest.waste_gb_seconds / 5


def test_the_line_is_read_between_its_points_and_not_beyond() -> None:
    line = [(1.0, outcome("a", 400.0, 100.0)), (2.0, outcome("b", 100.0, 400.0))]
    assert start_at_waste(line, 100.0) == pytest.approx(400.0)
    assert start_at_waste(line, 200.0) == pytest.approx(200.0)  # the middle, in logarithms
    assert start_at_waste(line, 99.0) is None and start_at_waste(line, 401.0) is None
    text = frontier_text([outcome("stem cells", 150.0, 200.0), outcome("one spare", 300.0, 200.0), outcome("LRU", 1.0, 900.0)], line)
    assert "less with stem cells −25%; more with one spare +50%." in text


def test_every_policy_of_the_page_is_drawn_and_said() -> None:
    from matplotlib import pyplot

    line = fixed_line(REQUESTS, SPECS, HOUR, (60.0, 600.0))
    outcomes = [run_contender(name, REQUESTS, SPECS, until=HOUR) for name in CONTENDERS]
    figure = plot_frontier(outcomes, line)
    assert {text.get_text() for text in figure.axes[0].texts} >= set(CONTENDERS)
    said = frontier_alt_text(outcomes, line)
    assert all(f"{name} " in said for name in CONTENDERS)
    seconds = [float(row[5].replace(",", "")) for row in frontier_table(outcomes).rows]
    assert len(seconds) == len(CONTENDERS) and seconds == sorted(seconds)
    drawn = draw_length(REQUESTS, SPECS, line, HOUR)(**{name: slider.value for name, slider in length_controls().items()})
    assert drawn.png[:4] == b"\x89PNG" and "Kept for 10 min" in drawn.caption
    pyplot.close("all")
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_frontier([], line)


def test_a_life_is_the_warmest_of_all_instances_without_holes() -> None:
    told = run_contender("scale to zero", REQUESTS[:5], SPECS)
    told.result.spans[:] = [
        InstanceSpan(0, "n", "f", "load", Warmth.DEVICE, 0.0, 5.0),  # a climb counts for nothing until it is there
        InstanceSpan(0, "n", "f", "run", Warmth.READY, 10.0, 20.0),
        InstanceSpan(1, "n", "", "idle", Warmth.RUNTIME, 5.0, 30.0),
        InstanceSpan(0, "n", "f", "idle", Warmth.READY, 20.0, 25.0),
    ]
    spans = warmth_spans(told.result, 0.0, 40.0)
    assert [(span.warmth, span.start, span.end) for span in spans] == [
        (Warmth.COLD, 0.0, 5.0), (Warmth.RUNTIME, 5.0, 10.0), (Warmth.READY, 10.0, 25.0), (Warmth.RUNTIME, 25.0, 30.0), (Warmth.COLD, 30.0, 40.0),
    ]  # fmt: skip


def test_one_life_shows_what_the_page_says_of_each_policy() -> None:
    from matplotlib import pyplot

    told = lives()
    begin, end = 128 * 60.0, 220 * 60.0

    def waited(name: str) -> list[bool]:
        rows = sorted(told[name].result.requests, key=lambda row: row.arrived)
        return [row.wait_seconds > 0.05 for row in rows if begin <= row.arrived]

    assert waited("scale to zero") == waited("fixed 10 min") == [True] * 5
    assert waited("hybrid histogram") == [False] * 4 + [True]
    assert waited("clairvoyant") == [False] * 5
    cake = warmth_spans(told["RainbowCake refitted"].result, begin, end)
    assert Warmth.RUNTIME in {span.warmth for span in cake}
    assert sum(span.seconds for span in cake if span.warmth is Warmth.COLD) < 20  # nothing but its climbs
    figure = plot_lives(told)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(POLICIES)
    assert all(f"{name}: " in lives_text(told) for name in POLICIES)
    pyplot.close("all")
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_lives({})


def test_the_three_pasts_are_decided_three_ways() -> None:
    from matplotlib import pyplot

    pasts = by_hand()
    assert [windows_text(decide(minutes)).split()[0] for minutes in pasts.values()] == ["away", "never", "away"]
    rhythm = decide(pasts["a rhythm"])
    assert (rhythm.prewarm, rhythm.alive) == (17 * 60.0, 35 * 60.0)
    rare = decide(pasts["too rare"])
    assert rare.alive / rare.prewarm == pytest.approx(1.15 / 0.85)
    assert len(plot_decisions(pasts).axes) == 3 and "a rhythm: away until 17 min" in decisions_text(pasts)
    betas = {"β = 5 s": 5.0, "β = 600 s": 600.0}
    assert "β = 5 s: 5 s at a mean gap of 20 s and 5 s at 600 s (with the floor first 60 s" in layer_times_text(betas)
    assert len(plot_layer_times(betas).axes) == 2
    pyplot.close("all")
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_decisions({})


def test_less_memory_means_more_cold_starts() -> None:
    from matplotlib import pyplot

    runs = squeeze(REQUESTS, SPECS, HOUR, policies=("LRU", "FaasCache"), sizes=(1e9, 4e9))
    for small, large in runs.values():
        assert small.cold_fraction > large.cold_fraction and small.start_seconds > large.start_seconds
    text = squeeze_text(runs, (1e9, 4e9))
    fewest = min(runs, key=lambda name: runs[name][0].cold_fraction)
    assert text.startswith(f"1 GB: fewest cold requests {fewest} (")
    assert len(plot_squeeze(runs, (1e9, 4e9)).axes) == 2
    pyplot.close("all")


def test_the_verdict_is_of_every_seed() -> None:
    def seed(start: float, waste: float) -> dict[str, Outcome]:
        return {name: outcome(name, start, waste) for name in OURS} | {name: outcome(name, 100.0, 100.0) for name in RIVALS}

    assert ratios([seed(50.0, 20.0)], OURS[0], RIVALS[0]) == ([0.5], [0.2])
    for seeds, verdict in (
        ([seed(50, 20), seed(99, 99)], "holds"), ([seed(50, 20), seed(101, 20)], "waste only"), ([seed(50, 101), seed(50, 20)], "start-up only"),
        ([seed(50, 101), seed(101, 20)], "not at every seed"),
    ):  # fmt: skip
        rows = order_table({SCARCE_NBYTES: seeds}).rows
        assert len(rows) == 6 and {row[-1] for row in rows} == {verdict}
    assert order_table({SCARCE_NBYTES: [seed(50, 20), seed(80, 20), seed(90, 40)]}).rows[0][3:5] == ("0.80 [0.50, 0.90]", "0.20 [0.20, 0.40]")


def test_the_contest_runs_each_seed_with_functions_of_its_own() -> None:
    runs = order_module.contest((1, 2), hours=0.5)
    assert set(runs) == {AMPLE_NBYTES, SCARCE_NBYTES} and all(len(seeds) == 2 for seeds in runs.values())
    first, second = runs[AMPLE_NBYTES]
    assert first["fixed 10 min"].requests != second["fixed 10 min"].requests
    assert first["RainbowCake"].waste_gb_seconds < first["fixed 10 min"].waste_gb_seconds
    assert {row[0] for row in order_table(runs).rows} == {"ample", "1.5 GB"}


def test_sharing_runtimes_leaves_less_to_hold() -> None:
    runs = layers_contest(REQUESTS, FUNCTIONS, HOUR, ("stem cells",))
    shared, alone = runs["stem cells"][True][AMPLE_NBYTES], runs["stem cells"][False][AMPLE_NBYTES]
    assert shared.waste_gb_seconds < alone.waste_gb_seconds
    assert [row[1] for row in layers_table(runs).rows] == ["ample", "1.5 GB"]


def test_weights_in_host_memory_are_what_the_next_start_climbs_from() -> None:
    models = large_models(2)
    requests = [TraceRequest(300.0 * number, models[number % 2].name, 10, 10) for number in range(8)]
    contenders = {"gone": Contender(lambda _: FixedKeepAlive(60.0)), "kept": Contender(lambda _: ThenInMemory(60.0, 900.0))}
    gone, kept = run_gpus(requests, models, 2400.0, devices=1, contenders=contenders)
    assert set(gone.outcome.cold) == {Warmth.COLD} and kept.outcome.cold[Warmth.DRAM] == 6
    assert kept.outcome.start_seconds < gone.outcome.start_seconds and kept.host_gb_hours > gone.host_gb_hours
    assert kept.gpu_hours == pytest.approx(gone.gpu_hours, rel=0.1)
    assert [row[0] for row in gpus_table([gone, kept], 1).rows] == ["kept", "gone"]


def test_a_contender_is_made_anew_for_each_run() -> None:
    first, second = (run_contender("hybrid histogram", REQUESTS, SPECS, until=HOUR) for _ in range(2))
    assert (first.cold, first.start_seconds, first.waste_gb_seconds) == (second.cold, second.start_seconds, second.waste_gb_seconds)
    given = run_contender("mine", REQUESTS, SPECS, contender=fixed(600.0), until=HOUR)
    assert given.cold == run_contender("fixed 10 min", REQUESTS, SPECS, until=HOUR).cold


def test_the_page_needs_no_torch_to_simulate() -> None:
    program = "import sys, sllm_mini.lab.keeping, sllm_mini.lab.keeping.gpus, sllm_mini.lab.keeping.frontier; print([name for name in ('torch', 'matplotlib') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip() == "[]"
