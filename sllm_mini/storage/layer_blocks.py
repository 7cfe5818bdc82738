"""Which blocks of an image hold which layers: what a node needs before it can run some of them. Explained in chapter 10.

From the index alone, so whoever plans needs neither torch nor the model. A layer mostly lies in several blocks, and a block in several layers.
"""

from __future__ import annotations

from sllm_mini.checkpoint.index import Index
from sllm_mini.checkpoint.layout import is_numbered
from sllm_mini.storage.arrivals import image_places
from sllm_mini.storage.incoming import cut_blocks, overlapping


def blocks_of_layers(index: Index, block_nbytes: int) -> list[frozenset[int]]:
    """For each of the model's layers, in order, the blocks (see `cut_blocks`) that a stage of it needs.

    The first layer's are also those of the embedding before it, the last one's those of the norm and the head. Where nothing after the layers is as
    large as the embedding, the head is tied to that (or lies there), and the last needs it too. Empty for a model whose tensors are in no numbered
    layers. Raises ValueError as `cut_blocks` does. Costs O(tensors). Pure.
    """
    starts = [block.offset for block in cut_blocks(index, block_nbytes)]
    blocks: list[set[int]] = [set() for _ in index.layers]
    largest = [0] * len(index.layers)
    for tensor, offset in image_places(index):
        blocks[tensor.layer] |= set(overlapping(starts, offset, tensor.nbytes))
        largest[tensor.layer] = max(largest[tensor.layer], tensor.nbytes)
    numbered = [number for number, layer in enumerate(index.layers) if is_numbered(layer)]
    if not numbered:
        return []
    before, after = range(numbered[0]), range(numbered[-1] + 1, len(index.layers))
    found = [blocks[number] for number in numbered]
    embedding = set[int]().union(*(blocks[number] for number in before))
    found[0] = found[0] | embedding
    found[-1] = found[-1].union(*(blocks[number] for number in after))
    if max((largest[number] for number in after), default=0) < max((largest[number] for number in before), default=0):
        found[-1] = found[-1] | embedding
    return [frozenset(each) for each in found]
