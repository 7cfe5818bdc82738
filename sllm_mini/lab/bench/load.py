"""`bench load` as one call: choose the loaders, prepare, measure, put the document together (chapter 02)."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sllm_mini.errors import UnsupportedError
from sllm_mini.lab.bench import ours, peers
from sllm_mini.lab.bench.document import assemble
from sllm_mini.lab.bench.entry import Entry
from sllm_mini.lab.bench.measure import Options, measure_rounds
from sllm_mini.lab.bench.workload import Model, find_model
from sllm_mini.lab.models import fitting_shape, workspace
from sllm_mini.loading.probe import measure_machine

_SUM = "sum modulo 2^64 of each tensor's little-endian 8-byte words, the last filled up with zeros, over all tensors"


def entries(device: str = "cpu", *, ladder: bool = True, with_peers: bool = True, only: Collection[str] = ()) -> list[Entry]:
    """Every loader to measure. `only` keeps those whose name it gives or begins, upper and lower case told apart, and
    always the reference.

    Raises UnsupportedError for a name in `only` that fits nothing.
    """
    found = ours.entries(ladder=ladder) + (peers.entries() if with_peers else []) + ours.limit_entries(device)
    for wanted in only:
        if not any(entry.name.startswith(wanted) for entry in found):
            names = ", ".join(repr(entry.name) for entry in found)  # quoted: there are commas in names
            raise UnsupportedError(f"there is no loader {wanted!r}; give the beginning of a name, upper and lower case as here: {names}")
    kept = (ours.REFERENCE, ours.MAPPED)
    return [entry for entry in found if not only or entry.name in kept or any(entry.name.startswith(wanted) for wanted in only)]


def measure_load(
    model: str | os.PathLike[str] | None = None,
    *,
    options: Options | None = None,
    loaders: Sequence[Entry] | None = None,
    folder: str | os.PathLike[str] | None = None,
    keep: bool = False,
    command: Sequence[str] = (),
    on_stage: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measures every loader on one model and returns the document (see `document`).

    `model`: a Hugging Face directory, a published shape, "small", or None for the largest shape that fits here.
    `folder`: where files are prepared (None: `bench/` in the chapters' workspace); what was made there is deleted at
    the end unless `keep`. Raises CheckpointError for an unknown model, ResourceError where nothing fits, OSError.
    """
    options = options or Options()
    root = Path(folder) if folder is not None else workspace() / "bench"
    root.mkdir(parents=True, exist_ok=True)
    say = on_stage or (lambda _: None)
    name = os.fspath(model) if model is not None else fitting_shape(root, on_gpu=options.device != "cpu")
    chosen = list(loaders) if loaders is not None else entries(options.device)
    say(f"finding {name}")
    found = find_model(name, root)
    try:
        run = measure_rounds(found, chosen, ours.REFERENCE, root, options, keep=keep, on_stage=say)
    finally:
        if found.made and not keep:
            shutil.rmtree(found.folder, ignore_errors=True)
    facts = _facts(found, options, chosen, root, command) | {"groups": run.groups}
    return assemble(run, nbytes=found.nbytes, device=options.device, reference=ours.REFERENCE, facts=facts)


def _facts(model: Model, options: Options, chosen: Sequence[Entry], root: Path, command: Sequence[str]) -> dict[str, Any]:
    machine = asdict(measure_machine(root)) | {"gpu": _gpu(options.device)}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command) or [Path(sys.argv[0]).name, *sys.argv[1:]],
        "packages": {name: _version(name) for name in sorted({entry.package for entry in chosen} | {"sllm_mini"})},
        "machine": machine,
        "model": {"name": model.name, "tensor_count": model.tensor_count, "nbytes": model.nbytes, "weights": model.weights},
        "method": {
            "device": options.device,
            "rounds": options.rounds,
            "states": list(options.states),
            "memory": options.memory,
            "seed": options.seed,
            "sum": _SUM,
            "not_timed": "imports, thread pools, the CUDA context and one first load of each worker",
        },
    }


def _gpu(device: str) -> dict[str, Any] | None:
    if device == "cpu":
        return None
    from sllm_mini.device.cuda import cuda_device

    return asdict(cuda_device(int(device.partition(":")[2] or 0)).properties())


def _version(package: str) -> str | None:
    if package == "sllm_mini":
        from sllm_mini import __version__

        return __version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


