"""Decode steps as CUDA graphs: captured never (eager), when a batch size is first used (lazy), or all up front.

A graph replays its launches with the memory of their capture, so a step's whole state lies in tensors of one place: the
slots (see `kv`), the newest tokens, the lengths. The host then makes one call a step instead of hundreds; what it costs
is the capture, which Medusa (ASPLOS'25) moves out of the cold start. A step attends to whole slots behind a mask, or by
our kernel, which stops at each row's length. Costs `batch * vocabulary` logits per batch size, and the memory of
one step once for all graphs. One thread at a time. Taught in chapter 06.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from sllm_mini.device.base import Device
from sllm_mini.device.cuda import CudaDevice
from sllm_mini.errors import ModelError, UnsupportedError
from sllm_mini.inference.attention import DecodeAttention, decoding

if TYPE_CHECKING:
    import torch

Mode = Literal["eager", "lazy", "upfront"]
MODES: tuple[Mode, ...] = ("eager", "lazy", "upfront")


@dataclass(frozen=True, slots=True)
class Capture:
    """One graph that was captured: for `batch` rows, in `seconds`, warm-up passes included."""

    batch: int
    seconds: float


class _Step:
    """One decode step of the first `batch` slots; everything it reads and writes stays where it is."""

    def __init__(self, model: Any, slots: Any, windows: Sequence[int | None], batch: int, attention: DecodeAttention | None) -> None:
        import torch

        keys = slots.layers[0].keys
        self.ids = torch.zeros((batch, 1), dtype=torch.int64, device=keys.device)
        self.lengths = torch.ones(batch, dtype=torch.int32, device=keys.device)
        self.logits: torch.Tensor | None = None
        self._model, self._slots, self._windows, self._attention = model, slots, windows, attention
        self._capacity = keys.shape[2]
        self._tokens = torch.arange(self._capacity, device=keys.device)

    def __call__(self) -> None:
        import torch

        with torch.inference_mode(), decoding(self._attention, self.lengths, self._capacity):
            newest = self.lengths.to(torch.int64).unsqueeze(1) - 1
            self._slots.write_at(newest[:, 0])
            logits = self._model(
                input_ids=self.ids, position_ids=newest, attention_mask=self._masks(newest), past_key_values=self._slots, use_cache=True, logits_to_keep=1
            ).logits[:, -1]
            if self.logits is None:
                self.logits = torch.empty_like(logits)
            self.logits.copy_(logits)

    def _masks(self, newest: torch.Tensor) -> Any:
        """What each row may attend to, `[rows, 1, 1, capacity]`; by layer type where a model has two."""
        full = (self._tokens <= newest)[:, None, None]
        found = {window: full if window is None else full & (self._tokens > newest - window)[:, None, None] for window in set(self._windows)}
        if len(found) == 1:
            return next(iter(found.values()))
        return {"full_attention" if window is None else "sliding_attention": mask for window, mask in found.items()}


class DecodeSteps:
    """The decode steps of a model over slots that stay where they are.

    `keys` and `values` are one tensor `[slots, kv_heads, capacity, head_dim]` per layer; `windows` each layer's sliding
    window, None for full attention. With "upfront" every batch size up to `max_batch` is captured here. `captures` tells
    what was captured. Raises UnsupportedError for graphs without a GPU, ModelError for a model that takes no positions.
    """

    def __init__(
        self,
        model: Any,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        *,
        device: Device,
        mode: Mode = "lazy",
        max_batch: int = 8,
        windows: Sequence[int | None] | None = None,
        attention: DecodeAttention | None = None,
    ) -> None:
        import inspect

        if mode != "eager" and not isinstance(device, CudaDevice):
            raise UnsupportedError(f"{device.name} has no CUDA graphs; use the mode 'eager' there")
        missing = {"position_ids", "logits_to_keep"} - set(inspect.signature(model.forward).parameters)
        if missing:
            raise ModelError(f"{type(model).__name__} takes no {' and no '.join(sorted(missing))}, so its steps cannot be captured; run it eagerly by its own cache")
        if not 1 <= max_batch <= keys[0].shape[0]:
            raise ValueError(f"max_batch is {max_batch}; there are {keys[0].shape[0]} slots")
        self.mode, self.max_batch, self.captures = mode, max_batch, list[Capture]()
        self._device, self._model, self._attention = device, model, attention
        self._slots = _slot_views()(keys, values)
        self._windows = list(windows) if windows is not None else [None] * len(keys)
        self._steps: dict[int, tuple[_Step, Callable[[], None]]] = {}
        if mode == "upfront":
            for batch in range(max_batch, 0, -1):  # the largest first: the others fit into its memory
                self._step(batch)

    def __call__(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Logits `[batch, vocabulary]` after the tokens `ids`, int64 `[batch]`, of the first rows, whose keys and values are
        written. `lengths` tells how many tokens each row has with them, at most the slots' capacity. The next call with
        the same batch overwrites the answer. Does not wait for a GPU."""
        batch = len(ids)
        if not 1 <= batch <= self.max_batch:
            raise ValueError(f"a step of {batch} rows was asked for; these are steps of 1 to {self.max_batch}")
        found = self._steps.get(batch)
        if found is None:
            # Captured with rows that are real: its warm-up passes write what the step itself will write.
            found = self._step(batch, ids, lengths)
        step, run = found
        step.ids.copy_(ids.unsqueeze(1))
        step.lengths.copy_(lengths)
        run()
        if step.logits is None:
            raise ModelError(f"{type(self._model).__name__} gave no logits; use a model with a head that predicts the next token")
        return step.logits

    def _step(self, batch: int, ids: torch.Tensor | None = None, lengths: torch.Tensor | None = None) -> tuple[_Step, Callable[[], None]]:
        step = _Step(self._model, self._slots, self._windows, batch, self._attention)
        run: Callable[[], None] = step
        if ids is not None and lengths is not None:
            step.ids.copy_(ids.unsqueeze(1))
            step.lengths.copy_(lengths)
        if self.mode != "eager" and isinstance(self._device, CudaDevice):
            started = time.perf_counter()
            with self._slots.kept_first_tokens(batch) if ids is None else nullcontext():
                run = self._device.capture(step)
            self._device.synchronize()
            self.captures.append(Capture(batch, time.perf_counter() - started))
        self._steps[batch] = step, run
        return step, run


@cache
def _slot_views() -> Any:
    """The cache that a step hands to the model; made here so that importing this module does not import transformers."""
    from transformers.cache_utils import Cache, DynamicLayer

    class View(DynamicLayer):
        """One layer's slots: the new tokens are written where `newest` says, and the whole slots are attended to."""

        keys: Any
        values: Any

        def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
            super().__init__()
            self.keys, self.values, self.is_initialized = keys, values, True
            self.newest: Any = None
            self.rows: Any = None

        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            batch = len(key_states)
            self.keys[self.rows, :, self.newest] = key_states[:, :, 0]
            self.values[self.rows, :, self.newest] = value_states[:, :, 0]
            return self.keys[:batch], self.values[:batch]

        def get_seq_length(self) -> int:
            return int(self.keys.shape[2]) - 1

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return int(self.keys.shape[2]), 0

    class Views(Cache):
        layers: list[View]  # type: ignore[assignment]

        def __init__(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
            import torch

            super().__init__(layers=[View(*pair) for pair in zip(keys, values, strict=True)])
            self._rows = torch.arange(len(keys[0]), device=keys[0].device)

        def write_at(self, newest: torch.Tensor) -> None:
            for layer in self.layers:
                layer.newest, layer.rows = newest, self._rows[: len(newest)]

        def kept_first_tokens(self, batch: int) -> Any:
            return _Kept([tensor for layer in self.layers for tensor in (layer.keys, layer.values)], batch)

    return Views


class _Kept:
    """Whatever a capture up front writes as the first token of each row is put back: rows may hold requests already."""

    def __init__(self, tensors: Sequence[torch.Tensor], batch: int) -> None:
        self._held = [(tensor[:batch, :, 0], tensor[:batch, :, 0].clone()) for tensor in tensors]

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        import torch

        with torch.inference_mode():
            for place, before in self._held:
                place.copy_(before)
