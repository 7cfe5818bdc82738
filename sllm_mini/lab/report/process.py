"""One command, run to its end or to its limit: its output in files, and nothing of it left running afterwards.

The command gets a session of its own and a mark in its environment. What is left at the end is found by either, so a
grandchild that made itself a session is ended too. Linux only. Safe from several threads.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sllm_mini.lab.children import signal_group

MARK = "SLLM_MINI_REPORT_UNIT"
_GRACE_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended: `rc` is None where it was killed because its `limit_seconds` were over."""

    rc: int | None
    seconds: float


def run_limited(
    command: Sequence[str],
    *,
    log: Path,
    limit_seconds: float,
    env: Mapping[str, str],
    cwd: Path,
    output: Path | None = None,
) -> Ended:
    """Runs `command` with its output in `log`, standard output in `output` instead if that is given.

    After `limit_seconds`, and on a KeyboardInterrupt (which it lets through), the command and all it started are ended:
    asked first, killed after 3 s. A program that is not there ends with 127, the shell's code for it.
    """
    mark = uuid.uuid4().hex
    start = time.monotonic()
    with log.open("ab") as errors, contextlib.ExitStack() as files:
        errors.write(f"$ {' '.join(command)}\n".encode())
        errors.flush()
        out = errors if output is None else files.enter_context(output.open("wb"))
        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                env={**env, MARK: mark},
                cwd=cwd,
                start_new_session=True,
            )
        except OSError as error:
            errors.write(f"{error}\n".encode())
            return Ended(127, time.monotonic() - start)
        try:
            rc: int | None = child.wait(timeout=max(limit_seconds, 0.0))
        except subprocess.TimeoutExpired:
            rc = None
            errors.write(f"ended by the report: its {limit_seconds:.0f} s were over\n".encode())
        finally:
            _end(child, mark)
    return Ended(rc, time.monotonic() - start)


def _end(child: subprocess.Popen[bytes], mark: str) -> None:
    """Leaves nothing of the command running. Finished commands without stragglers cost one look at /proc."""
    for number, patience in ((signal.SIGTERM, _GRACE_SECONDS), (signal.SIGKILL, _GRACE_SECONDS)):
        left = _marked(mark) - {child.pid} if child.poll() is not None else {child.pid, *_marked(mark)}
        if not left:
            return
        if child.poll() is None:
            signal_group(child, number)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and (child.poll() is None or _marked(mark) - {child.pid}):
            time.sleep(0.02)


def _marked(mark: str) -> set[int]:
    """The processes whose environment carries the mark; a zombie's is empty, so it does not count."""
    wanted = f"{MARK}={mark}".encode()
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                environment = (folder / "environ").read_bytes()
            except OSError:  # it ended, or is another user's
                continue
            if wanted in environment:
                found.add(int(folder.name))
    return found
