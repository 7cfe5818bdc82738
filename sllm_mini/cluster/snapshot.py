"""A running process written to files, and brought back: with CRIU, where the machine allows it. Explained in chapter 05.

A restore skips everything that came before the snapshot: imports, the model's skeleton, the loading of its weights, a
warm-up (AWS SnapStart and Catalyzer do this to whole virtual machines and sandboxes). A snapshot is as large as the
memory that the process has written to; saving writes all of it and restoring reads all of it.

CRIU asks for root or CAP_CHECKPOINT_RESTORE, for a kernel that it knows, and for a process that stands alone: a session
of its own (`start_new_session=True`), no terminal, no pipe or socket to another process (give it files or /dev/null),
no GPU memory. It comes back under its old pid, which must be free, and finds the files that it had open where they were.
A snapshot is a program with its memory: restore only what you saved.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sllm_mini.errors import SllmError, UnsupportedError

_LOG = "criu.log"
_PID = "pid"
_NOISE = ("exited, status", "rlimit:", "FAILED", "Could not initialize")
"""Errors in its log that are no reason: of limits it goes on without, and of what failed because something else had."""


class SnapshotError(SllmError):
    """A process that could not be saved or restored; the message holds CRIU's own first reason."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A saved process: the folder with its image files, their size on disk, and the pid that it had and will have."""

    folder: Path
    nbytes: int
    pid: int


def why_no_criu() -> str | None:
    """Why no snapshot can be made on this machine, in one sentence; None if it can. Runs `criu check`: some 0.1 s."""
    if shutil.which("criu") is None:
        return "criu is not installed; Debian and Ubuntu have a package of that name"
    checked = subprocess.run(["criu", "check"], capture_output=True, stdin=subprocess.DEVNULL, check=False)
    if checked.returncode == 0:
        return None
    return f"criu is installed but cannot work here ({_reason(checked.stderr.decode(errors='replace'))}); it needs root and a kernel that it knows"


def save_snapshot(pid: int, folder: str | os.PathLike[str], *, keep_running: bool = False) -> Snapshot:
    """Writes the process `pid` with all it started to `folder`, which must not exist, and ends it, or lets it run on.

    The folder, readable by this user alone, appears when the snapshot is whole. Raises UnsupportedError where
    `why_no_criu` has a reason, SnapshotError if the process cannot be saved (it runs on then), or the folder is there or
    cannot be made.
    """
    place = Path(folder).absolute()
    if place.exists():
        raise SnapshotError(f"{place} is there already; choose another folder or remove it")
    _require_criu()
    try:
        unfinished = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    except OSError as error:
        raise SnapshotError(f"{place} cannot be made ({error.strerror}); choose a folder in one that is there and may be written to") from error
    try:
        (unfinished / _PID).write_text(str(pid))  # before the process ends: after that nothing may fail that can be tried first
        _criu("dump", unfinished, f"process {pid} was not saved", "--tree", str(pid), *(["--leave-running"] if keep_running else []))
        os.rename(unfinished, place)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return open_snapshot(place)


def open_snapshot(folder: str | os.PathLike[str]) -> Snapshot:
    """A snapshot that was saved before. Raises SnapshotError if the folder holds none or is another user's."""
    place = Path(folder).absolute()
    try:
        owner = place.stat().st_uid
        pid = int((place / _PID).read_text())
        nbytes = sum(file.stat().st_blocks * 512 for file in place.iterdir())
    except (OSError, ValueError) as error:
        raise SnapshotError(f"{place} holds no snapshot ({error}); save one there first") from error
    if owner != os.geteuid():
        raise SnapshotError(f"{place} is user {owner}'s; a snapshot is a program, so restore only your own")
    return Snapshot(place, nbytes, pid)


def restore_snapshot(folder: str | os.PathLike[str]) -> int:
    """Brings the process back, running from where it was saved; its pid. It is nobody's child: watch it with a
    pidfd, or be a subreaper (prctl) to collect it.
    If the saved process was a child of this one, wait for that first: until then its pid is not free.

    Raises UnsupportedError where `why_no_criu` has a reason, SnapshotError if it cannot be restored: its pid is taken
    (the process runs still, or again), a file that it had open has changed, the snapshot is damaged.
    """
    snapshot = open_snapshot(folder)
    _require_criu()
    _criu("restore", snapshot.folder, f"{snapshot.folder} was not restored", "--restore-detached")
    return snapshot.pid


def _require_criu() -> None:
    if reason := why_no_criu():
        raise UnsupportedError(f"no snapshot: {reason}")


def _criu(verb: str, folder: Path, failure: str, *options: str) -> None:
    command = ["criu", verb, "--images-dir", str(folder), "--log-file", _LOG, "-v2", *options]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        log = folder / _LOG
        said = log.read_text(errors="replace") if log.exists() else done.stderr.decode(errors="replace")
        raise SnapshotError(f"{failure}: {_reason(said)}")


def _reason(log: str) -> str:
    """The first thing that went wrong, without CRIU's own file and line."""
    errors = [line.partition("): ")[2].strip() for line in log.splitlines() if "Error (" in line and not any(noise in line for noise in _NOISE)]
    return next(filter(None, errors), "it gave no reason")
