"""A model whose bytes somebody else owns: its tensors here, with no copy, for as long as anything can reach them.

On a CPU the store's chunks are mapped privately (`mapping`), so a write stays in this process; on a GPU its memory is
opened (CUDA IPC) and shared, writes included, so tenants of one GPU must trust each other. The tensors exist at once and
may be used layer by layer while the store still loads. Taught in chapter 05. Rebuilt from DeepServe's fork (ATC'25).
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from sllm_mini.checkpoint.directory import Checkpoint
from sllm_mini.device.base import Buffer, Device
from sllm_mini.errors import StoreError
from sllm_mini.loading.handle import LoadHandle
from sllm_mini.loading.load import start_load
from sllm_mini.loading.restore import join_composites, restore_tensors
from sllm_mini.storage.arrivals import image_places
from sllm_mini.storage.remote import open_remote
from sllm_mini.storage.source import RemoteOptions
from sllm_mini.types import Progress, Tier

if TYPE_CHECKING:
    import torch


class Arriving(Protocol):
    """`Arrivals` or a `LoadHandle`: who knows what is in place."""

    @property
    def layers(self) -> list[str]: ...

    @property
    def progress(self) -> Progress: ...

    @property
    def done(self) -> bool: ...

    def ready(self, name: str) -> bool: ...

    def wait_for(self, name: str, timeout: float | None = None) -> bool: ...

    def wait(self, timeout: float | None = None) -> object: ...

    def cancel(self) -> None: ...


class Attachment:
    """An attached model. Answers what a `LoadHandle` answers, so whatever runs on one runs on the other.

    `tier` says where its bytes are: DRAM or DEVICE, owned by the store, or DISK if the store had no room (`reason` says
    why) and this process loads it for itself. The lease on owned bytes ends with the last tensor, not with this object.
    Safe from several threads.
    """

    def __init__(self, checkpoint: Checkpoint, arriving: Arriving, tensors: Mapping[str, torch.Tensor], tier: Tier, reason: str = "") -> None:
        self.checkpoint = checkpoint
        self.tier = tier
        self.reason = reason
        self._arriving = arriving
        self._tensors: Mapping[str, torch.Tensor] | None = tensors

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The plain tensors by name, in execution order; see `ready` for when their bytes are there. Raises StoreError once
        closed."""
        found = self._tensors
        if found is None:
            raise StoreError(f"this attachment to {self.checkpoint.path} was closed; attach the model again")
        return found

    @property
    def layers(self) -> list[str]:
        return self._arriving.layers

    @property
    def progress(self) -> Progress:
        return self._arriving.progress

    @property
    def done(self) -> bool:
        """True once every byte is in place or the load has failed."""
        return self._arriving.done

    def ready(self, name: str) -> bool:
        """True if all bytes of a tensor, or of a layer, are in place. Raises LoadError for another name, and the load's
        error if it failed."""
        return self._arriving.ready(name)

    def wait_for(self, name: str, timeout: float | None = None) -> bool:
        """Waits until a tensor or layer is ready; False if `timeout` seconds passed first. Raises as `ready` does."""
        return self._arriving.wait_for(name, timeout)

    def wait(self, timeout: float | None = None) -> dict[str, torch.Tensor]:
        """Waits for all bytes and returns every tensor by name, composites put together. Raises the load's error, which
        drops the tensors, or TimeoutError, or StoreError once closed."""
        try:
            self._arriving.wait(timeout)
        except BaseException:
            if self._arriving.done:
                self._tensors = None
            raise
        return join_composites(self.checkpoint, dict(self.tensors))

    def cancel(self) -> None:
        """The same as `close`."""
        self.close()

    def close(self) -> None:
        """Drops this object's tensors, and ends a load of this process's own that is not done; a load of the store's is
        for others too and goes on."""
        self._tensors = None
        if isinstance(self._arriving, LoadHandle) and self.tier is Tier.DISK:
            self._arriving.cancel()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def attach_memory(checkpoint: Checkpoint, arriving: Arriving, memory: Buffer, tier: Tier) -> Attachment:
    """An attachment to an image that lies in `memory`; the tensors keep it alive, this function's caller need not."""
    tensors = restore_tensors(memory.tensor(), image_places(checkpoint.index))
    memory.close()
    return Attachment(checkpoint, arriving, tensors, tier)


def load_elsewhere(source: str, device: Device, reason: str, options: RemoteOptions | None = None) -> Attachment:
    """Loads a model into memory of this process's own, where a store has no room for it, and returns at once. Raises what
    opening the source raises."""
    if "://" not in source:
        handle = start_load(source, device)
        return Attachment(handle.checkpoint, handle, handle.tensors, Tier.DISK, reason)
    folder = tempfile.mkdtemp(prefix="sllm-mini-")
    try:
        with open_remote(source, Path(folder) / "checkpoint", options=options) as remote:  # a load that runs keeps it open
            handle = start_load(remote, device)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    found = Attachment(handle.checkpoint, handle, handle.tensors, Tier.DISK, reason)
    weakref.finalize(found, shutil.rmtree, folder, ignore_errors=True)
    return found
