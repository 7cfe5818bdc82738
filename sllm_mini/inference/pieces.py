"""A piece of a model: a transformers model of which only a range of layers has weights, and takes memory. Explained in chapter 10.

A pass begins at the piece's first layer with hidden states that it is given, and ends after its last; embeddings, positions and masks are
the model's own code, so a piece computes what the whole model would. Costs one layer's pass of one token when it is made.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sllm_mini.checkpoint.directory import Checkpoint
from sllm_mini.errors import ModelError

if TYPE_CHECKING:
    import torch


class PieceLeft(Exception):
    """No error: how a pass ends after a piece's last layer, without the norm and the head."""

    def __init__(self, output: Any) -> None:
        self.output = output


def decoder_layers(model: Any) -> tuple[str, Any]:
    """The name and the list of a model's decoder layers. Raises ModelError for a model that has no such list."""
    import torch

    count_ = getattr(model.config, "num_hidden_layers", None)
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList) and len(module) == count_]
    if not found:
        raise ModelError(f"{type(model).__name__} has no one list of its {count_} layers, so it cannot be cut into stages; run it in one place")
    return found[0]


def needed_tensors(checkpoint: Checkpoint, model: Any, start: int, stop: int) -> list[str]:
    """The names of the checkpoint's tensors that layers `start` to `stop` − 1 need. The first range also needs what the model uses before its
    layers (embeddings), the last what it uses after them (norm, head, or the embedding that is tied to it). `model` is a skeleton; reads
    no bytes, and costs a pass of one token on the meta device."""
    from sllm_mini.loading.model import match_names

    names: Mapping[str, Any] = {tensor.name: tensor.name for tensor in checkpoint.index.tensors}
    prefix, layers = decoder_layers(model)
    matched = match_names(model, names)[0]
    ends = {"first"} if start == 0 else set[str]()
    ends |= {"last"} if stop == len(layers) else set()
    sides = _sides(model, prefix) if len(ends) == 1 else {}
    needed = []
    for place, name in matched.items():
        number = int(place[len(prefix) + 1 :].split(".")[0]) if place.startswith(f"{prefix}.") else None
        if start <= number < stop if number is not None else ends & sides.get(place, ends):
            needed.append(str(name))
    return needed


def _sides(model: Any, prefix: str) -> dict[str, set[str]]:
    """For each parameter outside the layers whose module is called, whether that is before them ("first"), after them ("last") or both. A tied one
    counts for its partner. Empty where the model cannot be watched: then both ends need everything."""
    import torch

    twin = copy.deepcopy(model).to("meta")
    layers = decoder_layers(twin)[1]
    now = ["first"]
    sides: dict[str, set[str]] = {}

    def note(places: list[str]) -> None:
        for place in places:
            sides.setdefault(place, set()).update(now)

    def turn(*to: str) -> None:
        now[:] = to

    layers[0].register_forward_pre_hook(lambda *_: turn("first", "last"))  # what is used between layers is nobody's alone
    layers[-1].register_forward_hook(lambda *_: turn("last"))
    for name, module in twin.named_modules():
        own = [f"{name}.{leaf}".lstrip(".") for leaf, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]]
        if own and not f"{name}.".startswith(f"{prefix}."):
            module.register_forward_pre_hook(lambda *_, places=own: note(places))
    try:
        with torch.inference_mode():
            ids = torch.zeros((1, 1), dtype=torch.int64, device="meta")
            # With a mask: to make one, a model looks at values.
            twin(input_ids=ids, position_ids=ids, attention_mask=torch.zeros((1, 1, 1, 1), dtype=twin.dtype, device="meta"), use_cache=False)
    except Exception:  # noqa: BLE001 - models of others: one that looks at values cannot be run without any
        return {}
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for pair in tied.items():
        both = set[str]().union(*(sides.get(place, {"first", "last"}) for place in pair))
        sides |= dict.fromkeys(pair, both)
    return sides


class Piece:
    """Layers `start` to `stop` − 1 of a model, made of the tensors that `needed_tensors` names. What it lacks takes no memory. Passes take
    turns (`given`). Of an image that still arrives, `wait` (`Attachment.wait_for`) returns when a tensor's bytes are there: it is called for each that
    is needed before one is looked at. Raises ModelError for a range that is none, and where `tensors` lack something; what `wait` raises."""

    def __init__(self, checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor], start: int, stop: int, *, wait: Callable[[str], object] = lambda _: None) -> None:
        from sllm_mini.loading.model import build_skeleton

        self.model, self.start, self.stop, self.name = build_skeleton(checkpoint), start, stop, checkpoint.digest
        self.checkpoint = checkpoint
        layers = decoder_layers(self.model)[1]
        if not 0 <= start < stop <= len(layers):
            raise ModelError(f"layers {start} to {stop} are no range of this model's {len(layers)}; give 0 <= start < stop <= {len(layers)}")
        self.last = stop == len(layers)
        needed = needed_tensors(checkpoint, self.model, start, stop)
        lacking = [name for name in needed if name not in tensors]
        if lacking:
            raise ModelError(f"layers {start} to {stop} need {len(lacking)} tensors that are not here, such as {lacking[0]!r}; wait for their bytes")
        for name in needed:
            wait(name)
        _fill(self.model, {name: tensors[name] for name in needed}, checkpoint)
        self._lock = threading.RLock()
        self._inbound: torch.Tensor | None = None
        if start:
            self._in_tuple = isinstance(_output_of(self.model, layers[0]), tuple)
            for layer in layers[:start]:
                layer.forward = self._skip
            layers[start].register_forward_pre_hook(self._enter, with_kwargs=True)
        if not self.last:
            layers[stop - 1].register_forward_hook(_leave)

    @contextmanager
    def given(self, hidden: torch.Tensor | None) -> Iterator[None]:
        """Around a pass: these are the hidden states that its first layer gets, None where that is the model's first."""
        with self._lock:
            self._inbound = hidden
            try:
                yield
            finally:
                self._inbound = None

    def _skip(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden,) if self._in_tuple else hidden

    def _enter(self, _layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._inbound is None:
            return args, kwargs
        return ((self._inbound, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": self._inbound})


def _leave(_layer: Any, _args: Any, output: Any) -> None:
    raise PieceLeft(output)


def _output_of(model: Any, layer: Any) -> Any:
    """What a layer returns, which is a tuple in some models."""
    import torch

    hook = layer.register_forward_hook(_leave)
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=model.get_input_embeddings().weight.device), use_cache=False)
    except PieceLeft as left:
        return left.output
    finally:
        hook.remove()
    raise ModelError(f"{type(model).__name__} does not run its layers one after the other, so it cannot be cut into stages; run it in one place")


def _fill(model: Any, tensors: Mapping[str, torch.Tensor], checkpoint: Checkpoint) -> None:
    """The skeleton with these tensors, and for each that is not among them zeros that take the memory of one element."""
    import torch

    from sllm_mini.loading.model import fill, match_names

    matched = match_names(model, tensors)[0]
    device = next(iter(tensors.values())).device
    present = matched | {}
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    partners = {name for pair in tied.items() if pair[0] in present or pair[1] in present for name in pair}
    for name, place in model.named_parameters(remove_duplicate=False):
        if place.is_meta and name not in present and name not in partners and name not in tied:
            present[name] = torch.zeros((), dtype=place.dtype, device=device).expand(place.shape)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name not in present and name in model.state_dict():
            present[name] = buffer
    fill(model, present, str(device), checkpoint)
