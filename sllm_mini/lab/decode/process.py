"""One way to answer, in a process of its own, where nothing of the others slows it. Shown in chapter 07.

In one process they would not be apart: transformers' continuous batching computes on a thread of its own, so that two
pools of threads would wait for the same cores, and libgomp then lets both sleep where one would spin (seen on 2 cores with
torch 2.13: a step of ours took 1.3 times as long beside it, idle as it was). A process costs its imports and a copy of the model.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from sllm_mini.errors import ModelError
from sllm_mini.lab.decode.variants import LABELS, Answers, Variant, opened
from sllm_mini.lab.decode.workload import Workload

_END_SECONDS = 10.0


class WayProcess:
    """Answers `loads` by their number, timed where they are answered. Starts at once; `ready` waits until the model is loaded.
    One thread at a time."""

    def __init__(self, variant: Variant, path: str, device: str, dtype: str, loads: Sequence[Workload]) -> None:
        import torch

        self._variant = variant
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, variant, path, device, dtype, tuple(loads), torch.get_num_threads())
        self._process = context.Process(target=_serve, args=arguments, name=f"sllm-mini-{variant}", daemon=True)
        self._process.start()
        theirs.close()

    def ready(self) -> None:
        """Raises ModelError with the reason where it cannot answer."""
        self._heard()

    def __call__(self, number: int) -> tuple[float, Answers]:
        """Seconds and answers. Raises as `ready`."""
        found: tuple[float, Answers] = self._heard(number)
        return found

    def _heard(self, number: int | None = None) -> Any:
        try:
            if number is not None:
                self._connection.send(number)
            kind, found = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join(_END_SECONDS)
            raise ModelError(f"the process of {LABELS[self._variant]} ended with code {self._process.exitcode}; is there memory for its copy of the model?") from None
        if kind == "error":
            raise ModelError(f"{LABELS[self._variant]} gave no answer: {found}")
        return found

    def close(self) -> None:
        """Ends it, also in the middle of an answer."""
        self._connection.close()
        self._process.kill()
        self._process.join()

    def __enter__(self) -> WayProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(connection: Connection, variant: Variant, path: str, device: str, dtype: str, loads: Sequence[Workload], threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends it
    try:
        _answer(connection, variant, path, device, dtype, loads, threads)
    except Exception as error:  # noqa: BLE001 - whatever a library raises is the reason why there is no answer
        connection.send(("error", f"{type(error).__name__}: {error}"))


def _answer(connection: Connection, variant: Variant, path: str, device: str, dtype: str, loads: Sequence[Workload], threads: int) -> None:
    import torch

    from sllm_mini.checkpoint import open_checkpoint
    from sllm_mini.device import get_device

    torch.set_num_threads(threads)
    synchronize = get_device(device).synchronize
    largest = max(loads, key=lambda load: len(load.requests) * load.new_tokens)
    with opened(variant, open_checkpoint(path), device, dtype, largest) as run:
        connection.send(("ready", None))
        while (number := _next(connection)) is not None:
            synchronize()
            started = time.monotonic()
            answers = run(loads[number])
            synchronize()
            connection.send(("answers", (time.monotonic() - started, answers)))


def _next(connection: Connection) -> int | None:
    """None once the parent has ended."""
    try:
        number: int = connection.recv()
    except (EOFError, ConnectionError):
        return None
    return number
