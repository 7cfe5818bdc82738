"""Chapter 06: the arithmetic of warm-up, attention in chunks against SDPA, and two processes that want one kernel."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.patches import Rectangle

from sllm_mini.errors import ModelError
from sllm_mini.lab import recorded
from sllm_mini.lab.models import tiny_checkpoint
from sllm_mini.lab.warmup import break_even, capture, child, climb, requests, softmax, together, words
from sllm_mini.lab.warmup.break_even import break_even_steps
from sllm_mini.lab.warmup.capture import CapturePlan, plan_captures
from sllm_mini.lab.warmup.measure import KIND, run_child
from sllm_mini.lab.warmup.requests import AFTER_DUMMY, STRAIGHT, FirstRequest, measure_first_requests
from sllm_mini.lab.warmup.together import Asker, ask_together, askers_text, plot_askers


def document(*rows: tuple[str, str, str, list[float], dict[str, Any]], skipped: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A bench's document of (part, name, state, samples, facts)."""
    results = [
        {"part": part, "name": name, "state": state, "samples": samples, "seconds_median": float(numpy.median(samples)), "seconds_min": min(samples), "seconds_max": max(samples), "facts": facts}
        for part, name, state, samples, facts in rows
    ]
    facts = {name: dict[str, Any]() for name in ("limits", "machine", "method", "model")}
    return {"kind": KIND, **facts, "results": results, "skipped": [{"name": name, "reason": reason} for name, reason in (skipped or {}).items()]}


# Attention in chunks


@settings(max_examples=60)
@given(tokens=st.integers(1, 40), chunk=st.integers(1, 45), scale=st.sampled_from([0.1, 1.0, 30.0]), seed=st.integers(0, 99))
def test_any_cut_into_chunks_gives_what_sdpa_gives(tokens: int, chunk: int, scale: float, seed: int) -> None:
    generator = numpy.random.default_rng(seed)
    query, keys, values = (generator.standard_normal(shape) for shape in ((8,), (tokens, 8), (tokens, 8)))
    query *= scale
    one, past, content = (torch.from_numpy(each).reshape(1, 1, -1, 8) for each in (query, keys, values))
    exact = torch.nn.functional.scaled_dot_product_attention(one, past, content).flatten().numpy()
    assert abs(softmax.attend(query, keys, values, chunk) - exact).max() < 1e-13
    shares = softmax.chunk_shares(query, keys, values, chunk)
    assert len(shares) == -(-tokens // chunk) and sum(shares) == pytest.approx(1)


def test_a_large_score_is_infinite_only_where_it_is_not_shrunk() -> None:
    query, keys = numpy.full(4, 100, numpy.float32), numpy.eye(4, dtype=numpy.float32) * 10
    with numpy.errstate(over="ignore", invalid="ignore"):
        assert numpy.isnan(softmax.attend_naively(query, keys, keys)).all()
    found = softmax.attend(query, keys, keys, 2)
    assert found.dtype == numpy.float32 and found == pytest.approx(numpy.full(4, 2.5))


def test_the_drawing_of_chunks_says_what_they_add() -> None:
    query, keys = numpy.array([2.0]), numpy.array([[0.0], [1.0], [1.0], [0.0]])
    said = softmax.chunks_text(query, keys, keys, 2)
    assert "4 tokens in 2 chunks" in said and "raises the largest score 1 times" in said and "50.0 %, 50.0 %" in said
    below = softmax.plot_chunks(query, keys, keys, 2).axes[1]
    assert [bar.get_height() for bar in below.patches if isinstance(bar, Rectangle)] == pytest.approx([0.5, 0.5])


# Kernels


def test_one_of_two_processes_builds_and_the_other_waits(tmp_path: Path) -> None:
    if together.why_no_nvrtc() is not None:
        pytest.skip(f"needs NVRTC: {together.why_no_nvrtc()}")
    builder, waiter = ask_together(tmp_path / "cache")
    assert (builder.state, waiter.state) == ("just in time", "cached") and builder.digest == waiter.digest
    assert "compile" not in waiter.seconds and len(list((tmp_path / "cache").glob("*.kernel"))) == 1


def test_a_process_that_fails_is_named(tmp_path: Path) -> None:
    if together.why_no_nvrtc() is None:
        with pytest.raises(ModelError, match=r"asked for a kernel failed: .*sm_1"):
            ask_together(tmp_path / "cache", architecture="sm_1")
    else:
        with pytest.raises(ModelError, match="did not get ready"):
            ask_together(tmp_path / "cache")


def test_without_cupy_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "cupy is not installed" in str(together.why_no_nvrtc())


def test_askers_are_drawn_on_one_clock() -> None:
    askers = [Asker(1, "just in time", 10.0, {"cache": 0.01, "compile": 0.5}, "a"), Asker(2, "cached", 10.1, {"lock": 0.41}, "a")]
    said = askers_text(askers)
    assert "Process 1 got it just in time after 510 ms, compiling 500 ms." in said and "waiting for the lock 410 ms, compiling nothing" in said
    assert "Builds: 1. The code is the same." in said
    bars = [bar for bar in plot_askers(askers).patches if isinstance(bar, Rectangle)]
    assert bars[-1].get_x() == pytest.approx(100) and bars[-1].get_width() == pytest.approx(410)
    with pytest.raises(ValueError, match="nobody asked"):
        plot_askers([])


def kernels(**middle: float) -> dict[str, Any]:
    states = {"jit": "just in time", "cached": "cached", "ahead": "ahead of time"}
    return document(*(("kernels", "decode attention", states[name], [seconds], {"seconds": {"compiler": 0.9 * seconds, "cache": 0.1 * seconds}, "image_nbytes": 9}) for name, seconds in middle.items()))


def test_the_cached_state_says_what_it_spent_its_time_on() -> None:
    said = words.kernels_text(kernels(jit=1.0, cached=0.01, ahead=0.001), 0.0005)
    assert "cached 10.0 ms" in said and "9.00 ms went into asking the compiler" in said and "Predicted for reading the file: 500 µs" in said


# Compiling


@given(first=st.floats(0.001, 100), eager=st.floats(0.001, 1), compiled=st.floats(0.0001, 1))
def test_compiling_has_paid_after_the_least_such_number_of_steps(first: float, eager: float, compiled: float) -> None:
    steps = break_even_steps(first, eager, compiled)

    def ahead_by(count: int) -> float:
        return count * eager - (first + (count - 1) * compiled)

    if steps is None:
        assert compiled >= eager and first > eager
    else:
        assert ahead_by(steps) >= -1e-6 * steps
        assert steps == 1 or ahead_by(steps - 1) < 1e-6 * steps


def compiling(eager: float, compiled: float, rounds: int = 1) -> dict[str, Any]:
    both = (("first compiled step", "cold cache", 20.0), ("first compiled step", "warm cache", 2.0), ("a later step", "eager step", eager), ("a later step", "compiled step", compiled))
    return document(*(("torch.compile", name, state, [seconds] * rounds, {}) for name, state, seconds in both))


def test_the_crossings_are_drawn_where_they_are_said() -> None:
    said = break_even.break_even_text(compiling(0.02, 0.01))
    assert "x2.00 in one round" in said and "has paid after 1,999 steps" in said and "has paid after 199 steps" in said
    axes = break_even.plot_break_even(compiling(0.02, 0.01))
    assert [text.get_text().strip() for text in axes.texts] == ["1,999 steps", "199 steps"]
    assert "x2.00 (2.00 to 2.00), faster in every round" in break_even.break_even_text(compiling(0.02, 0.01, rounds=2))


def test_a_compiled_step_that_is_no_faster_never_pays() -> None:
    slower = compiling(0.01, 0.02)
    assert break_even.break_even_text(slower).count("has paid after no number of steps.") == 2
    assert not break_even.plot_break_even(slower).texts
    with pytest.raises(ValueError, match=r"torch\.compile was not measured"):
        break_even.break_even_text(document())


# Graphs


def test_where_the_cost_of_graphs_falls() -> None:
    plans = plan_captures(10, 0.1, 0.3, 0.5)
    assert plans["up front"] == CapturePlan(1.0, 0.0, 7 * 0.1)
    assert plans["lazy"].before_seconds == 0 and plans["lazy"].inside_seconds == pytest.approx(0.3)
    assert plans["restored"].total_seconds == pytest.approx(0.5) and plans["restored"].unused_seconds == pytest.approx(0.35)
    assert "Lazy saves 700 ms of work" in capture.captures_text(plans, 0.1)
    widths = [bar.get_width() for bar in capture.plot_captures(plans).patches if isinstance(bar, Rectangle)]
    assert sum(widths) == pytest.approx(sum(plan.total_seconds for plan in plans.values()))
    for wrong in ((0, 0.1, 0.3), (1, -1.0, 0.3), (1, 0.1, 1.3)):
        with pytest.raises(ValueError, match="shares from 0 to 1"):
            plan_captures(*wrong)


def test_every_setting_of_the_widget_is_drawn() -> None:
    controls = capture.capture_controls()
    for values in ({name: one.low for name, one in controls.items()}, {name: one.high for name, one in controls.items()}):
        drawn = capture.draw_captures(**values)
        assert drawn.png[:4] == b"\x89PNG" and drawn.caption in drawn.alt_text


# Requests


def test_the_first_request_in_a_process(one_torch_thread: None) -> None:
    """One of the two is measured in a process of its own, as both are outside of tests."""
    asked: list[bool] = []

    def run(task: str, arguments: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
        asked.append(bool(arguments["dummy"]))
        return run_child(task, arguments, environment) if arguments["dummy"] else child.TASKS[task](**arguments)

    found = measure_first_requests(tiny_checkpoint().path, rounds=1, run=run)
    assert sorted(asked) == [False, True] and {one.kind for one in found} == {STRAIGHT, AFTER_DUMMY}
    assert all((one.dummy_seconds > 0) == (one.kind == AFTER_DUMMY) and one.first_seconds > 0 for one in found)


def test_a_warm_up_that_changes_answers_is_refused() -> None:
    def run(task: str, arguments: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
        return {"dummy_seconds": 0, "first_seconds": 1, "again_seconds": 1, "token_ids": [int(arguments["dummy"])]}

    with pytest.raises(ModelError, match="other tokens after a dummy request"):
        measure_first_requests(Path("model"), rounds=1, run=run)
    with pytest.raises(ValueError, match="0 rounds"):
        measure_first_requests(Path("model"), rounds=0, run=run)


REQUESTS = [FirstRequest(kind, dummy, first, 0.1) for dummy_first in ((0.5, 0.2), (0.7, 0.3)) for kind, dummy, first in ((STRAIGHT, 0.0, 0.6), (AFTER_DUMMY, *dummy_first))]


def test_requests_are_said_and_drawn_as_measured() -> None:
    said = requests.requests_text(REQUESTS)
    assert "First token 600 ms after a request that comes straight away, 250 ms after a dummy request, x2.50 (2.00 to 3.00), faster in every round" in said
    assert "same request again: 100 ms" in said and said.endswith("The dummy request took 600 ms, before anyone waited, and spared the next one 350 ms (medians of the rounds).")
    assert "x3.00 in one round" in requests.requests_text(REQUESTS[:2])
    slower = [FirstRequest(kind, 0.5, 0.2 if kind == STRAIGHT else first, 0.1) for first in (0.1, 0.3) for kind in (STRAIGHT, AFTER_DUMMY)]
    assert "whether it spared the next one anything, these rounds do not tell" in requests.requests_text(slower)
    widths = [bar.get_width() for bar in requests.plot_requests(REQUESTS).patches if isinstance(bar, Rectangle)]
    assert widths == pytest.approx([600, 600, 250, 100])
    with pytest.raises(ValueError, match="no request"):
        requests.plot_requests([])


def test_the_climb_is_a_sum_of_what_was_measured() -> None:
    profile = document(("memory profile", "tiny", "measured", [1.0], {}), ("memory profile", "tiny", "recorded", [0.001], {}))
    climbs = climb.sum_climbs([compiling(0.02, 0.01), kernels(jit=0.4, cached=0.01, ahead=0.002), profile], REQUESTS)
    waited = {label: climb.waited_seconds(climbs, label) for label in climbs}
    assert waited == pytest.approx({"nothing prepared": 22.0, "prepared on disk": 2.603, "all done before": 0.25})
    assert sum(climbs["all done before"].values()) == pytest.approx(2.003 + 0.6 + 0.25), "what was done before is as long, and longer by the dummy request"
    said = climb.climbs_text(climbs)
    assert "22.0 s with nothing prepared, of which torch.compile 90.9 %" in said and "250 ms with all done before, which took 2.60 s that nobody waited for" in said
    rows = climb.climbs_table(climbs).rows
    assert [row[-1] for row in rows] == ["22.0 s", "2.60 s", "250 ms"] and rows[2][1] == "(2.00 s)" and rows[2][4] == "(600 ms)"
    bars = [bar for bar in climb.plot_climbs(climbs).patches if isinstance(bar, Rectangle)][-5:]
    assert bars[0].get_x() == pytest.approx(-2.603) and bars[-1].get_x() == pytest.approx(0, abs=1e-9) and bars[-1].get_width() == pytest.approx(0.25)
    assert [bool(bar.get_hatch()) for bar in bars] == [True] * 4 + [False]
    without = climb.sum_climbs([document(skipped={"torch.compile": "no compiler"}), profile], REQUESTS)
    assert list(without["nothing prepared"]) == ["memory profile", "first token"] and len(climb.plot_climbs(without).patches) == 7


# Words


Both = tuple[list[float], list[float]]


def first_calls(samples: Mapping[str, Both] | None = None, dtype: str = "float32") -> dict[str, Any]:
    given = samples or {
        "parallel loop": ([0.2, 0.1], [0.1, 0.3]), "prefill": ([0.5, 0.7], [0.1, 0.2]), "16 MiB of memory": ([0.2, 0.3], [0.1, 0.1])
    }  # fmt: skip
    found = document(*(("first calls", name, state, seconds, {}) for name, both in given.items() for state, seconds in zip(("first", "again"), both, strict=True)))
    return found | {"model": {"name": "m", "dtype": dtype}}


def test_first_calls_are_told_apart_only_where_every_round_does() -> None:
    said = words.first_calls_text(first_calls())
    assert "longer in every round for prefill; 16 MiB of memory." in said and "For parallel loop the rounds disagree" in said and "added to prefill: 450 ms" in said
    rows = words.first_calls_table(first_calls()).rows
    assert rows[1] == ("prefill", "600 ms", "150 ms", "450 ms (400 ms to 500 ms)", "x4.25 (3.50 to 5.00)")
    assert rows[0][3:] == ("no finding (-200 ms to 100 ms)", "no finding (0.33 to 2.00)"), "no median that its own rounds contradict"
    assert "x5.00 in one round" in words.first_calls_table(first_calls({"prefill": ([0.5], [0.1])})).rows[0][4]
    with pytest.raises(ValueError, match="tokenizer was not measured"):
        words.extra_seconds(first_calls(), "tokenizer")


@pytest.mark.parametrize(
    ("product", "prefill", "verdict"),
    [
        ([0.2, 0.3], [0.6, 0.9], "more in every round. So most of it is something else than the product, 67% by the medians"),
        ([0.2, 0.5], [0.6, 0.4], "this run does not tell"),
        ([0.2, 0.0], [0.6, 0.9], "this run does not tell"),
        ([0.7, 0.8], [0.2, 0.3], "less in every round"),
    ],
)
def test_a_prefill_is_explained_by_the_product_of_its_own_type_or_not_at_all(product: list[float], prefill: list[float], verdict: str) -> None:
    none = [0.0, 0.0]
    found = {"prefill": (prefill, none), "matrix product, float32": (product, none), "matrix product, bfloat16": ([9.0, 9.0], none)}
    assert verdict in words.prefill_account_text(first_calls(found))
    assert "A first product in bfloat16, the model's type, adds 9.00 s" in words.prefill_account_text(first_calls(found, "bfloat16"))


def test_the_loops_threads_are_not_started_before_its_clock() -> None:
    """What makes the numbers must not be torch, which would share the filling among threads."""
    script = "from sllm_mini.lab.warmup import child; import os, torch; torch.set_num_threads(2); tasks = lambda: len(os.listdir('/proc/self/task'))\n"
    script += "before = tasks(); call = child._loop(''); made = tasks(); call(); print(before, made, tasks())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    before, made, called = map(int, done.stdout.split())
    assert before == made < called


def test_what_was_not_measured_is_said_in_its_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    empty = document(skipped={"torch.compile": "no compiler"})
    assert words.shown_part(empty, "torch.compile") == "Skipped on this machine, torch.compile: no compiler."
    shown = words.shown_part(compiling(0.02, 0.01), "torch.compile", "said")
    assert not isinstance(shown, str) and shown.caption == "said" and "x10.00 in one round" in shown.alt_text
    monkeypatch.setattr(recorded, "resource", lambda _: tmp_path)
    assert "No run on a CUDA GPU" in str(words.recorded_warmup("bench.json"))
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "bench.json").write_text(json.dumps(compiling(0.02, 0.01)))
    found = words.recorded_warmup("bench.json")
    assert not isinstance(found, str) and found.caption == "Recorded on: gpu." and "cold cache 20.0 s" in found.alt_text


def test_a_trial_and_its_record_are_compared() -> None:
    facts = {"step_nbytes": 5_000_000, "kv_nbytes_per_token": 3_000}
    profile = document(("memory profile", "tiny", "measured", [1.0, 2.0], facts), ("memory profile", "tiny", "recorded", [0.5, 0.5], facts))
    assert words.profile_text(profile).startswith("The trial took 1.50 s and its record 500 ms to read, x3.00 (2.00 to 4.00). It found 5.00 MB")
