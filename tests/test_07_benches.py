"""`bench migrate` and `bench decode`: short runs on the command line, and what their documents make of samples. Chapter 07."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import Run

from sllm_mini.checkpoint import Checkpoint, convert_checkpoint
from sllm_mini.errors import FormatError, ModelError
from sllm_mini.inference.workers import WorkerOptions, Workers
from sllm_mini.lab import decode, moving
from sllm_mini.lab.decode import measure
from sllm_mini.lab.decode.document import KIND as DECODE
from sllm_mini.lab.decode.document import assemble as assemble_decode
from sllm_mini.lab.decode.process import WayProcess
from sllm_mini.lab.decode.workload import workloads
from sllm_mini.lab.moving.document import KIND as MIGRATE
from sllm_mini.lab.moving.document import MODES, Move, assemble
from sllm_mini.lab.moving.dying import forked
from sllm_mini.resources import resource

pytestmark = pytest.mark.usefixtures("one_torch_thread")
KEYS = {"name", "state", "nbytes", "samples", "seconds_median", "seconds_min", "seconds_max", "ratio_to_limit"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return convert_checkpoint(resource("data/models/tiny"), tmp_path_factory.mktemp("benches") / "tiny")


# --- bench migrate -----------------------------------------------------------------------------------------------------


def test_moves_are_measured_saved_and_printed(run: Run, tiny: Checkpoint, tmp_path: Path) -> None:
    saved = tmp_path / "moves.json"
    ended = run("bench", "migrate", tiny.path, "--rounds", 1, "--context", 24, "--context", 90, "--save", saved, "--json")
    assert ended.code == 0, ended.err
    assert ended.document == moving.read_moves(saved) and ended.document["kind"] == MIGRATE and ended.document["skipped"] == []
    rows = ended.document["results"]
    assert [(row["mode"], row["tokens"]) for row in rows] == [(mode, context) for context in (24, 90) for mode in MODES]
    assert all(row.keys() >= KEYS and row["pause_steps_min"] > 0 and len(row["samples"]) == 1 for row in rows)
    limits = ended.document["limits"]
    assert limits["kv_nbytes_per_token"] == 6 * 2 * 2 * 32 * 4 and min(limits.values()) > 0
    by_mode = {mode: moving.prompt_rows(ended.document, mode) for mode in MODES}
    for mode in ("kv", "stop_and_copy"):
        short, long = (row["nbytes"] for row in by_mode[mode])
        assert long > 90 * limits["kv_nbytes_per_token"] > short, mode
    assert by_mode["tokens"][1]["nbytes"] < by_mode["kv"][1]["nbytes"] / 20 and by_mode["stop_and_copy"][0]["rounds_median"] == 0
    with pytest.raises(FormatError, match="sllm-mini bench decode"):
        decode.read_decode(saved)


def test_running_workers_are_used_and_left_running_and_others_refused(run: Run, tiny: Checkpoint) -> None:
    options = moving.Options(rounds=1, contexts=(20,))
    with Workers(tiny.path, ["one", "two"], options=WorkerOptions(), program=forked()) as workers:
        found = moving.measure_moves(tiny.path, options=options, workers=workers)
        assert sorted(workers.names) == ["one", "two"] and {row["mode"] for row in found["results"]} == set(MODES)
        with pytest.raises(ValueError, match="something else"):
            moving.measure_moves(tiny.path, options=moving.Options(rounds=1, contexts=(20,), threads=2), workers=workers)
    with pytest.raises(ModelError, match="no room"):
        moving.measure_moves(tiny.path, options=moving.Options(contexts=(2047,)))
    for wrong in ({"rounds": 0}, {"contexts": ()}, {"contexts": (0,)}, {"modes": ()}, {"threads": 0}):
        with pytest.raises(ValueError, match="at least"):
            moving.Options(**wrong)
    ended = run("bench", "migrate", tiny.path / "nowhere", "--json")
    assert ended.code == 1 and "nowhere" in ended.error["message"]
    ended = run("bench", "migrate", tiny.path, "--context", 5000, "--json")
    assert ended.code == 1 and not ended.out and ended.error["type"] == "ModelError" and "a context of 5,000 tokens leaves no room" in ended.error["message"]
    assert run("bench", "migrate", tiny.path, "--context", 0).code == 2


def move(mode: Any, context: int, *, pause: float, step: float = 0.01, speed: float = 1.0) -> Move:
    return Move(mode, context, 1.0, pause, 2 * pause, step, 100 * context, 2, context, context / (100 * speed), context, 8 * context, context / (1000 * speed))


def test_a_pause_is_a_multiple_of_its_own_step() -> None:
    moves = [move("kv", 50, pause=0.03), move("kv", 50, pause=0.04, step=0.02), move("kv", 50, pause=0.02, step=0.02)]
    row = assemble(moves, {})["results"][0]
    assert row["pause_steps_samples"] == pytest.approx([3.0, 2.0, 1.0]) and row["pause_steps_median"] == pytest.approx(2.0)
    assert (row["gap_steps_max"], row["ratio_to_limit"]) == (pytest.approx(6.0), pytest.approx(1.5))
    assert "recompute_tokens_per_second_median" not in row, "nothing was recomputed"


def test_speeds_are_those_of_the_longest_context_and_of_each_row() -> None:
    moves = [move(mode, context, pause=0.01, speed=speed) for mode in MODES for context, speed in ((10, 5.0), (200, 1.0))]
    found = assemble(moves, {})
    assert found["limits"] == {"recompute_tokens_per_second": 100.0, "link_bytes_per_second": 8000.0, "kv_nbytes_per_token": 8.0}
    speeds, even = moving.break_even(found)
    assert even == 800.0 and speeds.link_bytes_per_second == 8000.0
    assert [row["recompute_tokens_per_second_median"] for row in moving.prompt_rows(found, "tokens")] == [500.0, 100.0]
    assert [row["link_bytes_per_second_median"] for row in moving.prompt_rows(found, "stop_and_copy")] == pytest.approx([40_000.0, 8000.0])
    with pytest.raises(KeyError):
        moving.break_even(assemble(moves[:2], {}))


# --- bench decode ------------------------------------------------------------------------------------------------------


def test_three_ways_answer_the_same_requests(run: Run, tiny: Checkpoint, tmp_path: Path) -> None:
    saved = tmp_path / "decode.json"
    short = ("--rounds", 1, "--batch", 1, "--batch", 2, "--prompt-tokens", 12, "--new-tokens", 6)
    ended = run("bench", "decode", tiny.path, *short, "--dir", tmp_path, "--save", saved, "--json")
    assert ended.code == 0, ended.err
    assert ended.document == decode.read_decode(saved) == json.loads(saved.read_text()) and ended.document["kind"] == DECODE
    rows = ended.document["results"]
    assert {row["workload"] for row in rows} == {"1 alike", "2 alike", "2 unlike"} and len(rows) == 9
    assert all(row["tokens_per_second_median"] > 0 and row["same_tokens_share"] == 1.0 for row in rows), "float32: the same tokens"
    assert all(row["ratio_to_limit"] is None if row["requests"] > 1 else (row["ratio_to_limit"] or 0) <= 1 for row in rows)
    assert [row["ratio_to_ours_median"] for row in rows if row["variant"] == "sllm_mini"] == [1.0, 1.0, 1.0]
    with pytest.raises(FormatError, match="sllm-mini bench migrate"):
        moving.read_moves(saved)


def test_a_cpu_computes_in_what_it_can_multiply(tmp_path: Path) -> None:
    asked = {"float16": "bfloat16", "bfloat16": "bfloat16", "float32": "float32"}
    for stored, computed in asked.items():
        entries = [SimpleNamespace(dtype=stored), SimpleNamespace(dtype=stored), SimpleNamespace(dtype="int64")]
        checkpoint = SimpleNamespace(index=SimpleNamespace(tensors=entries))
        assert measure.computed_dtype(checkpoint, decode.Options()) == computed  # type: ignore[arg-type]
        assert measure.computed_dtype(checkpoint, decode.Options(dtype="float16")) == "float16"  # type: ignore[arg-type]


def test_a_way_that_cannot_answer_says_why(tiny: Checkpoint) -> None:
    loads = workloads((1,), 4, 2, 0)
    with WayProcess("sllm_mini", str(tiny.path / "gone"), "cpu", "float32", loads) as way, pytest.raises(ModelError, match="sllm_mini gave no answer: CheckpointError"):
        way.ready()
    with WayProcess("sllm_mini", str(tiny.path), "cpu", "float32", loads) as way:
        way.ready()
        way._process.kill()
        way._process.join()
        for _ in range(2):
            with pytest.raises(ModelError, match="ended with code -9"):
                way(0)


def test_what_cannot_answer_is_refused_before_anything_is_made(run: Run, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "model.safetensors").write_bytes(b"")
    for name, words in (("opt-999m", "or one of gpt2, opt-125m"), ("small", "or one of gpt2, opt-125m"), (bare, "it holds no config.json")):
        ended = run("bench", "decode", name, "--dir", tmp_path / "made", "--json")
        assert ended.code == 1 and ended.error["type"] == "CheckpointError" and words in ended.error["message"] and "'small'" not in ended.error["message"]
    assert not (tmp_path / "made").exists()


def test_ratios_are_taken_round_by_round_and_options_are_checked(run: Run) -> None:
    loads = workloads((1,), 8, 4, 0)
    samples = {("1 alike", "sllm_mini"): [1.0, 2.0, 4.0], ("1 alike", "generate"): [2.0, 2.0, 2.0]}
    same = dict.fromkeys(samples, 1.0)
    found = assemble_decode(loads, samples, same, [0.1, 0.5, 0.2], {})  # type: ignore[arg-type]
    ours, theirs = found["results"]
    assert (theirs["ratio_to_ours_median"], theirs["ratio_to_ours_min"], theirs["ratio_to_ours_max"]) == (1.0, 0.5, 2.0)
    assert ours["tokens_per_second_median"] == 2.0 and ours["ratio_to_limit"] == pytest.approx(0.1 * 4 / 2), "a floor is the least, and no noisy read lifts it"
    none = assemble_decode(loads, samples, same, [0.9], {})  # type: ignore[arg-type]
    assert [row["ratio_to_limit"] for row in none["results"]] == [None, None], "what took less than the floor had another one"
    for wrong in ({"rounds": 0}, {"new_tokens": 0}, {"batches": ()}, {"batches": (0,)}):
        with pytest.raises(ValueError, match="at least"):
            decode.Options(**wrong)
    assert run("bench", "decode", "--batch", 0).code == 2
    unlike = workloads((4,), 64, 64, 3)[1]
    assert unlike.name == "4 unlike" and len({len(one.prompt) for one in unlike.requests}) > 1 and workloads((4,), 64, 64, 3)[1] == unlike
