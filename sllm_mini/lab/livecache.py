"""Small models in real stores, asked for by a seeded stream: what each eviction policy finds, beside what its simulation said.

All stores get each request one after another, so noise falls on all alike, and the simulation is given what a miss and
a hit take on this machine. Costs the models once on the disk and a budget of DRAM per policy. Call from one thread. Shown
in chapter 03.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from sllm_mini.checkpoint import open_checkpoint, save_checkpoint
from sllm_mini.device.base import ALIGNMENT
from sllm_mini.eviction import POLICIES, Policy
from sllm_mini.lab.bench.conditions import make_cold
from sllm_mini.lab.caching import CatalogueModel, HitRatios, simulate_cache
from sllm_mini.lab.hierarchy import attached, resident_nbytes
from sllm_mini.storage import Store

_LAYERS = 4


@dataclass(frozen=True, slots=True)
class SmallModels:
    """Checkpoints in `folder`, one per model of the catalogue, whose `cost_seconds` were measured there as well as
    `hit_seconds`, which attaching one takes that is in DRAM."""

    folder: Path
    catalogue: list[CatalogueModel]
    hit_seconds: float

    @property
    def nbytes(self) -> int:
        return sum(model.nbytes for model in self.catalogue)


@dataclass(frozen=True, slots=True)
class StreamRun:
    """What one policy found in a stream, and the seconds until every request had its model."""

    policy: str
    ratios: HitRatios
    seconds: float


def make_small_models(folder: Path, chunks: Sequence[int], *, exponent: float = 0.9, seed: int = 0) -> SmallModels:
    """Writes random tensors as checkpoints of so many chunks of 2 MiB, in the order of their popularity, and measures
    loading each from the disk into a full store (the median of 3) and attaching it there. Raises what saving and loading raise."""
    import torch

    chance = torch.Generator().manual_seed(seed)
    weights = [rank**-exponent for rank in range(1, len(chunks) + 1)]
    names = [f"model-{number:02d}" for number in range(len(chunks))]
    for name, count in zip(names, chunks, strict=True):
        words = count * ALIGNMENT // 8 // _LAYERS
        save_checkpoint({f"layers.{layer}.weight": torch.randint(2**62, (words,), generator=chance) for layer in range(_LAYERS)}, folder / name)
    misses: dict[str, list[float]] = {name: [] for name in names}
    hits: list[float] = []
    # One after another, in a cache that is too small for all: to lru every one of them is a miss, its eviction included.
    with Store(folder / "store-first", dram_nbytes=max(sum(chunks) // 3, *chunks) * ALIGNMENT, chunk_nbytes=ALIGNMENT, policy="lru") as store:
        for name in names:
            store.register(name, folder / name)
        for _ in range(4):
            make_cold(_files(folder, names))
            for name in names:
                misses[name].append(_seconds_to_attach(store, name))
                hits.append(_seconds_to_attach(store, name))
    sizes = [open_checkpoint(folder / name).nbytes for name in names]
    total = math.fsum(weights)
    catalogue = [
        CatalogueModel(name, weight / total, size, statistics.median(misses[name][1:])) for name, weight, size in zip(names, weights, sizes, strict=True)
    ]
    return SmallModels(folder, catalogue, statistics.median(hits))


def shuffled_chunks(models: int, *, least: int = 4, most: int = 40, seed: int = 0) -> list[int]:
    """Sizes of models in chunks, spread evenly on a logarithmic scale and shuffled, so that they owe nothing to popularity."""
    sizes = [round(least * (most / least) ** (number / max(1, models - 1))) for number in range(models)]
    random.Random(seed).shuffle(sizes)
    return sizes


def predict_stream(models: SmallModels, stream: Sequence[CatalogueModel], cache_nbytes: int, policies: Mapping[str, Policy] = POLICIES) -> list[StreamRun]:
    """What the simulation says of each policy, with the costs that were measured for the models."""
    cold = math.fsum(model.cost_seconds for model in stream)
    found = []
    for name, policy in policies.items():
        ratios = simulate_cache(stream, cache_nbytes, policy, granule_nbytes=ALIGNMENT)
        found.append(StreamRun(name, ratios, cold * (1 - ratios.seconds) + len(stream) * ratios.requests * models.hit_seconds))
    return found


def play_stream(models: SmallModels, stream: Sequence[CatalogueModel], cache_nbytes: int, policies: Mapping[str, Policy] = POLICIES) -> list[StreamRun]:
    """Asks a store per policy for the models of a stream, attaching each and letting it go. Raises what a store raises."""
    requests, cold = len(stream), math.fsum(model.cost_seconds for model in stream)
    whole, found, seconds = (dict.fromkeys(policies, 0.0) for _ in range(3))
    make_cold(_files(models.folder, (model.name for model in models.catalogue)))
    with ExitStack() as opened:
        stores = {}
        for name, policy in policies.items():
            stores[name] = opened.enter_context(Store(models.folder / f"store-{name}", dram_nbytes=cache_nbytes, chunk_nbytes=ALIGNMENT, policy=policy))
            for model in models.catalogue:
                stores[name].register(model.name, models.folder / model.name)
        for number, model in enumerate(stream):
            turn = list(stores)[number % len(stores) :] + list(stores)[: number % len(stores)]
            for name in turn:
                there = resident_nbytes(stores[name], model.name)
                whole[name] += there == model.nbytes
                found[name] += there
                seconds[name] += _seconds_to_attach(stores[name], model.name)
    asked = sum(model.nbytes for model in stream)
    return [StreamRun(name, HitRatios(whole[name] / requests, found[name] / asked, 1 - seconds[name] / cold), seconds[name]) for name in policies]


def _seconds_to_attach(store: Store, name: str) -> float:
    start = time.perf_counter()
    with attached(store, name) as attachment:
        attachment.wait()
        return time.perf_counter() - start


def _files(folder: Path, names: Iterable[str]) -> list[Path]:
    return [file for name in names for file in sorted((folder / name).glob("*.bin"))]
