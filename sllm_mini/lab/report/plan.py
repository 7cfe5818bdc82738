"""The table of the report: which stages there are, of which units, in what sizes on the machine at hand.

A bench that comes later adds one line to its stage. Sizes follow the GPU's memory, the host's and the free disk; what
does not fit, or lacks a module or a program, is skipped with the reason. Costs nothing but a look at the checkout.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sllm_mini.lab.report.folder import Folder
from sllm_mini.lab.report.host import CORE, SERVER, Host, module_command
from sllm_mini.lab.report.scripts import CHAPTERS_MODEL, COLD_START, MODEL
from sllm_mini.lab.report.unit import STAGE_SECONDS, Plan, Product, Unit

SHAPES = ("opt-125m", "llama-3.2-1b", "llama-3.1-8b")
"""From the smallest to the largest, so that a budget that ends early has ended with something."""
_TINY, _SMALL = "tiny", "small"
_WARMUP_SHAPE = "llama-3.2-1b"
_PARTS = {
    "ladder": ("ladder",),
    "usual": ("torch.load", "safetensors", "transformers"),
    "streamers": ("Run:ai", "fastsafetensors"),
    "others": ("tensorizer", "InstantTensor", "ServerlessLLM", "sllm_mini"),
}
"""Loaders that are measured in one unit where a model is large; ours, the reference of all ratios, is in each."""
_WHOLE_NBYTES = 1e9
"""Up to this size all loaders fit into one unit."""
_ROUNDS = 5
_START_SECONDS = 6.0
_DISK_BYTES_PER_SECOND, _WARM_BYTES_PER_SECOND = 1e9, 4e9
"""Of a disk that was not measured yet, and of the page cache; a loader is taken to reach half of either."""
_MADE_BYTES_PER_SECOND = 0.4e9
_TIERS_MOVES, _OVERLAP_MOVES = 20, 16
"""How often a round of such a bench moves its model's bytes or takes as long as that, roughly."""
_CONTEXT_NBYTES = 0.25e9
"""Of GPU memory that each process of a bench takes before it loads anything, roughly; they are all alive at once."""
_UNIT_SECONDS = 0.8 * STAGE_SECONDS


@dataclass(frozen=True, slots=True)
class Table:
    """Makes the plan. `checkout` is where tests/ and chapters/ lie; in a rehearsal sizes are tiny and the GPU is the fake."""

    host: Host
    folder: Folder
    checkout: Path

    def plan(self) -> Plan:
        products = {product.name: product for product in self._products()}
        units, skipped = [], dict(self._too_large())
        for unit in (*self._machine(), *self._tests(), *self._kernels(), *self._bench(), *self._chapters()):
            missing = self.host.missing(unit.modules, unit.programs)
            if missing:
                skipped[unit.key] = f"{', '.join(missing)} not there"
            else:
                units.append(unit)
        return Plan(tuple(units), products, skipped)

    @property
    def _rehearsal(self) -> bool:
        return self.folder.rehearsal

    def _module(self, name: str, *args: object) -> tuple[str, ...]:
        return (*module_command(name, rehearsal=self._rehearsal), *map(str, args))

    def _sllm(self, *args: object) -> tuple[str, ...]:
        return self._module("sllm_mini.cli.main", *args)

    # The stages

    def _machine(self) -> Iterator[Unit]:
        quick = ["--quick"] if self._rehearsal else []
        yield Unit("machine", "doctor", self._sllm("doctor", self.folder.work, "--json", *quick), 40, 180, "doctor.json", True, CORE)
        yield Unit("machine", "nvidia-smi", ("nvidia-smi", "-q"), 5, 60, programs=("nvidia-smi",))
        yield Unit("machine", "topology", ("nvidia-smi", "topo", "-m"), 5, 60, programs=("nvidia-smi",))
        yield Unit("machine", "packages", (sys.executable, "-m", "pip", "list", "--disable-pip-version-check"), 5, 60, modules=("pip",))

    def _tests(self) -> Iterator[Unit]:
        tests = self.checkout / "tests"
        required = {} if self._rehearsal else {"SLLM_REQUIRE_GPU": "1"}
        yield self._pytest("gpu", "gpu", (tests,), 240, required)
        for file in sorted((*tests.glob("test_*.py"), *tests.glob("faults/test_*.py"))):
            name = file.stem.removeprefix("test_") if file.parent == tests else f"faults-{file.stem.removeprefix('test_')}"
            yield self._pytest(name, "not browser and not gpu", (file,), 60, {})

    def _pytest(self, name: str, marks: str, paths: tuple[Path, ...], seconds: float, env: dict[str, str]) -> Unit:
        junit = self.folder.path / "junit" / f"{name}.xml"
        command = (sys.executable, "-m", "pytest", "-m", marks, "-p", "no:cacheprovider", "--color=no", f"--junitxml={junit}", *map(str, paths))
        return Unit("tests", name, command, seconds, modules=(*CORE, "pytest", "hypothesis"), env=env)

    def _kernels(self) -> Iterator[Unit]:
        kernels, needs = "sllm_mini.lab.report.kernels", (*CORE, "cupy")
        size = ["--nbytes", 8 << 20] if self._rehearsal else []
        yield Unit("kernels", "speed", self._module(kernels, *size), 60, 240, "kernels.json", True, needs)
        sanitizer = self.host.programs.get("compute-sanitizer") or "compute-sanitizer"
        for tool in ("memcheck", "racecheck"):
            checked = (sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all", *self._module(kernels, "--check"))
            each_its_own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # or a read past one tensor ends in its neighbour
            yield Unit("kernels", tool, checked, 120, 400, modules=needs, programs=("compute-sanitizer",), env=each_its_own)

    def _bench(self) -> Iterator[Unit]:
        saved, device = self.folder.results / "cold_start.json", self._workers_device
        yield Unit("bench", "cold-start", (sys.executable, "-c", COLD_START, device, str(saved), "1" if self._rehearsal else "2"), 60, 240, saved.name, modules=CORE)
        loaded = self._sllm("load", self._model(_TINY), "--device", "cuda", "--repeat", 3, "--json")
        yield Unit("bench", "load-command", loaded, 20, 120, "load_command.json", True, (*CORE, "cupy"), uses=(_TINY,))
        if not self._rehearsal:  # its model has 1 GB, and no part of it differs on a GPU
            formats = self.folder.results / "formats.json"
            record = (sys.executable, "-m", "sllm_mini.lab.formats.record", str(formats))
            yield Unit("bench", "formats", record, 90, 300, formats.name, modules=CORE, env={"SLLM_MINI_WORK": str(self.folder.scratch)})
        for target in dict.fromkeys((device, "cpu")):
            for model in (_TINY,) if self._rehearsal else (_SMALL, *SHAPES):
                if model not in self._too_large_for(target):
                    for state in ("warm",) if self._rehearsal else ("cold", "warm"):
                        yield from self._loads(model, target, state)
        for model in (_TINY,) if self._rehearsal else SHAPES:
            if model not in self._too_large_for(device):
                yield self._whole(model, "tiers", _TIERS_MOVES, "--also", _TINY, *(("--no-gpu",) if self._rehearsal else ()))
                if not self._rehearsal or self._on_a_disk():
                    yield self._whole(model, "overlap", _OVERLAP_MOVES, "--device", device, *(("--tokens", 8) if self._rehearsal else ()))
        yield from self._requests()
        yield from self._served()
        yield from self._warmups()

    def _requests(self) -> Iterator[Unit]:
        """Requests on a resident model: how fast they are answered, and how long one pauses that moves."""
        device = self._workers_device
        model = _TINY if self._rehearsal else _WARMUP_SHAPE
        if model not in self._too_large_for(device):
            small = ("--rounds", 1, "--batch", 2, "--prompt-tokens", 4, "--new-tokens", 4)
            yield self._resident("decode", model, *(small if self._rehearsal else ("--batch", 1, "--batch", 8, "--batch", 32, "--prompt-tokens", 256)))
            contexts = (16,) if self._rehearsal else (128, 512, 2000, 8000)
            yield self._resident("migrate", model, "--rounds", 1 if self._rehearsal else 3, *(word for context in contexts for word in ("--context", context)))

    def _served(self) -> Iterator[Unit]:
        """Starts as a client of the server sees them, and what the platform adds to a request that has no start."""
        model, rounds = (_TINY, 1) if self._rehearsal else (_WARMUP_SHAPE, 3)
        cuda, needs = ([] if self._rehearsal else ["--cuda"]), (*CORE, *SERVER, *(() if self._rehearsal else ("cupy",)))
        if model not in self._too_large_for(self._workers_device):
            source = self.checkout / "data/models/tiny" if self._rehearsal else self._model(model)
            saved = self.folder.results / f"bench_start_{model.replace('-', '_')}.json"
            asked = ["bench", "start", source, "--rounds", rounds, "--dir", self.folder.scratch, "--save", saved, *(["--no-peer"] if self._rehearsal else []), *cuda]
            yield Unit("bench", f"start-{model}", (sys.executable, "-m", "sllm_mini.cli.main", *map(str, asked)), 60 if self._rehearsal else 300, result=saved.name, modules=needs, uses=() if self._rehearsal else (model,))
        saved = self.folder.results / "bench_serve_overhead.json"
        asked = ["bench", "serve", "--overhead", "--rounds", 1 if self._rehearsal else 25, "--tokens", 4 if self._rehearsal else 16, "--save", saved, *cuda]
        yield Unit("bench", "serve-overhead", (sys.executable, "-m", "sllm_mini.cli.main", *map(str, asked)), 30 if self._rehearsal else 60, result=saved.name, modules=needs, env={"SLLM_MINI_WORK": str(self.folder.scratch)})

    def _resident(self, bench: str, model: str, *options: object) -> Unit:
        saved = self.folder.results / f"bench_{bench}_{model.replace('-', '_')}.json"
        asked = [bench, self._model(model), "--device", self._workers_device, "--save", saved, *options]
        command = (sys.executable, "-m", "sllm_mini.cli.main", "bench", *map(str, asked))
        return Unit("bench", f"{bench}-{model}", command, 40 if self._rehearsal else 200, result=saved.name, modules=CORE, uses=(model,))

    def _warmups(self) -> Iterator[Unit]:
        """What comes after the weights: on the processor all of it, on the GPU what only a GPU has, with a real shape."""
        wanted = {"cpu": (_TINY, ("memory profile",) if self._rehearsal else ()), "cuda": (_WARMUP_SHAPE, ("kernels", "memory profile", "attention", "graphs"))}
        for device, (model, parts) in wanted.items():
            if device == "cpu" or not (self._rehearsal or model in self._too_large_for(device)):
                saved = self.folder.results / f"bench_warmup_{device}.json"
                rounds, seconds = (1, 30.0) if self._rehearsal else (3, 400.0 if device == "cpu" else 300.0)
                asked = ["warmup", self._model(model), "--device", device, "--rounds", rounds, "--save", saved, *(word for part in parts for word in ("--part", part))]
                command = (sys.executable, "-m", "sllm_mini.cli.main", "bench", *map(str, asked))
                needs = CORE if device == "cpu" else (*CORE, "cupy")
                yield Unit("bench", f"warmup-{device}", command, seconds, result=saved.name, modules=needs, uses=(model,), env={"SLLM_MINI_WORK": str(self.folder.scratch)})

    @property
    def _workers_device(self) -> str:
        """The fake does not reach the processes that a bench starts, so they use the processor in a rehearsal."""
        return "cpu" if self._rehearsal else "cuda"

    def _whole(self, model: str, bench: str, moves: int, *options: object) -> Unit:
        """A bench that measures one model in one unit. `moves`: how often a round moves its bytes, roughly."""
        nbytes = self._nbytes(model)
        uses = (model,) if model in SHAPES else ()
        what = self._model(model) if uses else self.checkout / "data/models/tiny"
        disk = self._disk_bytes_per_second()
        move = nbytes / (0.5 * min(disk, _WARM_BYTES_PER_SECOND))
        fixed = 60 + 3 * nbytes / _MADE_BYTES_PER_SECOND + moves * move  # each start once before the rounds

        def seconds(rounds: int) -> float:
            return fixed + rounds * (10 * min(nbytes, 2 << 30) / disk + moves * move)

        rounds, estimate = (1, 45.0) if self._rehearsal else _fitting(seconds)
        saved = self.folder.results / f"bench_{bench}_{model.replace('-', '_')}.json"
        asked = [bench, what, "--rounds", rounds, "--dir", self.folder.scratch, "--save", saved, *options]
        command = (sys.executable, "-m", "sllm_mini.cli.main", "bench", *map(str, asked))
        return Unit("bench", f"{bench}-{model}", command, estimate, result=saved.name, modules=CORE, uses=uses)

    def _on_a_disk(self) -> bool:
        """Whether the report's own folder is on a disk, so that something in it can be cold."""
        if self.host.missing(CORE):
            return False
        from sllm_mini.loading.probe import IN_MEMORY_FILE_SYSTEMS
        from sllm_mini.loading.probe_kernel import file_system_of

        return file_system_of(self.folder.scratch) not in IN_MEMORY_FILE_SYSTEMS

    def _loads(self, model: str, device: str, state: str) -> Iterator[Unit]:
        nbytes = self._nbytes(model)
        parts = _PARTS if nbytes > _WHOLE_NBYTES else {"all": ("safetensors safe_open",) if self._rehearsal else ()}
        uses = (model,) if model in SHAPES else ()
        what = self._model(model) if uses else self.checkout / "data/models/tiny" if model == _TINY else model
        for part, names in parts.items():
            name = f"load-{model}-{device}-{state}" + ("" if part == "all" else f"-{part}")
            rounds, seconds = (1, 30.0) if self._rehearsal else self._rounds(self._count(names, device), nbytes, state)
            result = f"bench_{name.replace('-', '_')}.json"
            asked = [what, "--device", device, "--state", state, "--rounds", rounds, "--dir", self.folder.scratch, "--save", self.folder.results / result]
            only = [word for wanted in names for word in ("--only", wanted)]
            ladder = ["--no-ladder"] if self._rehearsal else []
            command = (sys.executable, "-m", "sllm_mini.cli.main", "bench", "load", *map(str, (*asked, *only, *ladder)))
            yield Unit("bench", name, command, seconds, result=result, modules=CORE, uses=uses)

    def _rounds(self, loaders: int, nbytes: int, state: str) -> tuple[int, float]:
        """As many rounds as fit into a unit, one at least, and the seconds they will take at the speed of this disk. The
        estimate is a coarse one: where it says that not even one fits, the unit is tried all the same."""
        disk = self._disk_bytes_per_second()
        rate = 0.5 * (disk if state == "cold" else _WARM_BYTES_PER_SECOND)
        fixed = 20 + loaders * _START_SECONDS + 2 * nbytes / rate + 3 * nbytes / _MADE_BYTES_PER_SECOND  # the sum, and formats written
        limits = 10 * min(nbytes, 2 << 30) / disk if state == "cold" else 5.0

        def seconds(rounds: int) -> float:
            return fixed + rounds * limits + loaders * (rounds + 1) * nbytes / rate  # one more that is not timed

        return _fitting(seconds)

    def _count(self, names: tuple[str, ...], device: str) -> int:
        """How many loaders a unit measures, ours included; all of them without `names`."""
        if self.host.missing(CORE):
            return 1
        from sllm_mini.lab.bench import entries

        return len(entries(device, only=names))

    def _disk_bytes_per_second(self) -> float:
        try:
            limits = json.loads((self.folder.results / "doctor.json").read_text(encoding="utf-8"))["limits"]
            return max(float(limits["disk_direct_read_bytes_per_second"]), 1e8)
        except (OSError, ValueError, KeyError, TypeError):
            return _DISK_BYTES_PER_SECOND

    def _chapters(self) -> Iterator[Unit]:
        for path in sorted((self.checkout / "chapters").glob("[0-9][0-9]_*.ipynb")):
            copy = self.folder.chapters / path.name
            marked = ["--rehearsal"] if self._rehearsal else []
            command = self._module("sllm_mini.lab.report.chapter", path, copy, *marked)
            seconds = 2 * _seconds_of(path)
            needs = (*CORE, "nbclient", "nbformat", "ipykernel", "matplotlib")
            env = {"SLLM_MINI_WORK": str(self._chapters_work)}
            yield Unit("chapters", path.stem, command, seconds, modules=needs, uses=("the chapters' model",), env=env)

    # What they use, and whether it fits

    @property
    def _chapters_work(self) -> Path:
        return self.folder.work / "chapters"

    def _model(self, shape: str) -> Path:
        return self.folder.models / shape

    def _nbytes(self, model: str) -> int:
        if self.host.missing(CORE):  # then nothing is run that would need it
            return 0
        from sllm_mini.checkpoint.shapes import SHAPES as PUBLISHED

        return PUBLISHED[model].nbytes if model in PUBLISHED else 0

    def _products(self) -> Iterator[Product]:
        for shape in SHAPES:
            command = (sys.executable, "-c", MODEL, shape, str(self._model(shape)))
            yield Product(shape, self._model(shape), command, 10 + self._nbytes(shape) / _MADE_BYTES_PER_SECOND)
        yield Product(_TINY, self._model(_TINY), self._sllm("convert", self.checkout / "data/models/tiny", self._model(_TINY)), 10)
        which = "tiny_checkpoint" if self._rehearsal else "sized_checkpoint"
        command = ("env", f"SLLM_MINI_WORK={self._chapters_work}", sys.executable, "-c", CHAPTERS_MODEL.format(which))
        yield Product("the chapters' model", self._chapters_work, command, 10 if self._rehearsal else 150)

    def _too_large_for(self, device: str) -> dict[str, str]:
        """Shapes that do not fit, with the reason."""
        if self._rehearsal:
            return {}
        found = {shape: self._why_not(shape, on_gpu=device != "cpu") for shape in SHAPES}
        return {shape: reason for shape, reason in found.items() if reason is not None}

    def _too_large(self) -> dict[str, str]:
        """What `_too_large_for` leaves out of the plan, by the key that stands for its units."""
        found = {f"bench/load-{shape}-{device}": reason for device in ("cuda", "cpu") for shape, reason in self._too_large_for(device).items()}
        if (why := self._too_large_for("cuda").get(_WARMUP_SHAPE)) is not None:
            found["bench/warmup-cuda"] = why
        return found | {f"bench/{bench}-{shape}": reason for bench in ("tiers", "overlap", "decode", "migrate", "start") for shape, reason in self._too_large_for(self._workers_device).items()}

    def _why_not(self, shape: str, *, on_gpu: bool) -> str | None:
        """The first thing there is too little of. On disk lie the model, our checkpoint and one peer's file; in memory
        some peers hold the model twice; on the GPU it lies once, with room for the context and one large tensor."""
        nbytes = self._nbytes(shape)
        made = nbytes if self._model(shape).exists() else 0
        wanted = {
            "disk": (3.2 * nbytes + 1e9, self.host.disk_nbytes + made),
            "memory": (2.2 * nbytes + 2e9, self.host.memory_nbytes),
        }
        if on_gpu and self.host.gpu is not None:
            parts = _PARTS.values() if nbytes > _WHOLE_NBYTES else ((),)
            contexts = 1 + max(self._count(names, "cuda") for names in parts)
            wanted["GPU memory"] = (1.25 * nbytes + contexts * _CONTEXT_NBYTES, self.host.gpu["free_nbytes"])
        for name, (need, free) in wanted.items():
            if need > free:
                return f"needs {need / 1e9:.1f} GB of {name}, {free / 1e9:.1f} GB are free"
        return None


def _fitting(seconds: Callable[[int], float]) -> tuple[int, float]:
    """As many rounds as fit into a unit, one at least, and the seconds they take."""
    rounds = next((rounds for rounds in range(_ROUNDS, 1, -1) if seconds(rounds) <= _UNIT_SECONDS), 1)
    return rounds, min(seconds(rounds), _UNIT_SECONDS)


def _seconds_of(chapter: Path) -> float:
    """How long a chapter took where it was last executed; two minutes for one that never was."""
    try:
        return float(json.loads(chapter.read_text(encoding="utf-8"))["metadata"]["sllm_mini"]["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return 120.0
