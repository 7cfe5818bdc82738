"""The store: the one owner of DRAM and of resident device weights on a machine.

Models are registered under a name with a source, a folder or an address. `attach` finds a model's bytes in the nearest
place (device, DRAM, disk, remote), brings them nearer where they must be, and lends them without a copy; whoever asks for
a model that is on its way shares that load. What is lent or pinned is never evicted; what else goes when memory is short
is a policy of `sllm_mini.eviction`. Embedded in a process this class is all there is; `server` puts it on a socket.
Taught in chapters 03 and 05. Rebuilt from ServerlessLLM's store (OSDI'24) and DeepServe's DRAM preload (ATC'25).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from sllm_mini.checkpoint.index import Index
from sllm_mini.device import get_device
from sllm_mini.device.base import Device
from sllm_mini.errors import NoRoomError, StoreError
from sllm_mini.eviction import POLICIES, Policy
from sllm_mini.storage import messages
from sllm_mini.storage.attach import Attachment, load_elsewhere
from sllm_mini.storage.bringing import Bringer, follow
from sllm_mini.storage.disk import DiskCache
from sllm_mini.storage.holdings import DRAM, Entry, Holdings, Lease, Listener
from sllm_mini.storage.incoming import Incoming, cut_blocks
from sllm_mini.storage.layer_blocks import blocks_of_layers
from sllm_mini.storage.lending import attach_lease
from sllm_mini.storage.memory import SharedPool
from sllm_mini.storage.places import DevicePlace, Dram
from sllm_mini.storage.shared_chunk import HugePages
from sllm_mini.storage.source import RemoteOptions
from sllm_mini.storage.sources import DISK, Sources
from sllm_mini.types import ProgressCallback

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}")


class Store:
    """See the module. `folder` is the store's own until it is closed; budgets are bytes, and a place without one is not used.

    `backed_nbytes`: of DRAM that is free, so much is backed (and pinned, where there is a GPU) while nothing is loaded, so
    that the next load does not stop for page faults; it is held though nobody uses it. `device_nbytes` maps a GPU
    ("cuda:0", or the device itself) to its budget. `policy`: a name of `eviction.POLICIES` or a policy. `chunk_nbytes`,
    `huge_pages`: see `SharedPool`. Raises ValueError for a budget smaller than one chunk or an unknown policy, WriteError for
    a folder that cannot be used, StoreError for one in which another store works. Safe from several threads. As a context manager it closes itself.

        with Store("/var/cache/sllm", dram_nbytes=8 << 30) as store:
            store.register("llama", "llama.sllm")
            with store.attach("llama") as model:
                tensors = model.wait()
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        dram_nbytes: int = 0,
        backed_nbytes: int = 0,
        disk_nbytes: int = 0,
        device_nbytes: Mapping[str | Device, int] | None = None,
        policy: str | Policy = "gdsf",
        chunk_nbytes: int | None = None,
        huge_pages: HugePages = "auto",
        remote: RemoteOptions | None = None,
    ) -> None:
        if isinstance(policy, str) and policy not in POLICIES:
            raise ValueError(f"there is no policy {policy!r}; choose one of {', '.join(POLICIES)}")
        devices = [(get_device(device), nbytes) for device, nbytes in (device_nbytes or {}).items()]
        if any(device.is_host for device, _ in devices):
            raise ValueError("the CPU's memory is the place 'dram'; give its budget as dram_nbytes")
        self.folder = Path(os.path.abspath(folder))
        self._holdings = Holdings(POLICIES[policy] if isinstance(policy, str) else policy, has_disk=disk_nbytes > 0)
        self._remote = remote or RemoteOptions()
        self._sources = Sources(self.folder, DiskCache(self.folder / "models", disk_nbytes) if disk_nbytes else None, self._remote)
        self._bringer = Bringer(self._holdings, self._sources)
        places = self._holdings.places
        try:
            if dram_nbytes:
                # Whichever GPU pins it, it is pinned for all GPUs of the process.
                gpu = next((device for device, _ in devices), None)
                places[DRAM] = Dram(SharedPool(dram_nbytes, chunk_nbytes, gpu, huge_pages, backed_nbytes=backed_nbytes, busy=self._bringer.busy))
            elif backed_nbytes:
                raise ValueError("backed_nbytes is a part of dram_nbytes, which is 0; give both")
            for device, nbytes in devices:
                places[device.name] = DevicePlace(device, nbytes)
        except BaseException:
            self.close()
            raise

    # Names

    def register(self, name: str, source: str | os.PathLike[str]) -> messages.Model:
        """Makes the checkpoint at a folder or an address known under a name. The same name again replaces it, unless
        something of the old version is in use. Raises StoreError, and what opening the source raises."""
        if not _NAME.fullmatch(name):
            raise StoreError(f"{name[:200]!r} is not a name for a model; use letters, digits, '.', '_' and '-'")
        place = os.fspath(source)
        version = self._sources.look(name, place if "://" in place else os.path.abspath(place))
        with self._holdings.locked():
            old = self._holdings.entries.get(name)
            if old is not None and old.version.checkpoint.index != version.checkpoint.index:
                self._drop(old)
            entry = self._holdings.entries.setdefault(name, Entry(name, version))
            entry.version = version
            return self._describe(entry)

    def forget(self, name: str) -> None:
        """Evicts a model everywhere, the disk cache included, and drops its name. Raises StoreError while it is in use."""
        with self._holdings.locked():
            self._drop(self._holdings.entry(name))

    def _drop(self, entry: Entry) -> None:
        alone = self._holdings.sharing(entry) == [entry]
        self._holdings.drop(entry)
        if alone:
            self._sources.forget(entry.version, companions=True)

    def models(self) -> list[messages.Model]:
        """What is registered, and what each place holds of it."""
        with self._holdings.locked():
            return [self._describe(entry) for entry in self._holdings.entries.values()]

    def digest(self, name: str) -> str:
        """What names a model's weights in every session of it: the digest of its index. Raises StoreError."""
        return self._holdings.entry(name).version.checkpoint.digest

    def index(self, name: str) -> Index:
        """Of the model's checkpoint. Raises StoreError."""
        return self._holdings.entry(name).version.checkpoint.index

    def _describe(self, entry: Entry) -> messages.Model:
        found = self._sources.on_disk(entry.version)
        if found is None:
            return self._holdings.describe(entry)
        return self._holdings.describe(entry, messages.Residence(DISK, found[0], 0, DISK in entry.pinned, found[1]))

    def stats(self) -> messages.Figures:
        """Budgets, use and counters; see `messages.Figures`."""
        with self._holdings.locked():
            known = self._holdings
            found = [
                messages.Place(place.name, place.budget_nbytes, place.used_nbytes, place.kernel_nbytes, place.ready_nbytes, place.trouble)
                for place in known.places.values()
            ]
            counters = dict(known.attached), dict(known.moved), dict(known.evicted)
        cache = self._sources.cache
        if cache is not None:
            used = cache.used_nbytes  # asked of the file system, so both figures are one
            found.append(messages.Place(DISK, cache.budget_nbytes, used, used))
        return messages.Figures(found, *counters)

    # Bytes

    def prefetch(self, name: str, place: str = DRAM, *, on_progress: ProgressCallback | None = None) -> None:
        """Brings a model to a place ("disk", "dram", "cuda:0") and returns when it is there.

        Raises StoreError if the place has no room or the store has no such place, and what the load raises.
        """
        entry = self._holdings.entry(name)
        if place == DISK:
            self._bringer.to_disk(entry, on_progress)
            return
        with self._bringer.bring(entry, place, use=False) as lease:
            follow(lease.arriving, on_progress)

    def attach(self, name: str, device: str | Device = "cpu") -> Attachment:
        """A model's tensors, at once; their bytes arrive layer by layer (see `Attachment`).

        On a CPU they are the store's DRAM, on a GPU the store's memory there. Where the store has no room, the model is
        loaded into memory of this process's own. Raises StoreError, and what opening the source raises.
        """
        target = get_device(device)
        found = self.lend(name, DRAM if target.is_host else target.name)
        if isinstance(found, messages.Elsewhere):
            return load_elsewhere(found.source, target, found.reason, self._remote)
        return attach_lease(found)

    def lend(self, name: str, place: str) -> Lease | messages.Elsewhere:
        """A lease on a model's image in a place, its load started; `Elsewhere` if there is no room for it."""
        entry = self._holdings.entry(name)
        try:
            found: Lease | messages.Elsewhere = self._bringer.bring(entry, place, use=True)
        except NoRoomError as error:
            found = messages.Elsewhere(self._sources.nearest_source(entry.version), str(error))
        with self._holdings.locked():
            self._holdings.attached[found.found_in if isinstance(found, Lease) else "elsewhere"] += 1
        return found

    def receive(self, name: str, block_nbytes: int) -> Incoming:
        """An image in DRAM that others fill block by block; it can be attached meanwhile, and is in use until it is closed.

        Raises StoreError where the model is in DRAM or on its way there, NoRoomError, ValueError for blocks of less than 2 MiB."""
        return self._bringer.receive(self._holdings.entry(name), block_nbytes)

    def blocks(self, name: str, block_nbytes: int) -> int:
        """How many of such blocks `receive` takes a model in. Raises StoreError, ValueError for blocks of less than 2 MiB."""
        return len(cut_blocks(self.index(name), block_nbytes))

    def layer_blocks(self, name: str, block_nbytes: int) -> list[frozenset[int]]:
        """Which of those blocks each layer needs (see `blocks_of_layers`). Raises as `blocks` does."""
        return blocks_of_layers(self.index(name), block_nbytes)

    def pin(self, name: str, place: str, pinned: bool = True) -> None:
        """Keeps a model from being evicted from a place, or no longer; brings nothing there. Raises StoreError."""
        with self._holdings.locked():
            entry = self._holdings.entry(name)
            if place != DISK:
                self._holdings.place(place)
            (entry.pinned.add if pinned else entry.pinned.discard)(place)

    def evict(self, name: str, place: str) -> int:
        """Gives back what a place holds of a model, and returns the bytes. Raises StoreError while it is leased, pinned or
        loading there."""
        with self._holdings.locked():
            entry = self._holdings.entry(name)
            self._holdings.refuse_if_used(entry, place)
            if place == DISK:
                if self._sources.cache is None or not entry.version.cache_name:
                    raise StoreError(f"{name} is not in a disk cache of the store's; nothing was removed")
                nbytes = self._sources.forget(entry.version)
            else:
                held = self._holdings.place(place)
                image = held.get(name)
                nbytes = 0 if image is None else held.shrink(name, image.occupied_nbytes)
            if nbytes:
                self._holdings.note("evicted", name, place, nbytes)
            return nbytes

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Calls `listener` with whatever changes what the places hold, on the thread where it happens and with the store's
        lock held, so it must return at once. Returns what ends it."""
        with self._holdings.locked():
            self._holdings.listeners.append(listener)

        def end() -> None:
            with self._holdings.locked(), suppress(ValueError):
                self._holdings.listeners.remove(listener)

        return end

    def close(self) -> None:
        """Ends loads and gives all memory back; what is attached stays readable until its holders drop it."""
        self._bringer.close()
        with self._holdings.locked():
            while self._holdings.places:
                self._holdings.places.popitem()[1].close()
            self._sources.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
