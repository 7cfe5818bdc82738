"""What a start makes anew though it does not depend on where the weights lie: a model's skeleton and its tokenizer. Explained in chapter 05.

A process that others are forked from `prepare`s a checkpoint once; each fork may `take` what was made, which costs it nothing: its pages
are shared until they are written to. Of no checkpoint that is another by now: what was made is found by the digest of the index, which
has the hashes of all files that it was made of. Tidal forks functions from initialised templates likewise.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sllm_mini.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sllm_mini.checkpoint.directory import Checkpoint

MOST = 8
"""Templates that are kept; the one that was made first goes. Each holds a tokenizer (some MB to tens of MB) and modules without weights."""
_MOST_TENSORS = 4096
"""Of a model whose skeleton is made within a second or so: nobody can be forked meanwhile."""
_lock = threading.Lock()
_made: OrderedDict[str, Template] = OrderedDict()


@dataclass(frozen=True, slots=True)
class Template:
    """A model with its parameters on the meta device, and its tokenizer where it has one. Whoever takes it has it alone."""

    model: PreTrainedModel
    tokenizer: Any | None


def prepare(path: str | os.PathLike[str]) -> None:
    """Makes the template of a checkpoint, on this thread alone: torch starts none for it. Raises UnsupportedError for a checkpoint
    whose model is not made of its configuration alone, or is very large; what opening it, its model and its tokenizer raise."""
    import torch

    from sllm_mini.checkpoint import open_checkpoint
    from sllm_mini.inference.text import load_tokenizer
    from sllm_mini.loading.model import build_skeleton

    checkpoint = open_checkpoint(path)
    if checkpoint.index.composites or len(checkpoint.index.tensors) > _MOST_TENSORS:
        raise UnsupportedError(f"{checkpoint.path} has quantised weights or more than {_MOST_TENSORS:,} tensors; its model is made at each start")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        made = Template(build_skeleton(checkpoint), load_tokenizer(checkpoint))
    finally:
        torch.set_num_threads(threads)
    with _lock:
        _made[checkpoint.digest] = made
        while len(_made) > MOST:
            _made.popitem(last=False)


def take(checkpoint: Checkpoint) -> Template | None:
    """That of this checkpoint, once; None where none was made here, or it was taken before. Safe from several threads."""
    with _lock:
        return _made.pop(checkpoint.digest, None)
