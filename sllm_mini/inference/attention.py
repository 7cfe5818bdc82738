"""Attention of decode steps, in place of torch's SDPA, for any transformers model that runs on SDPA.

`use_decode_attention` and `use_product_attention` make a model ask `decode_attention_forward` at every layer. That is
torch's SDPA for prefill, for shapes they have no place for, and outside of `decoding`. Inside, on a GPU, our own kernel
(`csrc/decode_attention.cu`) reads each row's keys once and stops at its own length, where SDPA with a mask reads all rows
to the longest: within a few rounding steps of float32 (then one of the output's dtype) of the exact result, the same bits
whatever rows are beside, two launches a layer and `4 * (head_dim + 2)` bytes per row, head and 128 tokens. On a CPU, two
matrix products stand in for SDPA where it is slow. Taught in chapter 06.
"""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from sllm_mini.device.base import Device
from sllm_mini.device.cuda import CudaDevice
from sllm_mini.device.kernels import Kernels, load_kernels
from sllm_mini.errors import ModelError, UnsupportedError

if TYPE_CHECKING:
    import torch

NAME = "sllm_decode"
"""What transformers calls this attention, in `config._attn_implementation`."""
SOURCE = "decode_attention.cu"
ELEMENTS = {"float32": 0, "float16": 1, "bfloat16": 2}
CHUNK_TOKENS = 128
GRAIN = 64
"""The tokens of a row in memory, and those that products work on, are a multiple of this."""
_MOST_QUERIES = 4
_MOST_HEAD_DIM = 256
_VECTOR_NBYTES = 16
_THREADS = 128
_UNKNOWN = ("softcap", "position_bias", "s_aux", "cache")
"""What some models' attention has beside a scale and a window; only SDPA is asked then."""
_local = threading.local()


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What a kernel is compiled for: `group` query heads share each key-value head; `dtype` is torch's name without "torch."."""

    head_dim: int
    group: int
    dtype: str

    @property
    def why_not(self) -> str | None:
        """Why there is no kernel for it; None if there is one."""
        if self.dtype not in ELEMENTS:
            return f"elements are {self.dtype}; the kernel takes {', '.join(ELEMENTS)}"
        if not 0 < self.head_dim <= _MOST_HEAD_DIM or self.head_dim * self.itemsize % _VECTOR_NBYTES:
            return f"a head has {self.head_dim} elements; the kernel takes up to {_MOST_HEAD_DIM}, in whole vectors of {_VECTOR_NBYTES} bytes"
        return None

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def queries(self) -> int:
        """Query heads that one block computes: the group cut into the fewest equal tiles of at most 4."""
        return -(-self.group // -(-self.group // _MOST_QUERIES))

    @property
    def options(self) -> tuple[str, ...]:
        """The compiler's options."""
        return (f"-DHEAD_DIM={self.head_dim}", f"-DELEMENT={ELEMENTS[self.dtype]}", f"-DQUERIES={self.queries}", f"-DCHUNK={CHUNK_TOKENS}")

    @classmethod
    def of_config(cls, config: Any, dtype: str | None = None) -> AttentionShape:
        """The shape of a transformers model, in `dtype` or its own. Raises ModelError where the configuration names no heads."""
        heads = getattr(config, "num_attention_heads", None)
        if not heads:
            raise ModelError(f"{type(config).__name__} names no attention heads; its attention cannot be taken over")
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        own = dtype or str(getattr(config, "dtype", None) or "float32")
        return cls(int(head_dim), heads // (getattr(config, "num_key_value_heads", None) or heads), own.removeprefix("torch."))


class DecodeAttention:
    """The kernel of one shape on one GPU, loaded or compiled when it is made. Safe from several threads.

    Raises UnsupportedError for a device without CUDA kernels or a shape there is none for, DeviceError if it cannot be built.
    """

    def __init__(self, device: Device, shape: AttentionShape) -> None:
        if not isinstance(device, CudaDevice):
            raise UnsupportedError(f"decode attention is a CUDA kernel and {device.name} runs none; torch's SDPA serves there")
        if shape.why_not is not None:
            raise UnsupportedError(f"there is no decode attention for this model: {shape.why_not}; torch's SDPA serves")
        self.shape = shape
        self.kernels: Kernels = load_kernels(device, SOURCE, shape.options)
        self._attend, self._merge = self.kernels["decode_attention"], self.kernels["decode_attention_merge"]

    def takes(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether these tensors are of the kernel's shape and aligned as it reads them."""
        import torch

        shape = self.shape
        if any(one.dtype is not getattr(torch, shape.dtype) or one.shape[-1] != shape.head_dim or one.stride(-1) != 1 for one in (query, keys, values)):
            return False
        sizes = [query.data_ptr(), keys.data_ptr(), values.data_ptr()]
        for one in (query, keys, values):
            sizes += [shape.itemsize * stride for stride in one.stride()[:-1]]
        return not any(size % _VECTOR_NBYTES for size in sizes) and query.shape[1] == shape.group * keys.shape[1]

    def __call__(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        lengths: torch.Tensor,
        *,
        longest: int,
        scale: float | None = None,
        window: int | None = None,
    ) -> torch.Tensor:
        """Attention `[rows, heads, head_dim]` of `query` (the same shape) over `keys` and `values` `[rows, kv_heads, tokens,
        head_dim]`, any strides.

        `lengths` is int32 on the device: how many tokens of each row count, at most `longest`. Of keys that hold fewer
        than `longest` tokens the oldest are taken to be cut off, which takes a `window` that ends before them. `scale` is
        1 / sqrt(head_dim) by default. Launches on torch's stream and does not wait.
        """
        import torch

        rows, heads, head_dim = query.shape
        kv_heads, group = keys.shape[1], self.shape.group
        chunks = -(-longest // CHUNK_TOKENS)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        partials = torch.empty((rows, heads, chunks, head_dim + 2), dtype=torch.float32, device=query.device)
        cut = (longest - keys.shape[2]) * self.shape.itemsize
        addresses = (query.data_ptr(), keys.data_ptr() - cut * keys.stride(2), values.data_ptr() - cut * values.stride(2))
        strides = (*query.stride()[:2], *keys.stride()[:3], *values.stride()[:3])
        tiles = -(-group // self.shape.queries)
        arguments = (*addresses, lengths.data_ptr(), partials.data_ptr(), *strides, group, window or 0, _bits(scale or head_dim**-0.5))
        self._attend.on_torch((chunks, kv_heads * tiles, rows), (_THREADS,), arguments)
        merging = (partials.data_ptr(), lengths.data_ptr(), out.data_ptr(), *out.stride()[:2], chunks, window or 0)
        self._merge.on_torch((heads, rows), (-(-head_dim // 32) * 32,), merging)
        return out


    def seen(self, ntokens: int) -> int:
        """How many tokens it is to be given, where the longest row has so many."""
        return ntokens

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, *, lengths: torch.Tensor, longest: int, scale: float | None, window: int | None
    ) -> torch.Tensor | None:
        """One step of a model, `[rows, heads, head_dim]`; None for what the kernel has no place for."""
        held = keys.shape[2]
        fits = held == longest or (held < longest and window is not None and window <= held)
        if not fits or len(lengths) != len(query) or not self.takes(query, keys, values):
            return None
        return self(query, keys, values, lengths, longest=longest, scale=scale, window=window)


class ProductAttention:
    """On a CPU: one product for the scores, softmax in float32, one product for the answer, each rounded to the
    dtype as in transformers' eager attention, but that the query is scaled first. In float16 and bfloat16, torch's SDPA for one query a row took 1.2 to 6 times as long (torch 2.13, AVX-512, 8
    rows of 96 to 1 024 tokens; most where query heads share keys), in float32 about as long. Only for rows of unlike lengths,
    which have a mask: without one, SDPA gives the bits that `generate` gives."""

    def seen(self, ntokens: int) -> int:
        """How many tokens it is to be given: oneDNN compiles a product for each new shape, so shapes change every 64 steps."""
        return -(-ntokens // GRAIN) * GRAIN

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, *, lengths: torch.Tensor, longest: int, scale: float | None, window: int | None
    ) -> torch.Tensor | None:
        """One step of a model, `[rows, heads, head_dim]`; `mask` `[rows, 1, 1, tokens]` is added to the scores. None without."""
        import torch

        if mask is None or not mask.is_floating_point():
            return None
        rows, heads, head_dim = query.shape
        grouped = query.reshape(rows, keys.shape[1], heads // keys.shape[1], head_dim)
        # Scaled before the product, which float16 could not hold otherwise.
        scores = grouped * (head_dim**-0.5 if scale is None else scale) @ keys.transpose(2, 3) + mask
        return (scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values).view(rows, heads, -1)


@lru_cache(maxsize=64)
def _bits(scale: float) -> int:
    """A scale as the kernel wants it: for powers of 2, the bits of a float32."""
    return int(struct.unpack("<I", struct.pack("<f", scale * math.log2(math.e)))[0])


@contextmanager
def decoding(attention: DecodeAttention | ProductAttention | None, lengths: torch.Tensor, longest: int) -> Iterator[None]:
    """Inside, this thread's passes of one token per row attend by `attention`: `lengths` (int32, on the device) tells how
    many tokens each row has, the new one included, and `longest` bounds them. The kernel does not look at masks, so they
    must say the same. With None for `attention` nothing changes."""
    before = getattr(_local, "attend", None)
    _local.attend = None if attention is None else partial(attention.attend, lengths=lengths, longest=longest)
    try:
        yield
    finally:
        _local.attend = before


def decode_attention_forward(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, *, scaling: float | None = None, dropout: float = 0.0, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: inside `decoding` what it names where that fits, torch's SDPA elsewhere."""
    attend = getattr(_local, "attend", None)
    if attend is not None and query.shape[2] == 1 and not dropout and all(kwargs.get(name) is None for name in _UNKNOWN):
        ours = attend(query[:, :, 0], key, value, attention_mask, scale=scaling, window=kwargs.get("sliding_window"))
        if ours is not None:
            return ours.unsqueeze(1), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    found: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    return found


def use_decode_attention(model: Any, device: Device) -> DecodeAttention:
    """Switches a model on `device` to this attention and returns its kernel, for `decoding`. Raises UnsupportedError, and
    changes nothing, for a model that does not run on torch's SDPA now, and as `DecodeAttention` does."""
    if not _runs_on_sdpa(model):
        raise UnsupportedError(f"{type(model).__name__} runs on {model.config._attn_implementation} attention; only one that runs on torch's SDPA can be switched")
    attention = DecodeAttention(device, AttentionShape.of_config(model.config, str(model.dtype)))
    _switch(model)
    return attention


def use_product_attention(model: Any) -> ProductAttention | None:
    """Switches a model in float16 or bfloat16 on a CPU, for `decoding`; None, and nothing changed, for any other and for one
    that does not run on torch's SDPA now."""
    half = str(model.dtype) in ("torch.float16", "torch.bfloat16")
    if not half or model.device.type != "cpu" or not _runs_on_sdpa(model):
        return None
    _switch(model)
    return ProductAttention()


def _runs_on_sdpa(model: Any) -> bool:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return model.config._attn_implementation in ("sdpa", NAME) and AttentionInterface().get("sdpa") is sdpa_attention_forward


def _switch(model: Any) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, decode_attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
