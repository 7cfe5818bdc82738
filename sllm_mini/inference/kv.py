"""Keys and values of every request of one engine, in slots that are written in place.

Each layer has one tensor `[slots, kv_heads, capacity, head_dim]` for keys and one for values. A request has one row;
the rows in use lie at the front, so that what a batch attends to is a view: where transformers' DynamicCache copies
itself as each token is appended, here only the new token is written. Slots and capacity grow by doubling. Every token
is kept, also those that a sliding window has passed. Costs `nbytes_per_token` a token of capacity, slots times; a row
that moves is copied. Taught in chapters 06 and 07. Imports transformers, whose cache it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from sllm_mini.inference.attention import GRAIN


class _Pass:
    """Which rows the next forward pass works on, and how far they are filled. `index` is None where all hold `past`."""

    def __init__(self) -> None:
        self.row, self.count, self.past, self.seen = 0, 1, 0, 0
        self.index: torch.Tensor | None = None
        self.rows: torch.Tensor | None = None
        self.packed = False
        self.slots, self.capacity = 0, 0


class SlotLayer(DynamicLayer):
    """One layer: hands a pass its rows. With rows of one length, a sliding window sees what DynamicCache would give it."""

    def __init__(self, shared: _Pass, window: int | None) -> None:
        super().__init__()
        self.window, self.is_sliding = window, window is not None
        self.length = 0
        self._pass = shared
        self._like: tuple[torch.Tensor, torch.Tensor] | None = None

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def nbytes_per_token(self) -> int:
        return 0 if self._like is None else sum(like.nbytes for like in self._like)

    @property
    def known(self) -> bool:
        """Whether a pass has shown how many heads it has, their sizes and their dtype."""
        return self._like is not None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the new tokens in place and returns views of all that the pass may attend to."""
        if not self.is_initialized:
            self._like = key_states[:1, :, :1].clone(), value_states[:1, :, :1].clone()
            self.device = key_states.device
            self.resize(self._pass.slots, self._pass.capacity, 0, 0)
        here = self._pass
        ntokens = key_states.shape[-2]
        if here.packed:
            self.keys[here.rows, :, here.index] = key_states[0].transpose(0, 1)
            self.values[here.rows, :, here.index] = value_states[0].transpose(0, 1)
            self.length = ntokens
            return key_states, value_states
        keys, values = self.keys.narrow(0, here.row, here.count), self.values.narrow(0, here.row, here.count)
        end = here.past + ntokens
        if here.index is None:
            keys.narrow(2, here.past, ntokens).copy_(key_states)
            values.narrow(2, here.past, ntokens).copy_(value_states)
            start = self._start()
        else:
            keys[here.rows, :, here.index] = key_states[:, :, 0]
            values[here.rows, :, here.index] = value_states[:, :, 0]
            start = 0
        self.length, end = end, max(end, here.seen)
        return keys.narrow(2, start, end - start), values.narrow(2, start, end - start)

    def _start(self) -> int:
        return 0 if self.window is None else max(self._pass.past - self.window + 1, 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        start = self._start()
        return self._pass.past + query_length - start, start

    def get_seq_length(self) -> int:
        return self.length

    def resize(self, slots: int, capacity: int, rows: int, tokens: int) -> None:
        """New storage; the first `tokens` of the first `rows` are kept. Zeroed: masked memory must hold finite numbers."""
        if self._like is None:
            return
        keys, values = (like.new_zeros((slots, like.shape[1], capacity, like.shape[3])) for like in self._like)
        for new, old in zip((keys, values), self.tensors(), strict=False):
            kept = min(rows, old.shape[0])
            new[:kept, :, :tokens] = old[:kept, :, :tokens]
        self.keys, self.values = keys, values  # last, so that an interruption loses nothing
        self.is_initialized = True

    def free(self) -> None:
        if self.is_initialized:
            del self.keys, self.values
            self.is_initialized = False

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Keys and values, nothing where there is no memory yet."""
        return (self.keys, self.values) if self.is_initialized else ()


class SlotCache(Cache):
    """The slots of one engine. `lengths` tells how many tokens each row holds, one entry for each row in use.

    `windows` gives each layer's sliding window, None for full attention. Nobody else's memory is touched by a pass
    that fails: lengths grow only when the pass is over. One thread at a time, in inference mode.
    """

    def __init__(self, windows: Sequence[int | None]) -> None:
        self._pass = _Pass()
        self._layers = [SlotLayer(self._pass, window) for window in windows]
        super().__init__(layers=list(self._layers))
        self.lengths: list[int] = []
        self.slots = self.capacity = 0
        self._reserved = 0, 0

    @property
    def known(self) -> bool:
        return all(layer.known for layer in self._layers)

    @property
    def nbytes_per_token(self) -> int:
        """Bytes of one token's keys and values, of all layers; 0 until `known`."""
        return sum(layer.nbytes_per_token for layer in self._layers)

    @property
    def nbytes(self) -> int:
        """Memory held now."""
        return self.nbytes_per_token * self.slots * self.capacity if any(layer.is_initialized for layer in self._layers) else 0

    # --- room -------------------------------------------------------------------------------------------------------

    def keep(self, slots: int, tokens: int) -> None:
        """Memory for that many rows of that many tokens is got now (once shapes are known) and not given back when idle."""
        self._reserved = slots, tokens
        self._reserve(slots, tokens)

    def _reserve(self, slots: int, tokens: int) -> None:
        if slots <= self.slots and tokens <= self.capacity:
            return
        slots = self.slots if slots <= self.slots else max(slots, 2 * self.slots)
        capacity = self.capacity if tokens <= self.capacity else -(-max(tokens, 2 * self.capacity) // GRAIN) * GRAIN
        with torch.inference_mode():
            for layer in self._layers:
                layer.resize(slots, capacity, len(self.lengths), max(self.lengths, default=0))
        self.slots, self.capacity = slots, capacity

    def add_row(self) -> int:
        """A new empty row, the last one."""
        row = len(self.lengths)
        self._reserve(row + 1, 0)
        self.lengths.append(0)
        return row

    def empty_row(self, row: int, *, clean: bool) -> None:
        """Forgets what a row holds. With `clean` its memory is zeroed: it may hold numbers that are not finite, which would
        spoil a shorter row that comes to lie there."""
        with torch.inference_mode():
            for layer in self._layers if clean else ():
                for held in layer.tensors():
                    held[row].zero_()
        self.lengths[row] = 0

    def pop_row(self, *, clean: bool = False) -> None:
        """Gives the last row back; `clean` as for `empty_row`. Without rows, memory goes back too, but for what `keep` asked for."""
        self.empty_row(len(self.lengths) - 1, clean=clean)
        self.lengths.pop()
        if not self.lengths and self._reserved == (0, 0):
            self.slots = self.capacity = 0
            for layer in self._layers:
                layer.free()

    def swap_rows(self, one: int, other: int) -> None:
        """Exchanges two rows; copies what each of them holds, and zeroes what the longer one leaves behind it."""
        if one == other:
            return
        a, b = self.lengths[one], self.lengths[other]
        with torch.inference_mode():
            for layer in self._layers:
                for held in layer.tensors():
                    kept = held[one, :, :a].clone()
                    held[one, :, :b] = held[other, :, :b]
                    held[one, :, b:a] = 0
                    held[other, :, :a] = kept
                    held[other, :, a:b] = 0
        self.lengths[one], self.lengths[other] = b, a

    # --- passes -----------------------------------------------------------------------------------------------------

    def start_pass(
        self, row: int, count: int, ntokens: int, rows: torch.Tensor | None = None, index: torch.Tensor | None = None, *, seen: int = 0
    ) -> None:
        """The next pass brings `ntokens` to each of `count` rows from `row` on. Rows of unlike lengths take one token each,
        and need `index`, int64 `[count]`: where each of them is written; `rows` is `[0, …, count - 1]`. They attend to at
        least `seen` tokens, of which a mask hides those that no row has; at most to the next multiple of `GRAIN`."""
        past = max(self.lengths[row : row + count])
        self._reserve(0, past + ntokens)
        here = self._pass
        here.row, here.count, here.past, here.rows, here.index, here.seen = row, count, past, rows, index, seen
        here.packed, here.slots, here.capacity = False, self.slots, self.capacity
        for layer in self._layers:
            layer.length = past

    def start_packed(self, lengths: Sequence[int], rows: torch.Tensor, index: torch.Tensor) -> None:
        """The next pass brings whole prompts, one after the other, to empty rows: its token i is written to `rows[i]` at
        `index[i]` (int64 `[sum(lengths)]`). They attend to what the pass itself brings."""
        self._reserve(0, max(lengths))
        here = self._pass
        here.row, here.count, here.past, here.rows, here.index, here.seen = 0, 1, 0, rows, index, 0
        here.packed, here.slots, here.capacity = True, self.slots, self.capacity
        for layer in self._layers:
            layer.length = 0

    def end_pass(self, row: int, count: int, ntokens: int) -> None:
        """The pass went well: the tokens count."""
        for filled in range(row, row + count):
            self.lengths[filled] += ntokens

    # --- bytes ------------------------------------------------------------------------------------------------------

    def _parts(self) -> Iterator[tuple[torch.Tensor, int, int]]:
        """Each tensor with its place among a token's bytes: layer by layer, keys before values."""
        sizes = [0]
        tensors = [held for layer in self._layers for held in layer.tensors()]
        for held in tensors:
            sizes.append(sizes[-1] + held.shape[1] * held.shape[3] * held.element_size())
        for held, (start, stop) in zip(tensors, pairwise(sizes), strict=True):
            yield held, start, stop

    def read(self, row: int, start: int, stop: int) -> torch.Tensor:
        """The bytes of tokens `[start, stop)`: uint8, contiguous, `[token][layer][key|value][kv_head][head_dim]`, on the
        CPU (pinned where it comes from a GPU). On a GPU costs as many bytes again there for a moment."""
        ntokens = stop - start
        if not ntokens:
            return torch.empty(0, dtype=torch.uint8)
        device = self._layers[0].device
        with torch.inference_mode():
            out = torch.empty((ntokens, self.nbytes_per_token), dtype=torch.uint8, device=device)
            for held, first, last in self._parts():
                tokens = held[row, :, start:stop].transpose(0, 1)
                out[:, first:last].view(held.dtype).view(tokens.shape).copy_(tokens)
            if device.type == "cpu":
                return out.view(-1)
            return torch.empty(out.numel(), dtype=torch.uint8, pin_memory=True).copy_(out.view(-1))

    def write(self, row: int, data: torch.Tensor) -> None:
        """Appends tokens to a row from bytes laid out as `read` gives them."""
        ntokens = data.numel() // self.nbytes_per_token
        start = self.lengths[row]
        self._reserve(0, start + ntokens)
        with torch.inference_mode():
            source = data.to(self._layers[0].device).view(ntokens, -1)
            for held, first, last in self._parts():
                shape = (ntokens, held.shape[1], held.shape[3])
                held[row, :, start : start + ntokens].copy_(source[:, first:last].contiguous().view(held.dtype).view(shape).transpose(0, 1))
        self.lengths[row] += ntokens
