"""The pipeline: many reads in flight, hashing and copies overlapped with them, memory for chunks bounded or none at all.

On a CPU target a chunk is read (or mapped from the page cache) straight into place (`in_place`); on the way to a GPU, or
to tensors that exist already, it goes through a ring of slots (`ring`). Rebuilt from ServerlessLLM's loader (OSDI'24),
without its synchronous copies, its discarded errors and its whole-model pool. Taught in chapter 02.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Protocol

from sllm_mini.checkpoint.directory import Checkpoint
from sllm_mini.errors import LoadError
from sllm_mini.loading.flow import Flow
from sllm_mini.loading.plan import Chunk, LoadPlan
from sllm_mini.loading.reader import Reader, open_reader


class Target(Protocol):
    """Where the chunks of one device go: `InPlace` or `Ring`. `readers`: threads that are of use to it at once."""

    free_slots: int
    readers: int

    def threads(self) -> list[tuple[str, Callable[[], None]]]: ...

    def deliver(self, chunk: Chunk) -> None: ...

    def finish(self) -> None: ...

    def close(self) -> None: ...


TargetMaker = Callable[[Flow, list[Reader]], Sequence[Target]]
"""Makes the targets, in the order of the plan's devices, once the files are open."""


def next_chunk(pending: Sequence[Chunk], free_slots: Sequence[int]) -> int | None:
    """Which chunk to read next: the position in `pending` (execution order) of the first chunk whose device has a
    free slot, None if none has. Reading in execution order is what lets inference start before the load ends; looking
    past a device whose slots are full keeps the disk busy while its copies catch up."""
    for position, chunk in enumerate(pending):
        if free_slots[chunk.device] > 0:
            return position
    return None


class Pipeline:
    """Carries out a plan on its own threads. `start`, then `join`; `stop` ends it early. `reads`: whether the targets want
    the checkpoint's files open (bytes may be in memory already). Used through `start_load` and `start_transfer`."""

    def __init__(self, checkpoint: Checkpoint, plan: LoadPlan, flow: Flow, on_end: Callable[[BaseException | None], None], *, reads: bool = True) -> None:
        self.flow = flow
        self._checkpoint, self._on_end, self._reads = checkpoint, on_end, reads
        self._pending = list(plan.chunks)
        self._readers: list[Reader] = []
        self._targets: list[Target] = []
        self._threads: list[threading.Thread] = []
        self._all_started = threading.Event()
        """No thread works before: page faults hold up who maps a stack for the next, and `start` would return when half is done."""
        self._running = 0

    def start(self, make_targets: TargetMaker) -> None:
        """Opens the files and starts the threads. Raises, leaving nothing behind, if either cannot be done."""
        self.flow.report.started = time.monotonic()
        try:
            for number in range(len(self._checkpoint.index.partitions) if self._reads else 0):
                self._readers.append(open_reader(self._checkpoint, number, direct=self.flow.options.direct, stopped=self.flow.has_failed))
            self._targets.extend(make_targets(self.flow, self._readers))
            self._running = readers = min(max(target.readers for target in self._targets), max(len(self._pending), 1))
        except BaseException:
            self._release()
            raise
        beside = [(f"sllm-{name}-{number}", work) for number, target in enumerate(self._targets) for name, work in target.threads()]
        self._threads = [threading.Thread(target=self._beside, args=(work,), name=name) for name, work in beside]
        self._threads += [threading.Thread(target=self._read_chunks, name=f"sllm-read-{number}") for number in range(readers)]
        finisher = threading.Thread(target=self._finish, args=(list(self._threads),), name="sllm-load")
        try:
            for thread in (*self._threads, finisher):
                thread.start()
        except BaseException as error:  # a Ctrl-C, or the system gives no more threads: end those that it gave
            self.stop(error)
            self._all_started.set()
            for target in self._targets:
                target.finish()
            started = [thread for thread in (*self._threads, finisher) if thread.ident is not None]
            for thread in started:
                thread.join()
            if finisher not in started:
                self._release()
            if not isinstance(error, RuntimeError):
                raise
            raise LoadError(f"no thread can be started to read it ({error}); fewer `threads` may do", path=self._checkpoint.path) from error
        self._threads.append(finisher)
        self._all_started.set()

    def stop(self, error: BaseException) -> None:
        """Ends the load with `error` unless it has ended already; reads in flight finish first."""
        self.flow.stop(error)

    def join(self) -> None:
        """Waits until every thread has gone."""
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _beside(self, work: Callable[[], None]) -> None:
        self._all_started.wait()
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - it is the load's result and raised by wait()
            self.stop(error)

    def _read_chunks(self) -> None:
        self._all_started.wait()
        try:
            while (chunk := self._take()) is not None:
                self._targets[chunk.device].deliver(chunk)
        except BaseException as error:  # noqa: BLE001 - it is the load's result and raised by wait()
            self.stop(error)
        finally:
            with self.flow.changed:
                self._running -= 1
                last = self._running == 0
            if last:
                for target in self._targets:
                    target.finish()

    def _take(self) -> Chunk | None:
        with self.flow.changed:
            while self._pending and self.flow.error is None:
                position = next_chunk(self._pending, [target.free_slots for target in self._targets])
                if position is not None:
                    chunk = self._pending.pop(position)
                    self._targets[chunk.device].free_slots -= 1
                    return chunk
                self.flow.changed.wait()
        return None

    def _finish(self, workers: list[threading.Thread]) -> None:
        for thread in workers:
            thread.join()
        report = self.flow.report
        reasons = dict.fromkeys(reason for reason in (report.fallback, *(reader.fallback for reader in self._readers)) if reason)
        report.fallback = "; ".join(reasons) or None
        report.seconds = time.monotonic() - report.started
        self._release()
        on_end = self._on_end
        self._on_end = _nothing
        self.flow.forget()
        on_end(self.flow.error)

    def _release(self) -> None:
        """Gives back everything but the target's memory. A stream of a lost device may refuse to close: then that is
        the load's error, unless it has one already."""
        closers = [reader.close for reader in self._readers] + [target.close for target in self._targets]
        for close in closers:
            try:
                close()
            except Exception as error:  # noqa: BLE001 - whatever it is: the rest must be given back and the handle told
                self.stop(error)
        self._targets = []  # the handle decides how long their memory lives
        link = self.flow.error
        while link is not None:  # a kept error must not keep the memory its frames looked at
            traceback.clear_frames(link.__traceback__)
            link = link.__cause__


def _nothing(_: object) -> None:
    return None
