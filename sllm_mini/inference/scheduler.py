"""Iteration-level batching: requests join and leave between two steps, and every step gives each of them one token.

A step first runs the prompts that wait, longest waiting first, several in one pass; then one decode pass for all that
ran already (Orca, OSDI'22). There is no thread of its own: whoever wants a piece steps. Costs some tens of microseconds a
step beside the model's forward pass, and one wait for the device. Taught in chapters 06 and 07.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from sllm_mini.errors import ModelError
from sllm_mini.inference.requests import Finish, Piece, Request, embedding, next_tokens
from sllm_mini.inference.rows import Rows, row_of
from sllm_mini.inference.runner import Runner
from sllm_mini.inference.turns import Turns

if TYPE_CHECKING:
    import torch

    from sllm_mini.inference.kv import SlotCache


_PACKED_TOKENS = 512
"""Prompts that wait are read in one pass up to so many tokens: enough to read the weights once for many, and few enough
that the mask is small and those that decode do not wait long."""


class Scheduler:
    """The batch of one model. At most `max_batch` rows: running, on hold and guests. Safe from several threads, which take
    turns; the model itself is run by one at a time."""

    def __init__(self, model: Any, max_batch: int) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch is {max_batch}; it must be at least 1")
        self.runner = model if isinstance(model, Runner) else Runner(model)
        self.max_batch = max_batch
        self._turns = Turns()
        self._requests: dict[str, Request] = {}
        self._waiting: deque[Request] = deque()
        self._rows = Rows(self.runner.new_slots())
        self._next: tuple[list[Request], torch.Tensor] | None = None
        self._has_run = False
        self._noutputs = 0
        self._wait_clock: Callable[[], float] | None = None
        self._news = threading.Condition()
        self._version = 0

    # --- what callers ask -------------------------------------------------------------------------------------------

    @property
    def requests(self) -> tuple[str, ...]:
        """The ids of all that run, wait or are on hold, oldest first; guests are none of them."""
        return tuple(self._requests)

    @property
    def kv(self) -> SlotCache:
        """The cache of this engine; look at it only between two steps."""
        return self._rows.kv

    def enqueue(self, request: Request) -> None:
        """Lets a request join at the next step. Raises ValueError if its id is taken."""
        if self._requests.setdefault(request.request_id, request) is not request:
            raise ValueError(f"a request with the id {request.request_id!r} is here already; give each one an id of its own")
        self._waiting.append(request)
        self._announce()

    def pull(self, request: Request) -> Piece | None:
        """The request's next piece, after as many steps as it takes; None after its end. Raises what ended it."""
        while True:
            version = self._version
            if request.pieces:
                return request.pieces.popleft()
            if request.ended:
                error, request.error = request.error, None
                if error is not None:
                    raise error
                return None
            with self._turns:
                if request.pieces or request.ended or self.step():
                    continue
            with self._news:  # it is on hold, or no row is free
                self._news.wait_for(lambda seen=version: self._version != seen)  # type: ignore[misc]

    def step(self) -> bool:
        """One iteration for every request: one token each. False if there was nothing to do. What goes wrong with one request
        ends that one, and is raised where its pieces are read; a pass for all that fails ends all that were in it."""
        with self._turns:
            self._reap()
            running = len(self._rows.running)
            admitted = alone = False
            while self._waiting and len(self._rows) < self.max_batch:
                first = not self._has_run
                batch = self._next_waiting(1 if first or alone else self.max_batch - len(self._rows))
                alone |= not self._prefill(batch, first) and len(batch) > 1
                self._has_run = admitted = True
                if first:  # its layers may have waited for their bytes, one by one: nobody else is made to
                    return True
            late = self._rows.late
            if decoding := self._rows.running[:running]:  # fewer, if an on_piece has dropped some
                self._decode(decoding)
            for request in late:
                self._catch_up(request)
            return admitted or running > 0 or bool(late)

    def end(self, request: Request, finish: Finish | None, error: BaseException | None = None) -> None:
        """Takes a request out, wherever it is; does nothing if it has ended. Waits for the step under way."""
        with self._turns:
            if request.ended:
                return
            request.ended = True
            request.finish = request.finish or finish
            request.error = error
            request.seen = None
            del self._requests[request.request_id]
            if request.row is None:
                if request in self._waiting:
                    self._waiting.remove(request)
            else:
                # Only logits that were finite prove that the row holds finite numbers alone.
                self._next = None
                self._rows.remove(request, clean=request.finish not in ("eos", "length", "stop"))
        self._announce()

    def abandon(self, request: Request) -> None:
        """Nobody will read it: it ends now, or before the next step. Never waits; called by a finaliser."""
        request.abandoned = True
        if self._turns.enter_if_free():
            try:
                self.end(request, None)
            finally:
                self._turns.__exit__(None, None, None)

    def _reap(self) -> None:
        for request in [one for one in list(self._requests.values()) if one.abandoned]:
            self.end(request, None)

    def _announce(self) -> None:
        with self._news:
            self._version += 1
            self._news.notify_all()

    # --- passes -----------------------------------------------------------------------------------------------------

    def _next_waiting(self, room: int) -> list[Request]:
        """Those that wait longest: at most `room`, and no more than one pass takes."""
        waiting = list(self._waiting)  # which other threads append to
        ntokens = accumulate(len(request.token_ids) for request in waiting)
        return [request for n, (request, total) in enumerate(zip(waiting[:room], ntokens, strict=False)) if n == 0 or total <= _PACKED_TOKENS]

    def _prefill(self, requests: list[Request], first: bool) -> bool:
        """The prompts of these, which are the next ones waiting, in one pass, and the first new token of each. False where that
        did not go well: one alone has ended then, with several nothing has happened."""
        import torch

        waits = self._wait_clock if first else None
        try:
            if len(requests) > 1 and not self.runner.can_batch:
                return False
            started, before = time.perf_counter(), waits() if waits else 0.0
            for request in requests:  # before the pass, so that no row which it fills has to move
                self._rows.add(request)
                self._rows.join(request)
            row = row_of(requests[0])
            embeds = any(request.embed for request in requests)
            keeping: AbstractContextManager[list[torch.Tensor]] = self.runner.keeping_states() if embeds else nullcontext([])
            with keeping as states:
                if len(requests) > 1:
                    logits = self.runner.prefill(self.kv, row, [request.token_ids for request in requests])
                else:
                    logits = self.runner.extend(self.kv, row, torch.tensor([requests[0].token_ids], device=self.runner.device))
            if embeds:
                for request, own in zip(requests, torch.cat(states, 1)[0].split([len(request.token_ids) for request in requests]), strict=True):
                    request.vector = embedding(own) if request.embed else None
            chosen = self._choose(requests, logits)
            token_ids = chosen.tolist()  # the one wait for the device
            if len(requests) > 1 and max(token_ids) >= self._noutputs:  # what is not finite in one may have spoilt the others
                self._withdraw(requests)
                return False
            for _ in requests:
                self._waiting.popleft()
        except BaseException as error:
            self._withdraw(requests)
            if not isinstance(error, Exception):
                raise
            if len(requests) == 1:
                self.end(requests[0], None, error)  # raised where its pieces are read
            return False
        load_seconds = waits() - before if waits else 0.0
        prefill_seconds = time.perf_counter() - started - load_seconds
        for request in requests:
            request.queue_seconds += max(started - request.requested - request.tokenize_seconds, 0.0)
            request.load_seconds, request.prefill_seconds = load_seconds, prefill_seconds
        self._give(requests, chosen, token_ids)
        return True

    def _withdraw(self, requests: list[Request]) -> None:
        """They wait again, in their order, as if this step had not begun."""
        for request in reversed(requests):
            if request.row is not None:
                self._rows.remove(request, clean=True)
            if request not in self._waiting:
                self._waiting.appendleft(request)

    def _catch_up(self, request: Request) -> None:
        """The first step of a request that came with keys and values missing: those and the next token, in one pass."""
        import torch

        if request.ended or request.held or not request.late:  # by an on_piece of another
            return
        started = time.perf_counter()
        row = row_of(request)
        self.kv.lengths[row] = min(self.kv.lengths[row], len(request.token_ids) - 1)  # also after a step that was interrupted
        try:
            ids = torch.tensor([request.token_ids[self.kv.lengths[row] :]], device=self.runner.device)
            token_id = int(self._choose([request], self.runner.extend(self.kv, row, ids)))
        except Exception as error:  # noqa: BLE001 - raised where its pieces are read
            self.end(request, None, error)
            return
        request.late = False
        request.decode_seconds += time.perf_counter() - started
        request.decode_steps += 1
        self._rows.join(request)
        self._take(request, token_id)

    def _decode(self, requests: list[Request]) -> None:
        """One token for each of these, which have the first rows."""
        try:
            together = len(requests) == 1 or self.runner.can_batch
        except Exception as error:  # noqa: BLE001 - raised where the pieces are read
            for request in requests:
                self.end(request, None, error)
            return
        for group in [requests] if together else [[request] for request in requests]:
            if group[0] in self._rows.running:  # another's on_piece may have dropped it
                self._decode_rows(group)

    def _decode_rows(self, requests: list[Request]) -> None:
        import torch

        started = time.perf_counter()
        for request in requests:  # also after a step that was interrupted
            self.kv.lengths[row_of(request)] = len(request.token_ids) - 1
        try:
            if self._next is not None and self._next[0] == requests:
                tokens = self._next[1]  # on its device already, so this step needs no copy from the host
            else:
                tokens = torch.tensor([[request.token_ids[-1]] for request in requests], device=self.runner.device)
            self._next = None
            if len(requests) == 1:
                logits = self.runner.extend(self.kv, row_of(requests[0]), tokens)
            else:
                logits = self.runner.decode(self.kv, tokens)
            chosen = self._choose(requests, logits)
            token_ids = chosen.tolist()  # the one wait for the device
        except Exception as error:  # noqa: BLE001 - raised where the pieces are read
            for request in requests:
                self.end(request, None, error)
            return
        seconds = time.perf_counter() - started
        for request in requests:
            request.decode_seconds += seconds
            request.decode_steps += 1
        self._give(requests, chosen, token_ids)

    def _give(self, requests: list[Request], chosen: torch.Tensor, token_ids: list[int]) -> None:
        """Each its token, unless an on_piece of another has dropped it, held it or let it go on meanwhile."""
        positions = [len(request.token_ids) for request in requests]
        for request, token_id, position in zip(requests, token_ids, positions, strict=True):
            if not request.ended and not request.held and len(request.token_ids) == position:
                self._take(request, token_id)
        if requests == self._rows.running and all(len(request.token_ids) == position + 1 for request, position in zip(requests, positions, strict=True)):
            self._next = requests, chosen.view(-1, 1)

    def _choose(self, requests: list[Request], logits: torch.Tensor) -> torch.Tensor:
        self._noutputs = logits.shape[-1]
        for request, row in zip(requests, logits, strict=True) if any(request.logprobs is not None for request in requests) else ():
            request.logits = row if request.logprobs is not None else None
        return next_tokens(requests, logits)

    def _take(self, request: Request, token_id: int) -> None:
        """A token that was chosen goes to its request, and its piece to whoever reads it."""
        try:
            if token_id >= self._noutputs:
                raise ModelError(
                    f"{self.runner.name} gave logits that are not finite at position {len(request.token_ids)}; "
                    "verify the checkpoint, or load it in bfloat16 or float32 if it was in float16"
                )
            if request.seen is not None:
                request.seen[token_id] = True
            piece = request.take(token_id)
            request.pieces.append(piece)
            if request.on_piece is not None:
                request.on_piece(piece)
        except Exception as error:  # noqa: BLE001 - raised where its pieces are read
            self.end(request, None, error)
            return
        if request.finish is not None:
            self.end(request, request.finish)
