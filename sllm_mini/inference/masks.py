"""Which tokens may attend to which, where several texts share one pass. Explained in chapter 07.

A mask is a 4-D tensor, which transformers hands to the attention of every layer as it is: bool for torch's SDPA on a GPU,
numbers that are added for eager attention and on a CPU, where SDPA would make them of a bool in every layer. Costs a byte for each pair of a query and a key, or one number of the model's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Masks:
    """The masks of one model. `windows` gives each layer's sliding window, None for full attention. `known` is False for a
    model that makes masks of its own, or attention that takes none of these; with `own_attention` it takes those of SDPA."""

    def __init__(self, model: Any, windows: Sequence[int | None], dtype: torch.dtype, *, own_attention: bool = False) -> None:
        config = model.config
        self._dtype = dtype
        self._added = getattr(config, "_attn_implementation", None) == "eager"
        types = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention" for window in windows]
        kinds = dict(zip(types, windows, strict=True)) if len(types) == len(windows) else {}
        one_window_each = all(kinds[kind] == window for kind, window in zip(types, windows, strict=False)) if kinds else False
        through_masks = getattr(model, "_supports_attention_backend", False) and getattr(config, "attention_chunk_size", None) is None
        ours = own_attention or getattr(config, "_attn_implementation", None) in ("sdpa", "eager")
        self._kinds: dict[str, int | None] = kinds
        self.known = bool(one_window_each and kinds.keys() <= {"full_attention", "sliding_attention"} and through_masks and ours)

    def of(self, keys: torch.Tensor, queries: torch.Tensor, together: torch.Tensor | None = None) -> Any:
        """What each query may attend to, `[rows, 1, queries, keys]`, from the positions of both, shaped so; of several texts
        in one row, `together` says which pairs are of one. One mask, or one for each kind of layer where there are two."""
        import torch

        masks: dict[str, torch.Tensor] = {}
        for kind, window in self._kinds.items():
            mask = keys <= queries
            if together is not None:
                mask = mask & together
            if window is not None:
                mask = mask & (keys > queries - window)
            if self._added or mask.device.type == "cpu":
                least = torch.finfo(self._dtype).min
                mask = torch.where(mask, torch.zeros((), dtype=self._dtype, device=mask.device), least)
            masks[kind] = mask
        return masks if len(masks) > 1 else next(iter(masks.values()))
