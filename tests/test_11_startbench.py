"""Starts from each rung beside `transformers serve`: what is computed from samples, and one real run without the peer. Chapter 11."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sllm_mini.checkpoint import convert_checkpoint
from sllm_mini.cluster import Zygote
from sllm_mini.errors import FormatError, SllmError
from sllm_mini.lab import startbench
from sllm_mini.lab.startbench import PEER, PROCESSES, RUNGS, Options, document, measure_start, play, read_start
from sllm_mini.resources import resource

NAMES = (*PROCESSES, *RUNGS, PEER)


def sample(seconds: float, imports: float = 0.0, text: str = " a", prepared: float = 0.0) -> dict[str, Any]:
    return {"seconds": seconds, "imports_seconds": imports, "prepared_seconds": prepared, "text": text, "timing": None}


def test_ratios_are_of_the_same_round_and_imports_stand_apart(tmp_path: Path) -> None:
    samples = {name: [sample(5.0, 4.5, prepared=0.5), sample(9.0, 7.0, prepared=1.0)] if name in PROCESSES else [sample(0.5), sample(0.25)] for name in NAMES}
    samples[PEER] = [sample(10.0, 6.0, " b"), sample(10.0, 7.0, " b")]
    found = document(samples, Options(2), 1, {"memory_copy": 1e9, "disk_buffered_read": 1e8, "disk_direct_read": 2e8}, 10**9, "")
    rows = {row["name"]: row for row in found["results"]}
    assert rows["runtime"]["ratio_to_peer_median"] == 30.0 and (rows["runtime"]["ratio_to_peer_min"], rows["runtime"]["ratio_to_peer_max"]) == (20.0, 40.0)
    assert rows["process, memory"]["prepared_seconds_median"] == 0.75  # counted as what came after the imports
    assert rows["process, memory"]["rest_samples"] == [1.0, 3.0] and rows["process, memory"]["ratio_without_imports_median"] == 2.5
    assert "ratio_to_peer_median" not in rows[PEER] and not rows[PEER]["same_text"] and rows["ready"]["same_text"]
    assert rows["process, disk"]["floor_seconds"] == 5.0 and rows["ready"]["floor_seconds"] == 1.0 and not found["skipped"]
    on_gpu = {row["name"]: row["floor_seconds"] for row in document(samples, Options(2, cuda=True), 1, {"memory_copy": 1e9, "host_to_device_copy": 5e9}, 10**9, "")["results"]}
    assert on_gpu["dram"] == 0.2 and on_gpu["device"] is on_gpu["ready"] is on_gpu["process, disk"] is None
    saved = tmp_path / "found.json"
    saved.write_text(json.dumps({**found, "machine": {}, "model": {}}))
    assert read_start(saved)["results"][0]["name"] == "process, disk"
    saved.write_text("{}")
    with pytest.raises(FormatError):
        read_start(saved)


def test_without_the_peer_there_are_no_ratios_and_a_reason() -> None:
    found = document({name: [sample(1.0)] for name in NAMES[:-1]}, Options(1), 1, {}, 10, "it is not here")
    assert found["skipped"] == [{"name": PEER, "reason": "it is not here"}]
    assert all("ratio_to_peer_median" not in row and row["floor_seconds"] is None for row in found["results"])


def test_each_row_starts_once_a_round_and_must_say_the_same() -> None:
    begun: list[str] = []

    def start(name: str) -> dict[str, Any]:
        begun.append(name)
        return sample(1.0, text=" else" if name == PEER else " a")

    samples = play(start, NAMES, Options(3), lambda _: None)
    assert all(len(each) == 3 for each in samples.values())
    rounds = [tuple(begun[at : at + len(NAMES)]) for at in range(0, len(begun), len(NAMES))]
    assert all(set(each) == set(NAMES) for each in rounds) and len(set(rounds)) > 1
    with pytest.raises(SllmError, match="cannot be compared"):
        play(lambda name: sample(1.0, text=name), NAMES, Options(1), lambda _: None)


def test_why_there_is_no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startbench.importlib.util, "find_spec", lambda name: None if name == "accelerate" else sys)
    assert "accelerate" in startbench.why_no_peer() and "make peers" in startbench.why_no_peer()


def test_a_server_that_does_not_start_says_what_it_said() -> None:
    with pytest.raises(SllmError, match="it is broken"), startbench._process([sys.executable, "-c", "raise SystemExit('it is broken')"], startbench._free_port()):
        pass


def test_what_a_runtime_prepares_is_timed_by_itself_and_fails_in_words(tmp_path: Path) -> None:
    checkpoint = convert_checkpoint(resource("data/models/tiny"), tmp_path / "tiny")
    with Zygote([], [startbench._TIMED]) as runtime:
        began = time.perf_counter()
        seconds = startbench._prepared_seconds(runtime, checkpoint)
        assert 0 < seconds < time.perf_counter() - began
        (tmp_path / "tiny" / "config.json").unlink()
        with pytest.raises(SllmError, match="could not be prepared"):
            startbench._prepared_seconds(runtime, checkpoint)


@pytest.mark.slow
def test_every_rung_answers_the_same() -> None:
    found = measure_start(resource("data/models/tiny"), Options(rounds=1, peer=False))
    rows = {row["name"]: row for row in found["results"]}
    assert list(rows) == [*PROCESSES, *RUNGS]
    assert all((row["prepared_seconds_min"] > 0) == (name in PROCESSES) for name, row in rows.items())
    assert rows["runtime"]["timing"]["tier"] == "dram" and rows["ready"]["timing"]["rung"] == "ready"
    assert rows["ready"]["seconds_median"] < rows["runtime"]["seconds_median"] < rows["process, memory"]["seconds_median"]
