"""What a store's places hold, who uses it, and what goes when memory is short. No I/O: everything here ends at once.

Leases come from two ends of the machine, from tensors that a garbage collector drops and from sockets that the kernel
closes, so a lease is ended by putting it into a queue, which any thread may do at any moment; it is taken note of before
the next decision. Taught in chapter 03.
"""

from __future__ import annotations

import queue
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from sllm_mini.errors import NoRoomError, StoreError
from sllm_mini.eviction import Policy, Resident, Victim, choose_victims, next_clock
from sllm_mini.storage import messages
from sllm_mini.storage.attach import Arriving
from sllm_mini.storage.places import DevicePlace, Dram, Image, Leases
from sllm_mini.storage.source import redacted
from sllm_mini.storage.sources import DISK, Version

DRAM = "dram"
_GPU = re.compile(r"cuda:\d+")
Listener = Callable[[messages.Happened], None]


@dataclass(eq=False, slots=True)
class Entry:
    """A registered model and how it was used. `lock` orders the loads of it."""

    name: str
    version: Version
    lock: threading.Lock = field(default_factory=threading.Lock)
    reading: threading.Event | None = None
    """Set once the transfer that reads its source now has closed that; None if none does."""
    pinned: set[str] = field(default_factory=set)
    last_used: float = 0.0
    uses: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    """What bringing all of it to a place took the last time."""
    clock: dict[str, float] = field(default_factory=dict)


class Ending:
    """Ends a lease when it is called, the first time; any thread may do so at any moment. Who waits for the last use of an
    image's memory keeps this, so nothing that reaches that memory can be reached from here: not the image, whose transfer
    may have failed with an error whose traceback holds the tensors."""

    def __init__(self, leases: Leases, ended: queue.SimpleQueue[Leases]) -> None:
        self._leases, self._ended = leases, ended
        self._once = threading.Lock()

    def __call__(self) -> None:
        if self._once.acquire(blocking=False):
            self._ended.put(self._leases)


class Lease:
    """The right to an image's memory until `close`, or `ending`, is called."""

    def __init__(self, holdings: Holdings, entry: Entry, place: str, image: Image, found_in: str) -> None:
        self.entry, self.place, self.image, self.found_in = entry, place, image, found_in
        self._holdings = holdings
        self.ending = Ending(image.leases, holdings.ended)

    @property
    def arriving(self) -> Arriving:
        """Who knows how much of it is in place. Raises StoreError if its load never began."""
        if self.image.arriving is None:
            raise StoreError(f"{self.entry.name} is not on its way to {self.place}; ask for it again")
        return self.image.arriving

    @contextmanager
    def memory(self) -> Iterator[Image]:
        """The image, with the store's lock held: if its load fails now, its memory is not given to another model before
        the block has ended. Raises the load's error if it has failed already."""
        with self._holdings.locked():
            held = self._holdings.places.get(self.place)
            if held is not None and held.get(self.entry.name) is self.image:
                yield self.image
                return
        self.arriving.wait()
        raise StoreError(f"{self.entry.name} is in {self.place} no more: the store was closed; open it again")

    def close(self) -> None:
        self.ending()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Holdings:
    """See the module. Safe from several threads: every method takes the lock, and `locked` holds it over several."""

    def __init__(self, policy: Policy, *, has_disk: bool = False) -> None:
        self._has_disk = has_disk
        self.places: dict[str, Dram | DevicePlace] = {}
        self.entries: dict[str, Entry] = {}
        self.attached: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()
        self.evicted: Counter[str] = Counter()
        self.listeners: list[Listener] = []
        self._policy = policy
        self._clock: dict[str, float] = {}
        self._lock = threading.RLock()
        self.ended: queue.SimpleQueue[Leases] = queue.SimpleQueue()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the lock, with all leases that have ended taken back."""
        with self._lock:
            while not self.ended.empty():
                self.ended.get().count -= 1
            yield

    def entry(self, name: str) -> Entry:
        """Raises StoreError for a name that is not registered."""
        with self.locked():
            found = self.entries.get(name)
            if found is None:
                known = ", ".join(sorted(self.entries)) or "nothing yet"
                raise StoreError(f"no model is registered as {name[:200]!r}; register it first (known: {known[:500]})")
            return found

    def require(self, entry: Entry) -> None:
        """Raises StoreError if a model was forgotten, or replaced, since its entry was found."""
        with self.locked():
            if self.entries.get(entry.name) is not entry:
                raise StoreError(f"{entry.name} was forgotten or registered anew in this moment; ask for it again")

    def sharing(self, entry: Entry) -> list[Entry]:
        """Who uses the same copy in the disk cache as this model, itself included: one source may have several names."""
        name = entry.version.cache_name
        with self.locked():
            return [other for other in self.entries.values() if other is entry or (name and other.version.cache_name == name)]

    def place(self, name: str) -> Dram | DevicePlace:
        """Raises StoreError for a memory that the store has no budget for."""
        found = self.places.get(name)
        if found is None:
            known = ", ".join([*self.places, *[DISK] * self._has_disk]) or "none, give it a budget"
            option = "--dram SIZE" if name == DRAM else f"--device {name}=SIZE" if _GPU.fullmatch(name) else ""
            raise StoreError(f"the store has no place {name[:200]!r}; it has {known}{option and f'; start it with {option}'}")
        return found

    def lease(self, entry: Entry, place: str, image: Image, found_in: str, *, use: bool = True) -> Lease:
        """A lease on an image that is whole or on its way; with `use` it counts as a use of the model."""
        with self.locked():
            image.leases.count += 1
            if use:
                entry.uses += 1
                entry.last_used = time.monotonic()
                entry.clock[place] = self._clock.get(place, 0.0)
            return Lease(self, entry, place, image, found_in)

    def make_room(self, entry: Entry, place: str) -> None:
        """Evicts until a place has room for a model. Raises NoRoomError, having evicted nothing, if that cannot be."""
        with self.locked():
            held, victims = self.place(place), self.victims(entry, place)
            self._clock[place] = next_clock(self._clock.get(place, 0.0), victims)
            for victim in victims:
                self.note("evicted", victim.name, place, held.shrink(victim.name, victim.nbytes))

    def victims(self, entry: Entry, place: str) -> list[Victim]:
        """What would have to go for a model to have room. Raises NoRoomError if that cannot be."""
        with self.locked():
            held = self.place(place)
            lacking = held.lacking_nbytes(entry.name, entry.version.checkpoint.nbytes)
            if lacking <= 0:
                return []
            residents = [found for name in held.names() if name != entry.name and (found := self._resident(name, held)) is not None]
            victims = choose_victims(residents, lacking, self._policy, held.granule_nbytes)
            if not victims:
                used = sum(found.nbytes - found.evictable_nbytes for found in residents)
                raise NoRoomError(
                    f"{place} has no room for {entry.name}: {lacking:,} bytes are lacking of its budget of {held.budget_nbytes:,}, and {used:,} are leased, pinned or loading"
                )
            return victims

    def _resident(self, name: str, held: Dram | DevicePlace) -> Resident | None:
        image, entry = held.get(name), self.entries[name]
        if image is None:
            return None
        nbytes = image.occupied_nbytes
        fixed = bool(image.loading or image.leases.count or held.name in entry.pinned)
        seconds = entry.seconds.get(held.name, 0.0) * nbytes / max(image.checkpoint.nbytes, 1)
        return Resident(name, nbytes, 0 if fixed else nbytes, entry.last_used, entry.uses, seconds, entry.clock.get(held.name, 0.0))

    def disk_victims(self, lacking_nbytes: int, cached: dict[str, tuple[int, float]]) -> list[str]:
        """Which entries of the disk cache (name → bytes, last use) to remove; none if that would not be enough."""
        with self.locked():
            residents = []
            for name, (nbytes, last_used) in cached.items():
                owners = [entry for entry in self.entries.values() if entry.version.cache_name == name]
                fixed = any(owner.reading is not None or DISK in owner.pinned for owner in owners)
                seconds = max((owner.seconds.get(DISK, 0.0) for owner in owners), default=0.0)
                residents.append(Resident(name, nbytes, 0 if fixed else nbytes, last_used, sum(owner.uses for owner in owners), seconds))
            whole = Policy(self._policy.name, self._policy.priority)  # of a file only all can go
            return [victim.name for victim in choose_victims(residents, lacking_nbytes, whole)]

    def refuse_if_used(self, entry: Entry, place: str) -> None:
        """Raises StoreError if something of a model in a place is leased, pinned or loading."""
        with self.locked():
            image = self.places[place].get(entry.name) if place in self.places else None
            users = self.sharing(entry) if place == DISK else [entry]
            why = ""
            if any(place in user.pinned for user in users):
                why = "it is pinned"
            elif (image is not None and image.loading) or (place == DISK and any(user.reading is not None for user in users)):
                why = "it is loading"
            elif image is not None and image.leases.count:
                uses = image.leases.count
                why = "1 attachment or copy uses it" if uses == 1 else f"{uses} attachments or copies use it"
            if why:
                raise StoreError(f"{entry.name} stays in {place}: {why}")

    def drop(self, entry: Entry) -> None:
        """Gives back all of a model's memory and its name. Raises StoreError if any of it is in use."""
        with self.locked():
            for place in (DISK, *self.places):
                self.refuse_if_used(entry, place)
            for held in self.places.values():
                image = held.get(entry.name)
                if image is not None:
                    self.note("evicted", entry.name, held.name, held.shrink(entry.name, image.occupied_nbytes))
            del self.entries[entry.name]

    def note(self, what: str, name: str, place: str, nbytes: int, reason: str = "") -> None:
        """Counts what happened and tells those who listen."""
        with self.locked():
            if what == "evicted":
                self.evicted[place] += nbytes
            for listener in tuple(self.listeners):  # one may end itself
                listener(messages.Happened(what, name, place, nbytes, reason))

    def describe(self, entry: Entry, *more: messages.Residence) -> messages.Model:
        """What is known of a model; `more`: where it is that is no memory."""
        with self.locked():
            found = []
            for held in self.places.values():
                image = held.get(entry.name)
                if image is not None:
                    arrived = image.arriving.progress.done_nbytes if image.loading and image.arriving is not None else image.resident_nbytes
                    found.append(messages.Residence(held.name, arrived, image.leases.count, held.name in entry.pinned, image.loading))
            index = entry.version.checkpoint.index
            return messages.Model(entry.name, redacted(entry.version.source), index.total_nbytes, len(index.layers), entry.uses, [*found, *more])
