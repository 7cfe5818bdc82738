"""Iteration-level batching: requests join and leave between two steps, and every step gives each of them one token.

A step first runs the prompts that wait, longest waiting first, each alone; then one decode pass for all that ran
already (Orca, OSDI'22). Rows of the cache that decode lie at its front, in `_rows[:_count]`; behind them lie requests
on hold and guests that are moving in. There is no thread of its own: whoever wants a piece steps. Costs some tens of
microseconds a step beside the model's forward pass, and one wait for the device. Taught in chapters 06 and 07.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sllm_mini.errors import ModelError
from sllm_mini.inference.requests import Finish, Piece, Request
from sllm_mini.inference.runner import Runner
from sllm_mini.inference.sampler import choose_tokens, penalise, seen_tokens
from sllm_mini.inference.turns import Turns

if TYPE_CHECKING:
    import torch

    from sllm_mini.inference.kv import SlotCache


class Guest:
    """A request that is moving in: a row that fills. `known` are the tokens of that row, None where only their KV came."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.row: int | None = None
        self.known: list[int | None] = []


class Scheduler:
    """The batch of one model. At most `max_batch` rows: running, on hold and guests. Safe from several threads, which take
    turns; the model itself is run by one at a time."""

    def __init__(self, model: Any, max_batch: int) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch is {max_batch}; it must be at least 1")
        self.runner = Runner(model)
        self.max_batch = max_batch
        self._kv: SlotCache | None = None
        self._turns = Turns()
        self._requests: dict[str, Request] = {}
        self._waiting: deque[Request] = deque()
        self._rows: list[Request | Guest] = []
        self._count = 0
        self._next: tuple[list[Request | Guest], torch.Tensor] | None = None
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
        if self._kv is None:
            self._kv = self.runner.new_slots()
        return self._kv

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
            running = self._count
            admitted = False
            while self._waiting and len(self._rows) < self.max_batch:
                first, self._has_run = not self._has_run, True
                self._prefill(self._waiting.popleft(), first)
                admitted = True
                if first:  # its layers may have waited for their bytes, one by one: nobody else is made to
                    return True
            late = [owner for owner in self._rows[self._count :] if isinstance(owner, Request) and owner.late and not owner.held]
            if running:
                self._decode(running)
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
                self._remove(request, clean=request.finish not in ("eos", "length", "stop"))
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

    # --- rows -------------------------------------------------------------------------------------------------------

    def _add(self, owner: Request | Guest) -> int:
        owner.row = self.kv.add_row()
        self._rows.append(owner)
        return owner.row

    def _swap(self, one: int, other: int) -> None:
        if one != other:
            self.kv.swap_rows(one, other)
            rows = self._rows
            rows[one], rows[other] = rows[other], rows[one]
            rows[one].row, rows[other].row = one, other

    def _join(self, request: Request) -> None:
        """From a row behind those that decode to the last of them."""
        self._swap(row_of(request), self._count)
        self._count += 1

    def _leave(self, owner: Request | Guest) -> None:
        """From a row that decodes to the first behind them."""
        self._count -= 1
        self._swap(row_of(owner), self._count)

    def _remove(self, owner: Request | Guest, *, clean: bool) -> None:
        self._next = None
        self.kv.lengths[row_of(owner)] = 0  # so that a swap copies only what the other one holds
        if row_of(owner) < self._count:
            self._leave(owner)
        self._swap(row_of(owner), len(self._rows) - 1)
        self._rows.pop()
        owner.row = None
        self.kv.pop_row(clean=clean)

    # --- passes -----------------------------------------------------------------------------------------------------

    def _prefill(self, request: Request, first: bool) -> None:
        """The tokens that the cache lacks, in one pass, and the first new one."""
        import torch

        started = time.perf_counter()
        waits = self._wait_clock if first else None
        before = waits() if waits else 0.0
        request.queue_seconds += max(started - request.requested - request.tokenize_seconds, 0.0)
        try:
            row = self._add(request)
            ids = torch.tensor([request.token_ids], device=self.runner.device)
            chosen = self._choose([request], self.runner.extend(self.kv, row, ids))
            token_id = int(chosen)  # the one wait for the device
        except Exception as error:  # noqa: BLE001 - raised where its pieces are read
            self.end(request, None, error)
            return
        except BaseException:  # interrupted: as if this step had not begun
            if request.row is not None:
                self._remove(request, clean=False)
            self._waiting.appendleft(request)
            raise
        request.load_seconds = waits() - before if waits else 0.0
        request.prefill_seconds = time.perf_counter() - started - request.load_seconds
        self._join(request)
        self._take(request, token_id)
        self._next = ([request], chosen.view(1, 1)) if self._count == 1 and not request.ended else None

    def _catch_up(self, request: Request) -> None:
        """The first step of a request that came with keys and values missing: those and the next token, in one pass."""
        import torch

        if request.ended:  # another's on_piece may have dropped it
            return
        started = time.perf_counter()
        row = row_of(request)
        try:
            ids = torch.tensor([request.token_ids[self.kv.lengths[row] :]], device=self.runner.device)
            token_id = int(self._choose([request], self.runner.extend(self.kv, row, ids)))
        except Exception as error:  # noqa: BLE001 - raised where its pieces are read
            self.end(request, None, error)
            return
        request.late = False
        request.decode_seconds += time.perf_counter() - started
        request.decode_steps += 1
        self._join(request)
        self._take(request, token_id)

    def _decode(self, count: int) -> None:
        """One token for each of the first rows."""
        batch = self._rows[:count]
        try:
            groups = [batch] if count == 1 or self.runner.can_batch else [[owner] for owner in batch]
        except Exception as error:  # noqa: BLE001 - raised where the pieces are read
            for owner in batch:
                self.end(self._requests[owner.request_id], None, error)
            return
        for group in groups:
            self._decode_rows(group)

    def _decode_rows(self, batch: list[Request | Guest]) -> None:
        import torch

        requests = [owner for owner in batch if isinstance(owner, Request)]
        started = time.perf_counter()
        for request in requests:  # also after a step that was interrupted
            self.kv.lengths[row_of(request)] = len(request.token_ids) - 1
        try:
            if self._next is not None and self._next[0] == batch:
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
        for request, token_id in zip(requests, token_ids, strict=True):
            request.decode_seconds += seconds
            request.decode_steps += 1
            if not request.ended:  # another's on_piece may have dropped it
                self._take(request, token_id)
        if not any(request.ended for request in requests):
            self._next = batch, chosen.view(-1, 1)

    def _choose(self, requests: list[Request], logits: torch.Tensor) -> torch.Tensor:
        """The next token of each, int64 `[rows]` on the device."""
        import torch

        self._noutputs = logits.shape[-1]
        if any(request.sampling.repetition_penalty != 1 for request in requests):
            rows = []
            for request, row in zip(requests, logits, strict=True):
                penalty = request.sampling.repetition_penalty
                if penalty != 1:
                    if request.seen is None:
                        request.seen = seen_tokens(request.token_ids, row.shape[0], row.device)
                    row = penalise(row, request.seen, penalty)
                rows.append(row.float())
            logits = torch.stack(rows)
        return choose_tokens(logits, [request.sampling for request in requests], [len(request.token_ids) for request in requests])

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


def row_of(owner: Request | Guest) -> int:
    if owner.row is None:
        raise ModelError(f"request {owner.request_id!r} has no slot; it ended between two steps")
    return owner.row
