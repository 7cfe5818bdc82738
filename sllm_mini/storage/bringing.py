"""How a model's bytes are brought to a place: the nearest source opened, room made, a transfer started and watched.

One transfer per model and place, however many ask for it. Taught in chapter 03.
"""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack, suppress

from sllm_mini.checkpoint.directory import Checkpoint
from sllm_mini.errors import StoreError
from sllm_mini.loading.flow import IN_PLACE
from sllm_mini.loading.load import start_transfer
from sllm_mini.storage.attach import Arriving
from sllm_mini.storage.discard import Discard
from sllm_mini.storage.holdings import DRAM, Entry, Holdings, Lease
from sllm_mini.storage.places import DevicePlace, Dram, Image, image_plan
from sllm_mini.storage.sources import DISK, Origin, Sources
from sllm_mini.types import ProgressCallback

_LOOK_SECONDS = 0.05


class Bringer:
    """See the module. Safe from several threads."""

    def __init__(self, holdings: Holdings, sources: Sources) -> None:
        self._holdings, self._sources = holdings, sources
        self._under_way: dict[threading.Thread, Arriving] = {}
        self._closed = False

    def bring(self, entry: Entry, place: str, *, use: bool) -> Lease:
        """A lease on an image that is whole or on its way; `use`: see `Holdings.lease`. Loads of one model begin one after
        another. Raises NoRoomError, StoreError, and what opening the source and starting the transfer raise."""
        with entry.lock, ExitStack() as held_open:
            with self._holdings.locked():
                self._require_open()
                held = self._holdings.place(place)
                image = held.get(entry.name)
                if image is not None and (image.loading or image.whole):
                    return self._holdings.lease(entry, place, image, place, use=use)
            source, found_in = self._nearest(entry, held, held_open)
            with self._holdings.locked():
                self._require_open()
                self._holdings.make_room(entry, place)
                image = held.reserve(entry.name, entry.version.checkpoint)
                image.loading = True
                lease = self._holdings.lease(entry, place, image, found_in, use=use)
            try:
                arriving = image.arriving = held.bring(image, source)
            except BaseException as error:
                self._settle(entry, held, image, error)
                lease.close()
                raise
            watcher = threading.Thread(target=self._watch, args=(entry, held, image, found_in, arriving, held_open.pop_all()), name="sllm-store-load", daemon=True)
            with self._holdings.locked():
                self._under_way[watcher] = arriving
            watcher.start()
            return lease

    def to_disk(self, entry: Entry, on_progress: ProgressCallback | None) -> None:
        """Reads a remote model into the disk cache and nowhere else; does nothing where it is on the disk. Raises
        StoreError if the cache cannot take it, and what reading it raises."""
        with entry.lock, ExitStack() as held_open:
            origin = self._open(entry, held_open)
            if origin.place == DISK:
                return
            if origin.uncached is not None:
                raise StoreError(f"{entry.name} was not brought to the disk: {origin.uncached}")
            plan = image_plan(origin.checkpoint, IN_PLACE.chunk_nbytes)
            started = time.monotonic()
            with start_transfer(origin.checkpoint, plan, lambda flow, readers: [Discard(flow, readers)], options=IN_PLACE, verify=False) as handle:
                follow(handle, on_progress)
        with self._holdings.locked():
            entry.seconds[DISK] = time.monotonic() - started
            self._holdings.moved[f"{origin.place}->{DISK}"] += entry.version.checkpoint.nbytes
            self._holdings.note("loaded", entry.name, DISK, entry.version.checkpoint.nbytes)

    def close(self) -> None:
        """Ends what is under way and waits for it; nothing is brought any more."""
        with self._holdings.locked():
            self._closed = True
            under_way = dict(self._under_way)
        for arriving in under_way.values():
            arriving.cancel()
        for watcher in under_way:
            watcher.join()

    def _nearest(self, entry: Entry, held: Dram | DevicePlace, held_open: ExitStack) -> tuple[Checkpoint | Image, str]:
        """What to bring it from, kept until `held_open` is closed, and the name of that place."""
        with self._holdings.locked():
            dram = self._holdings.places.get(DRAM)
            image = dram.get(entry.name) if isinstance(held, DevicePlace) and dram is not None else None
            if image is not None and image.whole and not image.loading:
                held_open.callback(self._holdings.lease(entry, DRAM, image, DRAM, use=False).close)
                return image, DRAM
        origin = self._open(entry, held_open)
        return origin.checkpoint, origin.place

    def _open(self, entry: Entry, held_open: ExitStack) -> Origin:
        with self._holdings.locked():
            entry.leases[DISK] += 1  # while a load reads the disk cache's copy, it stays
        held_open.callback(self._release_disk, entry)
        origin = self._sources.open(entry.name, entry.version, self._make_room_on_disk)
        held_open.callback(origin.close)
        return origin

    def _release_disk(self, entry: Entry) -> None:
        with self._holdings.locked():
            entry.leases[DISK] -= 1

    def _make_room_on_disk(self, lacking_nbytes: int) -> None:
        cache = self._sources.cache
        if cache is None:
            return
        cached = {found.name: (found.nbytes, found.last_used) for found in cache.entries() if not found.busy}
        for name in self._holdings.disk_victims(lacking_nbytes, cached):
            nbytes = cache.remove(name)
            with self._holdings.locked():
                owner = next((entry.name for entry in self._holdings.entries.values() if entry.version.cache_name == name), name)
                self._holdings.note("evicted", owner, DISK, nbytes)

    def _watch(self, entry: Entry, held: Dram | DevicePlace, image: Image, found_in: str, arriving: Arriving, held_open: ExitStack) -> None:
        """Waits for a transfer, takes note of its end and closes what it was read from."""
        started = time.monotonic()
        moved_nbytes = image.checkpoint.nbytes - image.resident_nbytes
        error: BaseException | None = None
        try:
            arriving.wait()
        except BaseException as failure:  # noqa: BLE001 - it is the transfer's result, and whoever waits for the image gets it
            error = failure
        with held_open, self._holdings.locked():
            if error is None:
                entry.seconds[held.name] = time.monotonic() - started
                self._holdings.moved[f"{found_in}->{held.name}"] += moved_nbytes
            self._settle(entry, held, image, error)
            self._under_way.pop(threading.current_thread())

    def _settle(self, entry: Entry, held: Dram | DevicePlace, image: Image, error: BaseException | None) -> None:
        with self._holdings.locked():
            image.loading = False
            if error is None:
                image.resident_nbytes = image.checkpoint.nbytes
                self._holdings.note("loaded", entry.name, held.name, image.checkpoint.nbytes)
            else:
                self._holdings.note("failed", entry.name, held.name, held.shrink(entry.name, image.occupied_nbytes))

    def _require_open(self) -> None:
        if self._closed:
            raise StoreError("the store is closed; open it again")


def follow(arriving: Arriving, on_progress: ProgressCallback | None) -> None:
    """Waits for a transfer and reports its progress. Raises its error."""
    while not arriving.done:
        with suppress(TimeoutError):
            arriving.wait(_LOOK_SECONDS if on_progress is not None else None)
        if on_progress is not None:
            on_progress(arriving.progress)
    arriving.wait()
