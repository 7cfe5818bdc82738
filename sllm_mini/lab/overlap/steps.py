"""A model run layer by layer as its bytes are handed out one layer at a time, in any order: which layer may run when.

The bytes come from a real checkpoint, the real hooks wait for them, and time is replaced by steps: the next layer is
handed out once nothing more can run with those there. So the outcome is the same on every machine. Costs the model's
bytes twice in memory; for tiny models. Shown in chapter 04.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sllm_mini.checkpoint import Checkpoint
from sllm_mini.errors import LoadCancelled, LoadError
from sllm_mini.inference.overlap import stream_model
from sllm_mini.lab.style import INK, MUTED, color_of, darker, use_style
from sllm_mini.loading.plan import plan_load
from sllm_mini.loading.restore import restore_tensors
from sllm_mini.types import Progress

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes

_CHUNK_NBYTES, _GRANULE_NBYTES = 1 << 21, 4096
_NOT_THERE = 0xFF
"""A float made of such bytes is not a number, so a layer that runs too early gives logits that are none."""
_PATIENCE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Step:
    """The layer whose bytes came, and the layers that ran because of it, in order."""

    delivered: str
    ran: tuple[str, ...]


class HandedOut:
    """A load (see `inference.overlap.Loading`) whose layers come when `deliver` says so, until `fail`. Safe from several threads."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        import torch

        self.checkpoint = checkpoint
        plan = plan_load(checkpoint.index, lambda _: 0, devices=1, names=None, chunk_nbytes=_CHUNK_NBYTES, granule=_GRANULE_NBYTES)
        self._places = list(plan.places(0))
        stored = bytearray(b"".join((checkpoint.path / partition.file).read_bytes() for partition in checkpoint.index.partitions))
        self._stored = torch.frombuffer(stored, dtype=torch.uint8)
        self._memory = torch.full_like(self._stored, _NOT_THERE)
        self._tensors = restore_tensors(self._memory, self._places)
        self._there: set[str] = set()
        self._asked: str | None = None
        self._ended = False
        self._error: LoadError | None = None
        self._changed = threading.Condition()

    def deliver(self, layer: str) -> None:
        """Puts the bytes of one layer in place. Raises ValueError for a layer that the checkpoint does not have, and the
        load's error once it has failed."""
        self._raise_if_failed()
        number = self.layers.index(layer)
        for entry, offset in self._places:
            if entry.layer == number:
                self._memory[offset : offset + entry.nbytes] = self._stored[offset : offset + entry.nbytes]
        with self._changed:
            self._there.add(layer)
            self._changed.notify_all()

    def fail(self, error: LoadError) -> None:
        """Ends the load with `error` and lets go of its memory, unless it has ended already."""
        with self._changed:
            if not self.done:
                self._error = error
                self._tensors, self._memory = {}, self._memory[:0].clone()
                self._changed.notify_all()

    def settle(self) -> str | None:
        """Waits until the model waits for a layer that is not there, and names it; None once its pass has ended."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._ended or (self._asked is not None and self._asked not in self._there), _PATIENCE_SECONDS):
                raise TimeoutError(f"the model neither waited nor ended within {_PATIENCE_SECONDS:.0f} seconds")
            return None if self._ended else self._asked

    def end(self) -> None:
        """To be called when the pass is over."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        self._raise_if_failed()
        return self._tensors

    @property
    def layers(self) -> list[str]:
        return list(self.checkpoint.index.layers)

    @property
    def progress(self) -> Progress:
        return Progress(len(self._there), len(self.layers))

    @property
    def done(self) -> bool:
        return self._error is not None or len(self._there) == len(self.layers)

    def ready(self, name: str) -> bool:
        self._raise_if_failed()
        return name in self._there

    def wait_for(self, name: str, timeout: float | None = None) -> bool:
        with self._changed:
            self._asked = name
            self._changed.notify_all()
            arrived = self._changed.wait_for(lambda: self._error is not None or name in self._there, timeout)
            self._raise_if_failed()
            return arrived

    def wait(self, timeout: float | None = None) -> Mapping[str, torch.Tensor]:
        for name in self.layers:
            self.wait_for(name, timeout)
        return self._tensors

    def cancel(self) -> None:
        self.fail(LoadCancelled("the load was cancelled", path=self.checkpoint.path))

    def _raise_if_failed(self) -> None:
        if self._error is not None:
            raise self._error.with_traceback(None)


def run_steps(checkpoint: Checkpoint, order: Sequence[str], prompt: Sequence[int]) -> tuple[list[Step], torch.Tensor]:
    """Runs one pass over `prompt` while layers are handed out in `order`; the steps, and the logits of the last position.

    Raises ValueError unless `order` names every layer once. Uses one thread beside the caller's, which has ended.
    """
    import torch

    loading = HandedOut(checkpoint)
    if sorted(order) != sorted(loading.layers):
        raise ValueError(f"the order must name each of the {len(loading.layers)} layers once: {', '.join(loading.layers)}")
    model = stream_model(loading).model
    found: list[torch.Tensor] = []

    def run() -> None:
        try:
            with torch.inference_mode():
                found.append(model(input_ids=torch.tensor([list(prompt)])).logits[0, -1])
        finally:
            loading.end()

    thread = threading.Thread(target=run, name="sllm-steps", daemon=True)
    thread.start()
    steps: list[Step] = []
    try:
        layers = loading.layers
        ran = _position(layers, loading.settle())
        for layer in order:
            loading.deliver(layer)
            now = _position(layers, loading.settle())
            steps.append(Step(layer, tuple(layers[ran:now])))
            ran = now
    finally:
        loading.cancel()
        thread.join()
    return steps, found[0]


def _position(layers: Sequence[str], waits_for: str | None) -> int:
    """How many layers have run when the model waits for one."""
    return len(layers) if waits_for is None else layers.index(waits_for)


def plot_steps(runs: Mapping[str, Sequence[Step]]) -> Axes:
    """One panel for each order: step by step, whose bytes came (circle) and which layers ran (square). Draws, never runs.

    Returns the first panel's axes. Raises ValueError without runs.
    """
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    if not runs:
        raise ValueError("there are no steps to draw; make some with `run_steps`")
    use_style()
    figure, panels = pyplot.subplots(1, len(runs), figsize=(7.2, 3.1), sharey=True, squeeze=False, layout="constrained")
    come, run = color_of("disk"), color_of("compute")
    for ax, (title, steps) in zip(panels[0], runs.items(), strict=True):
        layers = _layers_of(steps)
        for number, step in enumerate(steps, 1):
            for layer in step.ran:
                ax.plot(number, layers.index(layer), "s", markersize=15, color=run, markeredgecolor=darker(run))
            ax.plot(number, layers.index(step.delivered), "o", markersize=7, color=come, markeredgecolor=darker(come))
        ax.set_title(title)
        ax.set_xlabel("step: one layer's bytes come")
        ax.set_xticks(range(1, len(steps) + 1))
        ax.set_xlim(0.3, len(steps) + 0.7)
        ax.set_ylim(len(layers) - 0.4, -0.6)
        ax.set_yticks(range(len(layers)), [layer.removeprefix("model.") for layer in layers])
        ax.tick_params(axis="y", length=0, labelcolor=INK)
        ax.tick_params(axis="x", labelcolor=MUTED)
    handles = [
        Line2D([], [], linestyle="", marker="o", markersize=7, color=come, markeredgecolor=darker(come), label="its bytes come"),
        Line2D([], [], linestyle="", marker="s", markersize=11, color=run, markeredgecolor=darker(run), label="it runs"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    first: Axes = panels[0][0]
    return first


def _layers_of(steps: Sequence[Step]) -> list[str]:
    """All layers in the order in which they ran, which is execution order."""
    return [layer for step in steps for layer in step.ran]


def steps_text(runs: Mapping[str, Sequence[Step]]) -> str:
    """Of each order, after how many layers the first one ran and how many ran with the last bytes."""
    parts = []
    for title, steps in runs.items():
        first = next(number for number, step in enumerate(steps, 1) if step.ran)
        parts.append(f"{title}: the first layer runs after {first} of {len(steps)} layers have come, and {len(steps[-1].ran)} of them run only when the last has.")
    return " ".join(parts)


def steps_alt_text(runs: Mapping[str, Sequence[Step]]) -> str:
    """What `plot_steps` shows, in words."""
    told = []
    for title, steps in runs.items():
        each = "; ".join(f"{number}: {step.delivered} comes, {', '.join(step.ran) or 'nothing'} runs" for number, step in enumerate(steps, 1))
        told.append(f"{title}, step {each}.")
    return " ".join([*told, steps_text(runs)])
