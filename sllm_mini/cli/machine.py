"""`sllm-mini doctor`: what this machine is, what its kernel allows, and the limits no load can beat."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from sllm_mini.cli import terminal
from sllm_mini.cli.terminal import JsonOption
from sllm_mini.lab.units import nbytes_text, rate_text, seconds_text

if TYPE_CHECKING:
    from sllm_mini.device import CudaDevice
    from sllm_mini.loading.probe import Limits, Machine, Measurement

_NAMES = {
    "disk_direct_read": "disk, direct read",
    "disk_buffered_read": "disk, plain read",
    "disk_write": "disk, write",
    "cached_read": "page cache, copied",
    "cached_map": "page cache, mapped",
    "memory_copy": "memory copy",
    "first_touch": "first use of memory",
    "pinned_allocation": "pinning memory",
    "host_to_device_copy": "copy to the GPU",
}
_EXAMPLE_NBYTES = 2_500_000_000
_EXAMPLE = "A model of 1.2 billion 16-bit weights (2.50 GB)"
_BOUNDS = {
    "disk_direct_read": "from this disk",
    "cached_read": "copied from the page cache",
    "host_to_device_copy": "from memory to the GPU",
}


def doctor(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="The directory whose disk is measured: where models are or will be.")
    ] = Path("."),
    quick: Annotated[
        bool, typer.Option("--quick", help="Measure with 128 MiB in some 4 seconds, not with 1 GiB in some 15.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Say what this machine can do, and measure its limits.

    Writes one temporary file into DIR and removes it again.
    """
    from sllm_mini.loading.probe import measure_limits, measure_machine

    with terminal.stage_progress() as stage:
        stage("looking at this machine")
        try:
            machine = measure_machine(directory)
        except OSError as error:
            reason = f"no file can be made there ({error.strerror}); name a directory you may write to"
            raise OSError(error.errno, reason, str(directory)) from error
        device, gpu_reason = _gpu()
        gpu = None if device is None else _gpu_facts(device)
        limits = measure_limits(
            directory, device=device, quick=quick, on_stage=lambda words: stage(f"measuring {words}")
        )
    if json:
        terminal.emit_json(_document(machine, gpu, gpu_reason, limits))
        return
    console = terminal.stdout_console()
    console.print(_machine_table(machine, gpu, gpu_reason))
    console.print()
    console.print(_abilities_table(machine))
    console.print()
    console.print(_limits_table(limits))
    for skipped in limits.skipped:
        console.print(f"not measured: {skipped.name}: {skipped.reason}", style="yellow")
    console.print()
    for line in _meaning(machine, limits):
        console.print(line, width=min(console.width, terminal.TEXT_WIDTH))


def _gpu() -> tuple[CudaDevice | None, str]:
    """The first GPU, or None with the reason why there is none."""
    from sllm_mini.device import why_no_cuda
    from sllm_mini.device.cuda import cuda_device

    reason = why_no_cuda()
    return (cuda_device(0), "") if reason is None else (None, reason)


def _gpu_facts(gpu: CudaDevice) -> dict[str, Any]:
    return {"name": gpu.name, "free_nbytes": gpu.free_nbytes(), **asdict(gpu.properties())}


def _document(machine: Machine, gpu: dict[str, Any] | None, gpu_reason: str, limits: Limits) -> dict[str, Any]:
    from sllm_mini.loading.probe_samples import measurement_row

    skipped = [asdict(entry) for entry in limits.skipped]
    if gpu is None:
        skipped.append({"name": "host_to_device_copy", "reason": gpu_reason})
    return {
        "machine": asdict(machine) | {"gpu": gpu},
        "limits": {f"{name}_bytes_per_second": rate for name, rate in limits.bytes_per_second().items()},
        "results": [measurement_row(m) for m in limits.measurements],
        "skipped": skipped,
    }


def _machine_table(machine: Machine, gpu: dict[str, Any] | None, gpu_reason: str) -> Table:
    installed = " · ".join(f"{name} {version}" for name, version in machine.packages.items() if version)
    absent = ", ".join(name for name, version in machine.packages.items() if not version)
    memory = f"{nbytes_text(machine.memory_nbytes)}, {nbytes_text(machine.memory_available_nbytes)} available"
    return terminal.facts(
        {
            "processor": f"{machine.processor}, {terminal.count(machine.cpu_count, 'core')} for us ({machine.architecture})",
            "memory": memory,
            "GPU": f"{gpu['model']}, {nbytes_text(gpu['free_nbytes'])} of {nbytes_text(gpu['total_nbytes'])} free"
            if gpu
            else f"none: {gpu_reason}",
            "kernel": f"Linux {machine.kernel}",
            "python": f"{machine.python} · {installed}" + (f" (not installed: {absent})" if absent else ""),
            "directory": f"{machine.directory} ({machine.file_system}, {nbytes_text(machine.free_nbytes)} free)",
        }
    )


def _abilities_table(machine: Machine) -> Table:
    direct = machine.direct_io
    rows = [
        (
            direct.works,
            "direct I/O",
            f"reads around the page cache, in blocks of {direct.block_nbytes} bytes" if direct.works else direct.reason,
        ),
        (machine.huge_page_mode in ("always", "madvise"), "huge pages", _HUGE_PAGES[machine.huge_page_mode]),
    ]
    rows += [
        (a.works, a.name, _ABILITIES[a.name] if a.works else f"{_ABILITIES[a.name]}: {a.reason}")
        for a in machine.abilities
    ]
    made = terminal.facts({})
    made.title, made.title_justify, made.title_style = "What this kernel and file system allow", "left", "bold"
    made.columns.clear()
    for style in ("", "dim", ""):
        made.add_column(style=style, no_wrap=style == "dim", overflow="fold")
    for works, name, words in rows:
        made.add_row(Text("yes", style="green") if works else Text("no", style="yellow"), name, words)
    return made


_HUGE_PAGES = {
    "always": "always given",
    "madvise": "given to memory that asks, as ours does",
    "never": "switched off; fresh memory costs more page faults",
    "unknown": "the kernel does not say",
}
_ABILITIES = {
    "cachestat": "tells what the page cache holds, without touching it",
    "mincore": "tells the same of a mapped file",
    "populate_write": "backs memory with pages before it is needed",
    "io_uring": "many reads per system call (only reported)",
}


def _limits_table(limits: Limits) -> Table:
    made = terminal.table(
        "limit",
        "how",
        "median",
        "slowest to fastest",
        numbers=("median", "slowest to fastest"),
        title="Limits of this machine",
    )
    for name, words in _NAMES.items():
        best = limits.best(name)
        group = [m for m in limits.measurements if m.name == name]
        for number, m in enumerate(group):
            style = "bold green" if m is best and len(group) > 1 else ""
            made.add_row(
                words if number == 0 else "", m.setting, Text(rate_text(m.bytes_per_second), style=style), _range(m)
            )
    return made


def _range(m: Measurement) -> str:
    if len(m.samples_seconds) == 1:
        return "one sample"
    return f"{nbytes_text(m.nbytes / m.seconds_max)} – {nbytes_text(m.nbytes / m.seconds_min)}"


def _meaning(machine: Machine, limits: Limits) -> list[str]:
    """What the figures say, for a reader who meets them for the first time."""
    bounds = [
        f"{seconds_text(_EXAMPLE_NBYTES / best.bytes_per_second)} {words}"
        for name, words in _BOUNDS.items()
        if (best := limits.best(name)) is not None
    ]
    lines = (
        [f"{_EXAMPLE} needs at least " + ", ".join(bounds) + ". These are the medians above: a loader that takes much longer leaves room."]
        if bounds
        else []
    )
    if machine.directory_is_in_memory:
        lines.append(
            f"{machine.directory} lives in memory ({machine.file_system}), so its disk figures are figures of memory."
        )
    small, huge = (
        next((m for m in limits.measurements if m.name == "first_touch" and m.setting == s), None)
        for s in ("4 KiB pages", "huge pages")
    )
    if small and huge and huge.bytes_per_second > 1.5 * small.bytes_per_second:
        lines.append(
            f"Fresh memory is ready {huge.bytes_per_second / small.bytes_per_second:.1f} times faster in huge pages than in 4 KiB pages."
        )
    return lines
