"""Worker processes with one model, and requests that move between them while their text is read. Explained in chapter 07.

    with Workers("models/tiny.sllm", ["one", "two"]) as workers:
        story = workers.submit("one", "Once upon a time", max_new_tokens=200)
        report = workers.move(story, "two", mode="kv")
        for piece in workers.ledger.stream(story): print(piece.text, end="")

The register and the ledger are here, in the parent: the router of a cluster in its smallest form. A worker that dies is
noticed at once, because its connection ends, and one that hangs after `WorkerOptions.silent_seconds`; the requests of both
begin again with another, from the last token in the ledger.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sllm_mini.errors import ModelError, WireError
from sllm_mini.inference.migration.choice import Speeds, resolve_mode
from sllm_mini.inference.migration.messages import Mode, Report
from sllm_mini.inference.migration.source import MoveOptions
from sllm_mini.inference.ownership.ledger import TokenLedger
from sllm_mini.inference.ownership.register import EpochRegister
from sllm_mini.inference.ownership.server import OwnershipServer
from sllm_mini.inference.sampler import SamplingOptions
from sllm_mini.inference.session import Session, request_problem
from sllm_mini.inference.workers import messages
from sllm_mini.inference.workers.process import Start, WorkerProcess, start_process
from sllm_mini.types import Epoch
from sllm_mini.wire import Channel

PROGRAM = ("-m", "sllm_mini.inference.workers.worker")


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """How each worker runs its model. `threads` are torch's, and `pace_seconds` is slept after each step. A worker that has loaded
    its model and then answers nothing for `silent_seconds` counts as dead and is killed. Raises ValueError for what cannot run."""

    device: str = "cpu"
    threads: int = 1
    max_batch: int = 8
    pace_seconds: float = 0.0
    silent_seconds: float = 20.0

    def __post_init__(self) -> None:
        whole = type(self.threads) is int and type(self.max_batch) is int and self.threads >= 1 and self.max_batch >= 1
        if not (whole and 0 <= self.pace_seconds < math.inf and 0 < self.silent_seconds < math.inf):
            raise ValueError(f"{self} runs nothing; threads and max_batch are whole numbers of at least 1, pace_seconds is at least 0, silent_seconds more than 0")


class Workers:
    """The workers, the register, the ledger, and the requests between them. Safe from several threads; close it, or use `with`.

    `names` are the first workers'; `start` adds others. `program` is what a Python interpreter is given, or starts a process itself. Raises what loading the checkpoint in a worker raises.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str],
        names: Sequence[str] = ("one", "two"),
        *,
        options: WorkerOptions | None = None,
        program: Sequence[str] | Start = PROGRAM,
    ) -> None:
        self.checkpoint = os.path.abspath(checkpoint)
        self.options = options or WorkerOptions()
        self.register = EpochRegister()
        self.ledger = TokenLedger(self.register)
        self.model = ""
        self._program = program
        self._folder = Path(tempfile.mkdtemp(prefix="sllm-workers-"))
        self._lock = threading.RLock()
        self._workers: dict[str, WorkerProcess] = {}
        self._loading: set[WorkerProcess] = set()
        self._closed = False
        self._taken: set[str] = set()
        """Names of workers that start, live, or have lived: none is given twice, as the register asks."""
        try:
            self._server = OwnershipServer(self.register, self.ledger, self._folder / "arbiter")
        except BaseException:
            shutil.rmtree(self._folder)
            raise
        pool = ThreadPoolExecutor(max(len(names), 1))
        try:
            for started in [pool.submit(self.start, name) for name in names]:
                started.result()
        except BaseException:  # also a Ctrl-C: nobody waits for the others to load
            self.close()
            raise
        finally:
            pool.shutdown()

    @property
    def names(self) -> tuple[str, ...]:
        """The workers that live."""
        with self._lock:
            return tuple(self._workers)

    def start(self, name: str) -> WorkerProcess:
        """Starts one more worker and waits until it has loaded the model. Raises ValueError for the name of a worker that lives, or
        that has died: a message of the dead one may still be on its way."""
        with self._lock:
            if name in self._taken:
                raise ValueError(f"a worker was started as {name!r} before; give each worker a name of its own")
            self._taken.add(name)
        worker = None
        try:
            with self._lock:
                if self._closed:
                    raise WireError(f"worker {name} cannot start: these workers were closed; open others")
                worker = self._launch(name)
                self._loading.add(worker)
            self.model = self._load(worker)
            with self._lock:
                if self._closed:
                    raise WireError(f"worker {name} was closed while it loaded its model")
                self._workers[name] = worker
        except BaseException:
            if worker is not None:
                worker.close()
            with self._lock:
                self._taken.discard(name)  # it never spoke
            raise
        finally:
            with self._lock:
                self._loading -= {worker}
        if worker.gone:  # before it was among the workers, so that nobody has buried it
            self._bury(name)
        worker.watch(self.options.silent_seconds)
        return worker

    def _launch(self, name: str) -> WorkerProcess:
        ours, process = self._program() if callable(self._program) else start_process(self._program)
        return WorkerProcess(name, Channel(ours, messages.Answer, name=f"worker {name}"), process, self._bury)

    def _load(self, worker: WorkerProcess) -> str:
        options = self.options
        begin = messages.Open(
            worker.next(), self.checkpoint, options.device, worker.name, str(self._address(worker.name)), self._server.address, options.threads,
            options.max_batch, options.pace_seconds,
        )  # fmt: skip
        return worker.ask(begin, messages.Opened).model

    def submit(
        self,
        name: str,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 128,
        sampling: SamplingOptions | None = None,
        stop: str | Sequence[str] = (),
        stop_at_eos: bool = True,
        request_id: str | None = None,
    ) -> str:
        """Starts a request with worker `name` and returns its id; `ledger.stream(id)` reads its text wherever it goes. Raises the
        engine's error for a prompt it cannot take, ValueError for options that it cannot take, WireError for a worker that does not live."""
        if not isinstance(stop, str | Sequence):
            raise ValueError(f"stop is {stop!r:.60}; it must be a text or several, or be left out")
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        request_id = uuid.uuid4().hex[:12] if request_id is None else request_id
        sampling = SamplingOptions() if sampling is None else sampling
        problem = request_problem(request_id, max_new_tokens, sampling, stops, stop_at_eos)
        if problem is not None:
            raise ValueError(problem)
        worker = self._worker(name)
        token_ids = worker.ask(messages.Encode(worker.next(), prompt), messages.Encoded).token_ids if isinstance(prompt, str) else [*prompt]
        session = Session(request_id, self.model, tuple(token_ids), len(token_ids), max_new_tokens, sampling, stops, stop_at_eos)
        self.ledger.open(session)
        epoch = self.register.claim(session.request_id, name, 0)
        try:
            if epoch is None:
                raise WireError(f"worker {name} is gone; submit the request to another")
            self._run(name, session, epoch)
        except BaseException as error:
            if epoch is None or not isinstance(error, WireError) or not self._dead(name):
                self.ledger.close(session.request_id)
                raise
            # It died with the order in its hands: the request is begun again like its others.
        return session.request_id

    def move(
        self, request_id: str, to: str, *, mode: Mode | Literal["auto"] = "tokens", speeds: Speeds | None = None, target_gap_tokens: int = 4
    ) -> Report:
        """Moves a request to worker `to` while its text goes on; `mode` and `speeds` as for `migrate`.

        Raises ModelError for a request that nobody runs, whose text has ended, that is being moved or is there already, WireError
        for a worker that does not live or dies meanwhile, ValueError for a mode or a gap that there is not.
        """
        chosen = resolve_mode(mode, speeds, lambda: len(self.ledger.session(request_id).token_ids))
        gap = MoveOptions(target_gap_tokens=target_gap_tokens).target_gap_tokens
        owner = self.register.owner(request_id).owner
        if owner is None:
            raise ModelError(f"request {request_id!r} is nobody's; it was never submitted, or was closed")
        finish = self.ledger.finish(request_id)
        if finish is not None:
            raise ModelError(f"request {request_id!r} cannot be moved: its text has ended ({finish})")
        self._worker(to)
        if owner == to:
            raise ModelError(f"request {request_id!r} is with worker {to!r} already; name another to move it to")
        worker = self._worker(owner)
        return worker.ask(messages.Move(worker.next(), request_id, str(self._address(to)), chosen, gap), messages.Moved).report

    def cancel(self, request_id: str) -> None:
        """Ends a request for its reader and in its engine. Raises ModelError for a request that is not open."""
        self.ledger.end(request_id)
        owner, epoch = self.register.owner(request_id)
        if owner is not None:
            with suppress(WireError):  # its engine is gone, and nobody else takes a request over that has ended
                worker = self._worker(owner)
                worker.ask(messages.Drop(worker.next(), request_id, epoch), messages.Done)

    def kill(self, name: str) -> None:
        """Kills a worker process, as a failing machine would; what it ran begins again with the others."""
        self._worker(name).kill()

    def close(self) -> None:
        """Ends all workers and forgets all requests."""
        with self._lock:
            workers, self._workers, self._closed = [*self._workers.values(), *self._loading], {}, True
        for worker in workers:
            worker.close()
        self._server.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _address(self, name: str) -> Path:
        return self._folder / name

    def _worker(self, name: str) -> WorkerProcess:
        with self._lock:
            worker = self._workers.get(name)
        if worker is None:
            what = f"worker {name!r} has died, was closed or still loads" if name in self._taken else f"there is no worker {name!r}"
            raise WireError(f"{what}; these live: {', '.join(self.names) or 'none, so start another'}")
        return worker

    def _dead(self, name: str) -> bool:
        with self._lock:
            worker = self._workers.get(name)
        return worker is None or worker.gone

    def _run(self, name: str, session: Session, epoch: Epoch) -> None:
        worker = self._worker(name)
        worker.ask(messages.Run(worker.next(), epoch), messages.Done, payload=session.to_bytes())

    def _bury(self, name: str) -> None:
        """A worker died: its requests go to the others, one after another."""
        with self._lock:
            if self._workers.pop(name, None) is None:
                return  # it never lived, or all of them are being closed
        for number, (request_id, epoch) in enumerate(self.register.retire(name).items()):
            self._begin_again(request_id, epoch, number)

    def _begin_again(self, request_id: str, epoch: Epoch, number: int) -> None:
        """Gives a request whose owner in `epoch` died to another worker, unless it is somebody else's by now."""
        while True:
            names = self.names
            if not names:
                self.ledger.give_up(request_id, epoch, "every worker has died")
                return
            heir = names[number % len(names)]
            begun = self.ledger.restart(request_id, heir, epoch)
            if begun is None:
                if heir in self.names:
                    return  # the request is over, or somebody else's
                continue  # the heir died a moment ago and claims nothing any more
            try:
                self._run(heir, *begun)
            except Exception as error:  # noqa: BLE001 - its reader is told, and the other requests go on
                if not (isinstance(error, WireError) and self._dead(heir)):  # else it is among those of the heir's own burial
                    self.ledger.give_up(request_id, begun[1], str(error))
            return
