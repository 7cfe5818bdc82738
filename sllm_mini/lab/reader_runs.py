"""Measures a reader: what its load and then the first use of every byte cost, each run in a fresh process.

The processes are forked by multiprocessing's fork server, which has imported torch and nothing else: so each run starts
with the same clean heap, and imports are not in the figures. The page cache is set up inside the process before the
counting begins, without root. Shown in chapter 01.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sllm_mini.device.kernels import host_sum64
from sllm_mini.errors import LoadError
from sllm_mini.lab.counters import Counters, counted
from sllm_mini.lab.formats import Format
from sllm_mini.lab.readers import READERS, Reader, read_direct
from sllm_mini.loading.residency import cached_nbytes, drop_cached

if TYPE_CHECKING:
    import torch

_PRELOADED = ["torch", "numpy", "safetensors.torch", "sllm_mini.lab.reader_runs"]
_STEP = 4 << 20


@dataclass(frozen=True, slots=True)
class ReaderRun:
    """One run. `nbytes` are the model's, `cached_share` what the page cache held of its files before, None where the
    system does not say; `load` ends when every tensor exists, `use` is a sum over every byte, `checksum` that sum."""

    reader: Reader
    warm: bool
    nbytes: int
    cached_share: float | None
    load: Counters
    use: Counters
    checksum: int

    @property
    def seconds(self) -> float:
        return self.load.seconds + self.use.seconds

    def total(self, name: str) -> float | None:
        """Load and use together of one of the counters; None where this kernel does not count it."""
        parts = (getattr(self.load, name), getattr(self.use, name))
        return None if None in parts else sum(parts)

    @property
    def copies_per_byte(self) -> float | None:
        """How often the kernel copied each byte of the model from the page cache into this process."""
        read = self.total("read_nbytes")
        return None if read is None else read / self.nbytes if self.reader.copies else 0.0


def measure_readers(
    formats: Mapping[str, Format], *, rounds: int = 3, warm: Iterable[bool] = (False, True), readers: Sequence[Reader] = READERS
) -> list[ReaderRun]:
    """Every reader, `rounds` times in turn with the others, from the disk and from the page cache.

    A reader that the file system refuses (direct reads in a file system that lives in memory) is left out. Raises
    LoadError if two readers did not read the same bytes, and what a reader raises; one at a time on a machine.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    runs: list[ReaderRun] = []
    states = tuple(warm)
    readers = [reader for reader in readers if reader.load is not read_direct or _takes_direct(formats[reader.format].path)]
    for _ in range(rounds):
        for state in states:
            for reader in readers:
                fmt = formats[reader.format]
                with ProcessPoolExecutor(1, mp_context=context) as process:
                    runs.append(process.submit(_measure, reader, str(fmt.path), fmt.tensor_nbytes, state).result())
    if len({run.checksum for run in runs}) > 1:
        raise LoadError("two readers read different bytes of one model; write its files again")
    return runs


def median_runs(runs: Iterable[ReaderRun], *, warm: bool) -> list[ReaderRun]:
    """For each reader, in order, the run of that state whose seconds are the median: a real run, with its own counters."""
    by_reader: dict[str, list[ReaderRun]] = {}
    for run in runs:
        if run.warm == warm:
            by_reader.setdefault(run.reader.name, []).append(run)
    return [sorted(found, key=lambda run: run.seconds)[len(found) // 2] for found in by_reader.values()]


def sum_of(tensors: Mapping[str, torch.Tensor]) -> int:
    """The 64-bit sum over every byte of every distinct tensor, whatever their order and place; ~10 GB/s a core."""
    import torch

    total, seen = 0, set()
    for tensor in tensors.values():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            total += host_sum64(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total % (1 << 64)


def _takes_direct(folder: Path) -> bool:
    try:
        os.close(os.open(folder / "data-00000.bin", os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def _measure(reader: Reader, path: str, nbytes: int, warm: bool) -> ReaderRun:
    share = _prepare(Path(path), warm)
    with counted() as load:
        tensors = reader.load(path)
    with counted() as use:
        checksum = sum_of(tensors)
    return ReaderRun(reader, warm, nbytes, share, load, use, checksum)


def _prepare(path: Path, warm: bool) -> float | None:
    """Fills the page cache with the files of a format, or empties it of them; the share that it then holds."""
    held = total = 0
    for file in [path] if path.is_file() else sorted(path.glob("data-*.bin")):
        with file.open("rb", buffering=0) as opened:
            size = os.fstat(opened.fileno()).st_size
            if not warm:
                drop_cached(opened.fileno())
            elif cached_nbytes(opened.fileno(), 0, size) != size:
                while opened.read(_STEP):
                    pass
            found = cached_nbytes(opened.fileno(), 0, size)
            if found is None:
                return None
            held, total = held + found, total + size
    return held / total
