"""A transformers model made around the loader's tensors: a skeleton on the meta device, then filled.

No second copy of the weights ever exists: parameters are the loaded views themselves. The skeleton is built while the
bytes are being read. Buffers that no checkpoint holds (rotary frequencies, masks) are computed by the model's own
code, so they are right by construction. Taught in chapters 00 and 01.
"""

from __future__ import annotations

import os
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from sllm_mini.checkpoint import quantised
from sllm_mini.checkpoint.composite import is_plain
from sllm_mini.checkpoint.directory import Checkpoint, open_checkpoint
from sllm_mini.checkpoint.dtypes import ITEM_NBYTES, torch_dtype
from sllm_mini.device import get_device
from sllm_mini.device.base import Device
from sllm_mini.errors import ModelError, SllmError
from sllm_mini.loading.flow import LoadOptions
from sllm_mini.loading.load import start_load
from sllm_mini.types import Span, SpanRecorder, Warmth

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_patch_lock = threading.Lock()


def load_model(
    path: str | os.PathLike[str] | Checkpoint,
    device: str | Device = "cpu",
    *,
    verify: bool = True,
    options: LoadOptions | None = None,
    recorder: SpanRecorder | None = None,
) -> PreTrainedModel:
    """A transformers causal language model with the checkpoint's weights, in evaluation mode.

    Gives the outputs of `from_pretrained` on the same weights bit for bit. `recorder` gets the spans "skeleton",
    "wait for bytes" and "fill", and "bytes", the whole load, on the lane "loader". Raises what `start_load` and
    `LoadHandle.wait` raise, and ModelError for a checkpoint without a usable configuration or whose tensors are not
    those of the model. Safe from several threads.
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    target = get_device(device)
    span = recorder.span if recorder is not None else lambda *_args, **_options: nullcontext()
    with start_load(checkpoint, target, verify=verify, options=options) as handle:
        with span("skeleton", warmth=Warmth.DRAM):
            model = build_skeleton(checkpoint)
        with span("wait for bytes", warmth=Warmth.DEVICE):
            tensors = handle.wait()
        if recorder is not None:
            started = handle.report.started
            recorder.spans.append(Span("bytes", started, started + handle.report.seconds, "loader", checkpoint.nbytes, Warmth.DEVICE))
    with span("fill", warmth=Warmth.DEVICE):
        fill(model, tensors, target.name, checkpoint)
    return model


def build_skeleton(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model that `config.json` describes: parameters on the meta device, buffers real, nothing initialised."""
    if not any(companion.file == "config.json" for companion in checkpoint.index.companions):
        raise ModelError(f"{checkpoint.path}: the checkpoint carries no config.json, so no model can be built; load_tensors still works")
    checkpoint.read_companion("config.json")  # its hash is checked before anything believes it
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
        _check_quantisation(getattr(config, "quantization_config", None), checkpoint)
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config, dtype=_model_dtype(config, checkpoint))
        if any(companion.file == "generation_config.json" for companion in checkpoint.index.companions):
            checkpoint.read_companion("generation_config.json")
            model.generation_config = GenerationConfig.from_pretrained(checkpoint.path, local_files_only=True)
    except SllmError:
        raise
    except Exception as error:  # transformers and torch raise whatever they like at a configuration that makes no sense
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{checkpoint.path}: config.json does not describe a causal language model that can be built: {reason}") from error
    return model.eval()


def _check_quantisation(asked: Any, checkpoint: Checkpoint) -> None:
    """Raises ModelError unless the checkpoint's own weights are all that the configuration asks for."""
    kept = any(composite.kind in quantised.KINDS for composite in checkpoint.index.composites)
    if kept:
        quantised.import_torchao()  # it takes seconds, and the bytes are on their way meanwhile
    if asked is None:
        return
    method = asked.get("quant_method") if isinstance(asked, Mapping) else getattr(asked, "quant_method", None)
    if str(getattr(method, "value", method)) != "torchao":
        raise ModelError(f"{checkpoint.path}: config.json asks for quantised modules of another kind than torchao's, which load_model does not build; load_tensors still works")
    if not kept:
        raise ModelError(f"{checkpoint.path}: config.json says that torchao quantised the weights, and the checkpoint holds none of its tensors; convert the model again")


def _model_dtype(config: Any, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype `from_pretrained` would choose: the configuration's, else the one most bytes are stored in."""
    named = getattr(config, "dtype", None)
    if named is not None:
        return torch_dtype(str(named).removeprefix("torch."))
    nbytes: dict[str, int] = {}
    for tensor in checkpoint.index.tensors:
        if tensor.dtype.startswith(("float", "bfloat")) and ITEM_NBYTES[tensor.dtype] > 1:
            nbytes[tensor.dtype] = nbytes.get(tensor.dtype, 0) + tensor.nbytes
    return torch_dtype(max(nbytes, key=lambda name: nbytes[name], default="float32"))


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """While it lasts, each parameter that this thread registers in a module moves to the meta device at once, before
    any initialisation can touch its memory; what would draw numbers for it there does nothing, as a decomposition of
    torch's would otherwise go through all steps of that. Buffers stay real. The idea is accelerate's `init_empty_weights`."""
    import torch
    from torch.overrides import TorchFunctionMode

    thread = threading.get_ident()
    draws = {getattr(torch.Tensor, name) for name in ("normal_", "uniform_", "fill_", "zero_")}

    class NothingIsDrawn(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, given: tuple[Any, ...] = (), named: dict[str, Any] | None = None) -> Any:
            target = given[0] if given else (named or {}).get("tensor")
            if (function in draws or getattr(function, "__module__", "") == "torch.nn.init") and isinstance(target, torch.Tensor) and target.is_meta:
                return target
            return function(*given, **(named or {}))

    with _patch_lock:
        register = torch.nn.Module.register_parameter

        def register_on_meta(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
            register(module, name, parameter)
            if parameter is not None and threading.get_ident() == thread:
                placeholder = torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
                placeholder._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers then draws no numbers for it
                module._parameters[name] = placeholder

        torch.nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign,assignment]
        try:
            with NothingIsDrawn():
                yield
        finally:
            torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def fill(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], device: str, checkpoint: Checkpoint) -> None:
    """Puts loaded tensors in the place of a skeleton's parameters and buffers, and ties what the model ties.

    Raises ModelError if the model lacks a tensor or a shape differs; warns about tensors that it has no place for.
    """
    import torch

    slots = _slots(model)
    matched, unexpected = match_names(model, tensors)
    if unexpected:
        warnings.warn(f"the model has no place for {len(unexpected)} tensors of the checkpoint, such as {unexpected[0]!r}", stacklevel=3)
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for target, source in list(tied.items()):
        if target not in matched or source not in matched:
            continue
        if not is_plain(matched[target]) or not is_plain(matched[source]):
            del tied[target]  # one of them was quantised since, so they are two; comparing them would undo it
        elif matched[target].data_ptr() == matched[source].data_ptr():
            # Saved from a live model: both names, one storage. Tying again is free; comparing them would read both.
            del matched[target]
    for name, tensor in matched.items():
        module, leaf = slots[name]
        _put(module, leaf, name, tensor, checkpoint)
    missing = set(slots) - set(matched)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    for name in sorted(missing):
        module, leaf = slots[name]
        value = module._parameters.get(leaf, module._buffers.get(leaf))
        if value is not None and value.is_meta:
            raise ModelError(f"{checkpoint.path}: the model needs tensor {name!r}, which the checkpoint does not hold; load_tensors still works")
    if device != "cpu":
        for module in model.modules():
            for leaf, value in module._buffers.items():
                if value is not None and value.device.type == "cpu":
                    module._buffers[leaf] = value.to(torch.device(device))


def _slots(model: torch.nn.Module) -> dict[str, tuple[torch.nn.Module, str]]:
    """Every parameter and persistent buffer by its full name, with the module that holds it."""
    slots: dict[str, tuple[torch.nn.Module, str]] = {}
    for prefix, module in model.named_modules():
        start = f"{prefix}." if prefix else ""
        leaves = [leaf for leaf, value in module._parameters.items() if value is not None]
        leaves += [leaf for leaf, value in module._buffers.items() if value is not None and leaf not in module._non_persistent_buffers_set]
        slots.update({start + leaf: (module, leaf) for leaf in leaves})
    return slots


def match_names(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Tensors under the model's own names, and the names it has no place for and does not expect to be left over. A
    checkpoint of the bare model lacks its prefix, or has one too many. Reads no bytes."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    slots = _slots(model)
    prefix = f"{model.base_model_prefix}."
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    renamings = [change for change in get_model_conversion_mapping(model) if isinstance(change, WeightRenaming)]
    matched: dict[str, torch.Tensor] = {}
    unexpected: list[str] = []
    for name, tensor in tensors.items():
        found = next((option for option in (name, prefix + name, name.removeprefix(prefix)) if option in slots), None)
        if found is None:  # transformers has changed some names: GPT-NeoX's head is "embed_out" in files
            renamed, _ = rename_source_key(name, renamings, [])
            found = next((option for option in (renamed, prefix + renamed) if option in slots), None)
        if found is not None and found not in matched:
            matched[found] = tensor
        elif not any(pattern.search(name) for pattern in ignored):
            unexpected.append(name)
    return matched, unexpected


def _put(module: torch.nn.Module, leaf: str, name: str, tensor: torch.Tensor, checkpoint: Checkpoint) -> None:
    import torch

    current = module._parameters.get(leaf)
    place = current if current is not None else module._buffers[leaf]
    if place is None or place.shape != tensor.shape:
        expected = None if place is None else tuple(place.shape)
        raise ModelError(f"{checkpoint.path}: tensor {name!r} has shape {tuple(tensor.shape)} but the model needs {expected}")
    if tensor.dtype != place.dtype and place.is_floating_point():
        if not is_plain(tensor):
            raise ModelError(f"{checkpoint.path}: tensor {name!r} computes in {tensor.dtype} but config.json asks for {place.dtype}; name the former there")
        tensor = tensor.to(place.dtype)  # as from_pretrained does where file and configuration differ
    if current is not None:
        module._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor
