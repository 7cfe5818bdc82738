"""A forked child, from its first instruction to its last: what it must not share with its zygote, undone. Explained in chapter 05.

Its descriptors, its environment, its random numbers and its place in the process tree become its own; the libraries stay.
Costs some milliseconds, and the pages that it writes to.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

import msgspec

from sllm_mini.cluster.zygote_messages import Fork

_PR_SET_PDEATHSIG = 1

Entry = Callable[..., Any]


def become(entry: Entry, request: Fork, fds: tuple[int, ...], owned: list[int], zygote: int) -> NoReturn:
    """Runs the entry point and ends the process. `fds` came with the request, `owned` are the zygote's own; `zygote` is its pid.

    Nothing of the zygote's is closed through its Python objects, which would end the connections of others, nor
    under them, where a number would be used again: their descriptors are pointed elsewhere.
    """
    status = 1
    try:
        for number, fd in enumerate(fds[:3]):
            os.dup2(fd, number)
            os.close(fd)
        with open(os.devnull, "rb") as null:
            for fd in owned:
                os.dup2(null.fileno(), fd, inheritable=False)
        os.setpgid(0, 0)
        end_with(zygote)
        os.environb.clear()
        os.environb.update(request.environment)
        os.chdir(request.folder)
        sys.stdout.reconfigure(line_buffering=os.isatty(1))  # type: ignore[union-attr]
        _reseed()
        gc.enable()
        positional, named = msgspec.json.decode(request.arguments)
        if len(fds) > 3:
            named["channel"] = socket.socket(fileno=fds[3])
        sys.argv[:] = [request.entry]
        status = _status(entry(*positional, **named))
    except SystemExit as error:
        status = _status(error.code)
    except BaseException:  # noqa: BLE001 - the outermost frame of this process: what an interpreter does at its end
        traceback.print_exc()
    finally:
        try:
            flush_standard()
        finally:
            os._exit(status)


def end_with(parent: int) -> None:
    """This process is killed when the thread of `parent` that started it ends. Raises OSError."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "PR_SET_PDEATHSIG")
    if os.getppid() != parent:  # it ended before the line above
        os._exit(128 + signal.SIGKILL)


def _reseed() -> None:
    """Fresh randomness and thread counts where a fork would inherit the zygote's. `random`, `uuid`, `tempfile` and OpenSSL
    see to themselves; a generator that an imported module made for itself is that module's."""
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
    if torch := sys.modules.get("torch"):
        torch.default_generator.seed()
        threads = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
        if threads.isdecimal() and int(threads):
            torch.set_num_threads(int(threads))


def _status(value: Any) -> int:
    """What `sys.exit(value)` would make the exit status."""
    if value is None:
        return 0
    if isinstance(value, int):
        return value & 0xFF
    print(value, file=sys.stderr)
    return 1


def flush_standard() -> None:
    """Sends off what this process has printed, where somebody still reads it."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with suppress(OSError, ValueError):  # nobody reads it any more, or it was closed
            stream.flush()
