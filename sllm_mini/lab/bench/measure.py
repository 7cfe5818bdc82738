"""`measure_load`: every loader, cold and warm, in one interleaved run, beside the limits of the machine.

One worker process per loader lives through all rounds. In each round every loader is measured once per state, in a
shuffled order that a seed fixes; the limits are measured in the same round. A sample is the load and a 64-bit sum over
every byte, timed together; the sum must be that of the safetensors file. A loader that crashes, hangs or is wrong goes
to `skipped` with its reason and the others go on. Costs the formats' disk space and, per round, loader and state, a
load. Nothing is left behind. Call from one thread. Shown in chapter 02.
"""

from __future__ import annotations

import importlib.metadata
import random
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sllm_mini.errors import SllmError, UnsupportedError
from sllm_mini.lab.bench import limits
from sllm_mini.lab.bench.checksum import sum_files
from sllm_mini.lab.bench.conditions import back_memory, make_cold, make_warm
from sllm_mini.lab.bench.entry import SOURCE, STATES, Entry, Memory, State
from sllm_mini.lab.bench.prepare import Files, flush
from sllm_mini.lab.bench.process import Worker, WorkerError
from sllm_mini.lab.bench.workload import Model
from sllm_mini.loading.probe import IN_MEMORY_FILE_SYSTEMS
from sllm_mini.loading.probe_kernel import file_system_of
from sllm_mini.loading.probe_samples import Measurement, Skipped, reason_of

_RESERVE_NBYTES = 2 << 30
_FORMAT_SHARE = 1.05
_BACKED_SHARE = 1.1
_LIMIT_SECONDS, _SLOWEST_BYTES_PER_SECOND = 120.0, 20e6


@dataclass(frozen=True, slots=True)
class Options:
    """How to measure. `seed` fixes the order; `limit_seconds` ends a worker that gives no answer (None: by the model's
    size)."""

    rounds: int = 5
    states: tuple[State, ...] = STATES
    memory: Memory = "backed"
    device: str = "cpu"
    seed: int = 0
    limit_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"{self.rounds} rounds measure nothing; ask for at least 1")
        if not self.states or not set(self.states) <= set(STATES):
            raise ValueError(f"states are {' and '.join(STATES)}, not {', '.join(self.states) or 'none'}")
        if self.memory not in ("backed", "fresh"):
            raise ValueError(f"memory is backed or fresh, not {self.memory!r}")


@dataclass(slots=True)
class Series:
    """The samples of one loader in one state, one dictionary per round (see the worker), by the number of the round; a round
    whose sample was refused is missing."""

    entry: Entry
    state: State
    group: int
    samples: dict[int, dict[str, Any]] = field(default_factory=dict)


@dataclass(slots=True)
class Run:
    """What was measured, before anybody decides what it means. `use_seconds` holds the sum alone, once per round;
    `references` the reference's samples by group."""

    series: list[Series] = field(default_factory=list)
    limits: list[Measurement] = field(default_factory=list)
    use_seconds: list[float] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    groups: list[list[str]] = field(default_factory=list)


def plan_rounds(names: Sequence[str], states: Sequence[State], rounds: int, seed: int) -> list[list[tuple[str, State]]]:
    """The order of each round: every (name, state) once, shuffled. Pure."""
    generator = random.Random(seed)
    pairs = [(name, state) for name in names for state in states]
    return [generator.sample(pairs, len(pairs)) for _ in range(rounds)]


def plan_groups(formats: Collection[str], nbytes: int, free_nbytes: int) -> list[list[str]]:
    """The formats that lie on the disk together: all at once where there is room, else the source and the first with
    it, then each other alone (the reference's format stays throughout). Pure."""
    extra = [format for format in formats if format != SOURCE]
    if not extra or len(extra) * nbytes * _FORMAT_SHARE + _RESERVE_NBYTES <= free_nbytes:
        return [[SOURCE, *extra]]
    return [[SOURCE, extra[0]], *([format] for format in extra[1:])]


def measure_rounds(
    model: Model,
    entries: Sequence[Entry],
    reference: str,
    folder: Path,
    options: Options | None = None,
    *,
    keep: bool = False,
    on_stage: Callable[[str], None] | None = None,
) -> Run:
    """Prepares the formats below `folder`, measures, and gives back the samples.

    `reference` names the entry that is measured in every group. Unless `keep`, the formats are deleted at the end.
    Raises OSError where `folder` cannot be written; what a single loader cannot do is in `skipped`.
    """
    return _Bench(model, list(entries), reference, folder, options or Options(), on_stage or (lambda _: None)).run(keep)


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


class _Bench:
    def __init__(self, model: Model, entries: list[Entry], reference: str, folder: Path, options: Options, stage: Callable[[str], None]) -> None:
        self.model, self.options, self.stage, self.reference = model, options, stage, reference
        self.result = Run()
        self.limit_seconds = options.limit_seconds or _LIMIT_SECONDS + model.nbytes / _SLOWEST_BYTES_PER_SECOND
        self.files = Files(model.folder, model.files, folder / f"{model.name}-formats", self._write)
        self.folder = folder
        self.states = self._possible_states(folder)
        self.entries = [entry for entry in entries if self._possible(entry)]
        self.samples: list[limits.Sample] = []
        self.step, self.steps = 0, 0

    def run(self, keep: bool) -> Run:
        self.stage("summing the bytes of the file")
        self.expected = sum_files(self.model.files)
        first = [entry.format for entry in self.entries if entry.name == self.reference]
        formats = list(dict.fromkeys([*first, *(entry.format for entry in self.entries)]))
        self.result.groups = plan_groups(formats, self.model.nbytes, shutil.disk_usage(self.folder).free)
        try:
            for number, group in enumerate(self.result.groups):
                self._measure_group(number, group)
                if not keep:
                    for format in group:
                        if not first or format != first[0]:
                            self.files.remove(format)
        finally:
            if not keep:
                self.files.close()
        self.result.limits = limits.collect(self.samples)
        self.result.skipped = list(dict.fromkeys(self.result.skipped))
        return self.result

    def _possible_states(self, folder: Path) -> tuple[State, ...]:
        places = {str(place): file_system_of(place) for place in (self.model.folder, folder)}
        memory = [place for place, system in places.items() if system in IN_MEMORY_FILE_SYSTEMS]
        if memory and "cold" in self.options.states:
            self._skip("cold", f"{memory[0]} lives in memory, so nothing there can be cold; use --dir with a folder on a disk")
            return tuple(state for state in self.options.states if state != "cold")
        return self.options.states

    def _possible(self, entry: Entry) -> bool:
        if entry.whole_model and not self.model.is_whole:
            reason = f"it builds a model, and {self.model.name} has no config.json"
        elif entry.cuda_only and self.options.device == "cpu":
            reason = entry.cuda_only
        elif entry.package != "sllm_mini" and not _is_installed(entry.package):
            reason = f"{entry.package} is not installed"
        else:
            return True
        self._skip(entry.name, reason)
        return False

    def _skip(self, name: str, reason: str) -> None:
        self.result.skipped.append(Skipped(name, reason))

    def _measure_group(self, number: int, group: list[str]) -> None:
        entries = [entry for entry in self.entries if entry.format in group or entry.name == self.reference]
        for format in dict.fromkeys(entry.format for entry in entries):
            self.stage(f"writing the files of {format}")
            try:
                self.files.make(format)
                flush(self.files.read_by(format))
            except (OSError, SllmError) as error:
                for entry in entries:
                    if entry.format == format:
                        self._skip(entry.name, f"its files could not be written: {reason_of(error)}")
                entries = [entry for entry in entries if entry.format != format]
        with ExitStack() as stack:
            workers: dict[str, Worker] = {}
            for entry in entries:
                self.stage(f"starting {entry.name}")
                worker = stack.enter_context(Worker(entry.environment, limit_seconds=self.limit_seconds))
                try:
                    self._start(worker, entry)
                    workers[entry.name] = worker
                except (SllmError, OSError) as error:
                    worker.close()
                    self._skip(entry.name, reason_of(error))
            if workers:
                with ExitStack() as helpers:
                    self._rounds(number, {entry.name: entry for entry in entries}, workers, helpers)

    def _start(self, worker: Worker, entry: Entry) -> None:
        """Opens a loader and lets it load once untimed: its threads and caches exist then, and it is known to be right."""
        worker.ask(at_least_seconds=_LIMIT_SECONDS, do="open", opener=entry.opener, **self._job(entry.format), arguments=dict(entry.arguments))
        self._check(worker.ask(do="load"))

    def _rounds(self, number: int, entries: dict[str, Entry], workers: dict[str, Worker], helpers: ExitStack) -> None:
        names = list(workers)
        found = {(name, state): Series(entries[name], state, number) for name in names for state in self.states if state in entries[name].states}
        rounds = plan_rounds(names, self.states, self.options.rounds, self.options.seed + number)
        self.step, self.steps = 0, sum(len(one) for one in rounds)
        helper = helpers.enter_context(Worker(limit_seconds=self.limit_seconds))
        for round_number, order in enumerate(rounds):
            try:
                self._limits(helper)
            except (SllmError, OSError) as error:  # of this round only; the loaders are still worth measuring
                self._skip(f"limits, round {round_number + 1}", reason_of(error))
                helper.close()
                helper = helpers.enter_context(Worker(limit_seconds=self.limit_seconds))
            for name, state in order:
                self.step += 1
                series, worker = found.get((name, state)), workers.get(name)
                if series is None or worker is None:
                    continue
                self.stage(f"round {round_number + 1} of {self.options.rounds}: {name}, {state} ({self.step} of {self.steps})")
                try:
                    series.samples[round_number] = self._sample(worker, entries[name], state)
                except UnsupportedError as error:  # of this sample only: the next may find the machine in order
                    self._skip(f"{name}, {state}, round {round_number + 1}", str(error))
                except (SllmError, OSError) as error:
                    self._skip(name, reason_of(error))
                    workers.pop(name).close()
                    for other in self.states:
                        found.pop((name, other), None)
        self.result.series += [series for series in found.values() if series.samples]

    def _sample(self, worker: Worker, entry: Entry, state: State) -> dict[str, Any]:
        files = self.files.read_by(entry.format)
        if state == "cold":
            make_cold(files)
        else:
            make_warm(files)
        if self.options.memory == "backed":
            back_memory(int(self.model.nbytes * _BACKED_SHARE))
        return self._check(worker.ask(do="load"))

    def _check(self, sample: dict[str, Any]) -> dict[str, Any]:
        total, nbytes = self.expected
        if sample["nbytes"] != nbytes:
            raise WorkerError(f"it gave {sample['nbytes']:,} bytes of tensors and the file holds {nbytes:,}")
        if sample["sum"] != total:
            raise WorkerError("the sum over its bytes is not that of the file: some of them are wrong")
        return sample

    def _limits(self, helper: Worker) -> None:
        self.stage("measuring the limits")
        self._take(limits.memory_samples())
        if "cold" in self.states:
            self._take(limits.disk_samples(self._largest()))
        if self.options.device != "cpu":
            function = "sllm_mini.lab.bench.limits:device_samples"
            self._take(limits.from_lists(helper.ask(at_least_seconds=_LIMIT_SECONDS, do="call", function=function, arguments=[self.options.device])["value"]))
        if self.options.memory == "backed":
            back_memory(int(self.model.nbytes * _BACKED_SHARE))
        used = helper.ask(at_least_seconds=_LIMIT_SECONDS, do="use", **self._job(SOURCE))
        self._check(used)
        self.result.use_seconds.append(used["seconds"])

    def _take(self, found: Iterator[limits.Sample | Skipped]) -> None:
        try:
            for sample in found:
                if isinstance(sample, Skipped):
                    self.result.skipped.append(sample)
                else:
                    self.samples.append(sample)
        except UnsupportedError as error:
            self._skip("limits", str(error))

    def _largest(self) -> Path:
        """The file that direct reads are measured on: of our own checkpoint where it is there, else of the source."""
        format = next((entry.format for entry in self.entries if entry.name == self.reference), SOURCE)
        return max(self.files.read_by(format), key=lambda path: path.stat().st_size)

    def _job(self, format: str) -> dict[str, Any]:
        files = [str(path.resolve()) for path in self.model.files]
        return {"path": str(self.files.path(format).resolve()), "files": files, "device": self.options.device}

    def _write(self, format: str, source: Path, files: Sequence[Path], target: Path) -> None:
        with Worker(limit_seconds=self.limit_seconds) as worker:
            arguments = [format, str(source.resolve()), [str(path.resolve()) for path in files], str(target.resolve())]
            worker.ask(at_least_seconds=_LIMIT_SECONDS, do="call", function="sllm_mini.lab.bench.prepare:write_from_text", arguments=arguments)
