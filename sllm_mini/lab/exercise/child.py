"""Runs a function in a forked child with limits, so that whatever it does ends with the child.

A fork has everything that the notebook has: functions of other cells, imports, data. It costs some milliseconds and the pages
that it writes. What the child prints goes to a file of its own; it can stop, crash, loop, fill memory or
end itself, and the parent learns of it in one sentence. It is no prison: it has the rights of its user. Linux only.
"""

from __future__ import annotations

import os
import pickle
import resource
import selectors
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_PRINTED_NBYTES = 2000
_OVER_NBYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """What one child may use: seconds of processor time and of the clock, and bytes of memory and of each file, beyond what
    is there as it starts. Raises ValueError for a limit below 1."""

    cpu_seconds: int = 2
    seconds: float = 30.0
    memory_nbytes: int = 512 << 20
    file_nbytes: int = 1 << 20

    def __post_init__(self) -> None:
        if min(self.cpu_seconds, self.seconds, self.memory_nbytes, self.file_nbytes) < 1:
            raise ValueError(f"{self} leaves nothing to run with; give every limit at least 1")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What `work` returned, or the error it raised, or in `died` how its process ended before; and what it printed, cut."""

    value: Any = None
    error: BaseException | None = None
    died: str | None = None
    printed: str = ""


def run_in_child(work: Callable[[], Any], limits: Limits | None = None) -> Outcome:
    """Runs `work` in a child of this process and waits for it. An error that cannot be pickled comes back as RuntimeError
    with its type and text. Whatever the child started in its own process group is ended with it. Not safe from several threads.
    """
    limits = limits or Limits()
    reading, writing = os.pipe()
    with tempfile.TemporaryFile() as printed:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads, of which a kernel has some; the child uses none
            child = os.fork()
        if child == 0:
            os.close(reading)
            _be_the_child(work, limits, writing, printed)
        os.close(writing)
        try:
            answer = _read(reading, limits.seconds)
        finally:
            os.close(reading)
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child, signal.SIGKILL)
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)  # it may have died, or been stopped, before it had a group
            _, status = os.waitpid(child, 0)
        printed.seek(0)
        text = printed.read(_PRINTED_NBYTES).decode(errors="replace")
    if answer is None:
        return Outcome(died=f"it gave no answer within {limits.seconds:g} s; does it wait for something?", printed=text)
    try:
        value, error = pickle.loads(answer)
    except (EOFError, pickle.UnpicklingError):
        return Outcome(died=_how_it_ended(status, limits), printed=text)
    return Outcome(value, error, printed=text)


def _read(reading: int, seconds: float) -> bytes | None:
    """All that comes until the other end is closed; None if that takes too long."""
    end = time.monotonic() + seconds
    parts: list[bytes] = []
    with selectors.DefaultSelector() as selector:
        selector.register(reading, selectors.EVENT_READ)
        while selector.select(max(end - time.monotonic(), 0)):
            if not (part := os.read(reading, 1 << 16)):
                return b"".join(parts)
            parts.append(part)
    return None


def _how_it_ended(status: int, limits: Limits) -> str:
    if not os.WIFSIGNALED(status):
        return f"it ended its process (exit code {os.waitstatus_to_exitcode(status)}); a function returns, it does not exit"
    number = signal.Signals(os.WTERMSIG(status))
    if number is signal.SIGXCPU:
        return f"it used more than {limits.cpu_seconds} s of processor time; does a loop in it never end?"
    return f"its process was ended by {number.name}" + ("; a recursion without an end does that" if number is signal.SIGSEGV else "")


def _be_the_child(work: Callable[[], Any], limits: Limits, writing: int, printed: IO[bytes]) -> None:
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        for number in (1, 2):
            os.dup2(printed.fileno(), number)
        sys.stdout = sys.stderr = open(os.dup(printed.fileno()), "w", buffering=1, encoding="utf-8")  # noqa: SIM115 - ends with the process
        _limit(limits)
        _write(writing, _answer(work))
        code = 0
    finally:  # in any case: what the parent was doing is not the child's to go on with
        os._exit(code)


def _answer(work: Callable[[], Any]) -> bytes:
    value, error = None, None
    try:
        value = work()
    except BaseException as raised:  # noqa: BLE001 - whatever it is: it is the answer
        error = raised
        error.__traceback__ = error.__cause__ = error.__context__ = None
    try:
        answer = pickle.dumps((value, error))
        pickle.loads(answer)  # an error whose arguments are not its text can be written, and not be read
    except Exception as raised:  # noqa: BLE001 - anything may be in it
        told = error if error is not None else raised
        answer = pickle.dumps((None, RuntimeError(f"{type(told).__name__}: {told}"[:500])))
    return answer


def _write(writing: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(writing, view) :]


def _limit(limits: Limits) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for which, most in (
        (resource.RLIMIT_CPU, limits.cpu_seconds),
        (resource.RLIMIT_AS, used + limits.memory_nbytes),
        (resource.RLIMIT_FSIZE, max(limits.file_nbytes, _OVER_NBYTES)),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(which)
        resource.setrlimit(which, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
