"""What `csrc/decode_attention.cu` computes, on the host: for launches on the fake GPU.

Takes the launches' own arguments, addresses and strides included, and writes what the kernels write: of each chunk the
unnormalised sum, the largest score and the weight, then their merge. Numpy in float64; no speed is asked of it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import numpy
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

_TYPES = (numpy.float32, numpy.float16, numpy.uint16)
"""By ELEMENT; of bfloat16 numpy has only the bits."""


class HostAttention:
    """Both kernels, as the compiler's `options` make them."""

    def __init__(self, options: Sequence[str]) -> None:
        defined = {name: int(value) for name, value in (option.removeprefix("-D").split("=") for option in options)}
        self._head_dim, self._element, self._queries, self._chunk = (defined[name] for name in ("HEAD_DIM", "ELEMENT", "QUERIES", "CHUNK"))

    def attend(self, grid: Sequence[int], block: Sequence[int], args: Sequence[Any]) -> None:
        query, keys, values, lengths, partials, *strides, group, window, scale = map(int, args)
        query_row, query_head, key_row, key_head, key_token, value_row, value_head, value_token = strides
        chunks, blocks, rows = grid
        kv_heads = blocks // -(-group // self._queries)
        out = _array(partials, numpy.float32, (rows, kv_heads * group, chunks, self._head_dim + 2))
        for row, length in enumerate(_array(lengths, numpy.int32, (rows,))):
            for chunk, begin, end in self._chunks(int(length), window):
                for head in range(kv_heads):
                    first = head * group
                    asked = self._read(query, row * query_row + first * query_head, (group, query_head))
                    key = self._read(keys, row * key_row + head * key_head + begin * key_token, (end - begin, key_token))
                    value = self._read(values, row * value_row + head * value_head + begin * value_token, (end - begin, value_token))
                    scores = asked @ key.T * float(numpy.uint32(scale).view(numpy.float32))  # to the base 2
                    top = scores.max(1, keepdims=True)
                    weights = numpy.exp2(scores - top)
                    out[row, first : first + group, chunk] = numpy.hstack([weights @ value, top, weights.sum(1, keepdims=True)])

    def merge(self, grid: Sequence[int], block: Sequence[int], args: Sequence[Any]) -> None:
        partials, lengths, out, out_row, out_head, chunks, window = map(int, args)
        heads, rows = grid
        parts = _array(partials, numpy.float32, (rows, heads, chunks, self._head_dim + 2))
        kind = _TYPES[self._element]
        results = _array(out, kind, (rows, heads, self._head_dim), (out_row, out_head, 1))
        for row, length in enumerate(_array(lengths, numpy.int32, (rows,))):
            written = [chunk for chunk, _, _ in self._chunks(int(length), window)]
            found = numpy.zeros((heads, self._head_dim))
            if written:
                mine = parts[row][:, written].astype(numpy.float64)
                shares = numpy.exp2(mine[..., -2] - mine[..., -2].max(1, keepdims=True))
                found = (shares[..., None] * mine[..., :-2]).sum(1) / (shares * mine[..., -1]).sum(1)[:, None]
            results[row] = _bfloat16(found) if kind is numpy.uint16 else found.astype(kind)

    def _chunks(self, length: int, window: int) -> Iterator[tuple[int, int, int]]:
        """Each chunk that holds tokens that count: its number, the first of them and the end."""
        oldest = max(0, length - window) if window else 0
        for chunk in range(oldest // self._chunk, -(-length // self._chunk)):
            yield chunk, max(chunk * self._chunk, oldest), min((chunk + 1) * self._chunk, length)

    def _read(self, address: int, first: int, rows: tuple[int, int]) -> NDArray[numpy.float64]:
        """Rows of a head each, in float64; `first` and the rows' stride count elements."""
        count, stride = rows
        kind = _TYPES[self._element]
        found = _array(address + first * numpy.dtype(kind).itemsize, kind, (count, self._head_dim), (stride, 1))
        if kind is numpy.uint16:
            found = (found.astype(numpy.uint32) << 16).view(numpy.float32)
        return found.astype(numpy.float64)


def _array(address: int, kind: Any, shape: tuple[int, ...], strides: tuple[int, ...] | None = None) -> NDArray[Any]:
    """The memory at `address`; `strides` count elements, None for dense."""
    size = numpy.dtype(kind).itemsize
    if strides is None:
        strides = tuple(int(numpy.prod(shape[at + 1 :])) for at in range(len(shape)))
    reach = 1 + sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True))
    memory = numpy.frombuffer((ctypes.c_byte * (reach * size)).from_address(address), dtype=kind)
    return as_strided(memory, shape, [stride * size for stride in strides])


def _bfloat16(values: NDArray[Any]) -> NDArray[numpy.uint16]:
    """The nearest bfloat16s, ties to even, as bits."""
    bits = numpy.ascontiguousarray(values, numpy.float32).view(numpy.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(numpy.uint16)
