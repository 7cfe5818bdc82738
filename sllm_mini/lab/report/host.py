"""What the machine and the chosen Python have to offer the report, looked at before anything is run.

`look` itself needs Python alone and takes a second; whether CUDA can be used is asked in a process of its own
(`python -m sllm_mini.lab.report.host`), so that the report holds no GPU memory while its units measure.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sllm_mini.device.cpu import available_nbytes, cpu_count
from sllm_mini.lab.children import last_line

CORE = ("msgspec", "numpy", "rich", "safetensors", "tokenizers", "torch", "transformers", "typer", "xxhash")
"""What the package itself needs."""
SERVER = ("fastapi", "httptools", "jinja2", "prometheus_client", "uvicorn", "uvloop")
"""What the server needs beside it."""
_FALLS_AWAY = {
    **dict.fromkeys(CORE, "nearly everything; the package needs it"),
    "cupy": "everything that uses the GPU",
    "pip": "the list of all packages",
    "pytest": "the stage tests",
    "hypothesis": "the stage tests",
    "pytest_timeout": "limits of single tests (those of whole files hold)",
    "nbclient": "the stage chapters",
    "nbformat": "the stage chapters",
    "ipykernel": "the stage chapters",
    "matplotlib": "the stage chapters and every picture",
    **dict.fromkeys(SERVER, "benches of the server"),
    "ipywidgets": "sliders in chapters; their static twins stay",
}
_PROGRAMS = {
    "nvidia-smi": "the driver's own account of the GPU",
    "compute-sanitizer": "the memory check of the kernels",
    "g++": "tests that run the kernels' arithmetic on the CPU",
    "nvcc": "tests that compile the kernels for other GPUs",
}
_TIMEOUT_SECONDS = 120
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Host:
    """Facts in bytes. `modules` maps a module to its version, None if absent, `programs` a program to its path;
    `gpu` is what the driver says of the first GPU, None with a reason in `why_no_gpu`."""

    python: str
    modules: dict[str, str | None]
    programs: dict[str, str | None]
    gpu: dict[str, Any] | None
    why_no_gpu: str | None
    memory_nbytes: int
    disk_nbytes: int
    cpu_count: int
    system: str

    @property
    def gpu_model(self) -> str | None:
        return None if self.gpu is None else str(self.gpu["model"])

    def missing(self, modules: Sequence[str], programs: Sequence[str] = ()) -> list[str]:
        return [name for name in modules if not self.modules.get(name)] + [name for name in programs if not self.programs.get(name)]

    def complaints(self) -> list[str]:
        """One line for each thing that is absent, with what falls away."""
        absent = {name: why for name, why in _FALLS_AWAY.items() if not self.modules[name]}
        absent |= {name: why for name, why in _PROGRAMS.items() if not self.programs[name]}
        return [f"{name} is not there; without it falls away: {why}" for name, why in absent.items()]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def look(work: Path, *, rehearsal: bool) -> Host:
    """Looks at this machine, with the disk that `work`, which need not exist yet, is on. In a rehearsal the GPU is the
    recording fake. Never raises for what is absent."""
    gpu, reason = _ask_for_gpu(rehearsal)
    return Host(
        python=f"{platform.python_version()} ({sys.executable})",
        modules=_versions(),
        programs={name: _program(name) for name in _PROGRAMS},
        gpu=gpu,
        why_no_gpu=reason,
        memory_nbytes=min([available_nbytes(), *_container_nbytes()]),
        disk_nbytes=shutil.disk_usage(next(place for place in (work, *work.parents) if place.exists())).free,
        cpu_count=cpu_count(),
        system=f"{platform.system()} {platform.release()}",
    )


def _container_nbytes() -> list[int]:
    """What the container may still take, where it has a limit: the kernel's own figure does not know of it."""
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        try:
            return [int((_CGROUP / limit).read_text()) - int((_CGROUP / used).read_text())]
        except (OSError, ValueError):  # not there, or "max"
            continue
    return []


def _versions() -> dict[str, str | None]:
    """Of each module, without importing it; a name says which distribution it is from, "unknown" if nothing does."""
    homes = importlib.metadata.packages_distributions()
    found: dict[str, str | None] = {}
    for name in _FALLS_AWAY:
        there = importlib.util.find_spec(name) is not None
        found[name] = importlib.metadata.version(homes[name][0]) if there and name in homes else "unknown" if there else None
    return found


def _program(name: str) -> str | None:
    more = [str(path) for pattern in ("cuda/bin", "cuda-*/bin", "cuda*/compute-sanitizer") for path in sorted(Path("/usr/local").glob(pattern))]
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), *more]))


def module_command(module: str, *, rehearsal: bool) -> tuple[str, ...]:
    """The command that runs a module with this Python; in a rehearsal with the fake GPU in place of CUDA."""
    through = ("sllm_mini.lab.report.rehearsal",) if rehearsal else ()
    return (sys.executable, "-m", *through, module)


def _ask_for_gpu(rehearsal: bool) -> tuple[dict[str, Any] | None, str | None]:
    try:
        done = subprocess.run(
            module_command("sllm_mini.lab.report.host", rehearsal=rehearsal), stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=_TIMEOUT_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, f"asking for it took longer than {_TIMEOUT_SECONDS} s"
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        return None, last_line(done.stderr) or "no reason was given"
    return answer["gpu"], answer["reason"]


def _gpu_facts() -> dict[str, Any]:
    from sllm_mini.device.cuda import cuda_device, why_no_cuda

    reason = why_no_cuda()
    if reason is not None:
        return {"gpu": None, "reason": reason}
    device = cuda_device(0)
    return {"gpu": {"free_nbytes": device.free_nbytes(), **asdict(device.properties())}, "reason": None}


if __name__ == "__main__":
    print(json.dumps(_gpu_facts()))
