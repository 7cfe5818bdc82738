"""A process with an engine in it: `python -m sllm_mini.inference.workers.worker`, started by `Workers` (chapter 07).

One thread reads orders from the parent over standard input, one carries them out, and each move out has its own; what the
engine does meanwhile is its `service`'s. The process ends when its parent closes the connection or dies; an error in a step
that is no request's own ends it too, and so does a ledger that answers the feed no more: the parent begins its requests
again elsewhere.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NoReturn

from sllm_mini.errors import ModelError, SllmError, WireError
from sllm_mini.inference.session import Session
from sllm_mini.inference.workers import messages
from sllm_mini.inference.workers.service import EngineService
from sllm_mini.wire import Channel, Message

if TYPE_CHECKING:
    from sllm_mini.inference.engine import Engine

MAX_SESSION_NBYTES = 64 << 20
ANSWER_SECONDS = 10.0

CarryOut = Callable[[Any, bytes], Message]
"""What becomes of an order and its payload: the answer, or an error, which is told."""


def serve_orders(
    channel: Channel[Any], carry_out: CarryOut, stuck_seconds: Callable[[], float], *, beside: tuple[type[Message], ...] = (messages.Move,)
) -> None:
    """Reads orders until the channel ends, and answers each: pings at once with `stuck_seconds()`, those of the kinds `beside` on
    threads of their own, the others one after another. Raises ChannelClosed then."""
    in_order = ThreadPoolExecutor(1, thread_name_prefix="sllm-orders")

    def answer(order: Any, payload: bytes) -> None:
        try:
            try:
                channel.send(carry_out(order, payload), timeout=ANSWER_SECONDS)
            except Exception as error:  # noqa: BLE001 - it is told to whoever waits for an answer
                channel.send(failure(order, error), timeout=ANSWER_SECONDS)
        except WireError:
            channel.close()  # the parent is gone or does not read: the loop below ends, and with it this process

    while True:
        received = channel.receive(into=_memory)
        order = received.message
        if isinstance(order, messages.Ping):
            channel.send(messages.Alive(order.number, stuck_seconds()), timeout=ANSWER_SECONDS)
        elif isinstance(order, beside):
            threading.Thread(target=answer, args=(order, b""), name="sllm-order", daemon=True).start()
        else:
            in_order.submit(answer, order, bytes(received.payload or b""))


def serve_order(service: EngineService, order: messages.Run | messages.Move | messages.Drop, payload: bytes) -> messages.Done | messages.Moved:
    """Carries out an order about a request. Raises what the service raises."""
    if isinstance(order, messages.Move):
        return messages.Moved(order.number, service.move(order.request_id, order.address, mode=order.mode, target_gap_tokens=order.target_gap_tokens))
    if isinstance(order, messages.Run):
        service.run(Session.from_bytes(payload), order.epoch)
    else:
        service.drop(order.request_id, order.epoch)
    return messages.Done(order.number)


def failure(order: Any, error: BaseException) -> messages.Failed:
    """An error as a message: its class, if the parent has that too, and its sentence."""
    kind = type(error).__name__ if isinstance(error, SllmError) else "ModelError"
    return messages.Failed(order.number, kind, str(error)[:8000])


def end_process(owner: str, error: BaseException) -> NoReturn:
    """What becomes of a process whose engine cannot be stepped any more: it tells why, and ends."""
    if isinstance(error, WireError):  # often its parent has ended too, and then its reader knows why
        print(f"worker {owner} ends: {error}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)
    os._exit(1)


def load(begin: messages.Open) -> Engine:
    """The engine of a worker's first order."""
    import torch

    from sllm_mini.inference.engine import Engine

    torch.set_num_threads(begin.threads)
    return Engine.load(begin.checkpoint, begin.device, max_batch=begin.max_batch)


def take_stdin() -> socket.socket:
    """The connection that a parent gave as standard input, which is nothing from then on."""
    parent = os.dup(0)
    with open(os.devnull, "rb") as null:
        os.dup2(null.fileno(), 0)
    return socket.socket(fileno=parent)


def main(make: Callable[[messages.Open], Engine] = load) -> NoReturn:
    """Runs a worker whose parent is at the other end of standard input. It ignores SIGINT: its parent, or a killer, ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel: Channel[messages.Order] = Channel(take_stdin(), messages.Order, name="parent of the worker")
    try:
        begin = channel.receive().message
        if not isinstance(begin, messages.Open):
            raise WireError(f"a worker's first order is Open, not {type(begin).__name__}")
        try:
            engine = make(begin)
            service = EngineService(
                engine, owner=begin.owner, address=begin.address, arbiter=begin.arbiter, pace_seconds=begin.pace_seconds,
                on_error=lambda error: end_process(begin.owner, error),
            )  # fmt: skip
        except Exception as error:
            channel.send(failure(begin, error), timeout=ANSWER_SECONDS)
            raise
        channel.send(messages.Opened(begin.number, engine.name), timeout=ANSWER_SECONDS)

        def carry_out(order: messages.Order, payload: bytes) -> messages.Answer:
            if isinstance(order, messages.Encode):
                return messages.Encoded(order.number, engine.encode(order.prompt))
            if isinstance(order, messages.Open | messages.Ping):
                raise ModelError("this worker has a model already; start another for the next")
            return serve_order(service, order, payload)

        serve_orders(channel, carry_out, service.stuck_seconds)
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
