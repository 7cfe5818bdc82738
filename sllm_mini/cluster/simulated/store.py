"""A node's store: which models lie in its memory and on its disk, and which go when there is no room.

Taught in chapters 03 and 08. Whole models; what is being read is leased and stays. The order of eviction is a policy of
`sllm_mini.eviction`; least recently used costs O(1) by the order of a dict, any other O(n log n) for n models in the tier.
"""

from __future__ import annotations

from collections.abc import Iterator

from sllm_mini.eviction import LRU, Policy, Resident, choose_victims, next_clock
from sllm_mini.types import Tier


class _Shelf:
    """One tier: models in order of their last use."""

    __slots__ = ("_clock", "_held", "_leases", "_policy", "_room", "_uses", "models", "reserved")

    def __init__(self, room_nbytes: int | None, policy: Policy) -> None:
        self.models: dict[str, Resident] = {}
        self._room = room_nbytes
        self._held = 0
        self._policy = policy
        self._leases: dict[str, int] = {}
        self.reserved: set[str] = set()
        self._uses: dict[str, int] = {}
        self._clock = 0.0

    def use(self, name: str, nbytes: int, seconds: float, now: float) -> None:
        """Counts a use of a model, there or not; what is there becomes the one used last."""
        uses = self._uses[name] = self._uses.get(name, 0) + 1
        if self.models.pop(name, None) is not None:
            self.models[name] = Resident(name, nbytes, nbytes, now, uses, seconds, self._clock)

    def add(self, name: str, nbytes: int, seconds: float, now: float) -> tuple[bool, list[str]]:
        """Takes a model in if there is room or can be; whether it is new here, and who went for it."""
        if name in self.models or not nbytes:
            return False, []
        gone = [] if name in self.reserved else self.reserve(name, nbytes)
        if gone is None:
            return False, []
        self.reserved.discard(name)
        self.models[name] = Resident(name, nbytes, nbytes, now, max(self._uses.get(name, 0), 1), seconds, self._clock)
        return True, gone

    def reserve(self, name: str, nbytes: int) -> list[str] | None:
        """Room for a model that comes, until it is added: who went for it, None where nobody can."""
        gone: list[str] = []
        if self._room is not None:
            missing = self._held + nbytes - self._room
            if missing > 0:
                gone = self._victims(missing)
                if not gone:
                    return None
                for victim in gone:
                    self._held -= self.models.pop(victim).nbytes
        self._held += nbytes
        self.reserved.add(name)
        return gone

    def _victims(self, missing: int) -> list[str]:
        if self._policy is LRU:
            found, freed = [], 0
            for resident in self.models.values():
                if freed >= missing:
                    break
                if resident.name not in self._leases:
                    found.append(resident.name)
                    freed += resident.nbytes
            return found if freed >= missing else []
        residents = [resident for name, resident in self.models.items() if name not in self._leases]
        victims = choose_victims(residents, missing, self._policy)
        self._clock = next_clock(self._clock, victims)
        return [victim.name for victim in victims]

    def lease(self, name: str) -> None:
        self._leases[name] = self._leases.get(name, 0) + 1

    def release(self, name: str) -> None:
        left = self._leases.get(name, 0) - 1
        if left > 0:
            self._leases[name] = left
        else:
            self._leases.pop(name, None)


Change = tuple[str, Tier, bool]
"""A model, a tier, and whether it is there now (True) or gone."""


class SimulatedStore:
    """Memory above disk above the remote store. What is read from far is kept on both; what memory loses, disk may have."""

    __slots__ = ("_shelves",)

    def __init__(self, dram_nbytes: int | None, disk_nbytes: int | None, policy: Policy) -> None:
        self._shelves = {Tier.DRAM: _Shelf(dram_nbytes, policy), Tier.DISK: _Shelf(disk_nbytes, policy)}

    def put_on_disk(self, name: str, nbytes: int, now: float) -> Iterator[Change]:
        """A checkpoint that lies there from the beginning."""
        yield from self._add(Tier.DISK, name, nbytes, 0.0, now)

    def tier(self, name: str) -> Tier:
        """The fastest tier that has it."""
        return next((tier for tier, shelf in self._shelves.items() if name in shelf.models), Tier.REMOTE)

    def lease(self, name: str) -> Tier:
        """The tier that a load is to read from; it keeps the model until `release`."""
        tier = self.tier(name)
        if tier is not Tier.REMOTE:
            self._shelves[tier].lease(name)
        return tier

    def release(self, name: str, tier: Tier) -> None:
        """A load that did not come to reading."""
        if tier is not Tier.REMOTE:
            self._shelves[tier].release(name)

    def reserve(self, name: str, nbytes: int) -> list[Change] | None:
        """Room in memory for what is about to be read, as a store has it that reads into place: what went for it, None where there is
        no room. Nothing for what is there, or on its way."""
        shelf = self._shelves[Tier.DRAM]
        if name in shelf.models or name in shelf.reserved:
            return []
        gone = shelf.reserve(name, nbytes)
        return None if gone is None else list(self._gone(Tier.DRAM, gone))

    def loaded(self, name: str, nbytes: int, tier: Tier, seconds: float, now: float) -> Iterator[Change]:
        """A load of it from `tier`, which took `seconds`, is over: ends its lease, and keeps what came from further away."""
        self.release(name, tier)
        for shelf in self._shelves.values():
            shelf.use(name, nbytes, seconds, now)
        for kept in (Tier.DISK, Tier.DRAM):
            if kept > tier:
                yield from self._add(kept, name, nbytes, seconds, now)

    def _add(self, tier: Tier, name: str, nbytes: int, seconds: float, now: float) -> Iterator[Change]:
        new, gone = self._shelves[tier].add(name, nbytes, seconds, now)
        yield from self._gone(tier, gone)
        if new:
            yield name, tier, True

    def _gone(self, tier: Tier, victims: list[str]) -> Iterator[Change]:
        for victim in victims:
            yield victim, tier, False
            if tier is Tier.DRAM and victim not in self._shelves[Tier.DISK].models:
                yield victim, Tier.DISK, False  # who hears that memory lost it takes it to be on the disk
