"""`bench tiers` as one call: a model from every tier to memory, and from memory to another process, in one interleaved run.

In each round the limits are measured, then every step once, in a shuffled order that a seed fixes. A step that fails goes
to `skipped` with its reason and the others go on. Costs the models' disk space twice (files, and the disk cache) and their
memory twice. Nothing is left behind. Call from one thread. Shown in chapter 03.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sllm_mini.checkpoint import open_checkpoint
from sllm_mini.device import get_device, why_no_cuda
from sllm_mini.device.base import Device
from sllm_mini.errors import SllmError, UnsupportedError
from sllm_mini.lab.bench import limits
from sllm_mini.lab.bench.checksum import sum_files
from sllm_mini.lab.bench.conditions import make_warm
from sllm_mini.lab.bench.entry import SOURCE
from sllm_mini.lab.bench.prepare import Files, flush, write_format
from sllm_mini.lab.bench.words import DISK
from sllm_mini.lab.bench.workload import Model, find_model
from sllm_mini.lab.models import fitting_shape, workspace
from sllm_mini.lab.tiers.document import LOOPBACK, USE, Run, assemble
from sllm_mini.lab.tiers.origin import seconds_to_fetch
from sllm_mini.lab.tiers.steps import Step, Steps, Subject
from sllm_mini.loading.flow import IN_PLACE
from sllm_mini.loading.probe import IN_MEMORY_FILE_SYSTEMS, measure_machine
from sllm_mini.loading.probe_kernel import file_system_of
from sllm_mini.loading.probe_samples import Skipped, reason_of
from sllm_mini.resources import resource

TINY = "tiny"
ALSO = (TINY, "opt-125m")
"""Models that are attached beside the one that is loaded, so that what depends on the size is seen."""
_FORMAT = "sllm"
_LIMIT_SECONDS, _SLOWEST_BYTES_PER_SECOND = 120.0, 20e6
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Options:
    """How to measure. `also`: models to attach, too. `huge_pages`: change the kernel's settings for the run, as root, so
    that there are some. `gpu`: measure the first GPU, where there is one. `seed` fixes the order. Raises ValueError."""

    rounds: int = 5
    also: tuple[str, ...] = ALSO
    huge_pages: bool = False
    gpu: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"{self.rounds} rounds measure nothing; ask for at least 1")


def measure_tiers(
    model: str | os.PathLike[str] | None = None,
    *,
    options: Options | None = None,
    folder: str | os.PathLike[str] | None = None,
    keep: bool = False,
    command: Sequence[str] = (),
    on_stage: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measures one model and returns the document (see `document`).

    `model`: a Hugging Face directory, a published shape, "small", "tiny", or None for the largest shape that fits.
    `folder`: where files are prepared (None: `bench/` in the chapters' workspace); what was made there is deleted at the
    end unless `keep`. Raises CheckpointError for an unknown model, ResourceError where nothing fits, OSError.
    """
    options = options or Options()
    root = Path(folder) if folder is not None else workspace() / "bench"
    root.mkdir(parents=True, exist_ok=True)
    say = on_stage or (lambda _: None)
    gpu = get_device("cuda") if options.gpu and why_no_cuda() is None else None
    name = os.fspath(model) if model is not None else fitting_shape(root, on_gpu=gpu is not None)
    with ExitStack() as made:
        subjects = list(_subjects([*options.also, name], root, keep, made, say))
        run = measure_rounds(subjects, root, options, gpu, say)
    main = subjects[-1].model
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command) or [Path(sys.argv[0]).name, *sys.argv[1:]],
        "machine": asdict(measure_machine(root)) | {"gpu": None if gpu is None else gpu.name},
        "model": {"name": main.name, "tensor_count": main.tensor_count, "nbytes": main.nbytes, "weights": main.weights},
        "models": [{"name": one.name, "tensor_count": one.model.tensor_count, "nbytes": one.model.nbytes} for one in subjects],
        "method": {
            "rounds": options.rounds, "memory": "backed", "seed": options.seed, "huge_pages_allowed": options.huge_pages,
            "remote": "an HTTP server process on the loopback address, its files in the page cache",
            "not_timed": "imports, thread pools and the first sample of each kind in each process",
        },
    }  # fmt: skip
    return assemble(run, facts)


def _subjects(names: Sequence[str], root: Path, keep: bool, made: ExitStack, say: Callable[[str], None]) -> Iterator[Subject]:
    """Each model once, with its checkpoint; the last name is the last subject. What is made goes when `made` closes."""
    found: dict[str, Model] = {}
    for name in reversed(names):
        if Path(name).name in found:  # a directory takes the place of the shape that it is called after
            continue
        say(f"finding {name}")
        one = find_model(os.fspath(resource("data/models/tiny")) if name == TINY else name, root)
        found[one.name] = one
        if one.made and not keep:
            made.callback(shutil.rmtree, one.folder, ignore_errors=True)
    for one in reversed(found.values()):
        files = Files(one.folder, one.files, root / f"{one.name}-formats", write_format)
        if not keep:
            made.callback(files.close)
        say(f"writing the checkpoint of {one.name}")
        files.make(_FORMAT)
        flush([*files.read_by(_FORMAT), *files.read_by(SOURCE)])
        yield Subject(one, open_checkpoint(files.path(_FORMAT)), sum_files(one.files)[0])


def measure_rounds(subjects: Sequence[Subject], folder: Path, options: Options, gpu: Device | None, say: Callable[[str], None]) -> Run:
    """All rounds. The models' files are there; `folder` gets the store's own. Raises what `Steps` raises."""
    run, generator = Run(), random.Random(options.seed)
    if gpu is None:
        why = why_no_cuda() if options.gpu else "not asked for"
        run.skipped += [Skipped(name, f"no CUDA GPU is used: {why}") for name in ("DRAM → GPU", "disk → GPU", "GPU → another process")]
    if not subjects[-1].model.is_whole:
        run.skipped.append(Skipped("module build", f"it builds a model, and {subjects[-1].name} has no config.json"))
    limit_seconds = _LIMIT_SECONDS + subjects[-1].model.nbytes / _SLOWEST_BYTES_PER_SECOND
    samples: list[limits.Sample] = []
    with Steps(subjects, folder, gpu=gpu, huge_pages=options.huge_pages, limit_seconds=limit_seconds) as steps:
        # What is in memory is measured together: each load begins with none of it there.
        groups = [list(steps.loads()), list(steps.attachments())]
        for group in groups:
            run.samples |= {row: {} for step in group for row in step.rows}
        for number in range(options.rounds):
            say(f"round {number + 1} of {options.rounds}: the limits")
            for limit in _limits(steps, gpu, run):
                if isinstance(limit, Skipped):
                    run.skipped.append(limit)
                else:
                    samples.append(limit)
            for group in groups:
                for step in generator.sample(group, len(group)):
                    say(f"round {number + 1} of {options.rounds}: {step.rows[0].name}")
                    if not _measured(step, number, run):
                        group.remove(step)
    run.samples = {row: found for row, found in run.samples.items() if found}
    run.limits = limits.collect(samples)
    return run


def _measured(step: Step, number: int, run: Run) -> bool:
    """Whether the step is worth another round; its samples are in `run`, or why there are none."""
    try:
        for row, sample in zip(step.rows, step.run(), strict=True):
            run.samples[row][number] = sample
    except UnsupportedError as error:  # of this sample only: the next may find the machine in order
        run.skipped += [Skipped(row.name, str(error)) for row in step.rows]
    except (SllmError, OSError) as error:
        run.skipped += [Skipped(row.name, reason_of(error)) for row in step.rows]
        return False
    return True


def _limits(steps: Steps, gpu: Device | None, run: Run) -> Iterator[limits.Sample | Skipped]:
    """One sample of each limit. What fails is skipped, for this round."""
    main = steps.main
    checks: list[Callable[[], Iterator[limits.Sample | Skipped]]] = [limits.memory_samples, lambda: _loopback(steps)]
    largest = max(main.partitions, key=lambda path: path.stat().st_size)
    system = file_system_of(largest)
    if system in IN_MEMORY_FILE_SYSTEMS:
        yield Skipped(DISK, f"{largest.parent} lives in memory, so nothing there is cold; use --dir with a folder on a disk")
    else:
        checks.append(lambda: limits.disk_samples(largest))
    if gpu is not None:
        checks.append(lambda: limits.from_lists(limits.device_samples(gpu.name)))
    for check in checks:
        try:
            yield from check()
        except (SllmError, OSError) as error:
            yield Skipped("limits", reason_of(error))
    try:
        run.use_seconds.append(steps.use_seconds())
    except (SllmError, OSError) as error:
        yield Skipped(USE, reason_of(error))


def _loopback(steps: Steps) -> Iterator[limits.Sample]:
    paths = steps.main.partitions
    make_warm(paths)
    files = [(path.name, path.stat().st_size) for path in paths]
    nbytes = sum(size for _, size in files)
    seconds = seconds_to_fetch(steps.origin.port, files, IN_PLACE.chunk_nbytes, IN_PLACE.threads)
    yield limits.Sample(LOOPBACK, f"{IN_PLACE.chunk_nbytes // _MIB} MiB × {IN_PLACE.threads} connections", nbytes, seconds)
