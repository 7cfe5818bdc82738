"""A CUDA graph on the CPU, for the fake GPU: each of torch's operations and each launch is written down and run again.

What is replayed is what was captured, with the tensors' memory and Python's numbers of that time, and results go where
they went then. So host logic that would go wrong on a GPU goes wrong here: a step that reads a Python number that has
changed, or another tensor than the one it was captured with, gives old results, and one that waits for the device is
refused. It says nothing about time. Taught in chapter 06.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sllm_mini.errors import DeviceError

if TYPE_CHECKING:
    import torch

_WAITS = frozenset({"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"})
"""Operations that bring something to the host, which no capture allows."""
_local = threading.local()


def note_launch(work: Callable[[], None]) -> bool:
    """Writes a kernel's launch into this thread's capture and runs it; False, and nothing done, where none is going on."""
    recorded: list[Callable[[], None]] | None = getattr(_local, "recorded", None)
    if recorded is None:
        return False
    recorded.append(work)
    work()
    return True


def capture_work(work: Callable[[], None]) -> Callable[[], None]:
    """Runs `work` once, writing it down, and returns what does the same again. Raises DeviceError if it waits for the
    device or another capture is going on in this thread."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    recorded: list[Callable[[], None]] = []

    class Recorder(TorchDispatchMode):  # type: ignore[misc, unused-ignore]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func._schema.name in _WAITS:
                raise DeviceError(f"a capture cannot wait for the device, and {func._schema.name} does; keep the value on the device")
            out = func(*args, **(kwargs or {}))
            recorded.append(_replayed(func, args, kwargs or {}, out))
            return out

    if getattr(_local, "recorded", None) is not None:
        raise DeviceError("a capture is going on in this thread; end it first")
    _local.recorded = recorded
    try:
        with Recorder():
            work()
    finally:
        _local.recorded = None

    def replay() -> None:
        with torch.inference_mode():
            for one in recorded:
                one()

    return replay


def _replayed(func: Any, args: Any, kwargs: Any, out: Any) -> Callable[[], None]:
    """Does `func` again and puts its results where `out` lies, unless they lie there anyway (views, in-place work)."""
    import torch
    from torch.utils._pytree import tree_leaves

    inputs = {_place(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
    fresh = [isinstance(leaf, torch.Tensor) and _place(leaf) not in inputs for leaf in tree_leaves(out)]

    def again() -> None:
        found = func(*args, **kwargs)
        for is_fresh, target, value in zip(fresh, tree_leaves(out), tree_leaves(found), strict=True):
            if is_fresh:
                target.copy_(value)

    return again


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
