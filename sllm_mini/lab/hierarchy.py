"""One model on its way up: from a remote, from the disk, from DRAM, from a GPU; what is found, what moves, what it takes.

Everything goes through a real `Store` in this process. Each timed load ends with the sum over every byte, timed apart; the
limit of each tier is taken in the same round as the loads, and ratios are of one round. Costs the model once on the
server's side, once in the store's disk cache and up to one and a half times in DRAM. Call from one thread. Shown in chapter 03.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sllm_mini.checkpoint import Checkpoint
from sllm_mini.device import get_device
from sllm_mini.device.base import Device
from sllm_mini.errors import DeviceError, IntegrityError, UnsupportedError
from sllm_mini.lab.bench.checksum import sum_tensors
from sllm_mini.lab.bench.conditions import back_memory, make_cold
from sllm_mini.lab.tiers.origin import Origin, seconds_to_fetch
from sllm_mini.loading.probe_disk import MIB, SWEEP, seconds_to_read
from sllm_mini.loading.probe_memory import measure_device_copy
from sllm_mini.storage import Store
from sllm_mini.storage.memory import SharedPool
from sllm_mini.types import Tier

if TYPE_CHECKING:
    import torch

    from sllm_mini.storage import Attachment
    from sllm_mini.storage.messages import Residence

_FETCHES = ((4 * MIB, 4), (16 * MIB, 2), (16 * MIB, 4))
"""(range bytes, threads): the best of them is the limit of the way to the server."""
_LOOK_SECONDS = 0.0005


class CountedOrigin(Origin):
    """An `Origin` that can be asked how many bytes it has sent."""

    @property
    def sent_nbytes(self) -> int:
        """What the kernel says that the server's process has written since it started, headers left out. Raises
        UnsupportedError where the kernel does not count."""
        try:
            counters = Path(f"/proc/{self._process.pid}/io").read_text(encoding="ascii")
        except OSError as error:
            raise UnsupportedError(f"this kernel does not count what a process writes ({error.strerror}); read the store's own figures instead") from error
        return int(dict(line.split(": ") for line in counters.splitlines())["wchar"])


@dataclass(frozen=True, slots=True)
class TierRun:
    """One load from `tier`. `load_seconds` ends when every byte is where it was asked for, `use_seconds` is the first sum
    over all of them after that, `again_seconds` the second; `limit_seconds` is what the slowest part of the way takes
    to move as many bytes and do nothing else, measured in the same round."""

    tier: Tier
    nbytes: int
    load_seconds: float
    use_seconds: float
    again_seconds: float
    limit_seconds: float

    @property
    def seconds(self) -> float:
        return self.load_seconds + self.use_seconds

    @property
    def floor_seconds(self) -> float:
        """The least that the load and one use of every byte can take."""
        return self.limit_seconds + self.again_seconds


def tiers_to(device: Device) -> tuple[Tier, ...]:
    """Where a load to that device can start from."""
    return (Tier.REMOTE, Tier.DISK, Tier.DRAM) if device.is_host else tuple(Tier)


def measure_way_limits(checkpoint: Checkpoint, port: int, device: Device, files: Sequence[Path]) -> dict[Tier, float]:
    """Seconds that a tier's slowest part takes for the bytes of a checkpoint: ranges of the server on `port` into memory,
    direct reads of `files` (the same checkpoint's), copies to a GPU. A mapping moves nothing: 0. Raises what these raise."""
    served = [(partition.file, partition.file_nbytes) for partition in checkpoint.index.partitions]
    fetch = min(seconds_to_fetch(port, served, chunk, threads) for chunk, threads in _FETCHES)
    read = min(sum(_seconds_to_read(path, chunk, threads) for path in files) for chunk, threads in SWEEP[1:])
    link = 0.0 if device.is_host else _seconds_to_copy(checkpoint.nbytes, device)
    return {Tier.REMOTE: max(fetch, link), Tier.DISK: max(read, link), Tier.DRAM: link, Tier.DEVICE: 0.0}


def _seconds_to_read(path: Path, chunk_nbytes: int, threads: int) -> float:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:  # a file system without direct reads
        make_cold([path])
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        nbytes = os.fstat(fd).st_size
        return seconds_to_read(fd, nbytes, min(chunk_nbytes, nbytes), threads)
    finally:
        os.close(fd)


def _seconds_to_copy(nbytes: int, device: Device) -> float:
    found = [m for m in measure_device_copy(device, rounds=1).measurements if m.name == "host_to_device_copy"]
    if not found:
        raise DeviceError(f"copies to {device.name} could not be measured; free some of its memory")
    return nbytes / max(m.bytes_per_second for m in found)


def cached_files(store: Store) -> list[Path]:
    """The data files of everything in a store's disk cache."""
    return sorted((store.folder / "models").glob("[!.]*/*.bin"))


def measure_fresh_pages(nbytes: int = 256 << 20) -> tuple[float, int]:
    """(bytes per second, page bytes) at which this kernel makes fresh memory that can be shared, which a load needs to read
    into. Raises OutOfMemoryError."""
    with SharedPool(nbytes) as pool:
        start = time.perf_counter()
        pool.fill()
        seconds = time.perf_counter() - start
        chunk = pool.take()
        page = chunk.page_nbytes()
        pool.give(chunk)
    return nbytes / seconds, page


@contextmanager
def attached(store: Store, name: str, device: Device | str = "cpu") -> Iterator[Attachment]:
    """An attachment whose lease has ended when the block has, and its load too."""
    attachment = store.attach(name, device)
    try:
        yield attachment
    finally:
        attachment.close()
        del attachment
        settle(store, name)


def settle(store: Store, name: str) -> None:
    """Waits until nothing of a model is loading, and no lease is left that a garbage collection would end."""
    while any(place.loading for place in _places(store, name).values()):
        time.sleep(_LOOK_SECONDS)  # the bytes are there; the store takes note of it on a thread of its own
    if any(place.leases for place in _places(store, name).values()):
        gc.collect()


def resident_nbytes(store: Store, name: str, place: str = "dram") -> int:
    """How much of a model a place holds, counted from its first byte."""
    found = _places(store, name).get(place)
    return found.nbytes if found else 0


def _places(store: Store, name: str) -> dict[str, Residence]:
    return {place.place: place for model in store.models() if model.name == name for place in model.places}


def measure_tiers(store: Store, name: str, checkpoint: Checkpoint, port: int, *, device: str = "cpu", rounds: int = 3) -> list[TierRun]:
    """Loads a model of the store from every tier in turn, `rounds` times, the limits taken in each round.

    It is registered with the address of `checkpoint` on the server on `port`, and nothing of it is in use. Raises
    IntegrityError if two loads give different bytes, UnsupportedError where files cannot be made cold, StoreError.
    """
    target = get_device(device)
    runs: list[TierRun] = []
    sums: set[tuple[int, int]] = set()
    for _ in range(rounds):
        store.prefetch(name, "disk")
        limits = measure_way_limits(checkpoint, port, target, cached_files(store))
        for tier in tiers_to(target):
            _bring_only_to(store, name, tier, target)
            back_memory(checkpoint.nbytes)  # else a virtual machine's host is measured, which has to find the memory first
            gc.collect()
            start = time.perf_counter()
            attachment = store.attach(name, target)
            tensors = attachment.wait()
            target.synchronize()
            load = time.perf_counter() - start
            use, again = _use(tensors, sums), _use(tensors, sums)
            attachment.close()
            del attachment, tensors
            settle(store, name)
            runs.append(TierRun(tier, checkpoint.nbytes, load, use, again, limits[tier]))
    if len(sums) > 1:
        raise IntegrityError("two loads gave different bytes", path=checkpoint.path)
    return runs


def _use(tensors: dict[str, torch.Tensor], sums: set[tuple[int, int]]) -> float:
    start = time.perf_counter()
    sums.add(sum_tensors(tensors.values()))
    return time.perf_counter() - start


def _bring_only_to(store: Store, name: str, tier: Tier, device: Device) -> None:
    """Makes `tier` the nearest place that has the model."""
    settle(store, name)
    places = ("disk", "dram") if device.is_host else ("disk", "dram", device.name)
    if tier is Tier.REMOTE:
        for place in reversed(places):
            store.evict(name, place)
        return
    for place in places[: int(tier)]:
        store.prefetch(name, place)
    for place in reversed(places[int(tier) :]):
        store.evict(name, place)
    if tier is Tier.DISK:
        make_cold(cached_files(store))


@dataclass(frozen=True, slots=True)
class PartialLoad:
    """A load of a model of which DRAM held `found_nbytes`: what was moved, and when (seconds from asking) each layer was there
    together with all before it."""

    found_nbytes: int
    moved_nbytes: int
    ready: tuple[tuple[str, float], ...]

    @property
    def seconds(self) -> float:
        return self.ready[-1][1]


def measure_partial(checkpoint: Checkpoint, folder: Path, *, chunk_nbytes: int = 8 << 20, rounds: int = 3) -> list[PartialLoad]:
    """Loads a model of which DRAM holds nothing, and one whose tail another model has pushed out, in turn.

    DRAM has room for one model and a half, and the policy keeps prefixes. Raises UnsupportedError where files cannot be
    made cold, and what a store raises.
    """
    files = [checkpoint.path / partition.file for partition in checkpoint.index.partitions]
    found: list[PartialLoad] = []
    with Store(folder, dram_nbytes=checkpoint.nbytes * 3 // 2, chunk_nbytes=chunk_nbytes, policy="prefix") as store:
        store.register("model", checkpoint.path)
        store.register("another", checkpoint.path)
        for _ in range(rounds):
            for keep in (False, True):
                store.evict("model", "dram")
                if keep:
                    store.prefetch("model")
                    store.prefetch("another")  # its bytes need half of the first one's
                    store.evict("another", "dram")
                make_cold(files)
                back_memory(checkpoint.nbytes)
                found.append(_load_partial(store, "model"))
    return found


def _load_partial(store: Store, name: str) -> PartialLoad:
    found, before = resident_nbytes(store, name), sum(store.stats().moved_nbytes.values())
    start = time.perf_counter()
    with attached(store, name) as attachment:
        ready = []
        for layer in attachment.layers:
            attachment.wait_for(layer)
            ready.append((layer, time.perf_counter() - start))
        attachment.wait()
    return PartialLoad(found, sum(store.stats().moved_nbytes.values()) - before, tuple(ready))


def median_partial(loads: Sequence[PartialLoad]) -> list[PartialLoad]:
    """Of the loads that found the same, the one of median seconds; what found least comes first."""
    kinds = sorted({load.found_nbytes for load in loads})
    return [sorted((load for load in loads if load.found_nbytes == kind), key=lambda load: load.seconds)[sum(load.found_nbytes == kind for load in loads) // 2] for kind in kinds]


def median_seconds(runs: Sequence[TierRun], tier: Tier, part: str = "seconds") -> float:
    """The median of one part of a tier's runs. Raises StatisticsError if there is none."""
    return statistics.median(getattr(run, part) for run in runs if run.tier is tier)
