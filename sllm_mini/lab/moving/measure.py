"""`bench migrate` as one call: one request after another moves between two worker processes. Call from one thread. Chapter 07.

In each round every context is moved in every mode once, in a shuffled order that a seed fixes, alternately from one worker
to the other and back. The request is alone in its worker, greedy, and goes on past every end of text. Costs the model's
memory twice, and one prefill of the context for each move besides the move itself.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from sllm_mini.checkpoint import Checkpoint, open_checkpoint
from sllm_mini.errors import ModelError
from sllm_mini.inference.migration import Mode, Report
from sllm_mini.inference.ownership.ledger import LedgerPiece
from sllm_mini.inference.workers import WorkerOptions, Workers
from sllm_mini.lab.models import workspace
from sllm_mini.lab.moving.document import MODES, Move, assemble
from sllm_mini.lab.moving.dying import forked
from sllm_mini.lab.moving.model import SMALL, moving_checkpoint
from sllm_mini.loading.probe import measure_machine

_BEFORE, _AFTER = 12, 6
_FIRST_STEPS = 2
"""The first tokens of a request, whose steps are not counted: the first is its prefill."""
_ROOM = 4096
"""New tokens that a request may have at most: nobody waits for them, the request is cancelled."""
_NAMES = ("one", "two")
_PIECE_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Options:
    """How to measure. `contexts` are lengths of prompts, `threads` what each worker computes with (two workers share the
    machine). Raises ValueError for what measures nothing."""

    rounds: int = 3
    contexts: tuple[int, ...] = (128, 512, 2000)
    modes: tuple[Mode, ...] = MODES
    device: str = "cpu"
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.threads < 1:
            raise ValueError("rounds and threads are at least 1")
        if not self.contexts or min(self.contexts) < 1 or not self.modes:
            raise ValueError("name at least one mode and one context of at least 1 token")


@dataclass(frozen=True, slots=True)
class Trace:
    """One move and every token around it. `started` is when it was asked for, `seconds` how long until it was done, and
    `pause_seconds` from the source's last step to the destination's first, as these two saw it."""

    mode: Mode
    context: int
    pieces: tuple[LedgerPiece, ...]
    report: Report
    started: float
    seconds: float
    pause_seconds: float

    @property
    def step_seconds(self) -> float:
        """A decode step before the move: the median of the times between tokens."""
        before = [piece.arrived for piece in self.pieces[_FIRST_STEPS:] if piece.arrived <= self.started]
        return statistics.median(later - earlier for earlier, later in pairwise(before))

    @property
    def gap_seconds(self) -> float:
        """Between the source's last token and the destination's first, as the client got them."""
        return next(later.arrived - earlier.arrived for earlier, later in pairwise(self.pieces) if earlier.epoch != later.epoch)


def measure_moves(
    model: str | os.PathLike[str] | None = None,
    *,
    options: Options | None = None,
    folder: str | os.PathLike[str] | None = None,
    workers: Workers | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measures one model; returns the document (see `document`).

    `model` is a checkpoint of ours, None for a small random one, made below `folder` (None: the chapters' workspace) and
    kept there. `workers` that run already, "one" and "two" of that model, are used and left running; their options must be those of
    `options`. Raises what opening it raises, ValueError for other workers, ModelError for a context that leaves no room to move
    in, before anything is started, and for a request that stays where it was.
    """
    options = options or Options()
    say = on_stage or (lambda _: None)
    say("preparing the checkpoint")
    checkpoint = open_checkpoint(model) if model is not None else moving_checkpoint(workspace() if folder is None else folder)
    room = _room(checkpoint, options.contexts)
    with ExitStack() as stack:
        if workers is None:
            say("starting two workers")
            workers = stack.enter_context(Workers(checkpoint.path, _NAMES, options=WorkerOptions(device=options.device, threads=options.threads), program=forked()))
        running = workers.options.device, workers.options.threads, workers.options.pace_seconds, workers.checkpoint
        if running != (options.device, options.threads, 0.0, os.path.abspath(checkpoint.path)) or not set(_NAMES) <= set(workers.names):
            raise ValueError("these workers run something else than what is to be measured; leave them out, or start 'one' and 'two' with these options")
        moves = _run(workers, options, room, say)
    weights = f"random weights ({SMALL.name}, seed 0)" if model is None else "the checkpoint's own"
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "machine": asdict(measure_machine(checkpoint.path)),
        "model": {"name": checkpoint.path.name, "tensor_count": len(checkpoint.index.tensors), "nbytes": checkpoint.nbytes, "weights": weights},
        "method": {
            "device": options.device, "rounds": options.rounds, "contexts": list(options.contexts), "threads": options.threads, "seed": options.seed,
            "link": "a Unix socket between two processes", "not_timed": "the workers' start, and one move of each mode",
        },
    }  # fmt: skip
    return assemble(moves, facts)


def _room(checkpoint: Checkpoint, contexts: Sequence[int]) -> int:
    """New tokens that every request may have, within what the model's configuration admits. Raises ModelError where a context leaves
    no room to move in."""
    limit = json.loads(checkpoint.read_companion("config.json")).get("max_position_embeddings")
    room = _ROOM if limit is None else min(_ROOM, limit - max(contexts))
    if room < 2 * (_BEFORE + _AFTER):
        raise ModelError(f"a context of {max(contexts):,} tokens leaves no room to move in, as the model's context is {limit:,} tokens; measure shorter ones")
    return room


def _run(workers: Workers, options: Options, room: int, say: Callable[[str], None]) -> list[Move]:
    for mode in options.modes:
        say(f"a first move, untimed: {mode}")
        measure_move(workers, min(options.contexts), mode, "one", "two", room=room)
    moves = []
    generator = random.Random(options.seed)
    wanted = [(mode, context) for mode in options.modes for context in options.contexts]
    here, there = _NAMES
    for number in range(options.rounds):
        for mode, context in generator.sample(wanted, len(wanted)):
            say(f"round {number + 1} of {options.rounds}: {mode}, {context} tokens")
            moves.append(measure_move(workers, context, mode, here, there, room=room))
            here, there = there, here
    return moves


def measure_move(workers: Workers, context: int, mode: Mode, source: str, destination: str, *, room: int = _ROOM) -> Move:
    """One request of `context` tokens from `source` to `destination`, while it decodes. Raises ModelError if it stayed."""
    return _measured(trace_move(workers, context, mode, source, destination, room=room))


def trace_move(
    workers: Workers, context: int, mode: Mode, source: str, destination: str, *, before: int = _BEFORE, after: int = _AFTER, room: int = _ROOM
) -> Trace:
    """`measure_move` with every token: `before` of them come before the move begins, `after` from the destination. `room` is the
    limit of new tokens, and the model's context must hold it."""
    prompt = [3 + (7 * place) % 101 for place in range(context)]
    request = workers.submit(source, prompt, max_new_tokens=room, stop_at_eos=False)
    pieces = workers.ledger.stream(request, timeout=_PIECE_SECONDS)
    try:
        came = [next(pieces) for _ in range(before)]
        started = time.monotonic()
        report = workers.move(request, destination, mode=mode)
        seconds = time.monotonic() - started
        pause_seconds = report.pause_seconds
        if report.outcome != "moved" or pause_seconds is None:
            raise ModelError(f"the request was to move from {source} to {destination} and {report.outcome}: {report.reason}")
        while sum(piece.epoch == report.epoch for piece in came) < after:
            came.append(next(pieces))
    finally:
        workers.cancel(request)
        workers.ledger.close(request)
    return Trace(mode, context, tuple(came), report, started, seconds, pause_seconds)


def _measured(trace: Trace) -> Move:
    catch_up = max((phase for phase in trace.report.phases if phase.name == "round"), key=lambda phase: phase.tokens, default=None)
    copies = [phase for phase in trace.report.phases if phase.name == "copy" and phase.nbytes]
    return Move(
        mode=trace.mode,
        context=trace.context,
        seconds=trace.seconds,
        pause_seconds=trace.pause_seconds,
        gap_seconds=trace.gap_seconds,
        step_seconds=trace.step_seconds,
        nbytes=trace.report.nbytes,
        rounds=trace.report.rounds,
        last_round_seconds=next((phase.seconds for phase in reversed(trace.report.phases) if phase.name == "round"), 0.0),
        catch_up_tokens=catch_up.tokens if catch_up else 0,
        catch_up_seconds=catch_up.seconds if catch_up else 0.0,
        copy_tokens=sum(phase.tokens for phase in copies),
        copy_nbytes=sum(phase.nbytes for phase in copies),
        copy_seconds=sum(phase.seconds for phase in copies),
    )
