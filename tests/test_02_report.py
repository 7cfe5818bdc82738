"""`make gpu-report`: the runner under every bad turn, the plan on machines of all sizes, and one rehearsal from end to end."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from sllm_mini.cli import main as cli
from sllm_mini.errors import DeviceError, ResourceError
from sllm_mini.lab import recorded
from sllm_mini.lab.report import __main__ as command
from sllm_mini.lab.report import host as host_module
from sllm_mini.lab.report import plan as plan_module
from sllm_mini.lab.report import process as process_module
from sllm_mini.lab.report import record as record_module
from sllm_mini.lab.report.archive import write_archive
from sllm_mini.lab.report.folder import REHEARSAL, Folder, ReportError, write_json
from sllm_mini.lab.report.host import Host, look
from sllm_mini.lab.report.plan import SHAPES, Table
from sllm_mini.lab.report.process import MARK, run_limited
from sllm_mini.lab.report.record import record, record_chapters
from sllm_mini.lab.report.runner import Call, Runner, select
from sllm_mini.lab.report.summary import headlines, write_summary
from sllm_mini.lab.report.unit import STAGE_SECONDS, Plan, Product, Unit

CHECKOUT = Path(__file__).resolve().parent.parent
GB = 10**9


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "out", rehearsal=False)


def unit(name: str, code: str, *, stage: str = "stage", **options: Any) -> Unit:
    return Unit(stage, name, (sys.executable, "-c", code), **{"seconds": 1.0, **options})


def touch(path: Path, what: str = "x") -> str:
    """Code that adds to a file, so that a test can count how often it ran."""
    return f"open({str(path)!r}, 'a').write({what!r})"


def run(folder: Folder, *units: Unit, budget: float = 60, code: str = "c0de", products: dict[str, Product] | None = None, **options: Any) -> Call:
    runner = Runner(Plan(units, products or {}), folder, code=code, cwd=folder.path, say=lambda _: None)
    return runner.run(list(units), budget_seconds=budget, **options)


# One command


def limited(folder: Folder, code: str, seconds: float) -> tuple[Any, str]:
    log = folder.path / "log"
    ended = run_limited((sys.executable, "-c", code), log=log, limit_seconds=seconds, env=dict(os.environ), cwd=folder.path)
    return ended, log.read_text()


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_a_command_that_hangs_is_ended_with_all_it_started(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a child that made a session of its own, and one that will not listen."""
    monkeypatch.setattr(process_module, "_GRACE_SECONDS", 0.3)
    pids = folder.path / "pids"
    child = f"import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open({str(pids)!r}, 'a').write(str(os.getpid()) + '\\n'); time.sleep(600)"
    code = f"""
import subprocess, sys, time
for alone in (False, True):
    subprocess.Popen([sys.executable, "-c", {child!r}], start_new_session=alone)
while len(open({str(pids)!r}, "a+").seek(0) or open({str(pids)!r}).readlines()) < 2:
    time.sleep(0.02)
print("hanging", flush=True)
time.sleep(600)
"""
    ended, log = limited(folder, code, 4)
    assert ended.rc is None and "hanging" in log and "4 s were over" in log
    found = [int(line) for line in pids.read_text().split()]
    assert len(found) == 2 and not any(map(alive, found))


def test_a_command_that_ends_leaves_no_daemon(folder: Folder) -> None:
    daemon = "import os, subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True); print(p.pid)"
    ended, log = limited(folder, daemon, 30)
    assert ended.rc == 0 and not alive(int(log.split()[-1]))


def test_a_program_that_is_not_there_is_a_failure_with_a_reason(folder: Folder) -> None:
    log = folder.path / "log"
    ended = run_limited(("/no/such/program",), log=log, limit_seconds=5, env={}, cwd=folder.path)
    assert ended.rc == 127 and "No such file" in log.read_text()


# The runner


def test_a_failure_stops_nothing_and_is_recorded(folder: Folder) -> None:
    count = folder.path / "count"
    units = [unit("bad", "import sys; print('why'); sys.exit(7)"), unit("good", touch(count)), Unit("stage", "absent", ("/no/such/program",), 1.0)]
    call = run(folder, *units)
    assert (call.done, call.failed, call.left) == (("stage/good",), ("stage/bad", "stage/absent"), ())
    again = Folder(folder.path, rehearsal=False)  # as the next call would find it
    assert (again.entries["stage/bad"].rc, again.entries["stage/good"].rc, again.entries["stage/absent"].rc) == (7, 0, 127)
    entry = again.entries["stage/bad"]
    assert entry.command == units[0].command and entry.seconds > 0 and entry.started.startswith("20") and entry.code == "c0de"
    assert "why" in (folder.logs / entry.log).read_text()


def test_what_is_done_is_not_repeated_unless_asked_and_what_failed_only_with_other_code(folder: Folder) -> None:
    good, bad = folder.path / "good", folder.path / "bad"
    units = [unit("good", touch(good)), unit("bad", touch(bad) + "; raise SystemExit(1)")]
    for code, again, counts in (("a", False, (1, 1)), ("a", False, (1, 1)), ("b", False, (1, 2)), ("b", True, (2, 3))):
        call = run(folder, *units, code=code, again=again)
        assert (len(good.read_text()), len(bad.read_text())) == counts
        assert (call.done, call.failed, call.left) == (("stage/good",), ("stage/bad",), ())


def test_a_budget_that_ends_in_the_middle_is_resumed(folder: Folder) -> None:
    """The unit it ends in is ended, and has the whole budget of the next call; what was done before stays done."""
    first, slow, last, again = (folder.path / name for name in ("first", "slow", "last", "again"))
    hangs = f"import os, time; os.path.exists({str(again)!r}) or time.sleep(600); {touch(slow)}"
    units = [unit("first", touch(first)), unit("slow", hangs, seconds=0.1), unit("last", touch(last), seconds=5.0)]
    call = run(folder, *units, budget=1.5)
    assert (call.done, call.left) == (("stage/first",), ("stage/slow", "stage/last"))
    assert folder.entries["stage/slow"].status == "interrupted" and not slow.exists() and not last.exists()
    again.touch()
    call = run(folder, *units, budget=30)
    assert call.left == () and len(call.done) == 3
    assert [len(path.read_text()) for path in (first, slow, last)] == [1, 1, 1]


def test_a_unit_is_begun_only_where_its_time_is_left_and_a_smaller_one_goes_first(folder: Folder) -> None:
    order = folder.path / "order"
    units = [unit("a", touch(order, "a")), unit("long", touch(order, "L"), seconds=100.0), unit("b", touch(order, "b"))]
    call = run(folder, *units, budget=20)
    assert order.read_text() == "ab" and call.left == ("stage/long",)
    run(folder, *units, budget=20)  # alone it is begun whatever its estimate says, or no call ever would
    assert order.read_text() == "abL"


def test_a_unit_has_a_limit_of_its_own(folder: Folder) -> None:
    units = [unit("hangs", "import time; time.sleep(600)", limit_seconds=1.0), unit("next", "")]
    call = run(folder, *units)
    assert call.failed == ("stage/hangs",) and call.done == ("stage/next",) and folder.entries["stage/hangs"].status == "timeout"
    assert run(folder, *units).left == ()  # and it is not tried for ever


def test_no_budget_begins_nothing(folder: Folder) -> None:
    count = folder.path / "count"
    assert run(folder, unit("one", touch(count)), budget=-5).left == ("stage/one",) and not count.exists()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_being_interrupted_keeps_what_was_done_and_ends_what_runs(folder: Folder, how: signal.Signals) -> None:
    done, pid = folder.path / "done", folder.path / "pid"
    driver = f"""
from pathlib import Path
import sys
sys.path.insert(0, {str(CHECKOUT / "tests")!r})
from test_02_report import run, unit, touch
from sllm_mini.lab.report.folder import Folder
code = "import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
call = run(Folder(Path({str(folder.path)!r}), rehearsal=False), unit("one", touch(Path({str(done)!r}))), unit("two", code), unit("three", ""), budget=300)
sys.exit(42 if call.interrupted and call.done == ("stage/one",) and call.left == ("stage/two", "stage/three") else 1)
"""
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    child = subprocess.Popen([sys.executable, "-c", driver], env=environment)
    deadline = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(how)
    assert child.wait(60) == 42
    assert not alive(int(pid.read_text()))
    found = Folder(folder.path, rehearsal=False).entries
    assert {key: entry.status for key, entry in found.items()} == {"stage/one": "done", "stage/two": "interrupted"}


def test_a_result_is_a_file_or_the_standard_output(folder: Folder) -> None:
    saved = folder.results / "saved.json"
    units = [
        unit("prints", "import sys; print('[1]'); print('noise', file=sys.stderr)", result="printed.json", from_stdout=True),
        unit("saves", f"open({str(saved)!r}, 'w').write('{{}}')", result="saved.json"),
        unit("forgets", "", result="never.json"),
        unit("fails", "print('{\"half\": 1}'); raise SystemExit(3)", result="half.json", from_stdout=True),
    ]
    call = run(folder, *units)
    assert call.failed == ("stage/forgets", "stage/fails") and len(call.done) == 2
    assert (folder.results / "printed.json").read_text() == "[1]\n" and "noise" in folder.log_of("stage/prints").read_text()
    assert folder.entries["stage/forgets"].result is None and sorted(path.name for path in folder.path.iterdir() if "partial" in path.name) == []


def product(folder: Folder, code: str | None = None) -> dict[str, Product]:
    path, made = folder.work / "model", folder.path / "made"
    make = code or f"import os; os.mkdir({str(path)!r}); {touch(made)}"
    return {"model": Product("model", path, (sys.executable, "-c", make), 1.0)}


def test_a_model_is_made_once_for_all_that_use_it_and_deleted_after_the_last(folder: Folder) -> None:
    products, seen = product(folder), folder.path / "seen"
    look_at = f"import os; open({str(seen)!r}, 'a').write(str(os.path.isdir({str(folder.work / 'model')!r})) + ' ')"
    units = [unit("one", look_at, uses=("model",)), unit("two", look_at, uses=("model",)), unit("after", look_at)]
    call = run(folder, *units, products=products)
    assert len(call.done) == 3 and seen.read_text().split() == ["True", "True", "False"]
    assert (folder.path / "made").read_text() == "x"
    run(folder, *units, products=products)
    assert (folder.path / "made").read_text() == "x"  # all is done: nothing is made for nobody


def test_a_model_that_a_later_call_wants_is_kept(folder: Folder) -> None:
    products = product(folder)
    units = [unit("one", "", uses=("model",)), unit("two", "", uses=("model",)), unit("other", "", stage="else")]
    runner = Runner(Plan(tuple(units), products), folder, code="c", cwd=folder.path, say=lambda _: None)
    for one, kept in ((units[0], True), (units[2], True), (units[1], False)):
        runner.run([one], budget_seconds=60)
        assert products["model"].path.exists() == kept


def test_a_model_that_cannot_be_made_fails_its_users_and_leaves_no_half(folder: Folder) -> None:
    half = f"import os; os.mkdir({str(folder.work / 'model')!r}); print('disk full'); raise SystemExit(1)"
    call = run(folder, unit("one", "", uses=("model",)), unit("other", ""), products=product(folder, half))
    assert call.failed == ("stage/one",) and call.done == ("stage/other",) and not (folder.work / "model").exists()
    assert "disk full" in folder.log_of("stage/one").read_text()


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_model_whose_making_is_broken_off_is_made_again(folder: Folder, interrupted: bool) -> None:
    path, again = folder.models / "model", folder.path / "again"
    hangs = f"import os, signal, time; os.path.exists({str(again)!r}) or ({touch(path)}, {interrupted} and os.kill(os.getppid(), signal.SIGINT), time.sleep(600)); {touch(path)}"
    products = {"model": Product("model", path, (sys.executable, "-c", hangs), 0.1)}
    one = unit("one", "", uses=("model",), seconds=0.1)
    call = run(folder, one, products=products, budget=60 if interrupted else 1.5)
    assert call.left == ("stage/one",) and call.interrupted == interrupted and not path.exists()
    again.touch()
    assert run(folder, one, products=products).done == ("stage/one",)


def test_stages_and_units_are_chosen_by_name(folder: Folder) -> None:
    plan = Plan((unit("a", "", stage="s"), unit("b1", "", stage="t"), unit("b2", "", stage="t")), skipped={"u/gone": "why"})
    assert [u.key for u in select(plan, ["t"])] == ["t/b1", "t/b2"] and [u.key for u in select(plan, ["t/*2", "s"])] == ["s/a", "t/b2"]
    assert len(select(plan, ["all"])) == 3 and select(plan, ["u"]) == [] and select(plan, []) == []
    with pytest.raises(ReportError, match=r"'banch'.*the stages are s, t, u"):
        select(plan, ["banch"])


# The folder


def test_a_folder_holds_a_run_or_a_rehearsal_and_one_runner(folder: Folder) -> None:
    folder.save()
    with pytest.raises(ReportError, match="holds a run and this is a rehearsal"):
        Folder(folder.path, rehearsal=True)
    with folder.locked(), pytest.raises(ReportError, match="another report is being made"), Folder(folder.path, rehearsal=False).locked():
        pass
    with folder.locked():  # free again
        pass
    for text in ("{", "[]", '{"version": 99, "rehearsal": false, "units": {}}', '{"version": 1, "rehearsal": false, "units": {"a": {}}}'):
        (folder.path / "state.json").write_text(text)
        with pytest.raises(ReportError, match="OUT="):
            Folder(folder.path, rehearsal=False)


def test_nothing_outside_the_work_folder_is_deleted(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for path in (tmp_path / "mine", folder.work, folder.work / ".." / "results"):  # not the folder itself either
        with pytest.raises(ReportError, match="not deleted"):
            folder.delete(path)
        assert path.exists()


# The plan


def host(**options: Any) -> Host:
    gpu = {"model": "NVIDIA H200", "free_nbytes": 140 * GB, "total_nbytes": 141 * GB}
    facts = {
        "python": "3.12.1 (python3)", "modules": dict.fromkeys(host_module._FALLS_AWAY, "1.0"), "programs": dict.fromkeys(host_module._PROGRAMS, "/bin/x"),
        "gpu": gpu, "why_no_gpu": None, "memory_nbytes": 120 * GB, "disk_nbytes": 64 * GB, "cpu_count": 16, "system": "Linux 6",
    }  # fmt: skip
    return Host(**{**facts, **options})


def plan_of(folder: Folder, **options: Any) -> Plan:
    return Table(host(**options), folder, CHECKOUT).plan()


def shapes_in(plan: Plan, device: str) -> list[str]:
    return [shape for shape in SHAPES if any(f"-{shape}-{device}-" in unit.key for unit in plan.units)]


def test_sizes_follow_gpu_memory_host_memory_and_disk(folder: Folder) -> None:
    everything = plan_of(folder)
    assert shapes_in(everything, "cuda") == shapes_in(everything, "cpu") == list(SHAPES) and everything.skipped == {}
    small_gpu = plan_of(folder, gpu={"model": "small", "free_nbytes": 8 * GB, "total_nbytes": 8 * GB})
    assert shapes_in(small_gpu, "cuda") == ["opt-125m", "llama-3.2-1b"] and shapes_in(small_gpu, "cpu") == list(SHAPES)
    assert "GPU memory, 8.0 GB are free" in small_gpu.skipped["bench/load-llama-3.1-8b-cuda"]
    small_disk = plan_of(folder, disk_nbytes=20 * GB)
    assert shapes_in(small_disk, "cuda") == shapes_in(small_disk, "cpu") == ["opt-125m", "llama-3.2-1b"]
    assert "of disk, 20.0 GB are free" in small_disk.skipped["bench/load-llama-3.1-8b-cuda"]
    small_memory = plan_of(folder, memory_nbytes=4 * GB)
    assert shapes_in(small_memory, "cuda") == ["opt-125m"] and "of memory" in small_memory.skipped["bench/load-llama-3.2-1b-cpu"]
    nothing = plan_of(folder, disk_nbytes=0)
    assert shapes_in(nothing, "cuda") == [] and any(unit.key.startswith("bench/load-small-cuda") for unit in nothing.units)


def test_a_model_that_lies_on_the_disk_already_still_fits(folder: Folder) -> None:
    """A resumed call finds the model made and the disk so much fuller."""
    (folder.models / "llama-3.1-8b").mkdir()
    assert "llama-3.1-8b" in shapes_in(plan_of(folder, disk_nbytes=40 * GB), "cuda")
    (folder.models / "llama-3.1-8b").rmdir()
    assert "llama-3.1-8b" not in shapes_in(plan_of(folder, disk_nbytes=40 * GB), "cuda")


def test_every_unit_fits_a_stage_of_eight_minutes_and_its_names_are_its_own(folder: Folder) -> None:
    plan = plan_of(folder)
    assert STAGE_SECONDS == 450 and all(0 < unit.seconds <= unit.limit_seconds <= STAGE_SECONDS for unit in plan.units)
    assert len({unit.key for unit in plan.units}) == len(plan.units)
    named = [unit.result for unit in plan.units if unit.result]
    assert len(set(named)) == len(named) and {"doctor.json", "kernels.json", "cold_start.json"} <= set(named)
    assert plan.stages == ("machine", "tests", "kernels", "bench", "chapters")
    assert {name for unit in plan.units for name in unit.uses} <= plan.products.keys()
    assert all(folder.work in product.path.parents for product in plan.products.values())


def test_rounds_follow_the_speed_of_the_disk_and_names_do_not(folder: Folder) -> None:
    """A first call plans with a guess; once the disk is measured, more or fewer rounds fit, in units of the same names."""

    def rounds(shape: str) -> dict[str, int]:
        return {u.key: int(u.command[u.command.index("--rounds") + 1]) for u in plan_of(folder).units if f"load-{shape}-cuda-cold" in u.key}

    found = []
    for rate in (2e8, 2e9, 2e10):
        write_json(folder.results / "doctor.json", {"limits": {"disk_direct_read_bytes_per_second": rate}})
        found.append(rounds("llama-3.1-8b"))
        assert all(unit.seconds <= STAGE_SECONDS for unit in plan_of(folder).units)
    assert found[0].keys() == found[1].keys() == found[2].keys() and len(found[0]) == 4
    assert set(found[0].values()) == {1} and all(1 <= n <= m for n, m in zip(found[1].values(), found[2].values(), strict=True))
    assert max(found[2].values()) > 1
    assert list(rounds("opt-125m").values()) == [5]  # one unit of all loaders
    (folder.results / "doctor.json").write_text("{")
    assert rounds("llama-3.1-8b").keys() == found[0].keys()


@pytest.mark.parametrize("rehearsal", [True, False])
def test_every_command_of_the_plan_takes_its_options_and_saves_where_its_result_is_looked_for(rehearsal: bool, tmp_path: Path) -> None:
    """Those of the long rehearsal are run in it; that these commands do what they promise, the tests of each say."""
    folder = Folder(tmp_path / "out", rehearsal=rehearsal)
    seen = set()
    table = Table(host(), folder, CHECKOUT)
    for planned in table.plan().units:
        if cli.__name__ in planned.command:
            words = list(planned.command[planned.command.index(cli.__name__) + 1 :])
            asked, found = [], typer.main.get_command(cli.app)
            while commands := getattr(found, "commands", None):
                asked.append(words.pop(0))
                found = commands[asked[-1]]
            for product in planned.uses:
                table.plan().products[product].path.mkdir(parents=True, exist_ok=True)  # as the runner does before
            given = found.make_context(planned.key, words).params  # a click.UsageError for an option that there is not
            assert given["json"] if planned.from_stdout else given["save"] == folder.results / str(planned.result)
            seen.add(" ".join(asked))
    assert seen == {"doctor", "load", *(f"bench {name}" for name in ("load", "tiers", "overlap", "decode", "migrate", "serve", "start", "warmup"))}


def test_the_parts_of_a_bench_are_all_of_its_loaders() -> None:
    from sllm_mini.lab.bench import entries

    names = [entry.name for entry in entries("cuda")]
    by_part = {part: [name for name in names if name.startswith(words)] for part, words in plan_module._PARTS.items()}
    assert sorted(name for found in by_part.values() for name in found) == sorted(names)
    assert all(by_part.values())


def test_what_a_killed_unit_leaves_is_gone_before_the_next(folder: Folder) -> None:
    junk, seen = folder.scratch / "junk", folder.path / "seen"
    look_at = f"import os; open({str(seen)!r}, 'a').write(str(os.listdir({str(folder.scratch)!r})))"
    (folder.scratch / "of a call that was killed").mkdir()
    run(folder, unit("looks", look_at))
    run(folder, unit("leaves", f"{touch(junk)}; import time; time.sleep(600)", limit_seconds=1.0), unit("looks again", look_at))
    assert seen.read_text() == "[][]" and not junk.exists() and folder.scratch.is_dir()


def test_every_test_file_and_every_chapter_is_a_unit(folder: Folder) -> None:
    plan = plan_of(folder)
    commands = " ".join(word for unit in plan.units for word in unit.command)
    for path in [*CHECKOUT.glob("tests/test_*.py"), *CHECKOUT.glob("tests/faults/test_*.py"), *CHECKOUT.glob("chapters/[0-9][0-9]_*.ipynb")]:
        assert str(path) in commands
    assert "browser" not in {unit.name for unit in plan.units}
    (gpu,) = [unit for unit in plan.units if unit.key == "tests/gpu"]
    assert gpu.env == {"SLLM_REQUIRE_GPU": "1"} and gpu.command[gpu.command.index("-m", 3) + 1] == "gpu"


@pytest.mark.parametrize(
    ("absent", "stages"),
    [
        (["pytest"], {"machine", "kernels", "bench", "chapters"}),
        (["hypothesis"], {"machine", "kernels", "bench", "chapters"}),
        (["nbclient"], {"machine", "kernels", "bench", "tests"}),
        (["ipykernel", "pytest"], {"machine", "kernels", "bench"}),
        (["torch"], {"machine"}),
    ],
)
def test_what_is_missing_takes_its_stages_with_it_and_is_said(folder: Folder, absent: list[str], stages: set[str]) -> None:
    found = host(modules={name: None if name in absent else "1.0" for name in host_module._FALLS_AWAY}, programs=dict.fromkeys(host_module._PROGRAMS, "/x"))
    plan = Table(found, folder, CHECKOUT).plan()
    assert {unit.stage for unit in plan.units} == stages
    lines = found.complaints()
    assert len(lines) == len(absent) and all(line.split(" ")[0] in absent and "falls away" in line for line in lines)
    assert all(absent[0] in reason or len(absent) > 1 for reason in plan.skipped.values()) and plan.skipped


def test_a_program_that_is_missing_takes_only_its_units(folder: Folder) -> None:
    plan = plan_of(folder, programs={**dict.fromkeys(host_module._PROGRAMS, "/x"), "compute-sanitizer": None})
    assert plan.skipped == {f"kernels/{tool}": "compute-sanitizer not there" for tool in ("memcheck", "racecheck")}


def test_a_container_has_less_memory_than_its_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host_module, "_ask_for_gpu", lambda rehearsal: (None, "none"))
    monkeypatch.setattr(host_module, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("100\n")
    assert look(tmp_path, rehearsal=False).memory_nbytes > 10**6
    (tmp_path / "memory.max").write_text("1100\n")
    assert look(tmp_path, rehearsal=False).memory_nbytes == 1000


# Summary, archive, record


BENCH = {
    "limits": {"disk_bytes_per_second": 3e9},
    "results": [{"name": "sllm_mini", "state": "cold", "nbytes": 2 * GB, "seconds_median": 0.8, "ratio_to_limit": 0.83, "limit": "disk", "ratio_to_reference_median": 1.5}],
    "skipped": [{"name": "InstantTensor", "reason": "refuses a CPU"}],
}


def recorded_run(folder: Folder, document: dict[str, Any] | None = None, name: str = "bench.json") -> None:
    code = f"import json; print(json.dumps({BENCH if document is None else document!r}))"
    run(folder, unit("load", code, stage="bench", result=name, from_stdout=True), unit("bad", "raise SystemExit(1)"), code=recorded.code_hash())
    write_json(folder.path / "machine.json", host().as_json())


HALF = "print('{\"half\": 1}'); raise SystemExit(1)"


def test_the_summary_says_each_figure_with_its_ratio_and_all_that_was_not_run(folder: Folder) -> None:
    recorded_run(folder)
    plan = Plan((unit("load", "", stage="bench"), unit("bad", ""), unit("later", "")), skipped={"bench/big": "needs 48 GB of disk"})
    text = write_summary(folder, plan, host()).read_text()
    for words in ("# Report of NVIDIA H200", "| bench/load | sllm_mini | cold | 2.00 GB | 800 ms | 2.50 GB/s | 0.83 (disk) | 1.50 |", "stage/bad | failed with code 1",
                  "stage/later | not run yet", "bench/big | skipped: needs 48 GB", "InstantTensor: refuses a CPU", "disk_bytes_per_second | 3.00 GB/s"):  # fmt: skip
        assert words in text, words
    (row,) = json.loads((folder.path / "headlines.json").read_text())["rows"]
    assert row["bytes_per_second"] == 2.5e9 and row["ratio_to_limit"] == 0.83 and row["code"] == recorded.code_hash()
    assert "REHEARSAL" not in text


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {m.name.removeprefix("gpu-report/"): archive.extractfile(m).read() for m in archive if m.isfile()}  # type: ignore[union-attr]


def picture_notebook(nbytes: int) -> str:
    import base64

    image = base64.b64encode(os.urandom(nbytes)).decode()
    outputs = [
        {"output_type": "display_data", "metadata": {}, "data": {"image/png": image, "text/plain": "kept"}},
        {"output_type": "display_data", "metadata": {}, "data": {"text/html": ["<img src='data:", image, "'>"]}},
        {"output_type": "stream", "name": "stdout", "text": "figures stay\n"},
    ]
    return json.dumps({"cells": [{"cell_type": "code", "source": "1", "outputs": outputs}, {"cell_type": "markdown", "source": "text"}]})


def test_the_archive_has_what_was_recorded_and_no_model(folder: Folder) -> None:
    recorded_run(folder)
    (folder.work / "model.safetensors").write_bytes(bytes(1000))
    (folder.chapters / "00_x.ipynb").write_text(picture_notebook(1000))
    (folder.path / "junit" / "a.xml").write_text("<x/>")
    found = members(write_archive(folder))
    assert sorted(found) == ["chapters/00_x.ipynb", "junit/a.xml", "logs/bench.load.log", "logs/stage.bad.log", "machine.json", "results/bench.json", "state.json"]
    assert found["chapters/00_x.ipynb"] == (folder.chapters / "00_x.ipynb").read_bytes()


def test_an_archive_that_grows_too_large_drops_pictures_then_files_never_results_and_says_so(folder: Folder) -> None:
    recorded_run(folder)
    (folder.chapters / "00_x.ipynb").write_text(picture_notebook(300_000))
    log = folder.logs / "long.log"
    log.write_bytes(os.urandom(400_000) + b"the end")
    found = members(write_archive(folder))
    assert len(found["logs/long.log"]) == 256 << 10 and found["logs/long.log"].endswith(b"the end") and b"image/png" in found["chapters/00_x.ipynb"]
    path = write_archive(folder, limit_nbytes=350_000)
    found = members(path)
    assert path.stat().st_size <= 350_000 and b"image/png" not in found["chapters/00_x.ipynb"] and b"figures stay" in found["chapters/00_x.ipynb"]
    assert b"chapters/00_x.ipynb: its pictures" in found["OMITTED.txt"] and b"logs/long.log: all but its end" in found["OMITTED.txt"]
    path = write_archive(folder, limit_nbytes=20_000)
    found = members(path)
    assert path.stat().st_size <= 20_000 and "logs/long.log" not in found and b"logs/long.log: the whole file" in found["OMITTED.txt"] and "results/bench.json" in found
    with pytest.raises(ReportError, match="--archive-limit"):
        write_archive(folder, limit_nbytes=300)
    assert path.stat().st_size <= 20_000  # the last good one stays


def test_a_run_is_recorded_with_its_stamp_under_the_model_of_its_gpu(folder: Folder, tmp_path: Path) -> None:
    recorded_run(folder)
    (path,) = record(write_archive(folder), tmp_path / "results")
    assert path == tmp_path / "results" / "nvidia-h200" / "bench.json"
    document = json.loads(path.read_text())
    stamp = document.pop("recorded")
    assert document == BENCH and stamp["code_hash"] == recorded.code_hash() and stamp["gpu"] == "NVIDIA H200" and stamp["versions"]["torch"] == "1.0"
    assert stamp["date"] == folder.entries["bench/load"].started[:10] and stamp["command"].startswith("python -c") and stamp["machine"]["gpu"]["free_nbytes"]
    assert str(tmp_path) not in json.dumps(stamp)


def test_what_must_not_be_recorded_is_refused(folder: Folder, tmp_path: Path) -> None:
    results = tmp_path / "results"

    def refused(archive: Path, why: str) -> None:
        with pytest.raises(ReportError, match=why):
            record(archive, results)
        assert not results.exists()

    folder.save()
    write_json(folder.path / "machine.json", host().as_json())
    refused(write_archive(folder), "no result")
    run(folder, unit("half", HALF, result="half.json", from_stdout=True))
    archive = write_archive(folder)
    assert "results/half.json" in members(archive)
    refused(archive, "no result")  # of a unit that was done
    rehearsed = Folder(tmp_path / "rehearsed", rehearsal=True)
    recorded_run(rehearsed)
    archive = write_archive(rehearsed)
    assert "REHEARSAL" in archive.name and json.loads((rehearsed.results / "bench.json").read_text())["rehearsal"] == REHEARSAL
    refused(archive, "is a rehearsal")
    # Nor by changing what its state says: each of its documents says it too.
    state = json.loads((rehearsed.path / "state.json").read_text())
    write_json(rehearsed.path / "state.json", {**state, "rehearsal": False})
    refused(write_archive(Folder(rehearsed.path, rehearsal=False)), "is a rehearsal")
    recorded_run(folder)
    write_json(folder.path / "machine.json", host(gpu=None).as_json())
    refused(write_archive(folder), "without a GPU")
    for name, data in {"none.tar.gz": None, "text.tar.gz": b"no archive", "empty.tar.gz": b""}.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, "cannot be read|no archive")


def test_an_archive_that_names_places_elsewhere_writes_nothing_there(folder: Folder, tmp_path: Path) -> None:
    recorded_run(folder)
    state = json.loads((folder.path / "state.json").read_text())
    state["units"]["bench/load"]["result"] = "../../../escaped.json"
    files = {"state.json": state, "machine.json": {**host().as_json(), "gpu": {"model": "../../up"}}, "results/../../../escaped.json": {"x": 1}}
    with tarfile.open(tmp_path / "bad.tar.gz", "w:gz") as archive:
        for name, document in files.items():
            data = json.dumps(document).encode()
            member = tarfile.TarInfo(f"gpu-report/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    (written,) = record(tmp_path / "bad.tar.gz", tmp_path / "a" / "results")
    assert written == tmp_path / "a" / "results" / "up" / "escaped.json"


def executed_chapter(folder: Folder, chapters: Path, source: dict[str, Any]) -> str:
    """Runs a unit that stands for a chapter: its copy has outputs, as `lab.report.chapter` leaves it. Returns its text."""
    chapters.mkdir(exist_ok=True)
    write_json(chapters / "00_x.ipynb", source)
    done = {**source, "cells": [{**cell, "outputs": [{"output_type": "stream", "name": "stdout", "text": ["H200\n"]}], "execution_count": 1} for cell in source["cells"]]}
    copy = f"import json; json.dump({done!r}, open({str(folder.chapters / '00_x.ipynb')!r}, 'w'))"
    run(folder, unit("00_x", copy, stage="chapters"), code=recorded.code_hash())
    return json.dumps(done, indent=1) + "\n"


CELL = {"cell_type": "code", "id": "a", "metadata": {}, "source": ["1"], "outputs": [], "execution_count": None}
CHAPTER = {"cells": [CELL], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def test_executed_chapters_come_only_when_asked_for(folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    recorded_run(folder)
    monkeypatch.setattr(command, "_checkout", lambda: tmp_path)
    monkeypatch.setattr(record_module, "resource", lambda name: tmp_path / name)
    target, wanted = tmp_path / "chapters" / "00_x.ipynb", executed_chapter(folder, tmp_path / "chapters", CHAPTER)
    before, archive = target.read_text(), str(write_archive(folder))
    assert command.main(["record", archive]) == 0 and target.read_text() == before
    assert command.main(["record", archive, "--chapters"]) == 0 and target.read_text() == wanted
    assert capsys.readouterr().out.splitlines()[-1] == str(target)
    assert command.main(["record", archive, "--chapters"]) == 0 and target.read_text() == wanted  # again: outputs are no difference


def test_a_chapter_that_is_not_the_one_at_hand_is_not_brought(folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded_run(folder)
    executed_chapter(folder, tmp_path / "chapters", CHAPTER)
    archive, target = write_archive(folder), tmp_path / "chapters" / "00_x.ipynb"

    def refused(why: str) -> None:
        before = target.read_text() if target.exists() else None
        brought, (reason,) = record_chapters(archive, tmp_path / "chapters")
        assert not brought and why in reason and (target.read_text() if target.exists() else None) == before

    for other in ({**CELL, "source": ["2"]}, {**CELL, "id": "b"}, {**CELL, "cell_type": "markdown"}):
        write_json(target, {**CHAPTER, "cells": [other]})
        refused("its cells are not those")
    write_json(target, CHAPTER)
    with monkeypatch.context() as patch:
        patch.setattr(record_module, "code_hash", lambda: "other")
        refused("and here is other")
    (folder.chapters / "00_x.ipynb").unlink()
    archive = write_archive(folder)
    refused("too large for the archive")
    (folder.chapters / "00_x.ipynb").write_text(picture_notebook(300_000))
    archive = write_archive(folder, limit_nbytes=100_000)
    refused("too large for the archive")
    write_json(folder.chapters / "00_x.ipynb", {**CHAPTER, "cells": "none"})
    archive = write_archive(folder)
    refused("its cells are not those")
    target.unlink()
    refused("its cells are not those")


# The stamp of recorded runs


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    (tmp_path / "package" / "sub").mkdir(parents=True)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "package" / "a.py").write_text("a = 1")
    (tmp_path / "package" / "sub" / "b.py").write_text("b = 1")
    (tmp_path / "csrc" / "k.cu").write_text("kernel")
    monkeypatch.setattr(recorded, "_PACKAGE", tmp_path / "package")
    monkeypatch.setattr(recorded, "resource", lambda name: tmp_path / name)
    return recorded.code_hash.__wrapped__


def test_the_code_hash_is_of_the_sources_and_nothing_else(sources: Callable[[], str], tmp_path: Path) -> None:
    package, seen = tmp_path / "package", [sources()]
    (package / "_data" / "models").mkdir(parents=True)
    (package / "_data" / "models" / "train.py").write_text("in a wheel only")
    (package / "a.pyc").write_text("compiled")
    (tmp_path / "csrc" / "note.md").write_text("no source")
    assert sources() == seen[0] and len(seen[0]) == 16
    for change in (lambda: (package / "a.py").write_text("a = 2"), lambda: (tmp_path / "csrc" / "k.cu").write_text("other"), lambda: (package / "sub" / "b.py").rename(package / "b.py"),
                   lambda: (package / "c.py").write_text("")):  # fmt: skip
        change()
        seen.append(sources())
    assert len(set(seen)) == len(seen)


def test_a_run_by_other_code_is_called_stale(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(recorded, "resource", lambda name: tmp_path if name == "data/results" else CHECKOUT / name)
    for model, code in (("h200", recorded.code_hash()), ("old", "0123456789abcdef")):
        (tmp_path / model).mkdir()
        write_json(tmp_path / model / "x.json", {"recorded": {"code_hash": code, "date": "2026-01-02"}})
    assert recorded.recorded_note("x.json") == "Recorded on: h200, old (stale: by other code, 2026-01-02)."
    assert not recorded.is_stale(tmp_path / "h200" / "x.json") and recorded.is_stale(tmp_path / "old" / "x.json")
    (tmp_path / "old" / "x.json").write_text("{")
    with pytest.raises(ResourceError, match="record it again"):
        recorded.recorded_note("x.json")


def test_a_stale_run_is_drawn_as_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from test_00_chapter import ONE

    monkeypatch.setattr(recorded, "resource", lambda name: tmp_path if name == "data/results" else CHECKOUT / name)
    (tmp_path / "h200").mkdir()
    path = ONE.save(tmp_path / "h200" / "cold_start.json")
    for code, stale in ((recorded.code_hash(), False), ("0", True)):
        write_json(path, {**json.loads(path.read_text()), "recorded": {"code_hash": code, "date": "2026-01-02"}})
        drawn = recorded.beside_recorded(ONE.spans, "cold_start.json")
        assert not isinstance(drawn, str) and ("stale" in drawn.alt_text) == stale


def test_an_installed_package_has_the_hash_of_its_checkout(tmp_path: Path) -> None:
    """As a wheel lays it out: csrc and data inside the package."""
    package = tmp_path / "sllm_mini"
    shutil.copytree(CHECKOUT / "sllm_mini", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(CHECKOUT / "csrc", package / "_csrc")
    shutil.copytree(CHECKOUT / "data" / "models", package / "_data" / "models", ignore=shutil.ignore_patterns("tiny"))
    code = "from sllm_mini.lab.recorded import code_hash; print(code_hash())"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == recorded.code_hash.__wrapped__()  # not the one that another test may have had kept


# The command


def test_without_a_gpu_there_is_nothing_to_report_but_a_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "_ask_for_gpu", lambda rehearsal: (None, "no driver"))
    assert command.main(["--out", str(tmp_path)]) == 1
    assert "no CUDA GPU to report on: no driver; --rehearse" in capsys.readouterr().err
    assert command.main(["record", str(tmp_path / "absent.tar.gz")]) == 1
    with pytest.raises(SystemExit) as caught:
        command.main(["--budget", "soon"])
    assert caught.value.code == 2


def test_the_list_needs_no_gpu_and_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "_ask_for_gpu", lambda rehearsal: (None, "no driver"))
    out = tmp_path / "a" / "b"
    assert command.main(["--list", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for words in ("machine/doctor: about 40 s", "tests/gpu: about", "bench/load-small-cuda-cold: about", "chapters/", "no CUDA GPU here (no driver)"):
        assert words in printed
    assert command.main(["--list", "--out", str(out), "chapters", "summary"]) == 0
    printed = capsys.readouterr().out
    assert "chapters/" in printed and "bench/" not in printed
    assert command.main(["--list", "--out", str(out), "banch"]) == 1 and "no stage or unit is called 'banch'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    Folder(out, rehearsal=False)
    before = sorted(tmp_path.rglob("*"))
    assert command.main(["--list", "--out", str(out)]) == 0 and sorted(tmp_path.rglob("*")) == before


BARE = """
import importlib.abc, sys
class Bare(importlib.abc.MetaPathFinder):  # a Python with nothing but itself
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in sys.stdlib_module_names | {"sllm_mini"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Bare())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: found(name, *rest) if name in sys.stdlib_module_names else None
import sllm_mini.lab.report.__main__ as command
import sllm_mini.lab.report.host as host
if sys.argv.pop(1) == "gpu":
    host._ask_for_gpu = lambda rehearsal: ({"model": "A GPU", "free_nbytes": 0, "total_nbytes": 0}, None)
sys.exit(command.main(sys.argv[1:]))
"""


def test_a_python_without_anything_says_what_is_missing_and_does_what_it_can(tmp_path: Path) -> None:
    """No .venv, no package of ours installed: the checkout alone, on the interpreter that is named."""

    def bare(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-S", "-c", BARE, *args], cwd=tmp_path, env={"PYTHONPATH": str(CHECKOUT), "PATH": os.defpath}, capture_output=True, text=True, check=False)

    done = bare("gpu", "--out", str(tmp_path / "out"), "machine", "tests")
    assert done.returncode in (0, 1), done.stderr
    for words in ("torch is not there; without it falls away: nearly everything", "pytest is not there; without it falls away: the stage tests", "0 left"):
        assert words in done.stdout
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "machine/doctor | skipped: msgspec, numpy" in summary and "tests/gpu | skipped" in summary and (tmp_path / "out" / "gpu-report.tar.gz").exists()


SOME = ("machine", "tests", "kernels", "bench/load-command", "bench/cold-start", "chapters")
"""Every stage; of the benches those that no command's own test runs as the report does: on the fake, and a script."""


@pytest.mark.parametrize("stages", [pytest.param(SOME, id="every stage"), pytest.param((), id="every unit", marks=pytest.mark.slow)])
def test_a_rehearsal_goes_through_every_stage_on_a_processor(stages: tuple[str, ...], tmp_path: Path) -> None:
    """The real steps, the fake GPU: what it makes says that it is a rehearsal, and cannot be recorded."""
    checkout = tmp_path / "checkout"
    (checkout / "tests").mkdir(parents=True)
    (checkout / "chapters").mkdir()
    shutil.copytree(CHECKOUT / "sllm_mini", checkout / "sllm_mini", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("csrc", "data"):
        (checkout / name).symlink_to(CHECKOUT / name)
    for name in ("conftest.py", "command_line.py", "ray_machines.py"):  # all tests share the first, which imports the others
        shutil.copyfile(CHECKOUT / "tests" / name, checkout / "tests" / name)
    shutil.copyfile(CHECKOUT / "pyproject.toml", checkout / "pyproject.toml")
    shutil.copyfile(CHECKOUT / "Makefile", checkout / "Makefile")
    (checkout / "tests" / "test_00_on_gpu.py").write_text("import pytest\n@pytest.mark.gpu\ndef test_it():\n    pass\ndef test_other():\n    pass\n")
    cells = [
        {"cell_type": "markdown", "id": "a", "metadata": {}, "source": "# A chapter"},
        {"cell_type": "code", "id": "b", "metadata": {}, "source": "import os; print(os.path.basename(os.environ['SLLM_MINI_WORK']), os.listdir(os.environ['SLLM_MINI_WORK']))",
         "outputs": [], "execution_count": None},
    ]  # fmt: skip
    (checkout / "chapters" / "00_short.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    out = tmp_path / "out"
    asked = ["make", "--no-print-directory", "gpu-report", f"PYTHON={sys.executable}", f"OUT={out}", f"STAGES={' '.join(stages)}", "BUDGET=600", "REPORT_FLAGS=--rehearse"]
    environment = {key: value for key, value in os.environ.items() if key not in ("SLLM_MINI_WORK", "PYTHONPATH", MARK)}
    done = subprocess.run(asked, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    folder = Folder(out, rehearsal=True)
    logs = "\n".join(path.read_text() for path in sorted(folder.logs.iterdir()) if folder.entries[path.stem.replace(".", "/", 1)].status != "done")
    assert done.returncode == 0, done.stdout + done.stderr + logs
    assert REHEARSAL in done.stdout and "0 failed, 0 left" in done.stdout
    assert {key.split("/")[0] for key in folder.entries} == {"machine", "kernels", "bench", "tests", "chapters"}
    assert all(entry.status == "done" for entry in folder.entries.values())
    planned = {unit.key for unit in Table(look(out, rehearsal=True), folder, checkout).plan().units}
    assert folder.entries.keys() == {key for key in planned if not stages or key in stages or key.split("/")[0] in stages}
    kernels = json.loads((folder.results / "kernels.json").read_text())
    assert kernels["machine"]["gpu"] == "Recording GPU" and [r["name"] for r in kernels["results"]] == ["sum64", "xxh3_leaves", "decode_attention"] and kernels["rehearsal"] == REHEARSAL
    doctor = json.loads((folder.results / "doctor.json").read_text())
    assert doctor["limits"]["host_to_device_copy_bytes_per_second"] > 0 and doctor["machine"]["gpu"]["model"] == "Recording GPU"
    assert "1 skipped" in (folder.logs / "tests.gpu.log").read_text() and (out / "junit" / "00_on_gpu.xml").exists()
    chapter = json.loads((folder.chapters / "00_short.ipynb").read_text())
    assert "".join(chapter["cells"][0]["source"]) == REHEARSAL and "tiny" in "".join(chapter["cells"][2]["outputs"][0]["text"])
    assert "outputs" in (source := json.loads((checkout / "chapters" / "00_short.ipynb").read_text()))["cells"][1] and source["cells"][1]["outputs"] == []
    assert not (folder.work / "chapters").exists()  # what chapters made is deleted after the last
    assert headlines(folder) and all(row["ratio_to_limit"] for row in headlines(folder) if row["unit"] == "kernels/speed")
    summary = (out / "summary.md").read_text()
    assert "# Report of Recording GPU (rehearsal)" in summary and REHEARSAL in summary
    archive = out / "gpu-report-REHEARSAL.tar.gz"
    assert archive.stat().st_size < 16_000_000 and {"summary.md", "headlines.json", "machine.json", "state.json", "results/kernels.json"} <= members(archive).keys()
    with pytest.raises(ReportError, match="rehearsal"):
        record(archive, tmp_path / "results")
    again = subprocess.run(asked, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert Folder(out, rehearsal=True).entries == folder.entries  # nothing was run twice


@pytest.mark.parametrize("wrong", ["a token too few", "a token too many", "another scale"])
def test_attention_that_is_wrong_is_named(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sllm_mini.device import fake_attention
    from sllm_mini.device.fake import RecordingRuntime
    from sllm_mini.lab.report.attention import check_attention

    device, right = RecordingRuntime().device(), fake_attention.HostAttention
    assert "float64" in check_attention(device, "cpu")

    class Wrong(right):  # type: ignore[misc, valid-type]
        def _chunks(self, length: int, window: int) -> Any:
            more = {"a token too few": -1, "a token too many": 1}.get(wrong, 0)
            for chunk, begin, end in super()._chunks(length, window):
                yield chunk, begin, min(max(end + more, begin + 1), 700) if end == length else end

        def attend(self, grid: Any, block: Any, args: Any) -> None:
            scale = args[-1] + 4096 if wrong == "another scale" else args[-1]  # one part in two thousand
            super().attend(grid, block, (*args[:-1], scale))

    monkeypatch.setattr(fake_attention, "HostAttention", Wrong)
    with pytest.raises(DeviceError, match=r"decode_attention of [0-9,]+ tokens"):
        check_attention(RecordingRuntime().device(), "cpu")
