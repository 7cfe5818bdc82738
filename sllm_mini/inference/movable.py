"""What moving a request asks of an engine: its state, its keys and values, and a place for one that comes from elsewhere.

A request that leaves is read while it decodes, held for the last part, and dropped. One that comes is a guest first: a
row that fills, by keys and values that are written into it or by tokens that are computed again, while the others
decode. `adopt` makes it a request that goes on with the very next token. Every call gets in between two steps, also
where another thread steps in a loop. Costs are those of the bytes and tokens named. Taught in chapter 07.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sllm_mini.errors import ModelError
from sllm_mini.inference.requests import Finish, Generation, OnPiece, Request, starts_with
from sllm_mini.inference.rows import Guest, row_of
from sllm_mini.inference.scheduler import Scheduler
from sllm_mini.inference.session import Session
from sllm_mini.inference.stopping import TextStream
from sllm_mini.inference.text import TextDecoder

if TYPE_CHECKING:
    import torch

_CHUNK_NTOKENS = 128
"""Tokens that a guest computes between two steps of the others."""


class Movable(Scheduler):
    """A batch whose requests can be read, held, taken in and dropped. `name` says whose weights these are; sessions of
    others are refused. Safe from several threads. Every method raises ModelError in one sentence for a request that is
    not here, or not in the state it needs."""

    def __init__(self, model: Any, max_batch: int, name: str, decoder: TextDecoder | None) -> None:
        super().__init__(model, max_batch)
        self.name = name
        self._decoder = decoder
        self._guests: dict[str, tuple[Guest, Session, TextStream | None]] = {}

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """No step runs inside this block. Waits for the one under way, and for those who asked before; may be nested."""
        with self._turns:
            yield

    # --- a request that is here --------------------------------------------------------------------------------------

    def session(self, request_id: str) -> Session:
        """Its state as of the last step; it goes on."""
        with self._turns:
            return self._request(request_id).session()

    def hold(self, request_id: str) -> None:
        """Takes it out of the steps; its slot and its KV stay. Does nothing if it is on hold."""
        with self._turns:
            request = self._request(request_id)
            if request.held:
                return
            self._complete(request)
            request.held = True
            if request.row is None:
                self._waiting.remove(request)
            else:
                self._rows.leave(request)

    def release(self, request_id: str) -> None:
        """Lets it go on after `hold`; does nothing if it is not on hold."""
        with self._turns:
            request = self._request(request_id)
            if not request.held:
                return
            request.held = False
            if request.row is None:
                self._waiting.append(request)
            else:
                self._rows.join(request)
        self._announce()

    def drop(self, request_id: str, finish: Finish = "cancelled") -> bool:
        """Forgets a guest, or ends a request with that `finish`, and frees its slot. False if neither is here."""
        with self._turns:
            guest = self._guests.pop(request_id, None)
            if guest is not None:
                self._rows.remove(guest[0], clean=True)
                self._announce()
                return True
            request = self._requests.get(request_id)
            if request is None:
                return False
            self.end(request, finish)
            return True

    # --- keys and values ---------------------------------------------------------------------------------------------

    @property
    def kv_nbytes_per_token(self) -> int:
        """Bytes of one token's keys and values. The first time, on an engine that has not run, costs a pass of one token."""
        with self._turns:
            self._learn()
            return self.kv.nbytes_per_token

    def _learn(self) -> None:
        import torch

        if self.kv.known:
            return
        row = self.kv.add_row()
        try:
            self.runner.extend(self.kv, row, torch.zeros((1, 1), dtype=torch.int64, device=self.runner.device))
        finally:
            self._has_run = True
            self.kv.pop_row(clean=True)

    def kv_length(self, request_id: str) -> int:
        """How many tokens' KV it has here: one fewer than its tokens, none while it waits. Also of a guest."""
        with self._turns:
            if request_id in self._guests:
                return self.kv.lengths[row_of(self._guests[request_id][0])]
            request = self._request(request_id)
            self._complete(request)
            # A pass after which the request got no token has left its row one longer.
            return 0 if request.row is None else min(self.kv.lengths[request.row], len(request.token_ids) - 1)

    def _complete(self, request: Request) -> None:
        """Computes what the row of a late request lacks, so that it is like any other."""
        import torch

        if request.late:
            row = row_of(request)
            ids = request.token_ids[self.kv.lengths[row] : -1]
            self.runner.extend(self.kv, row, torch.tensor([ids], device=self.runner.device))
            request.late = False
            self._rows.join(request)

    def read_kv(self, request_id: str, start: int, stop: int) -> torch.Tensor:
        """The bytes of tokens `[start, stop)`, uint8 on the CPU, contiguous: `[token][layer][key|value][kv_head][head_dim]`, so
        bytes of tokens are one range and ranges can be joined. Also of a guest."""
        with self._turns:
            held = self.kv_length(request_id)
            if not 0 <= start <= stop <= held:
                raise ModelError(f"request {request_id!r} holds the KV of {held:,} tokens; ask for a range of those, not [{start:,}, {stop:,})")
            row = self._guests[request_id][0].row if request_id in self._guests else self._request(request_id).row
            return self.kv.read(0 if row is None else row, start, stop)

    # --- a request that comes ----------------------------------------------------------------------------------------

    def prepare(self, session: Session) -> None:
        """Reserves a slot for a request that is to come: a guest, which does not decode and holds nothing yet.

        Raises ModelError if it is of other weights, does not fit this model, or no slot is free.
        """
        with self._turns:
            self._check(session)
            text = self._text_of(session, None)
            self._learn()
            self._room(session.request_id)
            guest = Guest(session.request_id)
            self._rows.add(guest)
            self._guests[session.request_id] = guest, session, text

    def absorb(self, request_id: str, token_ids: Sequence[int]) -> None:
        """Appends tokens to a guest and computes their KV, in chunks, between which the others step. The first call starts
        at the first token of the sequence."""
        import torch

        ids = [int(token_id) for token_id in token_ids]
        self.runner.check_prompt(ids, 0)
        for start in range(0, len(ids), _CHUNK_NTOKENS):
            chunk = ids[start : start + _CHUNK_NTOKENS]
            with self._turns:
                guest = self._guest(request_id)
                self.runner.check_prompt([*(0 for _ in guest.known), *chunk], 0)
                self.runner.extend(self.kv, row_of(guest), torch.tensor([chunk], device=self.runner.device))
                self._has_run = True
                guest.known += chunk

    def write_kv(self, request_id: str, start: int, data: torch.Tensor) -> None:
        """Appends KV to a guest: uint8, as `read_kv` gives it, of tokens from `start` on, which is where it has got to.

        Raises ValueError for bytes that are not whole tokens of this model.
        """
        import torch

        with self._turns:
            guest = self._guest(request_id)
            size = self.kv.nbytes_per_token
            if data.dtype != torch.uint8 or data.numel() % size:
                raise ValueError(f"the KV of request {request_id!r} is {data.numel():,} x {data.dtype}; this model takes uint8 in multiples of {size:,} bytes a token")
            if start != len(guest.known):
                raise ModelError(f"request {request_id!r} holds the KV of {len(guest.known):,} tokens, so tokens from {start:,} on do not follow; send from there")
            ntokens = data.numel() // size
            if ntokens:
                self.runner.check_prompt([0] * (start + ntokens), 0)
                self.kv.write(row_of(guest), data)
                guest.known += [None] * ntokens

    def adopt(self, session: Session, *, on_piece: OnPiece | None = None) -> Generation:
        """A guest, prepared or not, becomes a request in the session's exact state: its next piece is the one that the source
        would have given next. KV that is missing is computed again: the last of it in the request's first step, together
        with the next token, what is more before this returns. A request that had not begun waits as any other. If this
        raises, nothing of it is left.
        """
        try:
            with self._turns:
                self._check(session, adopting=True)
                begun = len(session.token_ids) > session.prompt_length
                if not begun:  # its first pass is the whole prompt, as it would have been
                    self.drop(session.request_id)
                elif session.request_id not in self._guests:
                    self.prepare(session)
            if begun:
                missing = session.token_ids[len(self._guest(session.request_id).known) : -1]
                if len(missing) > _CHUNK_NTOKENS:
                    self.absorb(session.request_id, missing)
            with self._turns:
                return self._adopt(session, on_piece)
        except BaseException:
            with self._turns:
                if session.request_id in self._guests:
                    self.drop(session.request_id)
            raise

    def _adopt(self, session: Session, on_piece: OnPiece | None) -> Generation:
        guest, before, text = self._guests.get(session.request_id, (None, None, None))
        if guest is not None and not starts_with(session.token_ids, guest.known):
            raise ModelError(f"the session of request {session.request_id!r} does not begin with the tokens that were sent before it; start the move again")
        request = Request(
            session,
            self.runner.eos_ids if session.stop_at_eos else frozenset(),
            self._text_of(session, None if before is None else (before, text)),
            on_piece,
            time.perf_counter() - session.elapsed_seconds,
        )
        if guest is None:
            self.enqueue(request)
            return Generation(self, request)
        row = row_of(guest)
        self.kv.lengths[row] = min(self.kv.lengths[row], len(session.token_ids) - 1)
        request.late = self.kv.lengths[row] < len(session.token_ids) - 1
        self._guests.pop(session.request_id)
        self._rows.replace(guest, request)
        self._requests[session.request_id] = request
        if not request.late:
            self._rows.join(request)
        self._announce()
        return Generation(self, request)

    # --- checks ------------------------------------------------------------------------------------------------------

    def _request(self, request_id: str) -> Request:
        request = self._requests.get(request_id)
        if request is None:
            what = "is a guest, which does not run yet; adopt it first" if request_id in self._guests else "is not here; it has ended, moved, or never came"
            raise ModelError(f"request {request_id!r} {what}")
        return request

    def _guest(self, request_id: str) -> Guest:
        if request_id not in self._guests:
            raise ModelError(f"there is no guest {request_id!r}; prepare it first")
        return self._guests[request_id][0]

    def _check(self, session: Session, *, adopting: bool = False) -> None:
        if session.model != self.name:
            raise ModelError(f"the session is of model {session.model!r} and this engine runs {self.name!r}; move it to an engine of the same weights")
        if session.request_id in self._requests or (session.request_id in self._guests and not adopting):
            raise ModelError(f"a request with the id {session.request_id!r} is here already; drop it first")
        if session.remaining_tokens < 1:
            raise ModelError(f"request {session.request_id!r} has given all its {session.max_new_tokens:,} tokens; there is nothing to go on with")
        self.runner.check_prompt(session.token_ids, session.remaining_tokens)

    def _room(self, request_id: str) -> None:
        if len(self._rows) >= self.max_batch:
            raise ModelError(f"there is no slot for request {request_id!r}: all {self.max_batch} are taken; use an engine with a larger max_batch, or drop a request")

    def _text_of(self, session: Session, known: tuple[Session, TextStream | None] | None) -> TextStream | None:
        """The text of a session, from its tokens; checked against what its reader was given. `known` is that of an earlier
        state of the request, which is then carried on."""
        if session.embed:
            return None
        if self._decoder is None:
            if session.stop or session.emitted_text_nchars or session.held_text:
                raise ModelError(f"request {session.request_id!r} has text and this engine has no tokenizer; load the model with its tokenizer")
            return None
        text, done = None, session.prompt_length
        if known is not None and known[0].stop == session.stop and session.token_ids[: len(known[0].token_ids)] == known[0].token_ids:
            text, done = known[1], len(known[0].token_ids)
        text = text or TextStream(self._decoder, session.token_ids[: session.prompt_length], session.stop)
        for token_id in session.token_ids[done:]:
            text.push(token_id)
        same = text.emitted_nchars == session.emitted_text_nchars and session.held_text in (None, text.held)
        if not same or text.stopped:
            raise ModelError(f"the text of request {session.request_id!r} is not what this engine's tokenizer makes of its tokens; move it to an engine with the same tokenizer")
        return text
