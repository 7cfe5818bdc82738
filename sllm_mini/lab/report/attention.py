"""Decode attention on this GPU: is it right, and its launch for the clock. See `lab.report.kernels`.

The reference is torch's attention in float64 on the same inputs, fresh random ones at each call; what no row may read is
not a number, so that a kernel that looks there is found.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sllm_mini.device.cuda import CudaDevice
from sllm_mini.errors import DeviceError
from sllm_mini.inference.attention import AttentionShape, DecodeAttention

if TYPE_CHECKING:
    import torch

_SHAPES = (AttentionShape(64, 1, "float32"), AttentionShape(80, 2, "float16"), AttentionShape(96, 8, "bfloat16"), AttentionShape(128, 4, "bfloat16"))
_LENGTHS = (1, 127, 128, 129, 700)
_ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Half a unit in the last place of a number near 1."""
_TIMED, _TIMED_KV_HEADS, _TIMED_TOKENS = AttentionShape(128, 4, "bfloat16"), 8, 8192
"""One layer of Llama-3.1-8B."""


@dataclass(frozen=True, slots=True)
class Timed:
    """A launch: `nbytes` are those of the keys and values that it must read, `check` compares what `enqueue` last gave."""

    name: str
    nbytes: int
    enqueue: Callable[[], None]
    check: Callable[[], None]


def check_attention(device: CudaDevice, place: str) -> str:
    """What was checked, in words; tensors are made on torch's device `place`. Raises DeviceError where a result is farther
    from its reference than a few steps of float32 and one rounding to the output's type."""
    import torch

    generator = torch.Generator(device=place).manual_seed(secrets.randbits(63))
    lengths = torch.tensor(_LENGTHS, dtype=torch.int32, device=place)
    for shape in _SHAPES:
        attend = DecodeAttention(device, shape)
        query, keys, values = _inputs(shape, len(_LENGTHS), 2, max(_LENGTHS), generator, place)
        for row, length in enumerate(_LENGTHS):
            keys[row, :, length:] = values[row, :, length:] = float("nan")
        for window in (None, 200):
            found = attend(query, keys, values, lengths, longest=max(_LENGTHS), window=window)
            for row in range(len(_LENGTHS)):
                _compare(found[row], query[row], keys[row], values[row], _LENGTHS[row], window, shape)
    return f"decode_attention equals attention in float64 for {len(_SHAPES)} shapes of heads and {len(_LENGTHS)} lengths from {min(_LENGTHS)} to {max(_LENGTHS)} tokens"


def timed_attention(device: CudaDevice, place: str, nbytes: int) -> Timed:
    """Decode attention of one layer of Llama-3.1-8B over keys and values of about `nbytes` bytes, 64 rows at most."""
    import torch

    a_token = 2 * _TIMED_KV_HEADS * _TIMED.head_dim * _TIMED.itemsize
    tokens = max(1, min(_TIMED_TOKENS, nbytes // a_token))
    rows = max(1, min(64, nbytes // (tokens * a_token)))
    generator = torch.Generator(device=place).manual_seed(secrets.randbits(63))
    query, keys, values = _inputs(_TIMED, rows, _TIMED_KV_HEADS, tokens, generator, place)
    lengths = torch.full((rows,), tokens, dtype=torch.int32, device=place)
    attend, last = DecodeAttention(device, _TIMED), {}

    def enqueue() -> None:
        last["found"] = attend(query, keys, values, lengths, longest=tokens)

    def check() -> None:
        _compare(last["found"][-1], query[-1], keys[-1], values[-1], tokens, None, _TIMED)

    device.synchronize()  # inputs are made on torch's stream
    return Timed("decode_attention", rows * tokens * a_token, enqueue, check)


def _inputs(shape: AttentionShape, rows: int, kv_heads: int, tokens: int, generator: torch.Generator, place: str) -> tuple[torch.Tensor, ...]:
    import torch

    dtype = getattr(torch, shape.dtype)
    sizes = ((rows, shape.group * kv_heads, shape.head_dim), *[(rows, kv_heads, tokens, shape.head_dim)] * 2)
    return tuple(torch.randn(size, generator=generator, dtype=dtype, device=place) for size in sizes)


def _compare(found: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, length: int, window: int | None, shape: AttentionShape) -> None:
    from torch.nn.functional import scaled_dot_product_attention

    oldest = max(0, length - window) if window else 0
    key, value = (one[:, oldest:length].double().repeat_interleave(shape.group, 0) for one in (keys, values))
    exact = scaled_dot_product_attention(query.double()[:, None], key, value)[:, 0]
    bound = 2e-6 * value.abs().max() + _ROUNDING[shape.dtype] * exact.abs() + (2.0**-25 if shape.dtype == "float16" else 0.0)
    difference = (found.double() - exact).abs()
    if not bool((difference <= bound).all()):  # so that what is not a number is found too
        raise DeviceError(f"decode_attention of {length:,} tokens in {shape} is {float(difference.max()):.2g} away from its reference; do not trust this GPU's attention")
