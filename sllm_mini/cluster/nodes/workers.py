"""The workers of one machine as its agent sees them: climbed rung by rung, watched, and ended. Explained in chapter 08.

`WorkerHandle` is a worker and `Launcher` what starts it; `launchers` has those whose workers are processes (forked by a zygote, or
fresh), `threads` the one whose workers are threads of the agent itself.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from socket import socket
from typing import Protocol

from msgspec.structs import replace

from sllm_mini.cluster.nodes import worker_messages
from sllm_mini.cluster.nodes.worker_messages import Climbed, ClimbRung, Fall, Rung, Stage, Staged, Whole
from sllm_mini.cluster.process_memory import ProcessMemory, memory_of
from sllm_mini.errors import UnsupportedError, WireError
from sllm_mini.inference.migration.messages import Mode, Report
from sllm_mini.inference.workers import messages
from sllm_mini.inference.workers.process import Process, WorkerProcess
from sllm_mini.types import Warmth
from sllm_mini.wire import Channel


class WorkerHandle(Protocol):
    """One worker. Safe from several threads. What it is asked raises its own error (the class of `sllm_mini.errors` that it
    raised, ModelError for any other), or WireError once it is gone."""

    name: str
    pid: int
    """Of its process; the agent's own where the worker is a thread."""
    launched: Rung
    """The rung PROCESS: from the launch until it answered."""
    address: str
    """Where it takes moves in, once it stands at READY."""

    @property
    def gone(self) -> bool:
        """Whether it has ended, or is being ended."""

    def climb(self, order: ClimbRung) -> Rung:
        """Climbs one rung, and says what it took. An error leaves it on the rung where it was (a kill is the agent's to order)."""

    def whole(self, timeout: float | None = None) -> None:
        """Waits for the last byte, after a climb with `overlap`. Raises the load's error, WireTimeout."""

    def stage(self, start: int, stop: int, address: str, key: bytes = b"") -> str:
        """Serves some layers of the model that it attached, once their bytes are there; returns where. Without an address
        it has them ready for `ClimbRung.last`. For any rung from DRAM on, beside a climb."""

    def fall(self, warmth: Warmth) -> None:
        """Keeps less: down to DEVICE, DRAM or RUNTIME, and returns when what is above is free. A worker that should fall below
        RUNTIME is closed, and another launched for PROCESS."""

    def run(self, session: bytes, epoch: int) -> None:
        """A request begins here, or begins again, in that epoch of the register; its tokens go to the ledger."""

    def move(self, request_id: str, address: str, *, mode: Mode = "tokens", target_gap_tokens: int = 4) -> Report:
        """Moves a request to the worker that takes moves in at `address`."""

    def drop(self, request_id: str, epoch: int) -> None:
        """Nobody wants the request in that epoch any more; also where it is not here."""

    def stuck_seconds(self, seconds: float) -> float:
        """For how long the step under way has not ended although its bytes were there; 0 between steps. Raises WireTimeout where
        nothing is answered for `seconds`."""

    def watch(self, silent_seconds: float, stuck_seconds: float = math.inf) -> None:
        """From now on it is killed once it has answered nothing, or ended no step, for so long. Once."""

    def kill(self) -> None:
        """Ends it at once, as a machine that fails would: nothing is said to anybody."""

    def close(self) -> None:
        """Ends it and waits until it is gone. Safe to call twice."""


class Launcher(Protocol):
    """Starts workers, and ends them all with `close`. Safe from several threads."""

    def launch(self, name: str, on_death: Callable[[str], None], *, measure: bool = True) -> WorkerHandle:
        """A worker at PROCESS; waits until it answers. `on_death` is called once, on a thread of the worker's, when it is gone,
        with the reason in one sentence: perhaps before this returns, and not after `close`, which it may call. Raises SllmError
        where there is no worker to be had. Without `measure` the memory of its rung PROCESS is not counted and told as 0."""

    def prepare(self, source: str) -> None:
        """From now on workers find what a start of the checkpoint at `source`, a folder, makes that does not depend on where the weights
        are, made already; where that cannot be, they make it themselves. Takes its time, and raises nothing."""

    def shared_nbytes(self) -> int:
        """The bytes (PSS) of what it keeps running for all its workers: a zygote's; 0 for none."""

    def close(self) -> None:
        """Ends its workers, and what it keeps running. Safe to call twice."""


class ProcessWorker:
    """A worker that is a process with a channel to it; both are its own from now on. See `WorkerHandle`.

    `begun` is when its launch was asked for, on the monotonic clock. Returns when the process answers. Raises WireError if it ends
    before that, WireTimeout if it does not answer within `seconds`; it is ended then.
    """

    def __init__(
        self, name: str, channel: socket, process: Process, on_death: Callable[[str], None], *, begun: float, seconds: float, measure: bool = True,
    ) -> None:  # fmt: skip
        self.name, self.pid, self.address = name, process.pid, ""
        self._on_death = on_death
        self._lock = threading.Lock()
        self._told, self._dead = True, False
        """Whether nobody is to be told of its death (any more), and whether it has died."""
        self._worker = WorkerProcess(name, Channel(channel, worker_messages.Answer, name=f"worker {name}"), process, self._died)
        try:
            self.stuck_seconds(seconds)
            answered = time.monotonic() - begun
            memory = memory_of(self.pid) if measure else ProcessMemory(0, 0, 0)
            with self._lock:
                if self._dead:
                    raise WireError(f"worker {name} is gone: {self._worker.why}")
                self._told = False
        except BaseException as error:
            self._worker.close()
            if isinstance(error, UnsupportedError) or (isinstance(error, WireError) and self._worker.why):
                raise WireError(f"worker {name} ended before it could be used: {self._worker.why}") from error
            raise
        self.launched = Rung(Warmth.PROCESS, answered, memory.private_nbytes, memory.proportional_nbytes)

    @property
    def gone(self) -> bool:
        return self._worker.gone

    def climb(self, order: ClimbRung) -> Rung:
        climbed = self._worker.ask(replace(order, number=self._worker.next()), Climbed)
        self.address = climbed.address
        return climbed.rung

    def whole(self, timeout: float | None = None) -> None:
        self._worker.ask(Whole(self._worker.next()), messages.Done, seconds=timeout)

    def stage(self, start: int, stop: int, address: str, key: bytes = b"") -> str:
        return self._worker.ask(Stage(self._worker.next(), start, stop, address, key), Staged).address

    def fall(self, warmth: Warmth) -> None:
        self._worker.ask(Fall(self._worker.next(), warmth), messages.Done)

    def run(self, session: bytes, epoch: int) -> None:
        self._worker.ask(messages.Run(self._worker.next(), epoch), messages.Done, payload=session)

    def move(self, request_id: str, address: str, *, mode: Mode = "tokens", target_gap_tokens: int = 4) -> Report:
        return self._worker.ask(messages.Move(self._worker.next(), request_id, address, mode, target_gap_tokens), messages.Moved).report

    def drop(self, request_id: str, epoch: int) -> None:
        self._worker.ask(messages.Drop(self._worker.next(), request_id, epoch), messages.Done)

    def stuck_seconds(self, seconds: float) -> float:
        return self._worker.ask(messages.Ping(self._worker.next()), messages.Alive, seconds=seconds).stuck_seconds

    def watch(self, silent_seconds: float, stuck_seconds: float = math.inf) -> None:
        self._worker.watch(silent_seconds, stuck_seconds)

    def kill(self) -> None:
        self._worker.kill()

    def close(self) -> None:
        with self._lock:
            self._told = True
        self._worker.close()

    def _died(self, _name: str) -> None:
        with self._lock:
            told, self._told, self._dead = self._told, True, True
        if not told:
            self._on_death(self._worker.why)
