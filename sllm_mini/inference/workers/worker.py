"""A process with an engine in it: `python -m sllm_mini.inference.workers.worker`, started by `Workers` (chapter 07).

One thread steps the engine, one reads orders from the parent over standard input and one carries them out, one takes moves
in, each move out has its own, and the feed's sends tokens to the ledger. The process ends when its parent closes the
connection or dies; an error in a step that is no request's own ends it too, and so does a ledger that answers the feed no
more: the parent begins its requests again elsewhere.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NoReturn

from sllm_mini.errors import ModelError, SllmError, WireError
from sllm_mini.inference.migration import MoveOptions, migrate
from sllm_mini.inference.migration.target import MigrationServer
from sllm_mini.inference.ownership.feed import TokenFeed
from sllm_mini.inference.ownership.server import OwnershipClient
from sllm_mini.inference.session import Session
from sllm_mini.inference.workers import messages
from sllm_mini.types import Epoch
from sllm_mini.wire import Channel

if TYPE_CHECKING:
    from sllm_mini.inference.engine import Engine

MAX_SESSION_NBYTES = 64 << 20
ANSWER_SECONDS = 10.0
_IDLE_SECONDS = 0.1

OrderChannel = Channel[messages.Order]


class Worker:
    """An engine that is stepped, fed and moved. `serve` takes orders until the parent is gone."""

    def __init__(self, engine: Engine, begin: messages.Open, channel: OrderChannel) -> None:
        self._engine = engine
        self._owner = begin.owner
        self._pace_seconds = begin.pace_seconds
        self._channel = channel
        self._awake = threading.Event()
        self._arbiter = OwnershipClient(begin.arbiter)
        self._feed = TokenFeed(engine, OwnershipClient(begin.arbiter), wake=self._awake.set)  # a connection of its own: tokens wait for no claim
        self._moves = MigrationServer(begin.address, owner=begin.owner, register=self._arbiter, feed=self._feed)

    def serve(self) -> None:
        """Steps and takes orders until the channel ends. Raises ChannelClosed then."""
        threading.Thread(target=self._step, name="sllm-steps", daemon=True).start()
        in_order = ThreadPoolExecutor(1, thread_name_prefix="sllm-orders")
        while True:
            received = self._channel.receive(into=_memory)
            order = received.message
            if isinstance(order, messages.Ping):
                self._channel.send(messages.Done(order.number), timeout=ANSWER_SECONDS)
            elif isinstance(order, messages.Move):
                threading.Thread(target=self._answer, args=(order, b""), name="sllm-move-out", daemon=True).start()
            else:
                in_order.submit(self._answer, order, bytes(received.payload or b""))

    def _answer(self, order: messages.Order, payload: bytes) -> None:
        try:
            try:
                self._channel.send(self._carry_out(order, payload), timeout=ANSWER_SECONDS)
            except Exception as error:  # noqa: BLE001 - it is told to whoever waits for an answer
                self._channel.send(failure(order, error), timeout=ANSWER_SECONDS)
        except WireError:
            self._channel.close()  # the parent is gone or does not read: `serve` ends, and with it this process

    def _carry_out(self, order: messages.Order, payload: bytes) -> messages.Answer:
        if isinstance(order, messages.Encode):
            return messages.Encoded(order.number, self._engine.encode(order.prompt))
        if isinstance(order, messages.Run):
            self._feed.adopt(Session.from_bytes(payload), Epoch(order.epoch))
        elif isinstance(order, messages.Move):
            return messages.Moved(order.number, self._move(order))
        elif isinstance(order, messages.Drop):
            epoch = self._feed.epoch(order.request_id)
            if epoch is not None:
                self._feed.leave(order.request_id, epoch)
        else:
            raise ModelError("this worker has a model already; start another for the next")
        return messages.Done(order.number)

    def _move(self, order: messages.Move) -> messages.Report:
        options = MoveOptions(target_gap_tokens=order.target_gap_tokens)
        return migrate(
            self._engine, order.request_id, order.address, owner=self._owner, register=self._arbiter, mode=order.mode, feed=self._feed, options=options
        )

    def _step(self) -> None:
        try:
            while True:
                worked = self._engine.step()
                self._feed.report_failures()
                if self._feed.error is not None:
                    raise self._feed.error  # nobody hears what is said here
                if worked:
                    time.sleep(self._pace_seconds)
                else:
                    self._awake.wait(_IDLE_SECONDS)
                    self._awake.clear()
        except WireError as error:  # often its parent has ended too, and then its reader knows why
            print(f"worker {self._owner} ends: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        except BaseException:  # noqa: BLE001 - it is told, and ends the process
            traceback.print_exc()
            os._exit(1)


def failure(order: messages.Order, error: BaseException) -> messages.Failed:
    """An error as a message: its class, if the parent has that too, and its sentence."""
    kind = type(error).__name__ if isinstance(error, SllmError) else "ModelError"
    return messages.Failed(order.number, kind, str(error)[:8000])


def load(begin: messages.Open) -> Engine:
    """The engine of a worker's first order."""
    import torch

    from sllm_mini.inference.engine import Engine

    torch.set_num_threads(begin.threads)
    return Engine.load(begin.checkpoint, begin.device, max_batch=begin.max_batch)


def main(make: Callable[[messages.Open], Engine] = load) -> NoReturn:
    """Runs a worker whose parent is at the other end of standard input. It ignores SIGINT: its parent, or a killer, ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.dup(0)
    with open(os.devnull, "rb") as null:
        os.dup2(null.fileno(), 0)
    channel: OrderChannel = Channel(socket.socket(fileno=parent), messages.Order, name="parent of the worker")
    try:
        begin = channel.receive().message
        if not isinstance(begin, messages.Open):
            raise WireError(f"a worker's first order is Open, not {type(begin).__name__}")
        try:
            engine = make(begin)
            worker = Worker(engine, begin, channel)
        except Exception as error:
            channel.send(failure(begin, error), timeout=ANSWER_SECONDS)
            raise
        channel.send(messages.Opened(begin.number, engine.name), timeout=ANSWER_SECONDS)
        worker.serve()
    except SllmError:
        os._exit(0)  # the parent is gone, or knows; nothing here outlives it
    except BaseException:  # noqa: BLE001 - it is told, and ends the process
        traceback.print_exc()
    os._exit(1)


def _memory(order: messages.Order, nbytes: int) -> bytearray:
    if nbytes > MAX_SESSION_NBYTES or not isinstance(order, messages.Run):
        raise WireError(f"{type(order).__name__} came with {nbytes:,} bytes; use one sllm_mini on both sides")
    return bytearray(nbytes)


if __name__ == "__main__":
    main()
