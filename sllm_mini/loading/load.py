"""The front of this floor: start a load, or do one and wait.

Memory grows by the model's size on a CPU, and on a GPU by that on the device and a ring of pinned chunks on the host.
Taught in chapter 02.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from sllm_mini.checkpoint.directory import Checkpoint, open_checkpoint
from sllm_mini.checkpoint.hashing import CHUNK_NBYTES
from sllm_mini.checkpoint.index import BLOCK_NBYTES, Index
from sllm_mini.device import get_device
from sllm_mini.device.base import Buffer, Device
from sllm_mini.errors import LoadError
from sllm_mini.loading.handle import LoadHandle
from sllm_mini.loading.pipeline import LoadOptions, Pipeline
from sllm_mini.loading.plan import plan_load
from sllm_mini.loading.restore import restore_tensors
from sllm_mini.types import SpanRecorder

if TYPE_CHECKING:
    import torch


def start_load(
    path: str | os.PathLike[str] | Checkpoint,
    device: str | Device | Mapping[str, str | Device] = "cpu",
    *,
    names: Collection[str] | None = None,
    verify: bool = True,
    options: LoadOptions | None = None,
    recorder: SpanRecorder | None = None,
) -> LoadHandle:
    """Starts loading a checkpoint and returns at once.

    `device` is one device or a map from prefixes of tensor names to devices ("" matches all; the longest prefix
    counts). `names` loads only those tensors and composites. With `verify`, every chunk is hashed as it arrives, and a
    wrong one fails the load. `recorder` gets a span for each stage of each chunk. Raises what `open_checkpoint`
    raises, OutOfMemoryError before anything is read if the target is too small, LoadError for an unknown name. Safe
    from several threads.
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    options = options or LoadOptions()
    targets = device if isinstance(device, Mapping) else {"": device}
    devices, numbers = _number_devices(targets, checkpoint)
    wanted = None if names is None else _plain_names(checkpoint, names)
    granule = CHUNK_NBYTES if verify else BLOCK_NBYTES
    plan = plan_load(checkpoint.index, numbers, names=wanted, chunk_nbytes=options.chunk_nbytes, granule=granule)
    buffers: list[Buffer] = []
    tensors: dict[str, torch.Tensor] = {}
    try:
        for target, nbytes in zip(devices, plan.device_nbytes, strict=True):
            buffers.append(target.allocate(nbytes))
        for number, buffer in enumerate(buffers):
            own = ((tensor, plan.place(tensor, number)) for tensor, at in plan.tensors if at == number)
            tensors.update(restore_tensors(buffer.tensor(), own))
        order = {tensor.name: tensors[tensor.name] for tensor, _ in plan.tensors}
        handle = LoadHandle(checkpoint, plan, order, list(buffers))
        pipeline = Pipeline(
            checkpoint, plan, devices, buffers, options,
            verify=verify, recorder=recorder, on_chunk=handle._on_chunk, on_end=handle._on_end,
        )  # fmt: skip
        handle._attach(pipeline)
        pipeline.start()
    except BaseException:
        for buffer in buffers:
            buffer.close()
        raise
    return handle


def load_tensors(
    path: str | os.PathLike[str] | Checkpoint,
    device: str | Device | Mapping[str, str | Device] = "cpu",
    *,
    names: Collection[str] | None = None,
    verify: bool = True,
    options: LoadOptions | None = None,
    recorder: SpanRecorder | None = None,
) -> dict[str, torch.Tensor]:
    """Loads a checkpoint and returns its tensors as a dict, name → tensor, in execution order.

    `device`: "cpu", "cuda", "cuda:1", or a map from prefixes of names to devices. `names`: only these. `verify`: check
    every chunk's hash as it arrives. `options`: see `LoadOptions`. `recorder`: gets a span for each stage of each chunk.
    Ties and views share memory as they did when saved. Raises what `start_load` and `LoadHandle.wait` raise. Safe from
    several threads.

        tensors = load_tensors("llama.sllm", names=["model.norm.weight"])
    """
    with start_load(path, device, names=names, verify=verify, options=options, recorder=recorder) as handle:
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
