"""What a chapter finds on this machine, before it starts: the day, what is here, what is missing, and what that means.

`check_environment` never raises because something optional is absent: it says what the reader will see instead. Costs
the import of torch (which every chapter needs anyway) and the probes of `loading.probe`, some milliseconds. Shown at
the top of every chapter.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass
from typing import Literal

from sllm_mini.device.cpu import available_nbytes, cpu_count
from sllm_mini.device.cuda import cuda_device, why_no_cuda
from sllm_mini.errors import SllmError
from sllm_mini.lab.table import Table
from sllm_mini.lab.units import nbytes_text
from sllm_mini.loading.probe import Machine, measure_machine, processor_model

Status = Literal["ok", "limited", "missing"]

CAPTION = "This machine"
"""Of the table that a chapter opens with; who reads an executed chapter finds its machine and day by it."""
_NEEDED = ("torch", "transformers", "tokenizers", "safetensors", "msgspec", "numpy", "xxhash", "matplotlib")
_OPTIONAL = {
    "ipywidgets": "sliders are not shown; every picture is there all the same",
    "cupy": "no GPU is used; install the cuda12 or cuda13 extra on a machine that has one",
}
_SMALL_MEMORY_NBYTES = 2_000_000_000
_SMALL_DISK_NBYTES = 2_000_000_000


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact: its `name`, the `value` found, and in `meaning` what it means for the reader."""

    name: str
    value: str
    status: Status = "ok"
    meaning: str = ""


@dataclass(frozen=True, slots=True)
class Environment:
    """What `check_environment` found; shown as a table by a notebook, printed as one by `print`."""

    findings: tuple[Finding, ...]

    def __getitem__(self, name: str) -> Finding:
        for finding in self.findings:
            if finding.name == name:
                return finding
        raise KeyError(f"nothing called {name!r} was looked at; there are {', '.join(f.name for f in self.findings)}")

    @property
    def ready(self) -> bool:
        """True where nothing that the chapters need is missing."""
        return all(finding.status != "missing" for finding in self.findings)

    def table(self) -> Table:
        limited = sum(finding.status == "limited" for finding in self.findings)
        missing = [finding.name for finding in self.findings if finding.status == "missing"]
        if missing:
            verdict = f"Missing: {', '.join(missing)}. What to do stands in the table."
        elif limited:
            verdict = f"Everything the chapters need is here; {limited} {'thing is' if limited == 1 else 'things are'} limited, as said in the table."
        else:
            verdict = "Everything the chapters need is here."
        return Table(
            headers=("what", "found", "state", "what it means"),
            rows=tuple((f.name, f.value, f.status, f.meaning) for f in self.findings),
            caption=CAPTION,
            note=verdict,
        )

    def __str__(self) -> str:
        return str(self.table())

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return self.table()._repr_mimebundle_()


def check_environment(directory: str | os.PathLike[str] = ".") -> Environment:
    """Looks at this machine as seen from `directory`, where a 128 kB file is made and removed to try direct I/O.

    Never raises for something that is absent. Call from one thread at a time.
    """
    return Environment(
        (
            _date(),
            Finding("python", platform.python_version()),
            _system(),
            *_packages(),
            _processor(),
            _memory(),
            *_directory(directory),
            _gpu(),
        )
    )


def _date() -> Finding:
    # By UTC, as the notebook's own metadata.
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return Finding("date", today, meaning="figures on this page are from this day and this machine, where none other is named")


def _system() -> Finding:
    release = platform.release()
    if sys.platform != "linux":
        return Finding(
            "system", f"{platform.system()} {release}", "limited", "direct reads, shared memory and huge pages need Linux: use WSL2 or a container"
        )
    name = "WSL2, Linux" if "microsoft" in release.lower() else "Linux"
    return Finding("system", f"{name} {release}")


def _version(package: str) -> str | None:
    if package == "cupy":  # its wheels are named after the CUDA they are built for
        names = [name for name in (dist.name for dist in importlib.metadata.distributions()) if name and name.startswith("cupy")]
        return importlib.metadata.version(names[0]) if names else None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages() -> list[Finding]:
    versions = {name: _version(name) for name in _NEEDED}
    absent = [name for name, version in versions.items() if version is None]
    text = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    findings = [
        Finding("packages", text, "missing", f"{', '.join(absent)} not installed; run make setup, or pip install 'sllm_mini[lab]'")
        if absent
        else Finding("packages", text)
    ]
    for name, meaning in _OPTIONAL.items():
        version = _version(name)
        findings.append(Finding(name, version) if version else Finding(name, "not installed", "limited", meaning))
    return findings


def _processor() -> Finding:
    cores = cpu_count()
    model = processor_model()
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of it is broken
        return Finding("processor", f"{model}, {cores} cores", "missing", f"torch cannot be imported ({error}); run make setup again")
    threads = torch.get_num_threads()
    value = f"{model}, {cores} {'core' if cores == 1 else 'cores'}, torch computes on {threads} {'thread' if threads == 1 else 'threads'}"
    if threads > cores:
        return Finding("processor", value, "limited", f"more threads than cores slow each other down; set OMP_NUM_THREADS={cores}")
    if cores < 2:
        return Finding("processor", value, "limited", "one core cannot read and compute at once: overlap will show little gain")
    return Finding("processor", value)


def _memory() -> Finding:
    available = available_nbytes()
    if not available:
        return Finding("memory", "unknown", "limited", "the system does not say how much is free; large examples may fail")
    if available < _SMALL_MEMORY_NBYTES:
        return Finding("memory", f"{nbytes_text(available)} available", "limited", "the chapters shrink their models to fit; close other programs for more")
    return Finding("memory", f"{nbytes_text(available)} available")


def _directory(directory: str | os.PathLike[str]) -> list[Finding]:
    try:
        machine = measure_machine(directory)
    except OSError as error:
        reason = f"{os.fspath(directory)}: {error.strerror or error}"
        return [Finding("disk", reason, "missing", "nothing can be measured there; name a directory that you may write to")]
    return [_disk(machine), _direct_io(machine), _huge_pages(machine)]


def _disk(machine: Machine) -> Finding:
    value = f"{nbytes_text(machine.free_nbytes)} free on {machine.file_system}"
    if machine.directory_is_in_memory:
        return Finding("disk", value, "limited", f"{machine.directory} lives in memory, so its disk figures are figures of memory")
    if machine.free_nbytes < _SMALL_DISK_NBYTES:
        return Finding("disk", value, "limited", "the chapters shrink their models to fit; free some space for more")
    return Finding("disk", value)


def _direct_io(machine: Machine) -> Finding:
    if machine.direct_io.works:
        return Finding("direct I/O", f"yes, blocks of {machine.direct_io.block_nbytes} bytes")
    return Finding("direct I/O", f"no: {machine.direct_io.reason}", "limited", "reads go through the page cache, so a cold disk is measured less exactly")


_HUGE_PAGES: dict[str, tuple[Status, str]] = {
    "always": ("ok", ""),
    "madvise": ("ok", "given to memory that asks for them, as ours does"),
    "never": ("limited", "fresh memory costs several times more page faults; chapter 02 measures it"),
    "unknown": ("limited", "the kernel does not say; fresh memory may cost more page faults"),
}


def _huge_pages(machine: Machine) -> Finding:
    status, meaning = _HUGE_PAGES.get(machine.huge_page_mode, _HUGE_PAGES["unknown"])
    return Finding("huge pages", machine.huge_page_mode, status, meaning)


def _gpu() -> Finding:
    elsewhere = "everything runs on the processor"
    reason = why_no_cuda()
    if reason is not None:
        return Finding("GPU", "none", "limited", f"{reason}; {elsewhere}")
    try:
        device = cuda_device()
        return Finding("GPU", f"{device.properties().model}, {nbytes_text(device.free_nbytes())} free")
    except SllmError as error:
        return Finding("GPU", "none", "limited", f"{error}; {elsewhere}")
