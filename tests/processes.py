"""What tests of other processes share: modules that a fresh process can import, and waiting until a process has ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PATIENCE = 60.0
"""Seconds after which a thing that should happen at once counts as never; no test measures with it."""


@contextmanager
def on_the_path(folder: Path, module: str, source: str) -> Iterator[Path]:
    """`folder` with the source of a module in it, on the search path meanwhile."""
    (folder / f"{module}.py").write_text(source)
    sys.path.insert(0, str(folder))
    try:
        yield folder
    finally:
        sys.path.remove(str(folder))


def is_gone(pid: int) -> bool:
    """Waits until the process has ended; whoever inherits an orphan may take its time to collect it."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


def children_of(pid: int) -> list[str]:
    """The ids of its children, those that nobody has collected yet included."""
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
