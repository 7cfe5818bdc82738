"""Checks a function that a student wrote for one of the package's own, and shows what the whole package does with it.

    from sllm_mini.lab.exercise import Exercise

    def the_first_free_device_is_next(next_chunk):
        assert next_chunk(pending, [0, 1]) == 1, "device 0 has no free slot, so the chunk of device 1 is next"

    Exercise("sllm_mini.loading.pipeline:next_chunk").grade(next_chunk, {the_first_free_device_is_next: 2})

A check is a function of the student's function; it passes if it returns and fails with the sentence of its `assert`. Each runs
in a forked child of its own, with limits, where the package's function is blank in every place that holds it (`stand_in`) and its
source cannot be opened: importing, reloading or wrapping the original scores nothing, and a function that ends its process, loops or
fills memory loses the points of that check alone. What no check can stop: the package's text, or its code object, taken
along before. Used by the assignments.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from sllm_mini.lab.exercise.child import Limits, Outcome, run_in_child
from sllm_mini.lab.exercise.report import Report, Result
from sllm_mini.lab.exercise.stand_in import BlankError, ExerciseError, Original

__all__ = ["BlankError", "Exercise", "ExerciseError", "Limits", "Report", "Result"]

Function = Callable[..., Any]
Check = Callable[[Function], None]
Data = TypeVar("Data")

ALL_CHECKS_SECONDS = 90.0
"""How long the checks of one `grade` may take together, by the clock; nbgrader ends a cell after 120 s."""
SHOW_LIMITS = Limits(cpu_seconds=60, seconds=60.0, memory_nbytes=6 << 30, file_nbytes=2 << 30)
"""For what runs the whole package."""
_STARTS = {"subprocess.Popen", "os.system", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.spawn"}


class Exercise:
    """A function of the package, "module:name", that students write; ExerciseError at its first use where it is none. One thread at a time."""

    def __init__(self, target: str, limits: Limits | None = None) -> None:
        self._target, self._limits = target, limits or Limits()
        self._name = target.partition(":")[2]

    def check(self, function: Function, checks: Mapping[Check, float]) -> Report:
        """Runs each check in a child and gives it all its points or none. Raises ExerciseError for checks without points."""
        if not checks or min(checks.values()) <= 0:
            raise ExerciseError(f"the checks of {self._name} have no points to give; give each a number above 0")
        original = Original(self._target)  # looked for each time: a reload may have made copies
        end = time.monotonic() + ALL_CHECKS_SECONDS
        return Report(self._name, tuple(self._result(original, function, check, points, end) for check, points in checks.items()))

    def grade(self, function: Function, checks: Mapping[Check, float]) -> float:
        """As `check`; shows the report and returns the points, which is what nbgrader takes from a cell."""
        report = self.check(function, checks)
        _show(report)
        return report.points

    def show(self, function: Function, work: Callable[[], Data], draw: Callable[[Data, Data], object]) -> None:
        """Runs `work` with the package's own function and with the student's, each in a child, and draws both: `draw(own, theirs)`.

        `work` returns data (it is pickled), `draw` runs here. A function that fails is told in one sentence. Raises ExerciseError
        if `work` fails with the package's own.
        """
        own = run_in_child(work, SHOW_LIMITS)
        if (said := self._said(own)) is not None:
            raise ExerciseError(f"the package's own {self._name} cannot be shown here: {said}")
        original = Original(self._target)

        def with_theirs() -> Data:
            with original.replaced(function):
                return work()

        theirs = run_in_child(with_theirs, SHOW_LIMITS)
        if (said := self._said(theirs)) is not None:
            print(f"The package does not get through with your {self._name} yet: {said}.")
        else:
            draw(own.value, theirs.value)

    def _result(self, original: Original, function: Function, check: Check, points: float, end: float) -> Result:
        name = check.__name__.strip("_").replace("_", " ")
        left = end - time.monotonic()
        if left < 1:
            return Result(name, 0.0, points, f"not run: the checks before it took all of the {ALL_CHECKS_SECONDS:g} s")

        def work() -> None:
            original.blank()
            sys.addaudithook(_guard(original))
            check(function)

        outcome = run_in_child(work, replace(self._limits, seconds=min(self._limits.seconds, left)))
        said = self._said(outcome)
        return Result(name, points if said is None else 0.0, points, said or "", outcome.printed)

    def _said(self, outcome: Outcome) -> str | None:
        """Why it failed, in one sentence; None if it did not."""
        error = outcome.error
        if error is None:
            return outcome.died
        text = " ".join(str(error).split())[:400]
        if isinstance(error, AssertionError):
            return str(error).partition("\n")[0] or "an assert failed that says no more"
        if isinstance(error, BlankError):
            return text
        if isinstance(error, NotImplementedError):
            return f"{self._name} is not written yet" + (f": {text}" if text else "")
        if isinstance(error, MemoryError):
            return "it asked for more memory than a check may use"
        if isinstance(error, RecursionError):
            return "it calls itself without an end (RecursionError)"
        if isinstance(error, SystemExit):
            return "it calls exit; a function returns"
        return f"it raised {type(error).__name__}" + (f": {text}" if text else "")


def _guard(original: Original) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook, for good: neither the file of the original nor its compiled form is opened, and no program started."""
    file = os.path.realpath(original.file)
    compiled = os.path.realpath(importlib.util.cache_from_source(original.file)).partition(f".{sys.implementation.cache_tag}")[0] + "."

    def guard(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], str | bytes):
            path = os.path.realpath(os.fsdecode(args[0]))
            if path == file or path.startswith(compiled):
                raise BlankError(f"it reads the file of the package's own {original.name}, which is blank here; write what it does")
        elif event in _STARTS:
            raise ExerciseError(f"a check starts no other program ({event})")

    return guard


def _show(report: Report) -> None:
    ipython = sys.modules.get("IPython")  # a kernel has imported it
    if ipython is not None and ipython.get_ipython() is not None:
        from IPython.display import display

        display(report)
    else:
        print(report)
