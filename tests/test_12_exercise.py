"""Exercises: the package's own function is blank wherever it is held, a student's is checked apart, and nothing stays changed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

from sllm_mini.control import estimate
from sllm_mini.control.estimate import Estimator, load_seconds
from sllm_mini.control.messages import ModelSpec, NodeSpec
from sllm_mini.control.state import NodeState
from sllm_mini.lab.exercise import BlankError, Exercise, ExerciseError, Limits, Report, Result
from sllm_mini.lab.exercise.child import Outcome, run_in_child
from sllm_mini.lab.exercise.stand_in import Original
from sllm_mini.types import Tier

TARGET = "sllm_mini.control.estimate:load_seconds"
QUICK = Limits(cpu_seconds=1, seconds=20, memory_nbytes=64 << 20)


class Registry:
    held = staticmethod(load_seconds)
    table = {"load": load_seconds}  # noqa: RUF012 - as a student's would be
    many = (load_seconds, [load_seconds])
    fixed = functools.partial(load_seconds, 1.0)


def default(*arguments: Any, f: Callable[..., float] = load_seconds) -> float:
    return f(*arguments)


def closure() -> Callable[..., float]:
    kept = load_seconds
    return lambda *arguments: kept(*arguments)


def reloaded() -> Callable[..., float]:
    """As the package is reloaded in a notebook before the check; the tests' own module is put back."""
    before = dict(vars(estimate))
    fresh = importlib.reload(estimate).load_seconds
    vars(estimate).update(before)
    return fresh


def from_file() -> Callable[..., float]:
    spec = importlib.util.spec_from_file_location("taken", estimate.__file__)
    assert spec is not None and spec.loader is not None
    taken = importlib.util.module_from_spec(spec)
    sys.modules["taken"] = taken
    try:
        spec.loader.exec_module(taken)
    finally:
        del sys.modules["taken"]
    found: Callable[..., float] = taken.load_seconds
    return found


def copied() -> Callable[..., float]:
    return FunctionType(load_seconds.__code__, vars(estimate))


HOLDERS: dict[str, Callable[[], Callable[..., float]]] = {
    "its own name": lambda: load_seconds,
    "its module": lambda: estimate.load_seconds,
    "a class": lambda: Registry.held,
    "a table": lambda: Registry.table["load"],
    "a tuple": lambda: Registry.many[0],  # type: ignore[return-value]
    "a list": lambda: Registry.many[1][0],  # type: ignore[index]
    "a default": lambda: default,
    "a closure": closure,
    "a partial": lambda: lambda q, n, b: Registry.fixed(n, b) + q - 1,
    "a reload": reloaded,
    "another import of the file": from_file,
    "a copy": copied,
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_whoever_holds_the_function_calls_the_stand_in_and_has_it_back(holder: str) -> None:
    held = HOLDERS[holder]()
    assert held(1.0, 10, 5.0) == 3.0
    with Original(TARGET).replaced(lambda q, n, b: q - 100.0):
        assert held(1.0, 10, 5.0) == -99.0
    assert held(1.0, 10, 5.0) == 3.0


def test_the_package_itself_runs_on_the_stand_in() -> None:
    node = NodeState(NodeSpec(name="n", devices=1, dram_nbytes=10_000, remote_bytes_per_second=1.0, disk_bytes_per_second=100.0, dram_bytes_per_second=1000.0), [0], 10_000)
    spec = ModelSpec(name="m", nbytes=1000)
    assert Estimator().load(node, spec, Tier.DISK, 0.0) == 10.0
    with Original(TARGET).replaced(lambda queue, nbytes, rate: 7.0 * nbytes):
        assert Estimator().load(node, spec, Tier.DISK, 0.0) == 7000.0


def test_a_module_attribute_that_somebody_set_is_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever tries a function of their own that way has it neither blanked nor taken for the original."""
    monkeypatch.setattr(estimate, "load_seconds", lambda *_: 5.0)
    original = Original(TARGET)
    assert load_seconds in original.functions and estimate.load_seconds not in original.functions
    assert points(lambda q, n, b: q + n / b) == 3.0 and points(load_seconds) == 0.0


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_the_function_is_back_after_any_error(error: type[BaseException]) -> None:
    kept = load_seconds.__code__, load_seconds.__defaults__, load_seconds.__kwdefaults__, inspect.signature(load_seconds)
    with pytest.raises(error), Original(TARGET).replaced(lambda *_: 0.0):
        raise error
    assert (load_seconds.__code__, load_seconds.__defaults__, load_seconds.__kwdefaults__, inspect.signature(load_seconds)) == kept


def test_a_stand_in_that_calls_what_it_replaces_is_refused_in_any_thread() -> None:
    errors: list[BaseException] = []

    def call() -> None:
        try:
            load_seconds(1.0, 2, 1.0)
        except BlankError as error:
            errors.append(error)

    with Original(TARGET).replaced(lambda *arguments: load_seconds(*arguments)):
        call()
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert len(errors) == 2 and load_seconds(1.0, 2, 1.0) == 3.0


@pytest.mark.parametrize("target", ["sllm_mini.nowhere:f", "sllm_mini.eviction:nothing", "sllm_mini.eviction:Policy", "load_seconds", ""])
def test_a_target_that_is_no_function_is_refused(target: str) -> None:
    with pytest.raises(ExerciseError, match="function"):
        Exercise(target).check(load_seconds, CHECKS)


def test_what_is_replaced_cannot_be_replaced_again() -> None:
    with Original(TARGET).replaced(lambda *_: 0.0), pytest.raises(ExerciseError, match="once at a time"):
        Original(TARGET)


# Checks


def idle_queue(f: Callable[..., float]) -> None:
    assert f(0.0, 10, 5.0) == 2.0, "an empty queue adds nothing: 10 bytes at 5 bytes/s take 2 s"


def no_bytes(f: Callable[..., float]) -> None:
    assert f(4.0, 0, 5.0) == 4.0, "nothing to move still waits for the queue"


CHECKS = {idle_queue: 1, no_bytes: 2}


def check(function: Callable[..., float], limits: Limits = QUICK) -> Report:
    return Exercise(TARGET, limits).check(function, CHECKS)


def points(function: Callable[..., float]) -> float:
    return check(function).points


def test_points_are_given_by_check_with_a_sentence_for_each_that_failed() -> None:
    report = check(lambda q, n, b: n / b)
    assert [result.points for result in report.results] == [1, 0.0] and (report.points, report.max_points) == (1.0, 3.0)
    assert report.results[1].said == "nothing to move still waits for the queue"
    assert points(lambda q, n, b: q + n / b) == 3.0
    shown = report._repr_mimebundle_()
    for text in shown.values():
        assert "no bytes" in text and "1 of 3" in text and "nothing to move" in text
    assert "<table" in shown["text/html"] and "1 of 3 points" in str(report)


def test_grade_shows_the_report_and_returns_the_number_that_nbgrader_reads(capsys: pytest.CaptureFixture[str]) -> None:
    given = Exercise(TARGET, QUICK).grade(lambda q, n, b: n / b, CHECKS)
    assert type(given) is float and float(repr(given)) == 1.0
    assert "nothing to move" in capsys.readouterr().out and capsys.readouterr().err == ""


def test_a_stub_is_told_that_it_is_one() -> None:
    def stub(q: float, n: int, b: float) -> float:
        raise NotImplementedError("a08")

    report = check(stub)
    assert report.points == 0 and report.results[0].said == "load_seconds is not written yet: a08"


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda q, n, b: 1 / 0, "it raised ZeroDivisionError: division by zero"),
        (lambda q, n: 1, "it raised TypeError"),
        (None, "it raised TypeError"),
    ],
)
def test_errors_are_sentences(function: Callable[..., float], said: str) -> None:
    assert check(function).results[0].said.startswith(said)


def test_what_was_printed_is_shown_where_a_check_failed(capfd: pytest.CaptureFixture[str]) -> None:
    def tells(q: float, n: int, b: float) -> float:
        print("q is", q)
        os.write(2, b"and loudly")
        return n / b

    report = check(tells)
    assert "q is 4.0" in str(report) and "q is 0.0" not in str(report)
    assert capfd.readouterr() == ("", "")


def test_checks_without_points_are_refused() -> None:
    for checks in ({}, {idle_queue: 0}):
        with pytest.raises(ExerciseError, match="no points"):
            Exercise(TARGET).check(load_seconds, checks)


# Traps: an import of the reference may not score


KEPT = {name: make() for name, make in HOLDERS.items()}


@pytest.mark.parametrize("holder", HOLDERS)
def test_the_original_scores_nothing_however_it_was_taken_along(holder: str) -> None:
    kept = KEPT[holder]
    assert points(kept) == 0.0 and "blank" in check(lambda *arguments: kept(*arguments)).results[0].said
    assert kept(1.0, 10, 5.0) == 3.0


def imports_it(*arguments: Any) -> float:
    from sllm_mini.control.estimate import load_seconds as again

    return again(*arguments)


def by_the_package(q: float, n: int, b: float) -> float:
    node = NodeState(NodeSpec(name="n", devices=1, dram_nbytes=10_000, remote_bytes_per_second=1.0, disk_bytes_per_second=b, dram_bytes_per_second=1000.0), [0], 10_000, loads_until=q)
    return Estimator().load(node, ModelSpec(name="m", nbytes=max(n, 1)), Tier.DISK, 0.0)


def reloads_it(*arguments: Any) -> float:
    return importlib.reload(estimate).load_seconds(*arguments)


def imports_it_anew(*arguments: Any) -> float:
    del sys.modules["sllm_mini.control.estimate"]
    return imports_it(*arguments)


def executes_its_file(*arguments: Any) -> float:
    return from_file()(*arguments)


def reads_its_file(*arguments: Any) -> float:
    scope: dict[str, Any] = {"__name__": estimate.__name__}
    exec(Path(estimate.__file__).read_text(), scope)
    return float(scope["load_seconds"](*arguments))


def asks_another_process(*arguments: Any) -> float:
    code = f"from sllm_mini.control.estimate import load_seconds; print(load_seconds(*{arguments}))"
    return float(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout)


@pytest.mark.parametrize("function", [imports_it, by_the_package, reloads_it, imports_it_anew, executes_its_file, reads_its_file, asks_another_process])
def test_cheating_by_import_scores_nothing(function: Callable[..., float]) -> None:
    assert function(4.0, 5, 5.0) == 5.0, "it works outside"
    report = check(function)
    assert report.points == 0.0
    assert any(word in report.results[0].said for word in ("blank", "no other program"))


def test_a_pasted_source_cannot_be_told_from_work() -> None:
    """What cannot be stopped, as the teacher's guide says."""
    scope: dict[str, Any] = {}
    exec(inspect.getsource(load_seconds), scope)
    assert points(scope["load_seconds"]) == 3.0


# Traps: a function that ends its process loses its own points


def exits(_: float) -> None:
    os._exit(0)


def leaves(_: float) -> None:
    sys.exit()


def loops(_: float) -> None:
    while True:
        pass


def fills_memory(_: float) -> None:
    kept = []
    while True:
        kept.append(bytearray(1 << 20))


def recurses(x: float) -> None:
    recurses(x)


def is_killed(_: float) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def crashes(_: float) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def fills_the_disk(_: float) -> None:
    while True:
        print("x" * 10_000)


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (exits, "exit code 0"), (leaves, "calls exit"), (loops, "does a loop in it never end"), (fills_memory, "more memory"), (recurses, "calls itself without an end"),
        (is_killed, "ended by SIGKILL"), (crashes, "ended by SIGSEGV"), (fills_the_disk, "File too large"),
    ],
)  # fmt: skip
def test_a_function_that_dies_loses_only_the_points_of_that_check(end: Callable[[float], None], said: str) -> None:
    def dies(q: float, n: int, b: float) -> float:
        if n == 0:
            end(q)
        return q + n / b

    report = check(dies)
    assert [result.points for result in report.results] == [1, 0.0] and said in report.results[1].said
    assert points(lambda q, n, b: q + n / b) == 3.0


def test_one_that_waits_for_ever_is_ended_with_what_it_started() -> None:
    reading, writing = os.pipe()

    def waits() -> None:
        if os.fork():
            threading.Event().wait()
        signal.pause()  # a grandchild, which holds the pipe open as long as it lives

    outcome = run_in_child(waits, Limits(seconds=1))
    os.close(writing)
    assert outcome.died is not None and "within 1 s" in outcome.died
    assert os.read(reading, 1) == b""
    os.close(reading)


def test_the_clock_that_one_check_used_up_is_missing_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sllm_mini.lab.exercise.ALL_CHECKS_SECONDS", 1.5)
    report = check(lambda *_: threading.Event().wait())
    assert "gave no answer" in report.results[0].said and report.results[1].said.startswith("not run")


class Strange(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__("strange")


def raise_strange() -> None:
    raise Strange(1, 2)


def test_what_cannot_be_pickled_is_told_in_words() -> None:
    for work in (raise_strange, lambda: threading.Lock()):
        outcome = run_in_child(work)
        assert isinstance(outcome.error, RuntimeError) and outcome.value is None
    assert run_in_child(lambda: {"a": 1}) == Outcome({"a": 1})


def test_a_child_leaves_nothing_behind() -> None:
    before = set(os.listdir("/proc/self/fd"))
    for work in (lambda: 1, lambda: os._exit(4), lambda: 1 / 0):
        run_in_child(work)
    assert set(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-os.getpid(), os.WNOHANG)
    with pytest.raises(ValueError, match="at least 1"):
        Limits(cpu_seconds=0)


# Showing


def seconds() -> list[float]:
    node = NodeState(NodeSpec(name="n", devices=1, dram_nbytes=10_000, remote_bytes_per_second=1.0, disk_bytes_per_second=100.0, dram_bytes_per_second=1000.0), [0], 10_000)
    return [Estimator().load(node, ModelSpec(name="m", nbytes=nbytes), Tier.DISK, 0.0) for nbytes in (100, 200)]


def test_the_whole_package_runs_on_both_and_what_it_did_is_drawn_here(capsys: pytest.CaptureFixture[str]) -> None:
    drawn: list[object] = []
    exercise = Exercise(TARGET)
    exercise.show(lambda q, n, b: q + 2 * n / b, seconds, lambda own, theirs: drawn.extend((own, theirs, os.getpid())))
    assert drawn == [[1.0, 2.0], [2.0, 4.0], os.getpid()] and seconds() == [1.0, 2.0]
    exercise.show(lambda q, n, b: os._exit(1), seconds, lambda own, theirs: drawn.append("wrong"))
    exercise.show(load_seconds, seconds, lambda own, theirs: drawn.append("wrong"))
    assert len(drawn) == 3
    ended, refused = capsys.readouterr().out.splitlines()
    assert "exit code 1" in ended and ended.startswith("The package does not get through with your load_seconds yet") and "blank" in refused


def test_what_does_not_run_with_the_original_is_an_error() -> None:
    with pytest.raises(ExerciseError, match="the package's own load_seconds cannot be shown here: it raised ZeroDivisionError"):
        Exercise(TARGET).show(load_seconds, lambda: 1 / 0, lambda own, theirs: None)


def test_a_result_knows_whether_it_passed() -> None:
    assert Result("a", 2, 2).passed and not Result("a", 0.0, 2, "why").passed
