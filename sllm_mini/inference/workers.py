"""Worker processes with one model, and requests that move between them while their text is read. Explained in chapter 07.

    with Workers("models/tiny.sllm", ["one", "two"]) as workers:
        story = workers.submit("one", "Once upon a time", max_new_tokens=200)
        report = workers.move(story, "two", mode="kv")
        for piece in workers.ledger.stream(story): print(piece.text, end="")

The register and the ledger are here, in the parent: the router of a cluster in its smallest form. A worker that dies is
noticed at once, because its connection ends; its requests begin again with another, from the last token in the ledger.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sllm_mini import errors
from sllm_mini.errors import ModelError, SllmError, WireError
from sllm_mini.inference import worker_messages as messages
from sllm_mini.inference.ledger import TokenLedger
from sllm_mini.inference.migration_messages import Mode, Report
from sllm_mini.inference.ownership import EpochRegister
from sllm_mini.inference.ownership_server import OwnershipServer
from sllm_mini.inference.sampler import SamplingOptions
from sllm_mini.inference.session import Session
from sllm_mini.types import Epoch
from sllm_mini.wire import Channel

PROGRAM = ("-m", "sllm_mini.inference.worker")
_PATIENCE_SECONDS = 30.0
_A = TypeVar("_A", bound=messages.Answer)


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """How each worker runs its model. `threads` are torch's, and `pace_seconds` is slept after each step."""

    device: str = "cpu"
    threads: int = 1
    max_batch: int = 8
    pace_seconds: float = 0.0


class WorkerProcess:
    """One worker, as its parent sees it: orders go out, answers come back in any order. Safe from several threads.

    `on_death` is called once, on a thread of this object's, when the process is gone and nobody closed it. Every order raises the
    worker's own error, or WireError once it is gone.
    """

    def __init__(self, name: str, program: Sequence[str], on_death: Callable[[str], None]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen([sys.executable, *program], stdin=theirs.fileno())
        self.name = name
        self._on_death = on_death
        self._channel: Channel[messages.Answer] = Channel(ours, messages.Answer, name=f"worker {name}")
        self._changed = threading.Condition()
        self._answers: dict[int, messages.Answer] = {}
        self._number = 0
        self._gone = False
        self._closing = False
        self._thread = threading.Thread(target=self._listen, name=f"sllm-worker-{name}", daemon=True)
        self._thread.start()

    def next(self) -> int:
        """The number that the next order must carry."""
        with self._changed:
            self._number += 1
            return self._number

    def ask(self, order: messages.Order, kind: type[_A], *, payload: bytes | None = None) -> _A:
        """Gives an order and waits until it is answered."""
        self._channel.send(order, payload=payload, timeout=_PATIENCE_SECONDS)
        with self._changed:
            self._changed.wait_for(lambda: order.number in self._answers or self._gone)
            answer = self._answers.pop(order.number, None)
        if answer is None:
            raise WireError(f"worker {self.name} is gone; its requests begin again elsewhere")
        if isinstance(answer, messages.Failed):
            error = getattr(errors, answer.kind, None)
            raise error(answer.message) if isinstance(error, type) and issubclass(error, SllmError) else ModelError(answer.message)
        if not isinstance(answer, kind):
            raise WireError(f"worker {self.name} answered {type(answer).__name__} to {type(order).__name__}; use one sllm_mini on both sides")
        return answer

    def kill(self) -> None:
        """Kills the process (SIGKILL): what a machine that fails does."""
        self.process.kill()

    def close(self) -> None:
        """Ends the process and waits for it."""
        self._closing = True
        self._channel.close()
        try:
            self.process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._thread.join()

    def _listen(self) -> None:
        try:
            while True:
                answer = self._channel.receive().message
                with self._changed:
                    self._answers[answer.number] = answer
                    self._changed.notify_all()
        except WireError:
            with self._changed:
                self._gone = True
                self._changed.notify_all()
            self._channel.close()
            if not self._closing:
                self.process.kill()  # one that only closed its connection must not speak on
                self.process.wait()
                self._on_death(self.name)


class Workers:
    """The workers, the register, the ledger, and the requests between them. Safe from several threads; close it, or use `with`.

    `names` are the first workers'; `start` adds others. Raises what loading the checkpoint in a worker raises.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str],
        names: Sequence[str] = ("one", "two"),
        *,
        options: WorkerOptions | None = None,
        program: Sequence[str] = PROGRAM,
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
        try:
            self._server = OwnershipServer(self.register, self.ledger, self._folder / "arbiter")
        except BaseException:
            shutil.rmtree(self._folder)
            raise
        try:
            with ThreadPoolExecutor(max(len(names), 1)) as pool:
                for started in [pool.submit(self.start, name) for name in names]:
                    started.result()
        except BaseException:
            self.close()
            raise

    @property
    def names(self) -> tuple[str, ...]:
        """The workers that live."""
        with self._lock:
            return tuple(self._workers)

    def start(self, name: str) -> WorkerProcess:
        """Starts one more worker and waits until it has loaded the model. A dead worker's name is not used again."""
        worker = WorkerProcess(name, self._program, self._bury)
        options = self.options
        begin = messages.Open(
            worker.next(), self.checkpoint, options.device, name, str(self._address(name)), self._server.address, options.threads, options.max_batch,
            options.pace_seconds,
        )  # fmt: skip
        try:
            self.model = worker.ask(begin, messages.Opened).model
        except BaseException:
            worker.close()
            raise
        with self._lock:
            self._workers[name] = worker
        return worker

    def submit(
        self,
        name: str,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 128,
        sampling: SamplingOptions | None = None,
        stop: Sequence[str] = (),
        stop_at_eos: bool = True,
        request_id: str | None = None,
    ) -> str:
        """Starts a request with worker `name` and returns its id; `ledger.stream(id)` reads its text wherever it goes. Raises the
        engine's error for a prompt it cannot take."""
        worker = self._worker(name)
        token_ids = worker.ask(messages.Encode(worker.next(), prompt), messages.Encoded).token_ids if isinstance(prompt, str) else [*prompt]
        session = Session(
            request_id or uuid.uuid4().hex[:12], self.model, tuple(token_ids), len(token_ids), max_new_tokens, sampling or SamplingOptions(), tuple(stop),
            stop_at_eos,
        )  # fmt: skip
        self.ledger.open(session)
        epoch = self.register.claim(session.request_id, name, 0)
        try:
            if epoch is None:
                raise WireError(f"worker {name} is gone; submit the request to another")
            self._run(name, session, epoch)
        except WireError:
            if epoch is None:
                self.ledger.close(session.request_id)
                raise
            # It died with the order in its hands: the request is begun again like its others.
        except BaseException:
            self.ledger.close(session.request_id)
            raise
        return session.request_id

    def move(self, request_id: str, to: str, *, mode: Mode = "tokens", target_gap_tokens: int = 4) -> Report:
        """Moves a request to worker `to` while its text goes on. Raises ModelError if nobody runs it, WireError if its worker dies."""
        owner = self.register.owner(request_id).owner
        if owner is None:
            raise ModelError(f"request {request_id!r} is nobody's; it was never submitted, or was closed")
        self._worker(to)
        worker = self._worker(owner)
        return worker.ask(messages.Move(worker.next(), request_id, str(self._address(to)), mode, target_gap_tokens), messages.Moved).report

    def cancel(self, request_id: str) -> None:
        """Ends a request for its reader and in its engine."""
        self.ledger.end(request_id)
        owner = self.register.owner(request_id).owner
        if owner is not None:
            worker = self._worker(owner)
            worker.ask(messages.Drop(worker.next(), request_id), messages.Done)

    def kill(self, name: str) -> None:
        """Kills a worker process, as a failing machine would; what it ran begins again with the others."""
        self._worker(name).kill()

    def close(self) -> None:
        """Ends all workers and forgets all requests."""
        with self._lock:
            workers, self._workers = self._workers, {}
        for worker in workers.values():
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
            raise WireError(f"there is no worker {name!r}; these live: {', '.join(self.names) or 'none'}")
        return worker

    def _run(self, name: str, session: Session, epoch: Epoch) -> None:
        worker = self._worker(name)
        worker.ask(messages.Run(worker.next(), epoch), messages.Done, payload=session.to_bytes())

    def _bury(self, name: str) -> None:
        """A worker died: its requests go to the others, one after another."""
        with self._lock:
            self._workers.pop(name, None)
        for number, request_id in enumerate(self.register.retire(name)):
            self._begin_again(request_id, number)

    def _begin_again(self, request_id: str, number: int) -> None:
        while True:
            names = self.names
            if not names:
                self.ledger.fail(request_id, "every worker has died")
                return
            heir = names[number % len(names)]
            begun = self.ledger.restart(request_id, heir, self.register.owner(request_id).epoch)
            if begun is None:
                if self.register.owner(request_id).owner in self.names or self.ledger.finish(request_id):
                    return
                continue  # the heir died too, or was retired a moment ago
            try:
                self._run(heir, *begun)
            except WireError:
                continue
            except (SllmError, ValueError) as error:
                self.ledger.fail(request_id, str(error))
            return
