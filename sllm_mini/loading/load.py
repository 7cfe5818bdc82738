"""The front of this floor: start a load, or do one and wait.

Memory grows by the model's size on a CPU, and on a GPU by that on the device and a ring of pinned chunks on the host.
Taught in chapter 02.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from sllm_mini.checkpoint.composite import check_composite_kind
from sllm_mini.checkpoint.directory import Checkpoint, open_checkpoint
from sllm_mini.checkpoint.hashing import CHUNK_NBYTES
from sllm_mini.checkpoint.index import BLOCK_NBYTES, Index
from sllm_mini.device import get_device
from sllm_mini.device.base import Buffer, Device
from sllm_mini.device.cpu import HostMemory
from sllm_mini.errors import LoadError
from sllm_mini.loading.existing import devices_of, scatter
from sllm_mini.loading.flow import IN_PLACE, Flow, LoadOptions
from sllm_mini.loading.handle import LoadHandle
from sllm_mini.loading.in_place import InPlace
from sllm_mini.loading.pipeline import Pipeline, Target, TargetMaker
from sllm_mini.loading.plan import Chunk, LoadPlan, plan_load
from sllm_mini.loading.pool import ChunkPool
from sllm_mini.loading.reader import Reader
from sllm_mini.loading.restore import restore_tensors
from sllm_mini.loading.ring import Piece, Ring
from sllm_mini.types import SpanRecorder

if TYPE_CHECKING:
    import torch


def start_load(
    path: str | os.PathLike[str] | Checkpoint,
    device: str | Device | Mapping[str, str | Device] = "cpu",
    *,
    names: Collection[str] | None = None,
    into: Mapping[str, torch.Tensor] | None = None,
    verify: bool = True,
    options: LoadOptions | None = None,
    pool: ChunkPool | None = None,
    recorder: SpanRecorder | None = None,
) -> LoadHandle:
    """Starts loading a checkpoint and returns at once.

    `device` is one device or a map from prefixes of tensor names to devices ("" matches all; the longest prefix
    counts). `names` loads only those tensors and composites. `into` fills tensors that exist already, on whatever
    devices they are, and nothing else (leave out `device` and `names`); after a failure they hold a mixture of old and
    new bytes. With `verify`, every chunk is hashed as it arrives, and a wrong one fails the load. `pool` lends the host
    memory on the way to a GPU (or to existing tensors), so that no load has to pin its own. `recorder` gets a span for
    each stage of each chunk. Raises what `open_checkpoint` raises, OutOfMemoryError before anything is read if the
    target is too small, DeviceError for a device that is not there or refuses, LoadError for an unknown name or an unfit
    tensor, FormatError or UnsupportedError for a composite that cannot be built here, ValueError for arguments that
    contradict each other or a pool that does not fit or was closed, TypeError for an `into` that does not map names to
    tensors. Safe from several threads.
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    if into is not None:
        if names is not None or device != "cpu":
            raise ValueError("with `into`, the tensors say what is loaded and where; leave out `device` and `names`")
        devices, numbers = devices_of(checkpoint, into)
        wanted: Collection[str] | None = numbers
        device_of = numbers.__getitem__
    else:
        devices, prefixes = _number_devices(device if isinstance(device, Mapping) else {"": device}, checkpoint)
        wanted = None if names is None else _plain_names(checkpoint, names)
        device_of = partial(_by_prefix, prefixes) if len(prefixes) > 1 else lambda _: 0
    if options is None:
        in_place = into is None and all(target.is_host for target in devices)
        options = IN_PLACE if in_place else LoadOptions() if pool is None else LoadOptions(chunk_nbytes=pool.chunk_nbytes)
    if pool is not None:
        pool.require_open()
    if pool is not None and not any(_lends(pool, target) and (into is not None or not target.is_host) for target in devices):
        raise ValueError(f"the pool has memory for {pool.device.name}, which no chunk of this load passes through; make it for the load's device")
    if pool is not None and pool.chunk_nbytes != options.chunk_nbytes:
        raise ValueError(f"the pool's chunks have {pool.chunk_nbytes:,} bytes and the load reads {options.chunk_nbytes:,} at a time; make them equal")
    granule = CHUNK_NBYTES if verify else BLOCK_NBYTES
    plan = plan_load(checkpoint.index, device_of, devices=len(devices), names=wanted, chunk_nbytes=options.chunk_nbytes, granule=granule)
    _check_composites(checkpoint, plan)
    buffers: list[Buffer] = []
    try:
        if into is None:
            for target, nbytes in zip(devices, plan.device_nbytes, strict=True):
                buffers.append(target.allocate(nbytes))
        bases = [buffer.tensor() for buffer in buffers]
        scattered = None if into is None else scatter(plan, into)
        make_targets = partial(_targets, plan, devices, buffers, scattered, pool)
        handle = start_transfer(checkpoint, plan, make_targets, options=options, verify=verify, recorder=recorder, buffers=list(buffers))
    except BaseException:
        for buffer in buffers:
            buffer.close()
        raise
    try:
        # The first reads are on their way: 10 000 views take as long as 50 MB from a good disk.
        handle._give_tensors(dict(into) if into is not None else _restore(plan, bases))
    except BaseException:
        handle.cancel()
        raise
    return handle


def _check_composites(checkpoint: Checkpoint, plan: LoadPlan) -> None:
    """Raises now what `LoadHandle.wait` would raise of composites that cannot be built here."""
    if checkpoint.index.composites:
        planned = {tensor.name for tensor, _ in plan.tensors}
        for composite in checkpoint.index.composites:
            if planned.issuperset(composite.parts.values()):
                check_composite_kind(composite, checkpoint.path)


def start_transfer(
    checkpoint: Checkpoint,
    plan: LoadPlan,
    make_targets: TargetMaker,
    *,
    options: LoadOptions,
    verify: bool = True,
    reads: bool = True,
    recorder: SpanRecorder | None = None,
    buffers: Sequence[Buffer] = (),
) -> LoadHandle:
    """Carries out a plan with targets of the caller's own, and returns at once; the handle makes no tensors, so no
    composite either: a store may hold for others what it could not build itself.

    What a store is made of: `start_load` is this with memory and tensors of its own. `reads`: whether the targets want
    the checkpoint's files open. `buffers` are closed if it fails. Raises what opening the files and `make_targets` raise.
    """
    handle = LoadHandle(checkpoint, plan, list(buffers))
    flow = Flow(checkpoint.index, options, verify=verify, recorder=recorder, on_chunk=handle._on_chunk)
    pipeline = Pipeline(checkpoint, plan, flow, handle._on_end, reads=reads)
    handle._attach(pipeline)
    pipeline.start(make_targets)
    return handle


def ring_into(device: Device, buffer: Buffer, pool: ChunkPool | None = None) -> TargetMaker:
    """For `start_transfer`: chunks go through pinned memory to their places in one buffer on a GPU."""
    return lambda flow, readers: [Ring(flow, device, partial(_one_piece, buffer), readers, whole=buffer.nbytes > 0, pool=pool)]


def _restore(plan: LoadPlan, bases: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The views into each device's allocation, in execution order."""
    if len(bases) == 1:
        return restore_tensors(bases[0], plan.places(0))
    tensors: dict[str, torch.Tensor] = {}
    for number, base in enumerate(bases):
        tensors |= restore_tensors(base, plan.places(number))
    return {tensor.name: tensors[tensor.name] for tensor, _ in plan.tensors}


def _targets(
    plan: LoadPlan, devices: Sequence[Device], buffers: Sequence[Buffer], scattered: Mapping[int, Sequence[Piece]] | None,
    pool: ChunkPool | None, flow: Flow, readers: list[Reader],
) -> list[Target]:  # fmt: skip
    targets: list[Target] = []
    try:
        for number, device in enumerate(devices):
            lent = pool if pool is not None and _lends(pool, device) else None
            if scattered is not None:
                targets.append(Ring(flow, device, lambda chunk: scattered[chunk.number], readers, whole=False, pool=lent))
            elif isinstance(memory := buffers[number], HostMemory):
                targets.append(InPlace(flow, memory, (chunk for chunk in plan.chunks if chunk.device == number), readers))
            else:
                targets.append(Ring(flow, device, partial(_one_piece, memory), readers, whole=memory.nbytes > 0, pool=lent))
    except BaseException:
        for target in targets:
            target.close()
        raise
    return targets


def _lends(pool: ChunkPool, device: Device) -> bool:
    return pool.device.is_host == device.is_host  # pinned memory is pinned for every GPU


def _one_piece(memory: Buffer, chunk: Chunk) -> tuple[Piece]:
    return (Piece(0, chunk.nbytes, memory, chunk.device_offset),)


def load_tensors(
    path: str | os.PathLike[str] | Checkpoint,
    device: str | Device | Mapping[str, str | Device] = "cpu",
    *,
    names: Collection[str] | None = None,
    into: Mapping[str, torch.Tensor] | None = None,
    verify: bool = True,
    options: LoadOptions | None = None,
    pool: ChunkPool | None = None,
    recorder: SpanRecorder | None = None,
) -> dict[str, torch.Tensor]:
    """Loads a checkpoint and returns its tensors as a dict, name → tensor, in execution order.

    `device`: "cpu", "cuda", "cuda:1", or a map from prefixes of names to devices. `names`: only these. `into`: fill
    these tensors instead of making new ones. `verify`: check every chunk's hash as it arrives. `options`, `pool`,
    `recorder`: see `start_load`. Ties and views share memory as they did when saved. Raises what `start_load` and `LoadHandle.wait` raise. Safe from
    several threads.

        tensors = load_tensors("llama.sllm", names=["model.norm.weight"])
    """
    with start_load(path, device, names=names, into=into, verify=verify, options=options, pool=pool, recorder=recorder) as handle:
        return handle.wait()


def _number_devices(targets: Mapping[str, str | Device], checkpoint: Checkpoint) -> tuple[list[Device], dict[str, int]]:
    found: dict[str, tuple[int, Device]] = {}
    numbers: dict[str, int] = {}
    for prefix, target in targets.items():
        device = get_device(target)
        number, _ = found.setdefault(device.name, (len(found), device))
        numbers[prefix] = number
    if not numbers:
        raise LoadError("the device map is empty; map at least the prefix '' to a device", path=checkpoint.path)
    if "" not in numbers:
        for tensor in checkpoint.index.tensors:
            if not any(tensor.name == prefix or tensor.name.startswith(f"{prefix}.") for prefix in numbers):
                raise LoadError(f"the device map has no device for tensor {tensor.name!r}; map the prefix '' to one", path=checkpoint.path)
    return [device for _, device in found.values()], numbers


def _by_prefix(devices: Mapping[str, int], name: str) -> int:
    return devices[max((prefix for prefix in devices if prefix == "" or name == prefix or name.startswith(f"{prefix}.")), key=len)]


def _plain_names(checkpoint: Checkpoint, names: Collection[str]) -> set[str]:
    """The plain tensors behind the names of tensors and composites."""
    index: Index = checkpoint.index
    known = {tensor.name for tensor in index.tensors}
    composites = {composite.name: composite for composite in index.composites}
    wanted: set[str] = set()
    for name in names:
        if name in composites:
            wanted.update(composites[name].parts.values())
        elif name in known:
            wanted.add(name)
        else:
            raise LoadError(f"the checkpoint holds no tensor {name!r}", path=checkpoint.path)
    return wanted
