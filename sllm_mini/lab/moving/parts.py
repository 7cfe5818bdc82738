"""What a move is made of, each part measured alone in one process, and what follows for a move. Shown in chapter 07.

A decode step, the speed at which tokens are computed again, the way of a KV cache (read, over a socket, written), the bytes of
a session. `predict` puts them together; `measure` then says what a move between two processes took.
"""

from __future__ import annotations

import os
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

from sllm_mini.checkpoint import Checkpoint
from sllm_mini.inference.engine import Engine
from sllm_mini.inference.migration import Mode, MoveOptions, Speeds
from sllm_mini.inference.session import Session

_STEPS = 12
_ROUNDS = 3
_TOKEN_NBYTES = 4


@dataclass(frozen=True, slots=True)
class Parts:
    """Each part alone. `speeds` holds recomputation, the link as a move uses it, and bytes of KV a token."""

    step_seconds: float
    speeds: Speeds
    session_nbytes: int
    """Of a session without tokens, nearly."""
    session_nbytes_per_token: float
    gap_seconds: float
    """Of a pass over the last gap, `target_gap_tokens`, and the token after it, with the context behind them."""
    target_gap_tokens: int = MoveOptions().target_gap_tokens


@dataclass(frozen=True, slots=True)
class Prediction:
    """A move of `context` tokens: what is sent, how long it takes to bring it, and the pause in decode steps."""

    mode: Mode
    context: int
    nbytes: float
    seconds: float
    pause_steps: float


def predict(parts: Parts, mode: Mode, context: int) -> Prediction:
    """From the parts, as if nothing but the move ran.

    The session is sent twice, at the beginning and at the end. A pause has one step in any case, the destination's first. By
    tokens that step goes over the last gap as well; KV adds the last gap's bytes; stopping first adds all of them. Pure.
    """
    speeds = parts.speeds
    session = 2 * (parts.session_nbytes + parts.session_nbytes_per_token * context)
    if mode == "tokens":
        return Prediction(mode, context, session + _TOKEN_NBYTES * context, context / speeds.recompute_tokens_per_second, parts.gap_seconds / parts.step_seconds)
    copy = context * speeds.kv_nbytes_per_token / speeds.link_bytes_per_second
    late = copy if mode == "stop_and_copy" else copy * min(parts.target_gap_tokens / context, 1)
    return Prediction(mode, context, session + speeds.kv_nbytes_per_token * context, copy, 1 + late / parts.step_seconds)


def crossing(parts: Parts, mode: Mode) -> float:
    """Tokens of context from which on `predict` has a longer pause for stop and copy than for `mode`: there the copy of the whole
    cache outlasts what the mode adds to a step. Pure."""
    if mode == "tokens":
        return max(parts.gap_seconds - parts.step_seconds, 0.0) * parts.speeds.link_bytes_per_second / parts.speeds.kv_nbytes_per_token
    return float(parts.target_gap_tokens) if mode == "kv" else 0.0


def measure_parts(checkpoint: Checkpoint, *, tokens: int = 512, device: str = "cpu", threads: int = 1) -> Parts:
    """Runs each part alone: a request of `tokens`, its decode steps, its KV read, sent and written, the same computed again.
    Medians: of the steps, and of a few rounds of the rest after one that is not counted, since the first pass of a kind allocates.

    Raises what loading and running the model raise. Costs the model's memory once and the cache of two requests.
    """
    with torch_threads(threads):
        engine = Engine.load(checkpoint, device)
        prompt = [3 + (7 * place) % 101 for place in range(tokens)]
        generation = engine.submit(prompt, max_new_tokens=4 * _STEPS, stop_at_eos=False)
        times = [piece.seconds for piece in (next(generation) for _ in range(_STEPS))]
        step = statistics.median(later - earlier for earlier, later in pairwise(times[1:]))
        session = generation.session()
        engine.hold(session.request_id)
        short = replace(session, token_ids=session.token_ids[:1], prompt_length=1)
        nbytes, least = len(session.to_bytes()), len(short.to_bytes())
        gap = 1 + min(MoveOptions().target_gap_tokens, len(session.token_ids) - 2)
        recompute, last, link = zip(*(_again(engine, session, gap) for _ in range(1 + _ROUNDS)), strict=True)
        kv = engine.kv_nbytes_per_token
        generation.close()
    speeds = Speeds(statistics.median(recompute[1:]), statistics.median(link[1:]), kv)
    return Parts(step, speeds, least, (nbytes - least) / (len(session.token_ids) - 1), statistics.median(last[1:]))


def _again(engine: Engine, session: Session, gap: int) -> tuple[float, float, float]:
    """One guest computed again and one copied: tokens a second, seconds of the pass over the last `gap`, bytes a second."""
    guest = replace(session, request_id="guest")
    many = session.token_ids[:-gap]
    engine.prepare(guest)
    started = time.monotonic()
    engine.absorb("guest", many)
    stopped = time.monotonic()
    engine.absorb("guest", session.token_ids[-gap:])
    last = time.monotonic() - stopped
    engine.drop("guest")
    engine.prepare(guest)
    link = _carry(engine, session.request_id, "guest")
    engine.drop("guest")
    return len(many) / (stopped - started), last, link


def _carry(engine: Engine, source: str, guest: str) -> float:
    """Bytes per second of KV from one request to a guest over a Unix socket, block by block, as a move takes them."""
    import torch

    count = engine.kv_length(source)
    step = max(1, MoveOptions().block_nbytes // engine.kv_nbytes_per_token)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        started = time.monotonic()
        for start in range(0, count, step):
            stop = min(start + step, count)
            block = engine.read_kv(source, start, stop).numpy().data
            sender = threading.Thread(target=ours.sendall, args=(block,))
            sender.start()
            arrived = bytearray(block.nbytes)
            left = memoryview(arrived)
            while left:
                left = left[theirs.recv_into(left) :]
            sender.join()
            engine.write_kv(guest, start, torch.frombuffer(arrived, dtype=torch.uint8))
        return count * engine.kv_nbytes_per_token / (time.monotonic() - started)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch computes with that many threads inside the block, never with more than there are processors."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(min(count, os.cpu_count() or 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)
