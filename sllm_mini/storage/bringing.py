"""How a model's bytes are brought to a place: the nearest source opened, room made, a transfer started and watched.

One transfer per model and place, and one that reads a model's source, however many ask. Taught in chapter 03.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

from sllm_mini.checkpoint.directory import Checkpoint
from sllm_mini.errors import IntegrityError, LoadCancelled, StoreError
from sllm_mini.loading.flow import IN_PLACE
from sllm_mini.loading.load import start_transfer
from sllm_mini.storage.attach import Arriving
from sllm_mini.storage.discard import Discard
from sllm_mini.storage.failures import words
from sllm_mini.storage.holdings import DRAM, Entry, Holdings, Lease
from sllm_mini.storage.incoming import PEERS, Incoming
from sllm_mini.storage.places import DevicePlace, Dram, Image, image_plan
from sllm_mini.storage.remote import RemoteCheckpoint
from sllm_mini.storage.sources import DISK, REMOTE, Origin, Sources
from sllm_mini.types import Progress, ProgressCallback

_LOOK_SECONDS = 0.05


class Transfer:
    """A transfer to an image as those see it who share it: layers as they arrive, its end once the store has taken note of
    it. So whoever asks again after a failure begins anew, and whoever evicts after a success is not told that it loads."""

    def __init__(self, moving: Arriving) -> None:
        self.moving = moving
        self.noted = moving.noted if isinstance(moving, Incoming) else threading.Event()

    @property
    def layers(self) -> list[str]:
        return self.moving.layers

    @property
    def progress(self) -> Progress:
        return self.moving.progress

    @property
    def done(self) -> bool:
        return self.noted.is_set()

    def ready(self, name: str) -> bool:
        with self._end_is_noted():
            return self.moving.ready(name)

    def wait_for(self, name: str, timeout: float | None = None) -> bool:
        with self._end_is_noted():
            return self.moving.wait_for(name, timeout)

    def wait(self, timeout: float | None = None) -> None:
        with self._end_is_noted():
            self.moving.wait(timeout)
        self.noted.wait()

    def cancel(self) -> None:
        self.moving.cancel()

    @contextmanager
    def _end_is_noted(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            if self.moving.done:
                self.noted.wait()
            raise


class Bringer:
    """See the module. Safe from several threads."""

    def __init__(self, holdings: Holdings, sources: Sources) -> None:
        self._holdings, self._sources = holdings, sources
        self._changed = threading.Condition()
        self._jobs = 0
        self._moving: set[Arriving] = set()
        self._closed = False

    def busy(self) -> bool:
        """Whether anything is brought anywhere now."""
        return self._jobs > 0

    def bring(self, entry: Entry, place: str, *, use: bool) -> Lease:
        """A lease on an image that is whole or on its way; `use`: see `Holdings.lease`. Loads of one model begin one after
        another. Raises NoRoomError, StoreError, and what opening the source and starting the transfer raise."""
        while True:
            with entry.lock, ExitStack() as job, ExitStack() as reading:
                self._begin(job)
                with self._holdings.locked():
                    self._holdings.require(entry)
                    held = self._holdings.place(place)
                    image = held.get(entry.name)
                    if image is not None and (image.loading or image.whole):
                        return self._holdings.lease(entry, place, image, place, use=use)
                    self._holdings.victims(entry, place)  # no source is opened for what has no room
                    source = self._image_in_dram(entry, held, reading)
                    other = None if source is not None else self._claim(entry, reading)
                if other is None:
                    return self._start(entry, held, source, use, job, reading)
            other.wait()

    def receive(self, entry: Entry, block_nbytes: int) -> Incoming:
        """An image in DRAM that others fill. Raises StoreError where it is there or on its way, NoRoomError."""
        with entry.lock, ExitStack() as job:
            self._begin(job)
            with self._holdings.locked():
                self._holdings.require(entry)
                held = self._holdings.place(DRAM)
                image = held.get(entry.name)
                if image is not None and (image.loading or image.whole):
                    raise StoreError(f"{entry.name} is in {DRAM} or on its way there; attach it instead")
                self._holdings.make_room(entry, DRAM)
                image = held.reserve(entry.name, entry.version.checkpoint)
                image.loading = True
                lease = self._holdings.lease(entry, DRAM, image, PEERS, use=False)
            moving: Incoming | None = None
            try:
                moving = Incoming(lease, block_nbytes, partial(self._source, entry))
                self._follow(entry, held, image, moving, None, job, ExitStack())
            except BaseException as error:
                self._give_up(entry, held, image, moving, error)
                lease.close()
                raise
            return moving

    @contextmanager
    def _source(self, entry: Entry) -> Iterator[Origin]:
        """A model's source, opened for what of its image did not come otherwise."""
        with ExitStack() as reading:
            while (other := self._claim(entry, reading)) is not None:
                other.wait()
            yield self._open(entry, reading)

    def to_disk(self, entry: Entry, on_progress: ProgressCallback | None) -> None:
        """Reads a remote model into the disk cache and nowhere else; does nothing where it is on the disk. Raises
        StoreError if the cache cannot take it, and what reading it raises."""
        with ExitStack() as job:
            self._begin(job)
            with ExitStack() as reading:
                while (other := self._claim(entry, reading)) is not None:
                    other.wait()
                origin = self._open(entry, reading)
                if origin.place == DISK:
                    return
                if origin.uncached is not None:
                    raise StoreError(f"{entry.name} was not brought to the disk: {origin.uncached}")
                plan = image_plan(origin.checkpoint, IN_PLACE.chunk_nbytes)
                started = time.monotonic()
                with start_transfer(origin.checkpoint, plan, lambda flow, readers: [Discard(flow, readers)], options=IN_PLACE, verify=False) as handle:
                    self._cancel_when_closed(handle, job)
                    follow(handle, on_progress)
            if not self._sources.is_cached(entry.version):  # a full disk, above all: then a load goes on without the cache
                raise StoreError(f"{entry.name} was not brought to the disk: {handle.report.fallback or 'another process removed it'}")
            with self._holdings.locked():
                entry.seconds[DISK] = time.monotonic() - started
                self._count(origin.checkpoint, origin.place, DISK, entry.version.checkpoint.nbytes)
                self._holdings.note("loaded", entry.name, DISK, entry.version.checkpoint.nbytes)

    def close(self) -> None:
        """Ends what is under way and waits for it; nothing is brought any more."""
        with self._changed:
            self._closed = True
            moving = list(self._moving)
        for arriving in moving:
            arriving.cancel()
        with self._changed:
            self._changed.wait_for(lambda: self._jobs == 0)

    def _start(self, entry: Entry, held: Dram | DevicePlace, image_in_dram: Image | None, use: bool, job: ExitStack, reading: ExitStack) -> Lease:
        origin: Origin | None = None
        source: Checkpoint | Image
        if image_in_dram is None:
            origin = self._open(entry, reading)
            source, found_in = origin.checkpoint, origin.place
        else:
            source, found_in = image_in_dram, DRAM
        with self._holdings.locked():  # what is claimed or leased above keeps the model from being forgotten
            self._holdings.make_room(entry, held.name)
            image = held.reserve(entry.name, entry.version.checkpoint)
            image.loading = True
            lease = self._holdings.lease(entry, held.name, image, found_in, use=use)
        moving: Arriving | None = None
        try:
            moving = held.bring(image, source)
            self._follow(entry, held, image, moving, origin, job, reading)
        except BaseException as error:
            self._give_up(entry, held, image, moving, error)
            lease.close()
            raise
        return lease

    def _follow(
        self, entry: Entry, held: Dram | DevicePlace, image: Image, moving: Arriving, origin: Origin | None, job: ExitStack, reading: ExitStack
    ) -> None:
        """Has a transfer watched to its end on a thread of its own, which closes `job` and `reading` then."""
        transfer = image.arriving = Transfer(moving)
        self._cancel_when_closed(moving, job)
        kept_job, kept_reading = job.pop_all(), reading.pop_all()
        followed = (entry, held, image, transfer, origin, kept_job, kept_reading)
        watcher = threading.Thread(target=self._watch, args=followed, name="sllm-store-load", daemon=True)
        try:
            watcher.start()
        except RuntimeError as error:
            job.push(kept_job)
            reading.push(kept_reading)
            raise StoreError(f"no thread can be started to watch the load of {entry.name} ({error}); end some threads and ask again") from error

    def _give_up(self, entry: Entry, held: Dram | DevicePlace, image: Image, moving: Arriving | None, error: BaseException) -> None:
        """Ends a transfer that nobody watches, and gives its memory back."""
        if moving is not None:
            moving.cancel()
            while not moving.done:  # nothing may move into memory that is given back
                time.sleep(_LOOK_SECONDS)
        self._settle(entry, held, image, error)

    def _watch(
        self, entry: Entry, held: Dram | DevicePlace, image: Image, transfer: Transfer, origin: Origin | None, job: ExitStack, reading: ExitStack
    ) -> None:
        """Waits for a transfer, closes what it was read from, and takes note of its end."""
        started = time.monotonic()
        moved_nbytes = image.checkpoint.nbytes - image.resident_nbytes
        error: BaseException | None = None
        with job:
            try:
                with reading:
                    try:
                        transfer.moving.wait()
                    except BaseException as failure:  # noqa: BLE001 - it is the transfer's result, and whoever waits for the image gets it
                        error = failure
                if isinstance(error, IntegrityError) and origin is not None and origin.place == DISK:
                    self._sources.forget(entry.version)  # the copy in the cache is damaged: the next load reads the remote
                cached = error is None and origin is not None and origin.place == REMOTE and self._sources.is_cached(entry.version)
                with self._holdings.locked():
                    if cached:
                        self._holdings.note("loaded", entry.name, DISK, entry.version.checkpoint.nbytes)
                    if error is None:
                        if moved_nbytes:  # the rest was there: all of it would have taken so much longer
                            entry.seconds[held.name] = (time.monotonic() - started) * image.checkpoint.nbytes / moved_nbytes
                        if isinstance(transfer.moving, Incoming):
                            self._holdings.moved.update({f"{place}->{held.name}": nbytes for place, nbytes in transfer.moving.moved.items()})
                        else:
                            self._count(None if origin is None else origin.checkpoint, DRAM if origin is None else origin.place, held.name, moved_nbytes)
            finally:
                try:
                    self._settle(entry, held, image, error)
                finally:
                    transfer.noted.set()

    def _settle(self, entry: Entry, held: Dram | DevicePlace, image: Image, error: BaseException | None) -> None:
        with self._holdings.locked():
            image.loading = False
            if error is None:
                image.resident_nbytes = image.checkpoint.nbytes
                self._holdings.note("loaded", entry.name, held.name, image.checkpoint.nbytes)
            else:
                what, reason = ("cancelled", "") if isinstance(error, LoadCancelled) else ("failed", words(error) or type(error).__name__)
                self._holdings.note(what, entry.name, held.name, held.shrink(entry.name, image.occupied_nbytes), reason)

    def _count(self, source: Checkpoint | None, found_in: str, place: str, nbytes: int) -> None:
        """Counts what was moved: of a remote model, what an interrupted download left on the disk was not read again."""
        if isinstance(source, RemoteCheckpoint):
            read_nbytes = min(source.traffic.remote_nbytes, nbytes)
            if place != DISK and read_nbytes < nbytes:
                self._holdings.moved[f"{DISK}->{place}"] += nbytes - read_nbytes
            nbytes = read_nbytes
        self._holdings.moved[f"{found_in}->{place}"] += nbytes

    def _image_in_dram(self, entry: Entry, held: Dram | DevicePlace, until: ExitStack) -> Image | None:
        """The whole image in DRAM that a GPU's is copied from, leased."""
        dram = self._holdings.places.get(DRAM)
        image = dram.get(entry.name) if isinstance(held, DevicePlace) and dram is not None else None
        if image is None or not image.whole or image.loading:
            return None
        until.callback(self._holdings.lease(entry, DRAM, image, DRAM, use=False).close)
        return image

    def _claim(self, entry: Entry, until: ExitStack) -> threading.Event | None:
        """Takes the reading of a model's source; if another transfer has it, returns the event of its end instead."""
        with self._holdings.locked():
            self._holdings.require(entry)
            if entry.reading is not None:
                return entry.reading
            entry.reading = threading.Event()
        until.callback(self._release, entry, entry.reading)
        return None

    def _release(self, entry: Entry, reading: threading.Event) -> None:
        with self._holdings.locked():
            entry.reading = None
        reading.set()

    def _open(self, entry: Entry, until: ExitStack) -> Origin:
        """The nearest source that is no memory, closed with `until`."""
        with self._changed:
            if self._closed:
                raise StoreError("the store is closed; open it again")
        origin = self._sources.open(entry.name, entry.version, self._make_room_on_disk)
        until.callback(origin.close)
        return origin

    def _make_room_on_disk(self, lacking_nbytes: int) -> None:
        cache = self._sources.cache
        if cache is None:
            return
        with self._holdings.locked():  # also over the removal: nobody begins to read what goes
            cached = {found.name: (found.nbytes, found.last_used) for found in cache.entries() if not found.busy}
            for name in self._holdings.disk_victims(lacking_nbytes, cached):
                owners = [entry.name for entry in self._holdings.entries.values() if entry.version.cache_name == name]
                self._holdings.note("evicted", owners[0] if owners else name, DISK, cache.remove(name))

    def _begin(self, job: ExitStack) -> None:
        """Counts what is under way, until `job` is closed. Raises StoreError once the store is closed."""
        with self._changed:
            if self._closed:
                raise StoreError("the store is closed; open it again")
            self._jobs += 1
        job.callback(self._end)

    def _end(self) -> None:
        with self._changed:
            self._jobs -= 1
            self._changed.notify_all()

    def _cancel_when_closed(self, moving: Arriving, job: ExitStack) -> None:
        with self._changed:
            self._moving.add(moving)
            closed = self._closed
        job.callback(self._moving.discard, moving)
        if closed:
            moving.cancel()


def follow(arriving: Arriving, on_progress: ProgressCallback | None) -> None:
    """Waits for a transfer and reports its progress, at its end in any case. Raises its error."""
    if on_progress is not None:
        while not arriving.done:
            on_progress(arriving.progress)
            with suppress(TimeoutError):
                arriving.wait(_LOOK_SECONDS)
    arriving.wait()
    if on_progress is not None:
        on_progress(arriving.progress)
