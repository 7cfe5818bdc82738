"""The places a store owns: DRAM in shared chunks, and memory on GPUs. Each knows what it holds and how to fill it.

A place decides nothing: the store makes room, grants leases and says what goes. A place is called with the store's lock
held; transfers run on threads of their own. Taught in chapter 03.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from sllm_mini.checkpoint.directory import Checkpoint
from sllm_mini.checkpoint.layout import align_up
from sllm_mini.device.base import ALIGNMENT, Buffer, Device
from sllm_mini.errors import StoreError
from sllm_mini.loading.flow import IN_PLACE, LoadOptions
from sllm_mini.loading.load import ring_into, start_transfer
from sllm_mini.loading.plan import LoadPlan, plan_load
from sllm_mini.loading.pool import ChunkPool
from sllm_mini.loading.reader import HasReaders
from sllm_mini.storage.arrivals import Arrivals
from sllm_mini.storage.attach import Arriving
from sllm_mini.storage.chunks import FromChunks, IntoChunks
from sllm_mini.storage.memory import SharedPool
from sllm_mini.storage.shared_chunk import SharedChunk


@dataclass(eq=False, slots=True)
class Leases:
    """How many attachments, and copies to other places, use an image now."""

    count: int = 0


@dataclass(eq=False, slots=True)
class Image:
    """What a place holds of one model. `resident_nbytes` is the prefix that is there; while `loading`, the one that was there before."""

    checkpoint: Checkpoint
    resident_nbytes: int = 0
    loading: bool = False
    arriving: Arriving | None = None
    occupied_nbytes: int = 0
    """What it takes of the place's budget."""
    leases: Leases = field(default_factory=Leases)
    chunks: tuple[SharedChunk, ...] = ()
    """In DRAM."""
    buffer: Buffer | None = None
    """On a GPU."""

    @property
    def whole(self) -> bool:
        return self.resident_nbytes == self.checkpoint.nbytes


def image_plan(checkpoint: Checkpoint, chunk_nbytes: int) -> LoadPlan:
    """The load of a whole checkpoint to one device; there `device_offset` is the offset in the image."""
    return plan_load(checkpoint.index, lambda _: 0, devices=1, names=None, chunk_nbytes=chunk_nbytes, granule=ALIGNMENT)


class Dram:
    """Images in chunks of shared memory. A whole image's tail may be given back; what stays is a prefix of the model."""

    name = "dram"

    def __init__(self, pool: SharedPool) -> None:
        self.pool = pool
        self.budget_nbytes = pool.budget_nbytes
        self.granule_nbytes = pool.chunk_nbytes
        self._images: dict[str, Image] = {}

    @property
    def used_nbytes(self) -> int:
        return self.pool.used_nbytes

    @property
    def kernel_nbytes(self) -> int:
        return self.pool.kernel_nbytes()

    @property
    def ready_nbytes(self) -> int:
        return self.pool.ready_nbytes

    @property
    def trouble(self) -> str:
        return self.pool.trouble

    def names(self) -> list[str]:
        return list(self._images)

    def get(self, model: str) -> Image | None:
        return self._images.get(model)

    def lacking_nbytes(self, model: str, nbytes: int) -> int:
        held = self._images.get(model)
        wanted = align_up(nbytes, self.granule_nbytes) - (len(held.chunks) * self.granule_nbytes if held else 0)
        return max(0, wanted - self.pool.free_nbytes)

    def reserve(self, model: str, checkpoint: Checkpoint) -> Image:
        """Takes the chunks that are missing, which need no memory yet. Raises OutOfMemoryError, having taken none."""
        held = self._images.get(model)
        image = held or Image(checkpoint)
        taken: list[SharedChunk] = []
        try:
            for _ in range(-(-checkpoint.nbytes // self.granule_nbytes) - len(image.chunks)):
                taken.append(self.pool.take(back=False))
        except BaseException:
            for chunk in taken:
                self.pool.give(chunk)
            raise
        self._keep(image, (*image.chunks, *taken))
        self._images[model] = image
        return image

    def bring(self, image: Image, source: Checkpoint | Image) -> Arriving:
        """Starts reading what is missing of a reserved image from a checkpoint."""
        if isinstance(source, Image):
            raise StoreError("an image in DRAM is filled from a checkpoint, not from another")
        plan = image_plan(source, min(IN_PLACE.chunk_nbytes, self.granule_nbytes)).after(image.resident_nbytes)
        return start_transfer(
            source, plan, lambda flow, readers: [IntoChunks(flow, image.chunks, plan.chunks, readers)], options=IN_PLACE, verify=not isinstance(source, HasReaders)
        )

    def shrink(self, model: str, nbytes: int) -> int:
        """Gives back the last `nbytes` of what an image occupies, in whole chunks, and returns how many those are."""
        image = self._images[model]
        keep = max(0, len(image.chunks) - -(-nbytes // self.granule_nbytes))
        gone = image.chunks[keep:]
        self._keep(image, image.chunks[:keep])
        for chunk in gone:
            self.pool.give(chunk)
        image.resident_nbytes = min(image.resident_nbytes, keep * self.granule_nbytes)
        if not image.chunks:
            del self._images[model]
        return len(gone) * self.granule_nbytes

    def _keep(self, image: Image, chunks: tuple[SharedChunk, ...]) -> None:
        image.chunks = chunks
        image.occupied_nbytes = len(chunks) * self.granule_nbytes

    def close(self) -> None:
        for name, image in list(self._images.items()):
            self.shrink(name, image.occupied_nbytes)
        self.pool.close()


class DevicePlace:
    """Images in memory of one GPU, each one allocation, so that each can be opened by another process."""

    granule_nbytes = ALIGNMENT
    kernel_nbytes = None
    ready_nbytes = 0
    trouble = ""

    def __init__(self, device: Device, budget_nbytes: int) -> None:
        self.name = device.name
        self.device = device
        self.budget_nbytes = budget_nbytes
        self._images: dict[str, Image] = {}
        self._pool = ChunkPool(device, chunk_nbytes=LoadOptions().chunk_nbytes, chunks=LoadOptions().ring_chunks)
        self._copies = FromChunks(device)

    @property
    def used_nbytes(self) -> int:
        return sum(image.occupied_nbytes for image in self._images.values())

    def names(self) -> list[str]:
        return list(self._images)

    def get(self, model: str) -> Image | None:
        return self._images.get(model)

    def lacking_nbytes(self, model: str, nbytes: int) -> int:
        return max(0, self.used_nbytes + align_up(nbytes, ALIGNMENT) - self.budget_nbytes)

    def reserve(self, model: str, checkpoint: Checkpoint) -> Image:
        """Allocates. Raises OutOfMemoryError if the GPU has less than the budget says."""
        # Whole blocks: CUDA shows whoever opens an allocation all of its last 2 MiB, which must be nobody else's.
        nbytes = align_up(checkpoint.nbytes, ALIGNMENT)
        image = Image(checkpoint, occupied_nbytes=nbytes, buffer=self.device.allocate(nbytes))
        self._images[model] = image
        return image

    def bring(self, image: Image, source: Checkpoint | Image) -> Arriving:
        """Starts filling a reserved image: from a checkpoint through pinned memory, or from DRAM, where it is whole."""
        buffer = _open(image)
        if isinstance(source, Checkpoint):
            options = LoadOptions()
            plan = image_plan(source, options.chunk_nbytes)
            return start_transfer(source, plan, ring_into(self.device, buffer, self._pool), options=options, verify=not isinstance(source, HasReaders))
        arrivals, chunks = Arrivals(image.checkpoint), source.chunks

        def copy() -> None:
            try:
                self._copies.copy(chunks, image.checkpoint.nbytes, buffer, on_prefix=arrivals.advance)
                arrivals.end()
            except BaseException as error:  # noqa: BLE001 - it is the copy's result and raised by wait()
                arrivals.end(error)

        threading.Thread(target=copy, name=f"sllm-copy-{self.name}", daemon=True).start()
        return arrivals

    def shrink(self, model: str, nbytes: int) -> int:
        """Gives back all of an image, since an allocation has no tail, and returns the bytes."""
        image = self._images.pop(model)
        buffer, image.buffer = _open(image), None
        buffer.close()
        return image.occupied_nbytes

    def close(self) -> None:
        for name, image in list(self._images.items()):
            self.shrink(name, image.occupied_nbytes)
        self._copies.close()
        self._pool.close()


def _open(image: Image) -> Buffer:
    if image.buffer is None:
        raise StoreError(f"{image.checkpoint.path}: its memory was given back; ask for it again")
    return image.buffer
