"""Chapter 05: processes start by every means and give one token, tenants cannot harm each other, nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sllm_mini.checkpoint import Checkpoint, convert_checkpoint
from sllm_mini.cluster import ProcessMemory, Zygote
from sllm_mini.cluster.snapshot import Snapshot
from sllm_mini.errors import ModelError, StoreError
from sllm_mini.lab import warm, warm_plots, warm_snapshot
from sllm_mini.lab.rungs import median_rungs
from sllm_mini.lab.warm import Brought, Crowd, StoreProcess, Task, WarmStart, start_instance
from sllm_mini.resources import resource
from sllm_mini.types import Span, Warmth


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return convert_checkpoint(resource("data/models/tiny"), tmp_path_factory.mktemp("warm") / "tiny")


@pytest.fixture(scope="module")
def zygote(tiny: Checkpoint) -> Iterator[Zygote]:
    with warm.runtime_zygote(tiny) as started:
        yield started


@pytest.fixture(scope="module")
def store(tiny: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreProcess]:
    with StoreProcess(tmp_path_factory.mktemp("store"), dram_nbytes=64 << 20) as started:
        started.client.register("tiny", tiny.path)
        started.client.prefetch("tiny")
        yield started


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_every_means_gives_the_same_token_and_climbs_its_own_rungs(tiny: Checkpoint, zygote: Zygote, store: StoreProcess) -> None:
    own, resident = Task(str(tiny.path)), Task(str(tiny.path), store.address, "tiny")
    means = {
        "cold": lambda: start_instance(own),
        "zygote": lambda: start_instance(own, zygote=zygote),
        "both": lambda: start_instance(resident, zygote=zygote),
    }
    starts = warm.measure_starts(means, rounds=1)
    names = {name: {span.name for span in runs[0].spans} for name, runs in starts.items()}
    assert {"interpreter", "start load", "bytes"} <= names["cold"] and "fork" not in names["cold"]
    assert {"fork", "start load", "bytes"} <= names["zygote"]
    assert {"fork", "attach"} <= names["both"] and not {"start load", "bytes"} & names["both"]
    assert all(run.coverage > 0.9 and run.again_seconds > 0 for runs in starts.values() for run in runs)
    rungs = {name: median_rungs(runs) for name, runs in starts.items()}
    assert rungs["zygote"]["runtime"] < rungs["cold"]["runtime"] / 3, "the imports were there"
    assert starts["both"][0].memory is not None and starts["cold"][0].memory is not None
    assert starts["both"][0].memory.private_nbytes < starts["cold"][0].memory.private_nbytes / 2


def test_a_tenant_that_writes_is_alone_with_it(tiny: Checkpoint, zygote: Zygote, store: StoreProcess) -> None:
    with start_instance(Task(), zygote=zygote) as one, start_instance(Task(), zygote=zygote) as other:
        sums = [instance.bring("attach", tiny, store.address, "tiny", keep=True)["sum"] for instance in (one, other)]
        assert sums[0] == sums[1] == one.ask("total")["sum"]
        before = one.memory.private_nbytes
        written = one.ask("write")
        assert one.memory.private_nbytes - before >= written["nbytes"] - 8192
        assert one.ask("total")["sum"] != sums[0] and other.ask("total")["sum"] == sums[0]
        assert one.bring("attach", tiny, store.address, "tiny")["sum"] == sums[0], "the store's own bytes are as they were"


def test_what_is_brought_is_there_and_whole(tiny: Checkpoint, zygote: Zygote, store: StoreProcess) -> None:
    with start_instance(Task(), zygote=zygote) as worker:
        runs = warm.measure_brought(worker, {"tiny": tiny}, store, rounds=1)
    assert sorted(run.how for run in runs) == sorted(warm.HOWS)
    assert len({run.nbytes for run in runs}) == 1 and all(run.seconds > 0 for run in runs)


def test_attached_weights_are_there_once(tiny: Checkpoint, zygote: Zygote, store: StoreProcess) -> None:
    crowds = warm.measure_memory(zygote, tiny, store, "tiny", counts=(1, 3))
    assert [(crowd.how, crowd.count) for crowd in crowds] == [(how, count) for how in warm.HOWS for count in (1, 3)]
    copied, attached = (warm_plots.one_more_nbytes(crowds, how) for how in ("copy", "attach"))
    assert 0.7 * tiny.nbytes < copied - attached < 1.3 * tiny.nbytes


def test_a_failure_is_named_and_leaves_no_process(tiny: Checkpoint, zygote: Zygote, store: StoreProcess, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"failed: StoreError: .*nobody"):
        start_instance(Task(str(tiny.path), store.address, "nobody"), zygote=zygote)
    with start_instance(Task(), zygote=zygote) as idle:
        with pytest.raises(ModelError, match="no model"):
            idle.ask("again")
        with pytest.raises(ValueError, match="needs a model"):
            warm.measure_starts({"idle": lambda: start_instance(Task(), zygote=zygote)}, rounds=1)
    assert gone(idle.pid)
    with start_instance(Task(), zygote=zygote) as killed:
        os.kill(killed.pid, signal.SIGKILL)
        with pytest.raises(ModelError, match=r"is gone|ended without"):
            killed.ask("drop")
    with pytest.raises(ValueError, match="by name"):
        Task("somewhere", store="socket")
    with pytest.raises(ValueError, match="cannot be saved"):
        warm_snapshot.measure_snapshot(Task(str(tiny.path), store.address, "tiny"), tmp_path)


def test_a_store_ends_with_its_owner(tmp_path: Path) -> None:
    with StoreProcess(tmp_path, dram_nbytes=8 << 20) as started:
        assert started.client.models() == []
    assert gone(started.pid) and not Path(started.address).exists()
    started.close()
    with pytest.raises(StoreError, match="did not start"):
        StoreProcess(tmp_path / "missing" / "deeper" / ("x" * 200), dram_nbytes=8 << 20)


def test_a_process_that_stands_alone_answers_after_it_was_stopped(tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CRIU's part is played by stopping the process and letting it go on; what it does itself has tests of its own."""
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(*args: Any, **options: Any) -> Any:
        started.append(popen(*args, **options))
        return Kept(started[-1])

    class Kept:
        """Not ended by the measurement, which takes it for saved."""

        def __init__(self, process: subprocess.Popen[bytes]) -> None:
            self.pid, self.poll = process.pid, process.poll

        def kill(self) -> None: ...

        def wait(self) -> None: ...

    def save(pid: int, folder: Path) -> Snapshot:
        os.kill(pid, signal.SIGSTOP)
        return Snapshot(folder, 7, pid)

    def restore(_folder: Path) -> int:
        os.kill(started[0].pid, signal.SIGCONT)
        return started[0].pid

    monkeypatch.setattr(warm_snapshot.subprocess, "Popen", start)
    monkeypatch.setattr(warm_snapshot, "save_snapshot", save)
    monkeypatch.setattr(warm_snapshot, "restore_snapshot", restore)
    restored = warm_snapshot.measure_snapshot(Task(str(tiny.path)), tmp_path)
    assert started[0].wait(30) == -signal.SIGKILL
    assert restored.nbytes == 7 and 0 < restored.restore_seconds < restored.first_token_seconds


def start_of(seconds: float, token: int = 1, private: int = 10**6) -> WarmStart:
    spans = (Span("fork", 0, seconds / 4, warmth=Warmth.PROCESS), Span("first token", seconds / 4, seconds, warmth=Warmth.READY))
    return WarmStart(spans, seconds, "", (token,), "a", 1, "cpu", 0, 10, None, {}, seconds / 10, ProcessMemory(10**9, 10**8, private))


def test_factors_are_of_one_round() -> None:
    starts = {"cold": [start_of(8), start_of(4), start_of(6)], "warm": [start_of(4), start_of(4), start_of(1)]}
    factor = warm_plots.speedups(starts, "cold")["warm"]
    assert (factor.median, factor.least, factor.most) == (2, 1, 6)
    said = warm_plots.starts_text(starts, "cold")
    assert "warm x2.00 (1.00 to 6.00)" in said and "The soonest by its median is warm" in said
    rows = {row[0]: row for row in warm_plots.starts_table(starts, "cold", {"cold": 6.0, "warm": 2.0}).rows}
    assert rows["warm"][1:] == ("4.00 s", "x2.00 (1.00 to 6.00)", "x3.00", "1.00 MB") and rows["cold"][2:4] == ("", "")
    assert warm_plots.ready_parts(starts["cold"]) == {"first token": 0.6}


def test_a_prediction_takes_off_the_rungs_that_are_saved() -> None:
    parts = {"process": 1.0, "runtime": 4.0, "dram": 0.5, "device": 2.0, "ready": 0.25, "first token": 0.25}
    found = [warm_plots.predicted_seconds(parts, forked=forked, attached=attached) for forked in (False, True) for attached in (False, True)]
    assert found == [8.0, 6.0, 3.0, 1.0]
    assert "the rung runtime, 50.0 %" in warm_plots.above_text(parts) and "3.1 %" in warm_plots.above_text(parts)
    assert "the longest part." in warm_plots.above_text({"ready": 1.0, "first token": 3.0})


def brought() -> list[Brought]:
    samples = {"copy": (0.01, 1.0), "map": (0.01, 0.02), "attach": (0.004, 0.008)}
    sizes = {"small": 10**7, "large": 10**9}
    return [Brought(how, name, size, seconds, 0.3, 0.1) for how, both in samples.items() for (name, size), seconds in zip(sizes.items(), both, strict=True)]  # type: ignore[arg-type]


def test_attaching_is_said_and_drawn_as_measured() -> None:
    said = warm_plots.brought_text(brought())
    assert "the bytes grow x100" in said and "attached to the store: 4.00 ms → 8.00 ms, x2.0" in said
    assert "took 200 ms per GB of large" in said
    axes = warm_plots.plot_brought(brought())
    assert len(axes.containers) == 4 and [text.get_text() for text in axes.get_xticklabels()] == ["small\n10.0 MB", "large\n1.00 GB"]
    assert [row[0] for row in warm_plots.brought_table(brought()).rows] == ["small"] * 3 + ["large"] * 3
    quick = [Brought(run.how, run.name, run.nbytes, run.seconds, 0.1, 0.1) for run in brought()]
    assert len(warm_plots.plot_brought(quick).containers) == 3, "a touch too short to tell from none is not drawn"
    with pytest.raises(ValueError, match="nothing was brought"):
        warm_plots.brought_text([])


def test_what_one_more_process_adds_is_a_difference() -> None:
    slopes = {"copy": 10**9, "map": 4 * 10**8, "attach": 10**7}
    crowds = [Crowd(how, count, 10**9 + count * slope) for how, slope in slopes.items() for count in (1, 2, 4)]  # type: ignore[arg-type]
    assert [warm_plots.one_more_nbytes(crowds, how) for how in warm.HOWS] == list(slopes.values())
    assert "attached to the store 10.0 MB (1.0 % of the model)" in warm_plots.memory_text(crowds, 10**9)
    line = warm_plots.plot_memory(crowds).lines[2]
    assert [value for _, value in line.get_xydata().tolist()] == pytest.approx([1.01, 1.02, 1.04])  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="two sizes"):
        warm_plots.one_more_nbytes(crowds[:1], "copy")
    with pytest.raises(ValueError, match="no crowd"):
        warm_plots.plot_memory([])
