"""The memory profile, and `bench warmup`: what is recorded and refused, and what the bench makes of its samples."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Run
from cuda_on_cpu import compile_for_cpu
from typer.testing import CliRunner

from sllm_mini.device import CpuDevice
from sllm_mini.device.fake import RecordingRuntime
from sllm_mini.errors import FormatError, ModelError, OutOfMemoryError
from sllm_mini.inference import warmup
from sllm_mini.inference.attention import AttentionShape
from sllm_mini.inference.warmup import (
    MemoryProfile,
    ProfileKey,
    find_profile,
    measure_profile,
    peak_nbytes,
    pool_tokens,
    read_profile,
    write_profile,
)
from sllm_mini.lab import warmup as lab
from sllm_mini.lab.models import tiny_checkpoint
from sllm_mini.lab.warmup import measure as measure_module
from sllm_mini.lab.warmup.child import time_attention
from sllm_mini.resources import resource

KEY = ProfileKey("digest", "GPU", "bfloat16", 8, 1000, ("torch 2.0",))
PROFILE = MemoryProfile(KEY, 1_000_000, 2_000, 0.5)


def tiny() -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 500}
    return AutoModelForCausalLM.from_config(LlamaConfig(**shape, max_position_embeddings=2048)).eval()


def test_a_profile_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    write_profile(tmp_path / "new" / "one.json", PROFILE)
    assert read_profile(tmp_path / "new" / "one.json", KEY) == PROFILE
    with pytest.raises(FileNotFoundError):
        read_profile(tmp_path / "none.json", KEY)


@pytest.mark.parametrize(
    "change", [{"model": "other"}, {"device": "other"}, {"dtype": "float16"}, {"max_batch": 9}, {"max_tokens": 999}, {"versions": ("torch 2.1",)}], ids=lambda change: next(iter(change))
)
def test_a_stale_profile_is_refused_with_what_differs(tmp_path: Path, change: dict[str, Any]) -> None:
    write_profile(tmp_path / "one.json", PROFILE)
    (name,) = change
    with pytest.raises(ModelError, match=f"something else \\({name} .+ instead of"):
        read_profile(tmp_path / "one.json", replace(KEY, **change))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", json.dumps(PROFILE.to_json() | {"version": 2}), json.dumps(PROFILE.to_json() | {"step_nbytes": "many"}), json.dumps(PROFILE.to_json() | {"kv_nbytes_per_token": 0})]
)
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "one.json").write_text(text)
    with pytest.raises(FormatError, match="no memory profile"):
        read_profile(tmp_path / "one.json", KEY)


def test_measured_once_then_recorded_and_stale_ones_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials: list[ProfileKey] = []

    def trial(key: ProfileKey, model: Any, device: Any) -> MemoryProfile:
        trials.append(key)
        return replace(PROFILE, key=key)

    monkeypatch.setattr(warmup, "measure_profile", trial)
    newer = replace(KEY, versions=("torch 3.0",))
    assert newer.file_name == KEY.file_name
    found = [find_profile(key, tmp_path, None, CpuDevice()) for key in (KEY, KEY, newer, newer, KEY)]
    assert [one.state for one in found] == ["measured", "recorded", "measured", "recorded", "measured"] and len(trials) == 3
    assert "versions ('torch 2.0',) instead of ('torch 3.0',)" in found[2].note and not found[1].note
    (tmp_path / KEY.file_name).write_text("{")
    assert "no memory profile" in find_profile(KEY, tmp_path, None, CpuDevice()).note
    (tmp_path / "file").write_text("")
    blocked = find_profile(KEY, tmp_path / "file", None, CpuDevice())
    assert blocked.state == "measured" and "was not recorded" in blocked.note


def test_the_trial_counts_what_a_prefill_holds_at_once() -> None:
    # in a process of its own: what other threads give back meanwhile would be taken off what this one holds
    code = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nimport test_06_warmup\ntest_06_warmup.print_trials()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    small, large = json.loads(done.stdout)
    assert small["kv_nbytes_per_token"] == large["kv_nbytes_per_token"] == 2 * 2 * 2 * 16 * 4
    widest = 2048 * 512 * 4  # one of the MLP's tensors; some are alive together
    assert widest < large["step_nbytes"] < 40 * widest and small["step_nbytes"] < large["step_nbytes"]


def print_trials() -> None:
    """Of a prompt of 64 tokens and of one of 2048, as JSON."""
    model, device = tiny(), CpuDevice()
    keys = [ProfileKey.of("m", device, "float32", max_batch=2, max_tokens=tokens) for tokens in (64, 2048)]
    print(json.dumps([measure_profile(key, model, device).to_json() for key in keys]))


def test_the_peak_is_what_was_held_at_once() -> None:
    def work() -> int:
        torch.ones(16 << 20).sum()
        return 7

    peak, found = peak_nbytes(CpuDevice(), work)
    assert found == 7 and 60e6 < peak < 100e6


def test_the_pool_takes_what_a_step_leaves() -> None:
    assert pool_tokens(PROFILE, 10_000_000, share=0.9) == (9_000_000 - 1_000_000) // 2_000
    with pytest.raises(OutOfMemoryError, match="one sequence of 1,000 tokens"):
        pool_tokens(PROFILE, 3_000_000)
    with pytest.raises(ValueError, match="at least 1"):
        ProfileKey.of("m", CpuDevice(), "float32", max_batch=0, max_tokens=5)


# The bench


def answers(task: str, arguments: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """Stands in for the children: fixed seconds, and the caches' files that the real ones would leave."""
    if task == "first_call":
        return {"first_seconds": 0.5, "again_seconds": [0.1, 0.2, 0.3]}
    if task == "compile_step":
        warm = Path(environment["TORCHINDUCTOR_CACHE_DIR"])
        first = 2.0 if warm.exists() else 8.0
        warm.mkdir(exist_ok=True)
        return {"first_seconds": first, "eager_seconds": [0.02], "compiled_seconds": [0.01], "largest_difference": 0.0}
    if task == "kernel_state":
        cache = Path(arguments["cache"])
        if arguments["state"] == "just in time":
            cache.mkdir(parents=True)
            (cache / "name-sm_90-digest-version.kernel").write_text("x")
        if arguments["state"] == "ahead of time":
            assert [path.name for path in Path(arguments["ahead"]).iterdir()] == ["name-sm_90-digest.kernel"]
        return {"state": arguments["state"], "seconds": {"compile": 1.0} if arguments["state"] == "just in time" else {"cache": 0.01}, "image_nbytes": 10}
    place = Path(arguments["folder"])
    state = "recorded" if place.exists() else "measured"
    place.mkdir(exist_ok=True)
    return {"state": state, "seconds": 1.0 if state == "measured" else 0.001, "step_nbytes": 5, "kv_nbytes_per_token": 2}


@pytest.fixture
def document(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    monkeypatch.setenv("SLLM_MINI_WORK", str(tmp_path))
    monkeypatch.setattr(measure_module, "why_no_compiler", lambda: None)
    return lab.measure_warmup(tiny_checkpoint(tmp_path).path, options=lab.Options(rounds=2), run=answers)


def test_the_document_has_every_state_and_what_was_skipped(document: dict[str, Any]) -> None:
    rows = {(row["part"], row["state"]): row for row in document["results"]}
    assert rows["torch.compile", "cold cache"]["samples"] == [8.0, 8.0] and rows["torch.compile", "warm cache"]["samples"] == [2.0, 2.0]
    assert {state for part, state in rows if part == "kernels"} == {"just in time", "cached", "ahead of time"}
    assert rows["memory profile", "recorded"]["seconds_median"] == 0.001
    assert [one["name"] for one in document["skipped"]] == ["attention", "graphs"] and "no CUDA graphs" in document["skipped"][1]["reason"]
    assert str(lab.factor_of(document, "kernels", "decode attention")) == "x100.00 (100.00 to 100.00)"
    assert json.loads(json.dumps(document))["results"] == document["results"]
    assert {row["nbytes"] for row in document["results"]} == {None} and rows["kernels", "cached"]["facts"]["image_nbytes"] == 10
    assert document["model"] == {"name": "tiny", "dtype": "float32"}


def test_a_part_that_fails_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLLM_MINI_WORK", str(tmp_path))
    monkeypatch.setattr(measure_module, "why_no_compiler", lambda: "torch.compile needs a C++ compiler")
    tried: list[str] = []

    def run(task: str, arguments: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
        tried.append(task)
        if task == "kernel_state":
            raise ModelError("there is no NVRTC")
        return answers(task, arguments, environment)

    found = lab.measure_warmup(tiny_checkpoint(tmp_path).path, options=lab.Options(rounds=2, parts=("torch.compile", "kernels", "memory profile")), run=run)
    assert {one["name"]: one["reason"] for one in found["skipped"]} == {"torch.compile": "torch.compile needs a C++ compiler", "kernels: decode attention": "there is no NVRTC"}
    assert {row["part"] for row in found["results"]} == {"memory profile"} and tried.count("kernel_state") == 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".warmup")]
    with pytest.raises(ValueError, match="no part 'kernel'; the parts are first calls"):
        lab.Options(parts=("kernel",))


def test_pictures_tables_and_words_say_the_same(document: dict[str, Any], tmp_path: Path) -> None:
    from matplotlib.patches import Rectangle

    drawn = lab.described_warmup(document)
    assert drawn.png.startswith(b"\x89PNG")
    for words in ("first compiled step: cold cache 8.00 s, warm cache 2.00 s (cold cache over warm cache x4.00 (4.00 to 4.00), warm cache faster in every round)", "just in time 1.00 s"):
        assert words in drawn.alt_text
    table = lab.warmup_table(document)
    assert len(table.rows) == len(document["results"]) and ("torch.compile", "first compiled step", "warm cache", "2.00 s", "2.00 s to 2.00 s", "x4.00 (4.00 to 4.00)") in table.rows
    assert [row[2] for row in lab.kernels_table(document).rows] == ["compile 1.00 s", "cache 10.0 ms", "cache 10.0 ms"]
    axes = lab.plot_part(document, "kernels")
    assert [round(bar.get_width(), 3) for bar in axes.patches if isinstance(bar, Rectangle)] == [1.0, 0.01, 0.01]
    with pytest.raises(ValueError, match="graphs was not measured"):
        lab.plot_part(document, "graphs")
    path = tmp_path / "saved.json"
    path.write_text(json.dumps(document))
    assert lab.read_warmup(path)["results"] == document["results"]
    path.write_text("[]")
    with pytest.raises(FormatError, match="not what"):
        lab.read_warmup(path)


def test_what_only_a_gpu_has_is_measured_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLLM_MINI_WORK", str(tmp_path))
    monkeypatch.setattr(measure_module, "get_device", lambda name: RecordingRuntime().device())
    asked: list[tuple[str, dict[str, Any]]] = []

    def run(task: str, arguments: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
        asked.append((task, dict(arguments)))
        if task == "graphs":
            return {"before_seconds": 1.0, "first_seconds": [0.5, 0.25], "later_seconds": [0.1, 0.1], "captures": [[1, 0.4]]}
        return {"own_seconds": [0.001], "sdpa_seconds": [0.003], "nbytes": 9, "largest_difference": 0.0, "sdpa_difference": 0.0}

    found = lab.measure_warmup(tiny_checkpoint(tmp_path).path, options=lab.Options(rounds=1, device="cuda", parts=("attention", "graphs")), run=run)
    assert found["skipped"] == [] and found["machine"]["gpu"] == "Recording GPU"
    assert sorted((arguments["mode"], arguments["kernel"]) for task, arguments in asked if task == "graphs") == [(mode, kernel) for mode in ("eager", "lazy", "upfront") for kernel in (False, True)]
    assert {row["nbytes"] for row in found["results"] if row["part"] == "attention"} == {9}
    assert [row[4:] for row in lab.warmup_table(found, ["attention"]).rows] == [("one round", ""), ("one round", "x3.00 in one round")]
    rows = {(row["name"], row["state"]): row["seconds_median"] for row in found["results"]}
    assert rows["lazy, SDPA", "first steps of all batch sizes"] == 0.75 and rows["one layer", "our kernel"] == 0.001
    assert "SDPA with a mask over our kernel x3.00 in one round" in lab.described_warmup(found).alt_text


def test_attention_is_timed_against_sdpa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = AttentionShape(16, 2, "bfloat16")
    of = compile_for_cpu(resource("csrc") / "decode_attention.cu", tmp_path, shape.options)
    device = RecordingRuntime(kernels={name: of(name) for name in ("decode_attention", "decode_attention_merge")}).device()
    found = time_attention(device, "cpu", 2, 40, kv_heads=2, group=2, head_dim=16, rounds=2)
    assert found["largest_difference"] < 0.01 and len(found["own_seconds"]) == 2 and found["nbytes"] == 2 * (20 + 40) * 2 * 16 * 2


def test_the_command_prints_one_document(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from sllm_mini.cli.main import app

    monkeypatch.setenv("SLLM_MINI_WORK", str(tmp_path))
    monkeypatch.setattr(measure_module, "FIRST_CALLS", ("tokenizer",))
    done = CliRunner().invoke(app, ["bench", "warmup", "--part", "first calls", "--rounds", "1", "--json"])
    assert done.exit_code == 0, done.output
    assert [(row["name"], row["state"]) for row in json.loads(done.stdout)["results"]] == [("tokenizer", "first"), ("tokenizer", "again")]
    bad = CliRunner().invoke(app, ["bench", "warmup", "--part", "nonsense"])
    assert bad.exit_code == 2 and "there is no part" in bad.output


def test_what_cannot_be_measured_is_refused_before_anything_is(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLLM_MINI_WORK", str(tmp_path))
    monkeypatch.setattr(measure_module, "run_child", None)  # no child is started
    ended = run("bench", "warmup", tmp_path / "nope", "--part", "first calls", "--json")
    assert ended.code == 1 and "nope" in ended.error["message"] and not ended.out
    tiny = tiny_checkpoint(tmp_path).path
    for model in (tiny, resource("data/models/tiny")):
        ended = run("bench", "warmup", model, "--part", "memory profile", "--max-tokens", 100_000)
        assert ended.code == 1 and "100,000 tokens was asked for, but this model's context is 2,048 tokens; ask for at most that with --max-tokens" in ended.err
    assert lab.measure_warmup(tiny, options=lab.Options(rounds=1, parts=("kernels",), max_tokens=100_000), run=answers)["results"], "no part makes that many"


def test_what_was_all_skipped_is_said_and_not_drawn(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLLM_MINI_WORK", str(tmp_path))
    ended = run("bench", "warmup", "--part", "graphs", "--part", "attention")
    assert ended.code == 0 and "every part that was asked for was skipped" in ended.out and "median" not in ended.out
    assert "skipped: graphs: " in ended.out and "no CUDA graphs" in ended.out
    ended = run("bench", "warmup", "--part", "graphs", "--picture", tmp_path / "x.png")
    assert ended.code == 1 and "was not drawn" in ended.err and not (tmp_path / "x.png").exists()
