"""Chooses the next token: the likeliest one, or one drawn at random in a way that any machine can repeat.

The random number of a draw is a pure function of (seed, position in the sequence): a counter-based generator (Philox,
Salmon et al., SC'11) has no state to lose, so a request that is resumed or moved to another machine draws the numbers
it would have drawn had it stayed. Costs one pass over the vocabulary, plus a sort where `top_p` is used (about 10 ms
for 128 000 tokens on one CPU core, far less on a GPU). Taught in chapters 04 and 07.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

COUNT_LIMIT = 1 << 40
"""What a count of tokens may be at most, so that a request fits into the bytes it moves as."""
_SEED_LIMIT = 1 << 64
_DRAW_BITS = 52
"""With 52 bits, `draw * total` rounds to less than `total` for every float64 total, so a draw never falls off the end."""


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How the next token is chosen. The default is greedy: the likeliest token, the lowest id among equals.

    `temperature` 0 is greedy, 1 the model's own distribution; `top_k` keeps the k likeliest tokens (0: all), `top_p`
    the fewest of the likeliest whose probabilities reach p (1: all); filters apply in that order. `seed` is in
    [0, 2^64). `repetition_penalty` comes before all of them and makes every token that the sequence holds, prompt
    included, less likely (1: no change; below 1 more likely; CTRL, Keskar et al., 2019). Raises ValueError for
    anything else.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not (_is_number(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number")
        if type(self.top_k) is not int or not 0 <= self.top_k <= COUNT_LIMIT:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (keep all tokens) or the whole number of tokens to keep")
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p is {self.top_p}; it must be more than 0 and at most 1 (keep all tokens)")
        if type(self.seed) is not int or not 0 <= self.seed < _SEED_LIMIT:
            raise ValueError(f"seed is {self.seed}; it must be a whole number from 0 to 2^64 - 1")
        if not (_is_number(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; it must be a positive number (1: no penalty)")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def draw(seed: int, position: int) -> float:
    """The random number in [0, 1) that belongs to one position of one seed: the same on every machine, every time.

    NumPy guarantees the stream of its Philox for good; the first block after counter `position` is used. Thread-safe.
    """
    import numpy as np

    bits = int(np.random.Philox(key=seed, counter=position).random_raw())
    return (bits >> (64 - _DRAW_BITS)) / (1 << _DRAW_BITS)


def filter_logits(logits: torch.Tensor, options: SamplingOptions) -> torch.Tensor:
    """Log-probabilities up to a constant, float32 `[..., vocabulary]`, with every token that may not be drawn at -inf.

    Temperature, then top-k, then top-p, as transformers' processors do; tokens that tie with the last one kept are
    kept too, so that the outcome does not depend on the order in which a sort leaves equals. Needs a temperature
    above 0. Thread-safe; does not wait for a GPU.
    """
    import torch

    scores = logits.float()
    # Shifting first keeps the division finite at any temperature; a softmax does not see the shift.
    scores = (scores - scores.amax(-1, keepdim=True)) / options.temperature
    limited = 0 < options.top_k < scores.shape[-1]
    if not limited and options.top_p == 1:
        return scores
    likeliest = scores.topk(options.top_k).values if limited else None
    if options.top_p < 1:
        descending = likeliest if likeliest is not None else scores.sort(descending=True).values
        ascending = descending.flip(-1)
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - options.top_p
        first_kept = dropped.sum(-1, keepdim=True).clamp(max=ascending.shape[-1] - 1)
        cut = ascending.gather(-1, first_kept)
    else:
        cut = likeliest[..., -1:] if likeliest is not None else scores
    return scores.masked_fill(scores < cut, -torch.inf)


def seen_tokens(token_ids: Sequence[int], vocabulary: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The penalty's history: bool `[vocabulary]`, True for every token of the sequence. Thread-safe."""
    import torch

    seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)
    seen[torch.tensor([token_id for token_id in token_ids if token_id < vocabulary], dtype=torch.int64, device=device)] = True
    return seen


def penalise(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Logits `[vocabulary]`, float32, with those of `seen` tokens divided by the penalty, or multiplied where they are
    negative, as transformers' processor does. Thread-safe; does not wait for a GPU."""
    import torch

    scores = logits.float()
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def choose_token(logits: torch.Tensor, options: SamplingOptions, position: int) -> torch.Tensor:
    """The id of the token for `position` of its sequence, as a 0-d int64 tensor on the device of `logits` `[vocabulary]`.

    Random choice inverts the cumulative distribution, in float64 and in the order of token ids, at `draw(seed,
    position)`. Logits that are not finite give the size of the vocabulary, an id no token has: so the caller learns
    of it with the token itself and this function never waits for a GPU. Thread-safe.
    """
    import torch

    vocabulary = logits.shape[-1]
    if options.greedy:
        best, token = logits.max(-1)  # the first of equals, by torch's contract; a NaN wins
        return torch.where(best.isfinite(), token, vocabulary)
    cumulative = filter_logits(logits, options).exp_().cumsum(-1, dtype=torch.float64)
    target = cumulative[-1:] * draw(options.seed, position)
    return torch.searchsorted(cumulative, target, right=True).squeeze(0)


def likeliest(logits: torch.Tensor, token_id: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The natural logarithm of a token's probability in the softmax of `logits` `[vocabulary]`, float32 and before any penalty, temperature or
    filter; and those of the `count` likeliest tokens, (id, logarithm), likeliest first, of equals the lowest id, as the greedy choice has it.
    Costs a few passes over the vocabulary, and waits for a GPU. Thread-safe."""
    import torch

    scores = logits.float()
    logarithms = scores.log_softmax(-1)
    top: tuple[tuple[int, float], ...] = ()
    if count:
        # The logits are compared, which a softmax may round to equals, and all that tie with the last: topk has no order among those.
        among = (scores >= scores.topk(min(count, len(scores))).values[-1]).nonzero()[:, 0]
        ids = among[scores[among].sort(descending=True, stable=True).indices[:count]]
        both = torch.stack([ids.double(), logarithms[ids].double()]).tolist()
        top = tuple((int(each), logarithm) for each, logarithm in zip(*both, strict=True))
    return float(logarithms[token_id]), top


def choose_tokens(logits: torch.Tensor, options: Sequence[SamplingOptions], positions: Sequence[int]) -> torch.Tensor:
    """`choose_token` for each row of `[rows, vocabulary]`, each by its own options: int64 `[rows]`. Thread-safe."""
    import torch

    if all(one.greedy for one in options):
        best, tokens = logits.max(-1)
        return torch.where(best.isfinite(), tokens, logits.shape[-1])
    return torch.stack([choose_token(*row) for row in zip(logits, options, positions, strict=True)])
