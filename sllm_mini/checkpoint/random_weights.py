"""Seeded random weights, any range of any tensor at any time, in the dtype they are stored in.

Each run of 131,072 elements of a tensor has its own generator, keyed by (seed, tensor name, run): whoever asks, in
whatever order and on however many threads, an element is always the same.

16-bit weights are independent draws of an 18-bit uniform (SFC64) through a table of normal quantiles; nothing is
pooled or repeated. On two shared cores this drew 300 to 480 million weights per second and thread where numpy's
ziggurat drew 100 and torch's `normal_` 160. What the table gives up: tails end at 4.6 deviations, and a weight has
10.461 bits of entropy instead of 10.464 (bfloat16), 13.444 instead of 13.458 (float16), so a compressor sees what it
would see of normal weights. float32 weights come from the ziggurat. Memory: 1.5 MB and 1 MB per thread. Taught in
chapter 01.
"""

from __future__ import annotations

import threading
from hashlib import blake2b
from typing import TYPE_CHECKING

from sllm_mini.checkpoint.dtypes import ITEM_NBYTES, torch_dtype

if TYPE_CHECKING:
    import numpy as np

DTYPES = ("float16", "bfloat16", "float32")
"""What weights can be drawn in, by torch's names."""

_RUN = 1 << 17  # elements per generator
_BLOCK = 1 << 15  # elements drawn at once: their bits and indices stay in a core's cache
_TABLE_BITS = 18  # a table of 512 KiB stays in a core's cache too


class RandomWeights:
    """Normal weights of standard deviation `std` in one of `DTYPES`. Safe from several threads."""

    def __init__(self, seed: int, dtype: str, std: float) -> None:
        import numpy as np
        import torch

        self._seed, self._std = seed, std
        self._dtype = torch_dtype(dtype)
        self._narrow = ITEM_NBYTES[dtype] == 2
        self._carrier = np.dtype(np.int16 if self._narrow else np.float32)  # numpy has no bfloat16
        self._local = threading.local()
        if self._narrow:
            quantiles = (torch.arange(1 << _TABLE_BITS, dtype=torch.float64) + 0.5) / (1 << _TABLE_BITS)
            self._table = (torch.special.ndtri(quantiles) * std).to(self._dtype).view(torch.int16).numpy()

    def fill(self, name: str, first: int, view: memoryview) -> None:
        """Writes elements `first`, `first + 1`, … of tensor `name` until `view` is full. `view` is whole elements."""
        import numpy as np

        out = np.frombuffer(view, self._carrier)
        done = 0
        while done < len(out):
            run, skip = divmod(first + done, _RUN)
            count = min(_RUN - skip, len(out) - done)
            part = out[done : done + count]
            if skip == 0:
                self._draw(f"{self._seed}/{name}/{run}", part)
            else:  # a generator starts at the run's beginning only
                scratch = self._scratch("run", _RUN, self._carrier)[: skip + count]
                self._draw(f"{self._seed}/{name}/{run}", scratch)
                part[:] = scratch[skip:]
            done += count

    def fill_constant(self, value: float, view: memoryview) -> None:
        """Writes the same value to every element of `view`."""
        import numpy as np
        import torch

        element = torch.tensor([value], dtype=self._dtype).view(torch.int16 if self._narrow else torch.float32)
        np.frombuffer(view, self._carrier)[:] = element.numpy()

    def _draw(self, key: str, out: np.ndarray) -> None:
        """The first `len(out)` elements of a run: of two calls with one key, the shorter gives a prefix."""
        import numpy as np

        bits = np.random.SFC64(int.from_bytes(blake2b(key.encode(), digest_size=16).digest(), "little"))
        if not self._narrow:
            np.random.Generator(bits).standard_normal(dtype=np.float32, out=out)
            np.multiply(out, np.float32(self._std), out=out)
            return
        indices = self._scratch("index", _BLOCK, np.dtype(np.intp))
        for low in range(0, len(out), _BLOCK):
            block = out[low : low + _BLOCK]
            index = indices[: len(block)]
            uniform = bits.random_raw(-(-len(block) // 2)).view(np.uint32)[: len(block)]
            np.right_shift(uniform, 32 - _TABLE_BITS, out=index)
            np.take(self._table, index, out=block, mode="clip")  # nothing is clipped; the checking mode would buffer

    def _scratch(self, name: str, count: int, dtype: np.dtype) -> np.ndarray:
        """An array of this thread, allocated once."""
        import numpy as np

        array: np.ndarray | None = getattr(self._local, name, None)
        if array is None:
            array = np.empty(count, dtype)
            setattr(self._local, name, array)
        return array
