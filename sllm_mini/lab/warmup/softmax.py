"""What `csrc/decode_attention.cu` computes, in numpy and one query at a time: chunks, an online softmax in each, a merge.

Flash-decoding (Dao et al., 2023). Written to be read, so one key a step; in whatever type the inputs have, and to the
base e where the kernel takes 2. Drawing never computes attention. Pure; shown in chapter 06.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy
from numpy.typing import NDArray

from sllm_mini.lab.style import MUTED, color_of, darker, use_style
from sllm_mini.lab.units import share_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[Any]
Part = tuple[Array, Any, Any]
"""Of a chunk: the sum of its values, unnormalised, the largest score, and the sum of the weights."""


def attend_chunk(query: Array, keys: Array, values: Array) -> Part:
    """One chunk, one pass: when a larger score comes, what was summed so far is shrunk to it. `query` is `[head_dim]`,
    `keys` and `values` are `[tokens, head_dim]`."""
    total, top, weight = numpy.zeros_like(values[0]), query.dtype.type(-numpy.inf), query.dtype.type(0)
    for score, value in zip(keys @ query * len(query) ** -0.5, values, strict=True):
        higher = max(top, score)
        shrink, share = numpy.exp(top - higher), numpy.exp(score - higher)
        total, weight, top = shrink * total + share * value, shrink * weight + share, higher
    return total, top, weight


def merge_chunks(parts: Sequence[Part]) -> Array:
    """Chunks brought to their common largest score and added in their order; then, once, divided by the weight."""
    top = max(high for _, high, _ in parts)
    by = [numpy.exp(high - top) for _, high, _ in parts]
    total = sum(factor * part[0] for factor, part in zip(by, parts, strict=True))
    return numpy.asarray(total / sum(factor * part[2] for factor, part in zip(by, parts, strict=True)))


def attend(query: Array, keys: Array, values: Array, chunk: int) -> Array:
    """softmax(query · keys / √head_dim) · values, in chunks of `chunk` tokens that no order binds."""
    starts = range(0, len(keys), chunk)
    return merge_chunks([attend_chunk(query, keys[start : start + chunk], values[start : start + chunk]) for start in starts])


def attend_naively(query: Array, keys: Array, values: Array) -> Array:
    """The formula as it is written down: `exp` of the scores themselves, which a large score makes infinite."""
    weights = numpy.exp(keys @ query * len(query) ** -0.5)
    return numpy.asarray(weights @ values / weights.sum())


def chunk_shares(query: Array, keys: Array, values: Array, chunk: int) -> list[float]:
    """Of the result, the share of each chunk: its weight after the merge over that of all."""
    parts = [attend_chunk(query, keys[start : start + chunk], values[start : start + chunk]) for start in range(0, len(keys), chunk)]
    top = max(high for _, high, _ in parts)
    weights = [float(numpy.exp(high - top) * weight) for _, high, weight in parts]
    return [weight / sum(weights) for weight in weights]


def plot_chunks(query: Array, keys: Array, values: Array, chunk: int) -> Figure:
    """Above, each token's score and the largest so far, which starts anew with each chunk; below, what each chunk adds.
    Not safe while another thread draws."""
    from matplotlib import pyplot

    use_style()
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(7.2, 4.4), height_ratios=(3, 2), sharex=True, layout="constrained")
    scores = keys @ query * len(query) ** -0.5
    shares = chunk_shares(query, keys, values, chunk)
    for number, start in enumerate(range(0, len(keys), chunk)):
        tokens = numpy.arange(start, min(start + chunk, len(keys)))
        highest = numpy.maximum.accumulate(scores[tokens])
        steps = above.step(tokens, highest, where="mid", color=color_of("dram"), linewidth=2)
        if number == 0:
            steps[0].set_label("the largest score so far, in each chunk")
        below.bar(start + (len(tokens) - 1) / 2, shares[number], 0.9 * len(tokens), color=color_of("ready"), edgecolor=darker(color_of("ready")), linewidth=0.5)
        below.annotate(share_text(shares[number]), (start + (len(tokens) - 1) / 2, shares[number]), ha="center", va="bottom", fontsize=9)
        if start:
            for ax in (above, below):
                ax.axvline(start - 0.5, color=MUTED, linewidth=0.8, linestyle=":")
    above.scatter(numpy.arange(len(keys)), scores, s=12, color=color_of("process"), label="score of a token", zorder=3)
    above.set_ylabel("score")
    above.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    below.set_ylabel("share of the result")
    below.set_ylim(0, 1.18 * max(shares))
    below.set_xlabel("token")
    return figure


def chunks_text(query: Array, keys: Array, values: Array, chunk: int) -> str:
    """What `plot_chunks` shows, in words."""
    shares = chunk_shares(query, keys, values, chunk)
    scores = keys @ query * len(query) ** -0.5
    raised = sum(int((numpy.diff(numpy.maximum.accumulate(scores[start : start + chunk])) > 0).sum()) for start in range(0, len(keys), chunk))
    return (
        f"{len(keys)} tokens in {len(shares)} chunks of up to {chunk}. Within the chunks a token raises the largest score {raised} times, and each time the sum so far is "
        f"shrunk. Of the result, the chunks make up {', '.join(map(share_text, shares))}."
    )
