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
from sllm_mini.lab.bench.conditions import back_memory, make_cold, make_warm, resident_nbytes
from sllm_mini.lab.counters import Counters, counted
from sllm_mini.lab.formats.files import Format
from sllm_mini.lab.formats.readers import READERS, Reader, read_direct

if TYPE_CHECKING:
    import torch

_PRELOADED = ["torch", "numpy", "safetensors.torch", "sllm_mini.lab.formats.runs"]


@dataclass(frozen=True, slots=True)
class ReaderRun:
    """One run. `nbytes` are the model's, `cached_share` what the page cache held of its files before; `load` ends when every tensor exists, `use` is a sum over every byte, `checksum` that sum."""

    reader: Reader
    warm: bool
    nbytes: int
    cached_share: float
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

    Before each run the host of a virtual machine is made to back as much memory as a reader takes, or the first readers
    after a pause would pay for it. A reader that the file system refuses (direct reads in a file system that lives in memory) is left out. Raises
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
                back_memory(2 * fmt.tensor_nbytes)
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
    """The 64-bit sum over every byte of every distinct tensor, whatever their order and place; ~10 GB/s."""
    import torch

    # By numpy, on this thread: the first sum by torch starts its threads, and what those read would be counted too.
    distinct = {tensor.data_ptr(): tensor for tensor in tensors.values()}.values()
    return sum(host_sum64(tensor.reshape(-1).view(torch.uint8).numpy().data) for tensor in distinct) % (1 << 64)


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


def _prepare(path: Path, warm: bool) -> float:
    """Fills the page cache with the files of a format, or empties it of them; the share that it then holds."""
    files = [path] if path.is_file() else sorted(path.glob("data-*.bin"))
    (make_warm if warm else make_cold)(files)
    held, total = resident_nbytes(files)
    return held / total
