"""One text that moves while it is written: sent on its way, followed token by token, shown in the colours of its owners.

    journey = travel(workers, "one", "Once upon a time", {20: ("two", "kv")}, max_new_tokens=100)
    Told(journey)

Every move runs on a thread of its own, so the text goes on while it is followed. Shown in chapter 07.
"""

from __future__ import annotations

import html
import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

from sllm_mini.errors import WireError
from sllm_mini.inference.migration import Mode, Report
from sllm_mini.inference.ownership.ledger import LedgerPiece
from sllm_mini.inference.sampler import SamplingOptions
from sllm_mini.inference.workers import Workers
from sllm_mini.lab.style import color_of, ink_on
from sllm_mini.lab.units import seconds_text

_PIECE_SECONDS = 60.0
_ROLES = ("disk", "device", "runtime", "dram")


@dataclass(frozen=True, slots=True)
class Journey:
    """What a client got, and from whom. `owners` names the worker of each epoch, `moves` is how each move ended (None: its
    source died with it)."""

    prompt: str
    pieces: tuple[LedgerPiece, ...]
    owners: Mapping[int, str]
    moves: tuple[Report | None, ...] = ()
    finish: str | None = None

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(piece.token_id for piece in self.pieces)

    @property
    def intervals(self) -> tuple[float, ...]:
        """Seconds between each token and the one before it, from the second token on."""
        return tuple(later.arrived - earlier.arrived for earlier, later in pairwise(self.pieces))

    @property
    def step_seconds(self) -> float:
        """What the reader waits for a token as a rule: the median."""
        return statistics.median(self.intervals)

    @property
    def stall_seconds(self) -> float:
        """The longest that the reader waited for a token, the first one apart."""
        return max(self.intervals)

    @property
    def problem(self) -> str | None:
        """What is wrong with the stream: a gap, a repeat or half a character; None if nothing is."""
        positions = [piece.position for piece in self.pieces]
        if positions != list(range(positions[0], positions[0] + len(positions))):
            return "positions that do not follow on each other"
        if any(later.epoch < earlier.epoch for earlier, later in pairwise(self.pieces)):
            return "a token of an epoch that was over"
        return "a broken character" if "\ufffd" in self.text else None


def travel(
    workers: Workers,
    source: str,
    prompt: str,
    moves: Mapping[int, tuple[str, Mode]],
    *,
    max_new_tokens: int = 160,
    sampling: SamplingOptions | None = None,
    stop_at_eos: bool = True,
    watch: Callable[[Journey], None] | None = None,
) -> Journey:
    """Submits `prompt` to `source` and moves it to (worker, mode) as soon as that many new tokens have come.

    `watch` gets the journey so far after each token. Raises what submitting raises, ModelError for a move that no
    living worker could begin, TimeoutError where no token comes.
    """
    request = workers.submit(source, prompt, max_new_tokens=max_new_tokens, sampling=sampling, stop_at_eos=stop_at_eos)
    pieces: list[LedgerPiece] = []
    owners: dict[int, str] = {}
    asked: list[Future[Report | None]] = []

    def so_far() -> Journey:
        return Journey(prompt, tuple(pieces), dict(owners))

    def move(to: str, mode: Mode) -> Report | None:
        try:
            return workers.move(request, to, mode=mode)
        except WireError:  # the source was killed and took its report with it
            return None

    with ThreadPoolExecutor(max_workers=1) as mover:
        for piece in workers.ledger.stream(request, timeout=_PIECE_SECONDS):
            pieces.append(piece)
            owner, epoch = workers.register.owner(request)
            if owner is not None:
                owners.setdefault(epoch, owner)
            if len(pieces) in moves:
                asked.append(mover.submit(move, *moves[len(pieces)]))
            if watch is not None:
                watch(so_far())
        reports = tuple(one.result() for one in asked)
    finish = workers.ledger.finish(request)
    workers.ledger.close(request)
    return Journey(prompt, tuple(pieces), owners, reports, finish)


class Told:
    """A journey as a page shows it: its text in stretches, each in the colour of its owner and marked with its name."""

    def __init__(self, journey: Journey) -> None:
        self.journey = journey

    def stretches(self) -> list[tuple[str, int, str]]:
        """Owner, epoch and text of each stretch."""
        grouped = groupby(self.journey.pieces, key=lambda piece: int(piece.epoch))
        return [(self.journey.owners.get(epoch, "?"), epoch, "".join(piece.text for piece in pieces)) for epoch, pieces in grouped]

    def _repr_html_(self) -> str:
        names = list(dict.fromkeys([*self.journey.owners.values(), "?"]))
        parts = [f"<em>{html.escape(self.journey.prompt)}</em>"]
        for owner, epoch, text in self.stretches():
            color = color_of(_ROLES[names.index(owner) % len(_ROLES)])
            style = f"background:{color};color:{ink_on(color)};padding:1px 2px"
            mark = f'<b style="{style};font-size:80%">{html.escape(owner)}, epoch {epoch}</b> '
            parts.append(f'{mark}<span style="{style}">{html.escape(text)}</span>')
        return f'<p style="line-height:1.9;max-width:46em">{" ".join(parts)}</p>'

    def __repr__(self) -> str:
        return " ".join([self.journey.prompt, *(f"[{owner}, epoch {epoch}]{text}" for owner, epoch, text in self.stretches())])

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {"text/html": self._repr_html_(), "text/plain": repr(self)}


def live() -> Callable[[Journey], None]:
    """A `watch` for `travel` that shows the text as it grows, in one output of a notebook; elsewhere it prints nothing."""
    from IPython.display import display

    shown: list[Any] = []

    def watch(journey: Journey) -> None:
        if not shown:
            shown.append(display(Told(journey), display_id=True))
        elif shown[0] is not None:
            shown[0].update(Told(journey))

    return watch


def journey_text(journey: Journey) -> str:
    """Where the text went and how long its reader waited, in a sentence or two."""
    stretches = Told(journey).stretches()
    where = ", then ".join(f"{owner} (epoch {epoch})" for owner, epoch, _ in stretches)
    wrong = journey.problem or "no gap, no repeat, no broken character"
    return (
        f"{len(journey.pieces)} tokens by {where}: {wrong}. The reader waited {seconds_text(journey.step_seconds)} for a token as a rule "
        f"and {seconds_text(journey.stall_seconds)} at most, {journey.stall_seconds / journey.step_seconds:.1f} times that."
    )
