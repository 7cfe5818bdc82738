"""What a probe hands back, and the two tools every probe shares: a deadline, and threads that stop when told.

A `Measurement` keeps every sample, so that a reader can see the spread and not only a median. Samples of settings
that are compared are taken in rounds (one of each, then again), so that a noisy minute on a shared machine hurts
all of them alike. Taught in chapters 00 and 02.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sllm_mini.errors import SllmError

_WAKE_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Measurement:
    """One thing moved `nbytes` in each of `samples_seconds`; `name` is a key, `setting` says how, in words."""

    name: str
    setting: str
    nbytes: int
    samples_seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.samples_seconds or min(self.samples_seconds) <= 0:
            raise ValueError(f"{self.name} ({self.setting}) needs at least one sample, each longer than 0 seconds")

    @property
    def seconds_median(self) -> float:
        return statistics.median(self.samples_seconds)

    @property
    def seconds_min(self) -> float:
        return min(self.samples_seconds)

    @property
    def seconds_max(self) -> float:
        return max(self.samples_seconds)

    @property
    def bytes_per_second(self) -> float:
        """Of the median sample."""
        return self.nbytes / self.seconds_median


def measurement_row(m: Measurement) -> dict[str, object]:
    """One probe's measurement in the keys that `doctor` and `bench` share."""
    return {
        "name": m.name,
        "setting": m.setting,
        "nbytes": m.nbytes,
        "samples": list(m.samples_seconds),
        "seconds_median": m.seconds_median,
        "seconds_min": m.seconds_min,
        "seconds_max": m.seconds_max,
        "bytes_per_second_median": m.bytes_per_second,
    }


@dataclass(frozen=True, slots=True)
class Skipped:
    """What could not be measured here, and why, in one sentence."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Samples:
    """The outcome of one probe: what it measured and what it had to leave out."""

    measurements: tuple[Measurement, ...] = ()
    skipped: tuple[Skipped, ...] = ()

    def __add__(self, other: Samples) -> Samples:
        return Samples(self.measurements + other.measurements, self.skipped + other.skipped)


class Deadline:
    """A budget of seconds that starts to run when it is made. The clock can be injected."""

    def __init__(self, budget_seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        if not budget_seconds > 0:
            raise ValueError(f"a budget of {budget_seconds} seconds measures nothing; give it more than 0")
        self._clock = clock
        self._end = clock() + budget_seconds

    @property
    def remaining_seconds(self) -> float:
        return max(0.0, self._end - self._clock())

    @property
    def passed(self) -> bool:
        return self._clock() >= self._end


def sample_in_rounds(
    name: str,
    nbytes: int,
    settings: Mapping[str, Callable[[], float]],
    *,
    rounds: int,
    deadline: Deadline,
) -> Samples:
    """Takes up to `rounds` samples of each setting, interleaved; each callable returns the seconds it measured.

    The first setting always gets one sample. A setting whose first turn comes after the deadline is skipped with
    that reason, one that raises OSError, MemoryError or SllmError with the error's own words; the others go on.
    """
    seconds: dict[str, list[float]] = {setting: [] for setting in settings}
    refused: dict[str, str] = {}
    taken = 0
    for _ in range(rounds):
        for setting, sample in settings.items():
            if setting in refused or (taken and deadline.passed):
                continue
            try:
                seconds[setting].append(max(sample(), 1e-9))
            except (OSError, MemoryError, SllmError) as error:
                refused[setting] = reason_of(error)
            taken += 1
    measured = tuple(
        Measurement(name, setting, nbytes, tuple(s)) for setting, s in seconds.items() if s and setting not in refused
    )
    skipped = tuple(
        Skipped(
            f"{name}, {setting}",
            refused.get(setting, "the time allowed for this probe was over; allow more or measure less"),
        )
        for setting, s in seconds.items()
        if setting in refused or not s
    )
    return Samples(measured, skipped)


def reason_of(error: BaseException) -> str:
    """An error as one clause for a `Skipped`: the kernel's own words, without a number or a temporary file's name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def run_threads(count: int, work: Callable[[int, threading.Event], None]) -> float:
    """Runs `work(worker, stop)` on `count` threads (on this one if 1) and returns the seconds until all were done.

    The first error of a worker is raised here once all have ended; it, and a Ctrl-C, set `stop`, which a worker
    must look at between pieces of its work. No work goes on after the call.
    """
    stop = threading.Event()
    if count == 1:
        start = time.perf_counter()
        work(0, stop)
        return time.perf_counter() - start
    errors: list[BaseException] = []
    # Work begins only when every thread runs: then each can be joined, however a Ctrl-C falls, and starting them
    # is not part of what is measured.
    begin = threading.Event()
    # Not `Thread.join`: in Python 3.11 a join that a Ctrl-C interrupts takes a running thread for a finished one.
    ended = [threading.Event() for _ in range(count)]

    def guarded(worker: int) -> None:
        try:
            begin.wait()
            if not stop.is_set():
                work(worker, stop)
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread, which raises it
            errors.append(error)
            stop.set()
        finally:
            ended[worker].set()

    threads = [threading.Thread(target=guarded, args=(worker,), name=f"probe-{worker}") for worker in range(count)]
    started = 0
    try:
        for thread in threads:
            thread.start()
            started += 1
        start = time.perf_counter()
        begin.set()
        for event in ended:
            # A signal that falls just before an endless wait would be noticed only after it.
            while not event.wait(_WAKE_SECONDS):
                pass
        seconds = time.perf_counter() - start
    finally:
        stop.set()
        begin.set()
        for event in ended[:started]:
            event.wait()
    if errors:
        raise errors[0]
    return seconds
