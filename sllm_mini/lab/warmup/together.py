"""Two fresh processes that want one kernel that is nowhere yet, at the same moment: one builds, the other waits.

Each says when it is ready (libraries imported, the compiler's version known) and both are let go together, so what is drawn
is only the cache, the lock and the compiler. Two processes, a few seconds. Shown in chapter 06.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sllm_mini.errors import DeviceError, ModelError
from sllm_mini.lab.children import last_line
from sllm_mini.lab.style import color_of, darker, use_style
from sllm_mini.lab.units import seconds_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CHILD = "sllm_mini.lab.warmup.together"
_COLORS = {"cache": "disk", "lock": "wait", "compile": "cold", "write": "dram"}
_MEANING = {"cache": "look into the cache", "lock": "wait for the lock", "compile": "compile", "write": "write to the cache"}


@dataclass(frozen=True, slots=True)
class Asker:
    """One process's way to the kernel. `begun`: when it was let go, by the machine's clock; `seconds` by step, in the order
    in which the steps first happened (a second look into the cache is counted with the first); `digest` of the code."""

    pid: int
    state: str
    begun: float
    seconds: Mapping[str, float]
    digest: str

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


def why_no_nvrtc() -> str | None:
    """Why kernels cannot be compiled here, with what to do about it; None if they can."""
    if importlib.util.find_spec("cupy") is None:
        return 'cupy is not installed, through which kernels are compiled; pip install "sllm_mini[cuda13]"'
    from sllm_mini.device.cuda import NvrtcCompiler

    try:
        NvrtcCompiler().version  # noqa: B018 - asking loads it
    except DeviceError as error:
        return str(error)
    return None


def ask_together(cache: Path, *, count: int = 2, architecture: str = "sm_90") -> list[Asker]:
    """Lets `count` processes ask for decode attention's kernel in an empty `cache` at once; whoever built it comes first.
    Raises ModelError with a child's last word if one fails."""
    arguments = json.dumps({"cache": str(cache), "architecture": architecture})
    with ExitStack() as stack:
        children = []
        for _ in range(count):
            child = subprocess.Popen([sys.executable, "-m", CHILD, arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            stack.enter_context(child)  # closes its pipes and waits for it
            stack.callback(child.kill)
            children.append(child)
        for child in children:
            if child.stdout is None or child.stdin is None or child.stdout.readline() != "ready\n":
                raise ModelError(f"a process that was to ask for a kernel did not get ready: {last_line(child.communicate()[1])}")
        for child in children:
            if child.stdin is not None:
                child.stdin.write("go\n")
                child.stdin.flush()
        found = []
        for child in children:
            out, err = child.communicate(timeout=300)
            if child.returncode:
                raise ModelError(f"a process that asked for a kernel failed: {last_line(err)}")
            found.append(Asker(child.pid, **json.loads(out.splitlines()[-1])))
    return sorted(found, key=lambda one: one.state != "just in time")


def plot_askers(askers: Sequence[Asker], ax: Axes | None = None) -> Axes:
    """A bar for each process, its steps one after the other, on one clock. Raises ValueError without a process. Not safe
    while another thread draws."""
    from matplotlib import pyplot

    if not askers:
        raise ValueError("nobody asked for a kernel; let two processes ask")
    if ax is None:
        use_style()
        _, ax = pyplot.subplots(figsize=(7.2, 1.3 + 0.5 * len(askers)), layout="constrained")
    first, seen = min(one.begun for one in askers), set[str]()
    for row, one in enumerate(askers):
        left = one.begun - first
        for step, seconds in one.seconds.items():
            if step not in _COLORS:
                continue
            color = color_of(_COLORS[step])
            ax.barh(row, 1e3 * seconds, left=1e3 * left, height=0.55, color=color, edgecolor=darker(color), linewidth=0.5, label=None if step in seen else _MEANING[step])
            seen.add(step)
            left += seconds
        ax.annotate(f" {one.state}", (1e3 * left, row), va="center", fontsize=9)
    ax.set_yticks(range(len(askers)), [f"process {row + 1}" for row in range(len(askers))])
    ax.set_ylim(len(askers) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    ax.set_xlim(0, 1.25e3 * max(one.begun - first + one.total_seconds for one in askers))
    ax.set_xlabel("milliseconds since the first was let go")
    ax.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=4, frameon=False)
    return ax


def askers_text(askers: Sequence[Asker]) -> str:
    """What happened, in words."""
    said = []
    for number, one in enumerate(askers, 1):
        waited = f", of which waiting for the lock {seconds_text(one.seconds['lock'])}" if "lock" in one.seconds else ""
        compiled = f", compiling {seconds_text(one.seconds['compile'])}" if "compile" in one.seconds else ", compiling nothing"
        said.append(f"Process {number} got it {one.state} after {seconds_text(one.total_seconds)}{waited}{compiled}.")
    same = len({one.digest for one in askers}) == 1
    return " ".join([*said, f"Builds: {sum(one.state == 'just in time' for one in askers)}. The code is {'the same' if same else 'not the same'}."])


def answer_on_signal(cache: str, architecture: str) -> dict[str, Any]:
    """Says when it is ready, waits for a line, and then looks for decode attention's kernel in `cache`. The child."""
    from sllm_mini.device.cuda import NvrtcCompiler
    from sllm_mini.device.kernels_image import KernelFolders, Recipe, find_image
    from sllm_mini.inference.attention import SOURCE, AttentionShape
    from sllm_mini.resources import resource

    compiler, recipe = NvrtcCompiler(), Recipe.of(resource("csrc") / SOURCE, AttentionShape(128, 4, "bfloat16").options, architecture)
    _ = compiler.version  # which loads it
    print("ready", flush=True)
    sys.stdin.readline()
    begun = time.monotonic()
    image = find_image(recipe, KernelFolders((), Path(cache)), compiler)
    return {"begun": begun, "state": image.state, "seconds": image.seconds, "digest": hashlib.sha256(image.data).hexdigest()}


if __name__ == "__main__":
    print(json.dumps(answer_on_signal(**json.loads(sys.argv[1]))))
