"""Processes that the lab starts in a session of their own: ended with what they started, and what they said last.

Python alone, so that the report can use it on any interpreter. Linux only. Safe from several threads.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from subprocess import Popen


def signal_group(child: Popen[bytes], number: signal.Signals) -> None:
    """Sends a signal to `child`, started with `start_new_session=True`, and to all in its group; a group outlives a leader
    that crashed. A group that is gone is no error."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, number)


def last_line(output: str) -> str | None:
    """The last line that a program printed, where a traceback has its reason; None if it printed nothing."""
    return next(reversed(output.strip().splitlines()), None)
