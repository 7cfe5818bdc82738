"""Chapter 02: factors are taken round by round, charts say what the spans say, the model follows the loader's rules."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sllm_mini.checkpoint import Checkpoint, convert_checkpoint
from sllm_mini.errors import LoadError
from sllm_mini.lab.bench.ours import REFERENCE
from sllm_mini.lab.ladder import chart as pipeline_chart
from sllm_mini.lab.ladder import model as pipeline_model
from sllm_mini.lab.ladder import plots as ladder_plots
from sllm_mini.lab.ladder import read_plots
from sllm_mini.lab.ladder import reads as direct_reads
from sllm_mini.lab.ladder.loaders import chapter_loaders
from sllm_mini.lab.ladder.model import Rates, Settings, predict_load
from sllm_mini.lab.ladder.reads import MIB, PAGES, InFlight, PageRun, measure_in_flight, measure_pages, median_pages
from sllm_mini.lab.ladder.runs import loads_table, measure_loads, median_load
from sllm_mini.loading import LoadOptions
from sllm_mini.loading.ladder import LADDER
from sllm_mini.loading.probe_samples import Measurement, Samples, Skipped
from sllm_mini.resources import resource
from sllm_mini.types import Span

COUNTED = {
    "user_seconds": 0.1, "system_seconds": 0.2, "minor_faults": 1000.0, "major_faults": 2.0, "read_calls": 62.0, "disk_nbytes": 1e9, "peak_nbytes": 1.1e9,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return convert_checkpoint(resource("data/models/tiny"), tmp_path_factory.mktemp("pipeline") / "tiny")


@pytest.fixture(scope="module")
def data(tiny: Checkpoint) -> Path:
    return tiny.path / tiny.index.partitions[0].file


def row(name: str, kind: str, samples: list[float], state: str = "cold", ratio: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> dict[str, Any]:
    median = sorted(samples)[len(samples) // 2]
    found: dict[str, Any] = {"name": name, "kind": kind, "state": state, "setting": "", "nbytes": 10**9, "samples": samples, "seconds_median": median}
    found |= {"rounds": list(range(len(samples))), "ratio_to_reference_samples": list(ratio)}
    found |= dict(zip(("ratio_to_reference_median", "ratio_to_reference_min", "ratio_to_reference_max"), ratio, strict=True))
    return found | {f"{counter}_median": value for counter, value in COUNTED.items()}


def bench(seconds: dict[str, list[float]], *more: dict[str, Any], use: float | None = 0.1) -> dict[str, Any]:
    return {
        "model": {"name": "made-up", "nbytes": 10**9},
        "method": {"device": "cpu", "rounds": 3},
        "limits": {"disk_direct_read_bytes_per_second": 2e9, "resident_use_seconds_median": use},
        "results": [*(row(f"ladder: {name}", "ladder", samples) for name, samples in seconds.items()), *more],
        "skipped": [{"name": "a", "reason": "not installed"}, {"name": "b", "reason": "not installed"}],
    }


THREE = {"by tensor": [1.1, 2.1, 1.1], "bulk": [0.6, 1.1, 0.6], "direct": [1.1, 0.6, 0.8]}


def test_a_factor_is_taken_round_by_round_without_the_sum() -> None:
    steps = ladder_plots.ladder_steps(bench(THREE))
    assert [step.name for step in steps] == ["by tensor", "bulk", "direct"]
    assert steps[0].factor is None and steps[0].seconds == pytest.approx(1.0)
    bulk, direct = steps[1].factor, steps[2].factor
    assert bulk is not None and direct is not None
    assert (bulk.median, bulk.least, bulk.most) == pytest.approx((2.0, 2.0, 2.0)) and bulk.verdict == "faster in every round"
    assert (direct.median, direct.least, direct.most) == pytest.approx((0.5 / 0.7, 0.5, 2.0)) and "no finding" in direct.verdict


def test_a_rung_that_is_missing_is_stepped_over() -> None:
    steps = ladder_plots.ladder_steps(bench({"by tensor": [1.1], "direct": [0.6]}))
    assert steps[1].before == "by tensor" and steps[1].factor is not None and steps[1].factor.median == pytest.approx(2.0)
    assert "not measured" in ladder_plots.step_text(bench({"by tensor": [1.1], "direct": [0.6]}), "bulk")
    with pytest.raises(ValueError, match="no rung"):
        ladder_plots.ladder_steps(bench({}))


def test_a_sum_that_is_all_there_is_is_not_taken_off() -> None:
    steps = ladder_plots.ladder_steps(bench({"by tensor": [0.11, 0.09]}))
    assert steps[0].seconds == pytest.approx(0.1)


def test_only_rounds_that_both_rungs_have_are_compared() -> None:
    document = bench({"by tensor": [1.1, 2.1], "bulk": [0.6, 0.35]})
    next(found for found in document["results"] if found["name"].endswith("bulk"))["rounds"] = [1, 7]
    factor = ladder_plots.ladder_steps(document)[1].factor
    assert factor is not None and (factor.least, factor.most) == pytest.approx((4.0, 4.0))


def test_the_ladder_says_what_it_shows() -> None:
    document = bench(THREE)
    assert "slower than the rung before: direct" in ladder_plots.ladder_text(document)
    assert "50% of the disk's limit on the lowest rung" in ladder_plots.ladder_text(document)
    assert "no rung is slower" in ladder_plots.ladder_text(bench({name: THREE[name] for name in ("by tensor", "bulk")}))
    assert "x2.00 (2.00 to 2.00) against by tensor" in ladder_plots.ladder_alt_text(document)
    axes = ladder_plots.plot_ladder(document)
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([1.0, 2.0, 1 / 0.7])
    table = {cells[0]: cells for cells in ladder_plots.ladder_table(document).rows}
    assert table["bulk"][3:] == ("100%", "x2.00 (2.00 to 2.00)", "x1.2") and table["by tensor"][5] == ""
    text = ladder_plots.step_text(document, "bulk")
    assert "62 → 62" in text and "1,002 → 1,002" in text and "1 of a tensor's size → 1 of 16 MiB" in text
    assert set(ladder_plots.PAPER_FACTORS) == {rung.name for rung in LADDER} - {"by tensor"}


def test_peers_and_hashes_are_said_as_measured() -> None:
    document = bench(
        {},
        row("x", "peer", [2.0], ratio=(1.5, 1.2, 1.6)),
        row("y", "peer", [1.0], ratio=(0.8, 0.7, 0.9)),
        row(f"{REFERENCE}, no hashing", "ours", [1.0], ratio=(0.8, 0.5, 1.0)),
    )
    said = ladder_plots.peers_text(document, "cold")
    assert [line.split() for line in said.splitlines()[1:3]] == [["y", "x0.80"], ["x", "x1.50"]] and "y, was ahead of ours in every round (0.70 to 0.90)" in said
    assert "1.25 times as long as without (1.00 to 2.00)" in ladder_plots.hashing_text(document, "cold")
    assert "not measured" in ladder_plots.hashing_text(document, "warm") and "No other package" in ladder_plots.peers_text(document, "warm")
    assert ladder_plots.skipped_table(document).rows == (("a, b", "not installed"),)
    assert [cells[0] for cells in ladder_plots.counters_table(document, "cold", kinds=("peer",)).rows] == ["y", "x"]


def test_the_chapter_measures_each_rung_and_one_setting_of_each_package() -> None:
    loaders = chapter_loaders()
    rungs = [entry for entry in loaders if entry.kind == "ladder"]
    assert [entry.name.removeprefix("ladder: ") for entry in rungs] == [rung.name for rung in LADDER]
    assert all(entry.states == ("cold",) for entry in rungs)
    packages = [entry.package for entry in loaders if entry.kind == "peer" and entry.package != "torch"]
    assert len(packages) == len(set(packages)) and REFERENCE in [entry.name for entry in loaders]


def points() -> list[InFlight]:
    return [InFlight(MIB, 1, True, [1e9], [0.001]), InFlight(MIB, 2, True, [1.9e9], [0.0011]), InFlight(16 * MIB, 1, True, [2e9], [0.008])]


def test_the_fewest_bytes_in_flight_that_are_enough() -> None:
    said = read_plots.in_flight_text(points())
    assert "gets 50% of the best" in said and "are 2 MiB (2 × 1 MiB)" in said and "with 1 × 16 MiB" in said
    assert said in read_plots.in_flight_alt_text(points())
    assert len(read_plots.plot_in_flight(points()).containers) == 2
    products = [float(cells[4]) for cells in read_plots.little_table([InFlight(MIB, 2, True, [2e9], [2 * MIB / 2e9])]).rows]
    assert products == [2.0]


def test_reads_in_flight_follow_littles_law(data: Path) -> None:
    for point in measure_in_flight(data, chunks=(MIB,), threads=(1, 3), rounds=1, sample_seconds=0.1):
        under_way = point.bytes_per_second / point.chunk_nbytes * point.wait_seconds
        assert 0.4 * point.threads < under_way <= 1.05 * point.threads
    with pytest.raises(LoadError, match="smaller than one chunk"):
        measure_in_flight(data, chunks=(1 << 40,))


def test_huge_pages_fault_less_whoever_makes_them(data: Path) -> None:
    runs = measure_pages(data, nbytes=8 * MIB, chunk_nbytes=2 * MIB, threads=2, rounds=1)
    assert [run.pages for run in runs] == list(PAGES) and {run.nbytes for run in runs} == {8 * MIB}
    small = min(run.faults for run in runs if not run.pages.huge)
    assert small >= 8 * MIB // 4096
    if direct_reads.HostMemory(2 * MIB, populate=True) and max(run.faults for run in runs if run.pages.huge) > small:
        pytest.skip("this kernel gives no huge pages")
    assert all((run.making_seconds > 0) == (run.pages.ready == "before") for run in runs)


def test_pages_are_compared_round_by_round() -> None:
    runs = [PageRun(PAGES[at], 10**9, 0.0, seconds, 5) for seconds_of in ((2.0, 1.0), (4.0, 2.0), (3.0, 6.0)) for at, seconds in enumerate(seconds_of)]
    assert [run.seconds for run in median_pages(runs)] == [3.0, 2.0]
    assert f"{PAGES[1].name} x0.50 (0.50 to 2.00)" in read_plots.pages_text(runs)
    assert read_plots.pages_text(runs) in read_plots.pages_alt_text(runs)
    assert [bar.get_width() for bar in read_plots.plot_pages(runs).patches][1::2] == pytest.approx([3.0, 2.0])


def test_the_floor_names_what_could_not_be_measured() -> None:
    measured = (Measurement("memory_copy", "1 thread", 10**9, (0.5,)), Measurement("first_touch", "huge pages", 10**9, (0.25,)))
    samples = Samples(measured, (Skipped("disk_direct_read", "refused"),))
    table = read_plots.floor_table(samples, 2 * 10**9)
    assert [cells[3] for cells in table.rows] == ["1.00 s", "500 ms"] and "disk_direct_read, refused" in table.note


def test_loads_are_measured_warm_in_every_setting(tiny: Checkpoint) -> None:
    settings = {"map": LoadOptions(chunk_nbytes=2 * MIB), "copy": LoadOptions(chunk_nbytes=2 * MIB, map_cached=False)}
    runs = measure_loads(tiny, settings, warm=True, rounds=3)
    assert [run.setting for run in runs] == ["map", "copy"] * 3
    assert all(run.report.nbytes == tiny.nbytes and all(0 <= span.start <= span.end for span in run.spans) for run in runs)
    # Another process may empty the page cache at any moment, but not at every one.
    assert max(run.report.mapped_nbytes for run in runs if run.setting == "map") > 0
    assert {run.report.mapped_nbytes for run in runs if run.setting == "copy"} == {0}
    middle = median_load(runs, "copy")
    assert sorted(run.seconds for run in runs if run.setting == "copy")[1] == middle.seconds
    assert [cells[0] for cells in loads_table(runs, "warm").rows] == ["map", "copy"]
    with pytest.raises(ValueError, match="no run"):
        median_load(runs, "none")


def test_a_recorded_load_has_a_row_for_each_chunk(tiny: Checkpoint) -> None:
    options = LoadOptions(chunk_nbytes=2 * MIB, use_cached=False)
    run = measure_loads(tiny, {"default": options}, warm=True, rounds=1)[0]
    rows = pipeline_chart.chunk_rows(run.spans)
    assert len(rows) == -(-tiny.nbytes // options.chunk_nbytes) and sum(map(len, rows)) == len(run.spans)
    assert all([span.name for span in chunk] == ["pages", "read", "hash"] for chunk in rows)


def test_chunks_are_put_together_from_their_threads() -> None:
    pages, first, second = "sllm-pages-0", "sllm-read-0", "sllm-read-1"
    spans = [Span("pages", 0.5, 1, pages), Span("pages", 0, 2, first), Span("read", 2, 4, first), Span("read", 1, 3, second), Span("hash", 3, 4, second)]
    rows = pipeline_chart.chunk_rows(spans)
    assert [[span.name for span in chunk] for chunk in rows] == [["pages", "read", "hash"], ["pages", "read"]]
    assert [chunk[0].lane for chunk in rows] == ["sllm-pages-0", "sllm-read-0"], "what a reader made itself is for its own next chunk"
    assert pipeline_chart.busy_seconds(spans[2:4]) == 3
    assert pipeline_chart.beside_share(spans, "hash") == 1.0 and pipeline_chart.beside_share(spans, "pages") == pytest.approx(0.4)
    assert "a read was under way for 75%" in pipeline_chart.pipeline_text(spans)
    figure = pipeline_chart.plot_pipeline(spans, mark_seconds=5, mark="measured")
    assert [len(axes.collections) for axes in figure.axes] == [5, 5]
    with pytest.raises(ValueError, match="nothing to draw"):
        pipeline_chart.plot_pipeline([])


RATES = Rates(disk=2e9, one_read=2e9, pages=8e9, hashing=4e9, cores=4, link=1e9)


def total(settings: Settings, rates: Rates = RATES) -> float:
    return max(span.end for span in predict_load(10**9, rates, settings))


def test_overlap_turns_a_sum_into_a_maximum() -> None:
    chunk = 2 * MIB
    apart = total(Settings(threads=1, chunk_nbytes=chunk, overlap=False))
    assert apart == pytest.approx(1 / 8 + 1 / 2 + 1 / 4)
    together = total(Settings(threads=4, chunk_nbytes=chunk))
    assert 0.5 <= together < 0.52


def test_the_slowest_stage_sets_the_pace() -> None:
    assert total(Settings(slots=8)) == pytest.approx(1.0, rel=0.05), "the link"
    assert total(Settings(threads=8), Rates(2e9, 2e9, 8e9, 0.25e9, cores=2)) == pytest.approx(2.0, rel=0.1), "hashing on two cores"
    assert total(Settings(threads=1, verify=False), Rates(2e9, 0.5e9, 8e9, 4e9)) == pytest.approx(2.0, rel=0.05), "one read at a time"
    assert total(Settings(threads=4, verify=False), Rates(2e9, 0.5e9, 8e9, 4e9)) == pytest.approx(0.5, rel=0.1), "four of them"


def test_every_chunk_goes_through_every_stage_once() -> None:
    for settings in (Settings(), Settings(threads=1), Settings(overlap=False), Settings(slots=2), Settings(slots=2, overlap=False), Settings(verify=False)):
        spans = predict_load(10**9 + 1, RATES, settings)
        names = {"read"} | ({"copy"} if settings.slots else {"pages"}) | ({"hash"} if settings.verify and not settings.slots else set())
        assert {name: sum(span.nbytes for span in spans if span.name == name) for name in {span.name for span in spans}} == dict.fromkeys(names, 10**9 + 1)
        for chunk in pipeline_chart.chunk_rows(spans):
            assert all(before.end <= after.start + 1e-9 for before, after in pairwise(chunk))


def test_a_ring_holds_no_more_chunks_than_it_has_slots() -> None:
    rows = pipeline_chart.chunk_rows(predict_load(10**9, RATES, Settings(slots=2, chunk_nbytes=16 * MIB)))
    taken = sorted([(chunk[0].start, 1) for chunk in rows] + [(chunk[-1].end - 1e-9, -1) for chunk in rows])
    held = most = 0
    for _, change in taken:
        held += change
        most = max(most, held)
    assert most == 2


@pytest.mark.parametrize("bad", [{"disk": 0}, {"hashing": -1.0}, {"pages": float("inf")}])
def test_rates_must_be_rates(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="above zero"):
        Rates(**{"disk": 1e9, "one_read": 1e9, "pages": 1e9, "hashing": 1e9} | bad)
    with pytest.raises(ValueError, match="at least 1"):
        Settings(slots=0)
    with pytest.raises(ValueError, match="takes no time"):
        predict_load(0, RATES)


def test_the_widget_draws_its_own_controls() -> None:
    on_gpu = pipeline_model.load_controls(RATES, Settings(slots=LoadOptions().ring_chunks))
    assert on_gpu["slots"].value == LoadOptions().ring_chunks
    controls = pipeline_model.load_controls(RATES, Settings())
    drawn = pipeline_model.draw_load(10**9, 0.6, **{name: control.value for name, control in controls.items()})
    assert f"Predicted load: 60 chunks on {LoadOptions().threads + 1} threads" in drawn.alt_text and "Measured: 600 ms" in drawn.alt_text
    assert "no memory beside the model" in drawn.caption
    ring = pipeline_model.draw_load(10**9, 0.6, **{name: control.value for name, control in controls.items()} | {"slots": 2})
    assert "a ring of 2 slots, 32 MiB" in ring.caption


def test_predictions_stand_beside_measurements(tiny: Checkpoint) -> None:
    settings = {"default": LoadOptions()}
    runs = measure_loads(tiny, settings, warm=True, rounds=1)
    cells = pipeline_model.prediction_table(runs, settings, RATES).rows[0]
    seconds = max(span.end for span in predict_load(tiny.nbytes, RATES))
    assert float(cells[4]) == pytest.approx(seconds / runs[0].load_seconds, abs=0.006)


def test_what_the_ladder_lost_is_said_in_one_line() -> None:
    from sllm_mini.lab.ladder.runs import refused_text

    lost = [("ladder: direct, cold, round 2", "9 of 10 bytes\nstay"), ("limits, round 3", "9 of 10 bytes stay"), ("ladder: by tensor", "it died")]
    others = [("sllm_mini load_tensors, cold, round 1", "not a rung"), ("disk_direct_read", "no limit")]
    text = refused_text({"skipped": [{"name": name, "reason": reason} for name, reason in lost + others]})
    assert text.endswith(": direct in round 2, limits in round 3 (9 of 10 bytes stay); by tensor in every round (it died).")
    assert refused_text({"skipped": [{"name": name, "reason": reason} for name, reason in others]}) == "No round of a rung was refused."
