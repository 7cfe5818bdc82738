"""Execute while loading: a model whose layers run as their bytes arrive.

The skeleton is built and filled while bytes are read: its parameters are the loader's views, which exist before their
bytes do. Hooks let each layer of the first pass wait for its own bytes, and are gone after it, so a later pass costs
what it always did. On a GPU a layer is ready once its copies are done, not merely enqueued, so kernels launched after
that, on any stream, see the bytes. Costs about 0.1 ms a layer, once; no byte is moved or copied.

The first token then takes about max(load, prefill) where one after the other takes their sum. λScale, BlitzScale and
HydraServe (reference 13) do this with layers of their own models; here any transformers decoder model will do.
Taught in chapter 04.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from sllm_mini.checkpoint.directory import Checkpoint
from sllm_mini.errors import LoadCancelled, ModelError, SllmError
from sllm_mini.types import Span, SpanRecorder, Warmth

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

WAIT_LANE, COMPUTE_LANE = "wait", "compute"


class Loading(Protocol):
    """What overlap needs of a load under way. `LoadHandle` is one; its docstrings say what each member promises."""

    @property
    def checkpoint(self) -> Checkpoint: ...

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]: ...

    @property
    def layers(self) -> list[str]: ...

    @property
    def done(self) -> bool: ...

    def ready(self, name: str) -> bool: ...

    def wait_for(self, name: str, timeout: float | None = None) -> bool: ...

    def wait(self, timeout: float | None = None) -> Mapping[str, torch.Tensor]: ...

    def cancel(self) -> None: ...


def next_runnable_layer(executed: int, ready: Sequence[bool]) -> int | None:
    """The layer to run now, when the first `executed` layers have run and `ready` says of each layer whether all its
    bytes are there; None if it has to wait for bytes, or if every layer has run.

    Layers run in order, whatever the order in which their bytes arrive. Pure; safe from several threads.
    """
    return executed if executed < len(ready) and ready[executed] else None


class StreamedModel:
    """A model that may run before its last bytes are there. `model` gives the logits of the loaded-then-run model bit for bit.

    `fallback` says why it was loaded whole before it was filled, None where it was not. Until the first complete pass,
    call the model or wait: whoever looks at a parameter directly may see memory that is not filled yet. A pass
    during which the load fails raises the load's error, as every later pass does; no thread of the load is left then
    and no weight is held. Calls to the model: one thread at a time; the rest is safe from several.
    """

    def __init__(self, model: PreTrainedModel, loading: Loading, gate: _Gate | None, fallback: str | None) -> None:
        self.model, self.loading, self.fallback = model, loading, fallback
        self._gate = gate

    @property
    def waits(self) -> bool:
        """True while hooks are in place, that is until the first complete pass, `wait`, or a load without overlap."""
        return self._gate is not None and self._gate.closed

    def wait(self, timeout: float | None = None) -> PreTrainedModel:
        """Waits for the last byte and returns the model, hooks gone. Raises as `LoadHandle.wait` does."""
        try:
            self.loading.wait(timeout)
        except SllmError:
            if self._gate is not None:
                self._gate.fail()
            raise
        if self._gate is not None:
            self._gate.open_all()
        return self.model

    def cancel(self) -> None:
        """Ends the load and gives its memory back; does nothing once it is done. A pass that waits raises LoadCancelled.

        A load that others share goes on without this model: a pass that waits then raises when its bytes are there."""
        if not self.loading.done:
            self.loading.cancel()
        try:
            self.loading.wait(0)
        except (SllmError, TimeoutError):  # it was not done: whoever runs the model learns of it there
            if self._gate is not None:
                self._gate.fail()


def stream_model(loading: Loading, *, recorder: SpanRecorder | None = None, skeleton: PreTrainedModel | None = None) -> StreamedModel:
    """A transformers causal language model around a load that is under way, in evaluation mode, at once.

    `recorder` gets the spans "skeleton" and "fill", and for each layer of the first pass its name on the lanes "wait"
    (for bytes) and "compute" (on a GPU: enqueueing its kernels). A checkpoint that cannot be filled without reading
    bytes (see `StreamedModel.fallback`) is waited for first. `skeleton` is one that was built of this checkpoint before, and is
    filled. Raises what `load_model` raises; the load then goes on, and ending it is the caller's to do. Safe from several
    threads on different loads.
    """
    from sllm_mini.loading.model import build_skeleton, fill

    recorder = recorder or SpanRecorder()
    checkpoint = loading.checkpoint
    with recorder.span("skeleton", warmth=Warmth.DRAM):
        model = build_skeleton(checkpoint) if skeleton is None else skeleton
    tensors = loading.tensors
    device = str(next(iter(tensors.values())).device) if tensors else "cpu"
    fallback = _needs_bytes(model, checkpoint, tensors)
    if fallback is not None:
        with recorder.span("wait for bytes", warmth=Warmth.DEVICE):
            tensors = loading.wait()
    with recorder.span("fill", warmth=Warmth.DEVICE):
        fill(model, tensors, device, checkpoint)
        gate = _Gate(model, loading, recorder) if fallback is None else None
    return StreamedModel(model, loading, gate, fallback)


def _needs_bytes(model: PreTrainedModel, checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Why filling the model would read bytes of the tensors: to convert them, compare them or put them together."""
    from sllm_mini.loading.model import match_names

    if checkpoint.index.composites:
        return f"tensor {checkpoint.index.composites[0].name!r} is put together from parts, for which all of them must be there"
    places = dict(_leaves(model))
    found, _ = match_names(model, tensors)
    for name, tensor in found.items():
        if places[name].is_floating_point() and places[name].dtype != tensor.dtype:
            return f"tensor {name!r} is stored as {tensor.dtype} and config.json asks for {places[name].dtype}, so it is converted"
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for target, source in tied.items():
        if target in found and source in found and found[target].data_ptr() != found[source].data_ptr():
            return f"tensors {target!r} and {source!r} are one in the model and stored twice, so they are compared"
    return None


def _leaves(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


class _Gate:
    """The hooks of one streamed model: each layer waits here for its bytes. Holds no reference to the model, so that
    dropping the model frees it at once."""

    def __init__(self, model: torch.nn.Module, loading: Loading, recorder: SpanRecorder) -> None:
        self._loading, self._recorder = loading, recorder
        self._layers = loading.layers
        self._ready = [False] * len(self._layers)
        self._passed: set[int] = set()
        self._running: tuple[str, float] | None = None
        self._lock = threading.Lock()
        self._failed = False
        self._pass_thread: int | None = None
        self._model = weakref.ref(model)
        # Found by place, not by name: of a tie, and of a checkpoint without the model's prefix, names say little. The
        # bytes of a tie that is saved under two names arrive with the first of its layers.
        positions = {name: position for position, name in enumerate(self._layers)}
        index, tensors = loading.checkpoint.index, loading.tensors
        layer_of: dict[tuple[int, int], int] = {}
        for tensor in index.tensors:
            if tensor.name in tensors:
                layer_of.setdefault(_place(tensors[tensor.name]), positions[index.layers[tensor.layer]])
        self._places = layer_of.keys()
        # Also after a pass that raised, when the weights can be given back.
        self._hooks = [model.register_forward_pre_hook(self._before), model.register_forward_hook(self._after, always_call=True)]
        for module in model.modules():
            own = {layer_of[place] for value in _own(module) if (place := _place(value)) in layer_of}
            below = {layer_of[place] for _, value in _leaves(module) if (place := _place(value)) in layer_of}
            # A module within one layer waits for it even where its parameters are its children's: its code may use them.
            if needed := sorted(below if len(below) == 1 else own):
                self._hooks.append(module.register_forward_pre_hook(_Wait(self, needed)))

    @property
    def closed(self) -> bool:
        return bool(self._hooks)

    def pass_layer(self, position: int) -> None:
        """Returns once the layer at `position` may run. Raises the load's error."""
        if position in self._passed:
            return
        self._end_compute()
        name, started = self._layers[position], time.monotonic()
        try:
            while next_runnable_layer(position, self._look()) != position:
                if self._ready[position]:
                    raise ModelError(f"layer {name!r} has all its bytes and next_runnable_layer({position}, …) does not let it run; it must return {position}")
                self._loading.wait_for(name)
        except SllmError:
            self._loading.cancel()  # whoever gets the error finds no thread of the load left
            self.fail()
            raise
        now = time.monotonic()
        self._recorder.spans.append(Span(name, started, now, WAIT_LANE))
        self._passed.add(position)
        self._running = name, now

    def open_all(self) -> None:
        """Removes the hooks, as every byte is there; a pass under way does so at its end."""
        with self._lock:
            if not self._failed and not self._others_pass():
                self._remove_hooks()

    def fail(self) -> None:
        """Gives the weights back, at the end of the pass if one is under way: its layers may still compute with them.
        The hooks stay, so that every later pass raises the load's error."""
        with self._lock:
            self._failed = True
            if not self._others_pass():
                self._drop_weights()

    def _others_pass(self) -> bool:
        # One of the asking thread's own has ended or is just ending, perhaps by a Ctrl-C, of which torch tells no hook.
        return self._pass_thread not in (None, threading.get_ident())

    def _before(self, _module: torch.nn.Module, _args: Any) -> None:
        with self._lock:
            self._pass_thread = threading.get_ident()
        self._running = None  # of a pass that was interrupted

    def _after(self, _module: torch.nn.Module, _args: Any, _output: Any) -> None:
        """After a pass: one that left out a layer (an expert nobody asked for) keeps the hooks until its bytes are there."""
        self._end_compute()
        with self._lock:
            self._pass_thread = None
            if self._failed:
                return self._drop_weights()
        try:
            if len(self._passed) == len(self._layers) or all(self._look()):
                self.open_all()
        except SllmError:
            self._loading.cancel()
            self.fail()
            raise

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _drop_weights(self) -> None:
        import torch

        self._passed.clear()
        self._ready = [False] * len(self._layers)
        model = self._model()
        for module in model.modules() if model is not None else ():
            for leaf, value in module._parameters.items():
                if value is not None and _place(value) in self._places:
                    module._parameters[leaf] = torch.nn.Parameter(value.detach().to("meta"), requires_grad=False)
            for leaf, buffer in module._buffers.items():
                if buffer is not None and _place(buffer) in self._places:
                    module._buffers[leaf] = buffer.to("meta")

    def _look(self) -> list[bool]:
        self._ready = [known or self._loading.ready(name) for known, name in zip(self._ready, self._layers, strict=True)]
        if self._failed:  # and the load went on, for others
            raise LoadCancelled("the load was cancelled", path=self._loading.checkpoint.path)
        return self._ready

    def _end_compute(self) -> None:
        if self._running is not None:
            name, started = self._running
            self._recorder.spans.append(Span(name, started, time.monotonic(), COMPUTE_LANE, warmth=Warmth.READY))
            self._running = None


class _Wait:
    """The hook of one module: its layers, in the order of their bytes."""

    def __init__(self, gate: _Gate, positions: Sequence[int]) -> None:
        self._gate, self._positions = gate, positions

    def __call__(self, _module: torch.nn.Module, _args: Any) -> None:
        for position in self._positions:
            self._gate.pass_layer(position)


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.nbytes


def _own(module: torch.nn.Module) -> Iterable[torch.Tensor]:
    return [value for value in (*module._parameters.values(), *module._buffers.values()) if value is not None]
