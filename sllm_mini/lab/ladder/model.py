"""The pipeline predicted: chunks on their way through their stages, from five rates and a handful of settings. Pure.

A fluid model. The disk serves reads in the order in which they were asked for: one gets at most `one_read` bytes per
second, all together `disk`. Making pages and hashing share the cores. A reader takes the chunk that `next_chunk`, the
loader's own function, names; it waits for the chunk's pages, reads, hashes, takes the next. On the way to a GPU there is
a ring of slots instead of pages, copies run one after another on the link, hashing is the GPU's. What it leaves out:
starting threads, Python, and that no disk is as steady as a number. Shown in chapter 02 as a widget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from sllm_mini.lab.figure import Described, describe
from sllm_mini.lab.ladder.chart import pipeline_alt_text, plot_pipeline
from sllm_mini.lab.ladder.runs import LoadRun, median_load
from sllm_mini.lab.table import Table
from sllm_mini.lab.units import seconds_text
from sllm_mini.lab.widgets import Choice, Control, Slider, Toggle
from sllm_mini.loading import LoadOptions
from sllm_mini.loading.pipeline import next_chunk
from sllm_mini.loading.plan import Chunk
from sllm_mini.types import Span

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Rates:
    """What a machine does alone, in bytes per second; `link` is the way to a GPU. Raises ValueError for one not above 0."""

    disk: float
    one_read: float
    pages: float
    hashing: float
    cores: int = 2
    link: float = 25e9

    def __post_init__(self) -> None:
        for name in ("disk", "one_read", "pages", "hashing", "link", "cores"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; give a number above zero")


@dataclass(frozen=True, slots=True)
class Settings:
    """How a load is done. `slots`: chunks of the ring to a GPU, None for a load into this machine's own memory. Without
    `overlap` each stage begins when the one before has ended for the whole model."""

    threads: int = LoadOptions().threads
    chunk_nbytes: int = LoadOptions().chunk_nbytes
    verify: bool = True
    overlap: bool = True
    slots: int | None = None

    def __post_init__(self) -> None:
        if self.threads < 1 or self.chunk_nbytes < 1 or (self.slots is not None and self.slots < 1):
            raise ValueError("threads, chunk_nbytes and slots must be at least 1")


@dataclass(slots=True, eq=False)
class _Task:
    name: str
    chunk: Chunk
    lane: str
    start: float
    left: float
    then: Callable[[], None]


class _Clock:
    """Work under way at rates that depend on what else is under way."""

    def __init__(self, rates: Rates) -> None:
        self.now = 0.0
        self.running: list[_Task] = []
        self.spans: list[Span] = []
        self._rates = rates

    def begin(self, name: str, chunk: Chunk, lane: str, then: Callable[[], None]) -> None:
        self.running.append(_Task(name, chunk, lane, self.now, float(chunk.nbytes), then))

    def step(self) -> None:
        """Goes on to the next moment at which something ends."""
        speeds = self._speeds()
        seconds = min(task.left / speed for task, speed in zip(self.running, speeds, strict=True) if speed > 0)
        for task, speed in zip(self.running, speeds, strict=True):
            task.left -= speed * seconds
        self.now += seconds
        ended = [task for task in self.running if task.left <= 1e-6 * task.chunk.nbytes]
        self.running = [task for task in self.running if task not in ended]
        for task in ended:
            self.spans.append(Span(task.name, task.start, self.now, task.lane, task.chunk.nbytes))
            task.then()

    def _speeds(self) -> list[float]:
        """Bytes per second of each task under way, in their order, which is that of their beginnings."""
        rates = self._rates
        busy = sum(task.name in ("pages", "hash") for task in self.running)
        share = min(1.0, rates.cores / max(busy, 1))
        alone = {"pages": rates.pages * share, "hash": rates.hashing * share, "copy": rates.link}
        spare = rates.disk
        speeds = []
        for task in self.running:
            speed = min(rates.one_read, spare) if task.name == "read" else alone[task.name]
            spare -= speed if task.name == "read" else 0.0
            speeds.append(speed)
        return speeds


def predict_load(nbytes: int, rates: Rates, settings: Settings | None = None) -> list[Span]:
    """The spans of a load of `nbytes` from second 0: "pages", "read", "hash", "copy", a lane for each thread.

    Raises ValueError where there is nothing to load.
    """
    if nbytes < 1:
        raise ValueError(f"a load of {nbytes} bytes takes no time; give at least 1")
    settings = settings or Settings()
    starts = range(0, nbytes, settings.chunk_nbytes)
    chunks = [Chunk(number, 0, at, min(settings.chunk_nbytes, nbytes - at), 0, at, 0) for number, at in enumerate(starts)]
    clock = _Clock(rates)
    if settings.overlap:
        _Overlapped(clock, chunks, settings).run()
    else:
        _one_by_one(clock, chunks, settings)
    return sorted(clock.spans, key=lambda span: (span.start, span.lane))


def _one_by_one(clock: _Clock, chunks: Sequence[Chunk], settings: Settings) -> None:
    readers = [f"read-{number}" for number in range(settings.threads)]
    stages = [("read", readers)] if settings.slots else [("pages", ["pages-0"]), ("read", readers)]
    if settings.slots:
        stages.append(("copy", ["copy-0"]))
    elif settings.verify:
        stages.append(("hash", readers))
    for name, lanes in stages:
        pending = list(chunks)

        def take(lane: str, name: str = name, pending: list[Chunk] = pending) -> None:
            if pending:
                clock.begin(name, pending.pop(0), lane, lambda: take(lane, name, pending))

        for lane in lanes:
            take(lane)
        while clock.running:
            clock.step()


class _Overlapped:
    """The loader's own rules: see `loading.in_place` and `loading.ring`."""

    def __init__(self, clock: _Clock, chunks: Sequence[Chunk], settings: Settings) -> None:
        self._clock, self._settings = clock, settings
        self._pending, self._unmade = list(chunks), [] if settings.slots else list(chunks)
        self._made: set[int] = {chunk.number for chunk in chunks} if settings.slots else set()
        self._waiting: dict[str, Chunk] = {}
        self._free_slots = settings.slots or len(chunks)
        self._copies: list[Chunk] = []
        self._idle = [f"read-{number}" for number in range(settings.threads)]

    def run(self) -> None:
        self._make_pages()
        self._wake()
        while self._clock.running:
            self._clock.step()
            self._wake()

    def _make_pages(self) -> None:
        if self._unmade:
            chunk = self._unmade.pop(0)
            self._clock.begin("pages", chunk, "pages-0", lambda: self._pages_made(chunk))

    def _pages_made(self, chunk: Chunk) -> None:
        self._made.add(chunk.number)
        self._make_pages()

    def _wake(self) -> None:
        for lane, chunk in list(self._waiting.items()):
            if chunk.number in self._made:
                del self._waiting[lane]
                self._read(lane, chunk)
        while self._idle and (position := next_chunk(self._pending, [self._free_slots])) is not None:
            lane, chunk = self._idle.pop(0), self._pending.pop(position)
            self._free_slots -= 1
            if chunk.number in self._made:
                self._read(lane, chunk)
            elif chunk in self._unmade:  # the reader is ahead of the thread that makes pages
                self._unmade.remove(chunk)
                self._clock.begin("pages", chunk, lane, partial(self._own_pages, lane, chunk))
            else:
                self._waiting[lane] = chunk

    def _own_pages(self, lane: str, chunk: Chunk) -> None:
        self._made.add(chunk.number)
        self._read(lane, chunk)

    def _read(self, lane: str, chunk: Chunk) -> None:
        self._clock.begin("read", chunk, lane, lambda: self._arrived(lane, chunk))

    def _arrived(self, lane: str, chunk: Chunk) -> None:
        if self._settings.slots:
            self._copies.append(chunk)
            if len(self._copies) == 1:
                self._copy()
            self._idle.append(lane)
        elif self._settings.verify:
            self._clock.begin("hash", chunk, lane, lambda: self._idle.append(lane))
        else:
            self._idle.append(lane)

    def _copy(self) -> None:
        self._clock.begin("copy", self._copies[0], "copy-0", self._copied)

    def _copied(self) -> None:
        self._copies.pop(0)
        self._free_slots += 1
        if self._copies:
            self._copy()


def prediction_table(runs: Sequence[LoadRun], options: Mapping[str, LoadOptions], rates: Rates, *, verify: bool = True, slots: int | None = None) -> Table:
    """Measured loads beside predicted ones, one row per setting; `slots` as in `Settings`."""
    rows = []
    for name, option in options.items():
        measured = median_load(runs, name)
        settings = Settings(option.threads, option.chunk_nbytes, verify, slots=slots)
        predicted = max(span.end for span in predict_load(measured.nbytes, rates, settings))
        own = sorted(run.load_seconds for run in runs if run.setting == name)
        spread = f"{seconds_text(own[0])} to {seconds_text(own[-1])}"
        rows.append((name, seconds_text(measured.load_seconds), spread, seconds_text(predicted), f"{predicted / measured.load_seconds:.2f}"))
    return Table(
        headers=("setting", "measured", "fastest to slowest", "predicted", "predicted / measured"),
        rows=tuple(rows),
        caption="The model beside the machine",
        numeric=frozenset({1, 2, 3, 4}),
    )


def load_controls(rates: Rates, settings: Settings) -> dict[str, Control]:
    """The widget's controls, at this machine's rates."""

    def slider(words: str, rate: float) -> Slider:
        return Slider(words, round(min(max(rate / 1e9, 0.05), 200.0), 2), 0.05, 200.0, unit="GB/s", log=True)

    return {
        "threads": Slider("threads that read", settings.threads, 1, 32, step=1),
        "chunk_mib": Choice("chunk", settings.chunk_nbytes // _MIB, {f"{size} MiB": size for size in (2, 4, 8, 16, 32, 64)}),
        "disk_gb_per_second": slider("the disk", rates.disk),
        "one_read_gb_per_second": slider("one read alone", rates.one_read),
        "pages_gb_per_second": slider("making pages", rates.pages),
        "hashing_gb_per_second": slider("hashing, one core", rates.hashing),
        "overlap": Toggle("stages overlap", settings.overlap),
        "verify": Toggle("hashes checked", settings.verify),
        "slots": Choice("target", settings.slots, {"this memory": None} | {f"a GPU, ring of {slots}": slots for slots in sorted({2, 8, settings.slots or 8})}),
        "link_gb_per_second": slider("link to the GPU", rates.link),
    }


def draw_load(
    nbytes: int,
    measured_seconds: float,
    *,
    threads: float,
    chunk_mib: int,
    disk_gb_per_second: float,
    one_read_gb_per_second: float,
    pages_gb_per_second: float,
    hashing_gb_per_second: float,
    overlap: bool,
    verify: bool,
    slots: int | None,
    link_gb_per_second: float = 25.0,
    cores: int = 2,
) -> Described:
    """The prediction as a picture, in the units of the sliders; `measured_seconds` is drawn as a line. The widget's function."""
    disk, one_read, pages, hashing, link = (
        rate * 1e9 for rate in (disk_gb_per_second, one_read_gb_per_second, pages_gb_per_second, hashing_gb_per_second, link_gb_per_second)
    )
    rates = Rates(disk, one_read, pages, hashing, cores, link)
    settings = Settings(round(threads), chunk_mib * _MIB, verify, overlap, slots)
    spans = predict_load(nbytes, rates, settings)
    seconds = max(span.end for span in spans)
    host = "no memory beside the model"
    if slots:
        host = f"a ring of {slots} slots, {slots * chunk_mib} MiB" if overlap else "a ring as large as the model"
    title = f"Predicted {seconds_text(seconds)}, measured at the notebook's settings {seconds_text(measured_seconds)}"
    figure = plot_pipeline(spans, title=title, mark_seconds=measured_seconds, mark="measured")
    return describe(figure, f"{pipeline_alt_text(spans, what='Predicted load')} Measured: {seconds_text(measured_seconds)}.", caption=f"On the way: {host}.")
