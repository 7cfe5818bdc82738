"""`bench warmup` as one call: what comes after the weights, each thing first and again, cold and prepared.

Every sample is a fresh process (see `child`), forked so that imports are not waited for; in each round all of them take turns in a shuffled order that a seed fixes,
but for states that need what an earlier one left (a filled cache), which follow it. What this machine cannot do is in
`skipped` with the reason. Nothing is left behind. Call from one thread. Shown in chapter 06.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sllm_mini.checkpoint import Checkpoint, convert_checkpoint, open_checkpoint
from sllm_mini.cluster.runtime import RUNTIME
from sllm_mini.device import get_device, why_no_cuda
from sllm_mini.device.cuda import CudaDevice
from sllm_mini.device.kernels_image import State
from sllm_mini.errors import DeviceError, ModelError, SllmError
from sllm_mini.lab.bench.document import read_document
from sllm_mini.lab.children import last_line
from sllm_mini.lab.models import tiny_checkpoint, workspace
from sllm_mini.lab.warmup.child import FIRST_CALLS, answer_task
from sllm_mini.loading.probe import measure_machine

KIND = "sllm-mini bench warmup"
PARTS = ("first calls", "torch.compile", "kernels", "memory profile", "attention", "graphs")
_OF_MAX_TOKENS = frozenset({"memory profile", "graphs"})
"""Parts that make a sequence of `max_tokens` with the model."""
FIRST, AGAIN = "first", "again"
COLD, WARM, EAGER, COMPILED = "cold cache", "warm cache", "eager step", "compiled step"
_PATIENCE_SECONDS, _END_SECONDS = 600.0, 10.0
_PRELOADED = [*RUNTIME, "transformers.models.llama.modeling_llama", "sllm_mini.lab.warmup.child"]
_ARCHITECTURE = "sm_90"
"""What kernels are compiled for where there is no GPU."""


@dataclass(frozen=True, slots=True)
class Options:
    """How to measure. `parts`: those of `PARTS` that are; `layers`: of the model that torch.compile gets; `max_batch` and
    `max_tokens`: the worst case of the memory profile and the graphs; `seed` fixes the order. Raises ValueError."""

    rounds: int = 3
    device: str = "cpu"
    parts: tuple[str, ...] = PARTS
    layers: int = 1
    max_batch: int = 8
    max_tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"{self.rounds} rounds measure nothing; ask for at least 1")
        unknown = sorted(set(self.parts) - set(PARTS))
        if unknown:
            raise ValueError(f"there is no part {unknown[0]!r}; the parts are {', '.join(PARTS)}")


@dataclass(slots=True)
class Samples:
    """What a run found: seconds by (part, name, state), facts beside them, and what was skipped with the reason."""

    seconds: dict[tuple[str, str, str], list[float]] = field(default_factory=dict)
    facts: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def add(self, part: str, name: str, state: str, seconds: float, facts: Mapping[str, Any] | None = None) -> None:
        """One sample. Of `facts` the last are kept."""
        self.seconds.setdefault((part, name, state), []).append(seconds)
        self.facts[part, name, state] = dict(facts or {})


Run = Callable[[str, Mapping[str, Any], Mapping[str, str]], dict[str, Any]]
"""Does a task of `child` with an environment added to this one's, and returns its answer."""


def run_child(task: str, arguments: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """One task in a process of its own, forked from one that has imported what a server imports and called nothing of it. Raises ModelError
    with the child's last word if it fails."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    answers, answering = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile() as printed, answers:
        process = context.Process(target=answer_task, args=(answering, printed.name, task, dict(arguments), dict(environment)))
        process.start()
        answering.close()
        try:
            if not answers.poll(_PATIENCE_SECONDS):
                raise ModelError(f"{task} did not end in {_PATIENCE_SECONDS:.0f} s; measure fewer layers or a smaller model")
            answer: dict[str, Any] = answers.recv()
            process.join(_END_SECONDS)
        except EOFError:
            process.join()
            said = last_line(Path(printed.name).read_text(encoding="utf-8", errors="replace"))
            raise ModelError(f"{task} failed: {said or f'exit code {process.exitcode}'}") from None
        finally:
            process.kill()
            process.join()
    return answer


def measure_warmup(
    model: str | os.PathLike[str] | None = None,
    *,
    options: Options | None = None,
    command: Sequence[str] = (),
    on_stage: Callable[[str], None] | None = None,
    run: Run = run_child,
) -> dict[str, Any]:
    """Measures and returns the document. `model`: a checkpoint, or a Hugging Face directory that is converted for the run
    (default: the tiny trained one). Raises what opening or converting raises, DeviceError for a device that is not there and
    ModelError for a worst case that the model's context does not hold, before anything is measured; a part that fails later
    goes to `skipped`."""
    options = options or Options()
    device = get_device(options.device)
    given = Path(model) if model is not None else tiny_checkpoint().path
    say = on_stage or (lambda _: None)
    samples = Samples()
    with tempfile.TemporaryDirectory(dir=workspace(), prefix=".warmup-") as made:
        if (given / "config.json").exists() and not (given / "index.json").exists():
            _check_length((given / "config.json").read_bytes(), options)
            say(f"converting {given.name}")
            checkpoint = convert_checkpoint(given, Path(made) / given.name)
        else:
            checkpoint = open_checkpoint(given)
            if any(companion.file == "config.json" for companion in checkpoint.index.companions):
                _check_length(checkpoint.read_companion("config.json"), options)
        units = list(_units(checkpoint.path, device.name, options, Path(made), samples, run))
        generator = random.Random(options.seed)
        failed: set[str] = set()
        for number in range(options.rounds):
            for part, name, unit in generator.sample(units, len(units)):
                if f"{part}: {name}" in failed:
                    continue
                say(f"round {number + 1} of {options.rounds}: {part}, {name}")
                try:
                    unit(number)
                except (SllmError, OSError) as error:
                    failed.add(f"{part}: {name}")
                    samples.skipped[f"{part}: {name}"] = str(error)
    return {
        "kind": KIND,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command) or [Path(sys.argv[0]).name, *sys.argv[1:]],
        "machine": asdict(measure_machine(workspace())) | {"gpu": device.properties().model if isinstance(device, CudaDevice) else None},
        "model": {"name": given.name, "dtype": _dtype(checkpoint)},
        "method": asdict(options) | {"sample": "one fresh process; imports and loading are not timed"},
        "limits": {},
        "results": [_row(key, samples.seconds[key], samples.facts[key]) for key in sorted(samples.seconds, key=_place)],
        "skipped": [{"name": name, "reason": reason} for name, reason in samples.skipped.items()],
    }


def _check_length(config: bytes, options: Options) -> None:
    """Raises ModelError where a part would make a sequence that is longer than the model's context."""
    found = json.loads(config)
    limit = found.get("max_position_embeddings") or found.get("n_positions")
    if limit is not None and options.max_tokens > limit and not _OF_MAX_TOKENS.isdisjoint(options.parts):
        raise ModelError(f"a worst case of {options.max_tokens:,} tokens was asked for, but this model's context is {limit:,} tokens; ask for at most that with --max-tokens")


def _dtype(checkpoint: Checkpoint) -> str:
    """The type that most of the weights' bytes have."""
    nbytes: dict[str, int] = {}
    for tensor in checkpoint.index.tensors:
        nbytes[tensor.dtype] = nbytes.get(tensor.dtype, 0) + tensor.nbytes
    return max(nbytes, key=lambda dtype: nbytes[dtype], default="")


Unit = tuple[str, str, Callable[[int], None]]


def _units(checkpoint: Path, device: str, options: Options, folder: Path, samples: Samples, run: Run) -> list[Unit]:
    units: list[Unit] = []
    if "first calls" in options.parts:
        for what in FIRST_CALLS:

            def first_call(_: int, what: str = what) -> None:
                found = run("first_call", {"what": what, "path": str(checkpoint)}, {})
                samples.add("first calls", what, FIRST, found["first_seconds"])
                samples.add("first calls", what, AGAIN, statistics.median(found["again_seconds"]))

            units.append(("first calls", what, first_call))
    if "torch.compile" in options.parts:
        if why := why_no_compiler():
            samples.skipped["torch.compile"] = why
        else:
            units.append(("torch.compile", "decode step", lambda number: _compile(number, options, folder, samples, run)))
    if "kernels" in options.parts:
        units.append(("kernels", "decode attention", lambda number: _kernels(number, device, folder, samples, run)))
    if "memory profile" in options.parts:
        units.append(("memory profile", checkpoint.name, lambda number: _profile(number, checkpoint, device, options, folder, samples, run)))
    if device == "cpu":
        why = why_no_cuda() or "the CPU was asked for"
        samples.skipped |= {part: f"{why}; a processor has no CUDA {what}" for part, what in (("attention", "kernels"), ("graphs", "graphs")) if part in options.parts}
    else:
        if "attention" in options.parts:
            units.append(("attention", "one layer", lambda _: _attention(device, options, samples, run)))
        if "graphs" in options.parts:
            for mode in ("eager", "lazy", "upfront"):
                for kernel in (False, True):
                    name = f"{mode}, {'our kernel' if kernel else 'SDPA'}"
                    units.append(("graphs", name, lambda _, mode=mode, kernel=kernel, name=name: _graphs(name, mode, kernel, checkpoint, device, options, samples, run)))  # type: ignore[misc]
    return units


def why_no_compiler() -> str | None:
    """Why torch.compile cannot make code for this processor; None if it can."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name):
        return "torch.compile needs a C++ compiler and neither g++ nor clang++ is there; install one to measure it"
    return None


def _compile(number: int, options: Options, folder: Path, samples: Samples, run: Run) -> None:
    cache = folder / f"inductor-{number}"
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    try:
        for state in (COLD, WARM):
            found = run("compile_step", {"layers": options.layers}, environment)
            samples.add("torch.compile", "first compiled step", state, found["first_seconds"], {"largest_difference": found["largest_difference"]})
            if state == WARM:
                samples.add("torch.compile", "a later step", EAGER, statistics.median(found["eager_seconds"]))
                samples.add("torch.compile", "a later step", COMPILED, statistics.median(found["compiled_seconds"]))
    finally:
        shutil.rmtree(cache, ignore_errors=True)


def _kernels(number: int, device: str, folder: Path, samples: Samples, run: Run) -> None:
    ahead, cache = folder / "ahead", folder / f"kernels-{number}"
    shared = {"ahead": str(ahead), "cache": str(cache), "head_dim": 128, "group": 4, "device": device, "architecture": _ARCHITECTURE}
    order: tuple[State, ...] = ("just in time", "cached", "ahead of time")  # each finds what the one before left
    for state in order:
        if state == "ahead of time" and not ahead.exists():
            _build_ahead(cache, ahead)
        found = run("kernel_state", shared | {"state": state}, {})
        if found["state"] != state:
            raise DeviceError(f"a kernel that was to be come by {state} came by {found['state']}; delete the report's folder and measure again")
        samples.add("kernels", "decode attention", state, sum(found["seconds"].values()), found)
    shutil.rmtree(cache, ignore_errors=True)


def _build_ahead(cache: Path, ahead: Path) -> None:
    """What was compiled is what would be shipped, under the name of no compiler."""
    ahead.mkdir()
    for path in cache.glob("*.kernel"):
        shutil.copyfile(path, ahead / f"{path.stem.rpartition('-')[0]}.kernel")


def _profile(number: int, checkpoint: Path, device: str, options: Options, folder: Path, samples: Samples, run: Run) -> None:
    place = folder / f"profile-{number}"
    shared = {"path": str(checkpoint), "folder": str(place), "device": device, "max_batch": options.max_batch, "max_tokens": options.max_tokens}
    for state in ("measured", "recorded"):
        found = run("memory_profile", shared, {})
        if found["state"] != state:
            raise ModelError(f"a profile that was to be {state} was {found['state']}; see that {place} can be written")
        samples.add("memory profile", checkpoint.name, state, found["seconds"], found)


def _attention(device: str, options: Options, samples: Samples, run: Run) -> None:
    found = run("attention", {"device": device, "rows": options.max_batch, "tokens": 8 * options.max_tokens}, {})
    for state, seconds in (("SDPA with a mask", found["sdpa_seconds"]), ("our kernel", found["own_seconds"])):
        samples.add("attention", "one layer", state, statistics.median(seconds), {name: found[name] for name in ("nbytes", "largest_difference", "sdpa_difference")})


def _graphs(name: str, mode: str, kernel: bool, checkpoint: Path, device: str, options: Options, samples: Samples, run: Run) -> None:
    shared = {"path": str(checkpoint), "mode": mode, "max_batch": options.max_batch, "capacity": options.max_tokens, "device": device, "kernel": kernel}
    found = run("graphs", shared, {})
    samples.add("graphs", name, "before the first step", found["before_seconds"], {"captures": found["captures"]})
    samples.add("graphs", name, "first steps of all batch sizes", sum(found["first_seconds"]))
    samples.add("graphs", name, "one later step of each", sum(found["later_seconds"]))


def _place(key: tuple[str, str, str]) -> tuple[int, int]:
    """Parts in their order, first calls in theirs; what is left keeps the order in which it was measured."""
    return PARTS.index(key[0]), FIRST_CALLS.index(key[1]) if key[1] in FIRST_CALLS else len(FIRST_CALLS)


def _row(key: tuple[str, str, str], seconds: Sequence[float], facts: Mapping[str, Any]) -> dict[str, Any]:
    part, name, state = key
    return {
        "part": part, "name": name, "state": state, "nbytes": facts.get("nbytes"), "samples": list(seconds), "seconds_median": statistics.median(seconds),
        "seconds_min": min(seconds), "seconds_max": max(seconds), "facts": dict(facts),
    }  # fmt: skip


def read_warmup(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A saved document. Raises FormatError for a file that is not one, OSError if it cannot be read."""
    return read_document(path, KIND)


def rows_of(document: Mapping[str, Any], part: str) -> list[dict[str, Any]]:
    """The results of one part, in the order they were first measured."""
    return [row for row in document["results"] if row["part"] == part]


__all__ = ["PARTS", "Options", "measure_warmup", "read_warmup", "rows_of", "run_child", "why_no_compiler"]
