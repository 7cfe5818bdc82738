"""How long prompts and answers are: log-normal lengths, cut at a maximum, that have a published mean and median.

Taught in chapter 08. Token counts of real services have two humps and are not independent; a log-normal with the right
mean, median and maximum has one, and draws input and output apart. A draw costs about a microsecond; pure.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

_QUANTILE = NormalDist().inv_cdf
_HALVINGS = 50


@dataclass(frozen=True, slots=True)
class TokenLengths:
    """Token counts from 1 to `maximum` with this mean and median. Raises ValueError for three figures that do not fit.

    The distribution is a log-normal cut off at `maximum`; rounding to whole tokens moves mean and median by less than one.
    """

    mean: float
    median: float
    maximum: int

    def __post_init__(self) -> None:
        if not 1 <= self.median < self.mean < self.maximum < math.inf:
            raise ValueError(f"no such lengths: median {self.median}, mean {self.mean}, maximum {self.maximum}; give 1 <= median < mean < maximum")
        _fit(self.mean, self.median, self.maximum)

    def sampler(self, chance: random.Random) -> Callable[[], int]:
        """A function that draws one length. As safe from several threads as `chance`."""
        mu, sigma = _fit(self.mean, self.median, self.maximum)
        top = _cdf((math.log(self.maximum) - mu) / sigma)
        draw, exp, quantile = chance.random, math.exp, _QUANTILE

        def length() -> int:
            part = top * draw()
            return max(1, round(exp(mu + sigma * quantile(part)))) if part > 0 else 1

        return length


@dataclass(frozen=True, slots=True)
class TokenProfile:
    """The lengths of prompts and of answers."""

    input: TokenLengths
    output: TokenLengths


def _cdf(value: float) -> float:
    """The normal distribution function, exact far below the mean too (NormalDist's is 0 from −8.3 on in Python 3.11)."""
    return 0.5 * math.erfc(-value / math.sqrt(2))


def _mean(mu: float, sigma: float, top: float) -> float:
    """The mean of a log-normal cut off where its logarithm is `top`."""
    return math.exp(mu + sigma * sigma / 2) * _cdf((top - mu) / sigma - sigma) / _cdf((top - mu) / sigma)


def _mu(median: float, sigma: float, top: float) -> float:
    """The location that gives a log-normal, cut off at `top`, this median."""
    target = math.log(median)

    def too_low(mu: float) -> bool:
        part = _cdf((top - mu) / sigma) / 2
        return part > 0 and mu + sigma * _QUANTILE(part) < target

    low, high = target, target + 1.0  # the cut takes from above alone, so the location is the median's logarithm or more
    while too_low(high):
        high += high - low
    for _ in range(_HALVINGS):
        half = (low + high) / 2
        low, high = (half, high) if too_low(half) else (low, half)
    return high


@lru_cache(maxsize=64)
def _fit(mean: float, median: float, maximum: int) -> tuple[float, float]:
    """Location and scale of the cut log-normal: the mean grows with the scale, towards that of a power law.

    The widest scale tried puts the cut as far below the middle as doubles can follow.
    """
    top = math.log(maximum)
    widest = 36 / (1 + math.log(2) / (top - math.log(median)))
    if _mean(_mu(median, widest, top), widest, top) < mean:
        raise ValueError(f"no log-normal with median {median:g} up to {maximum} has a mean of {mean:g}; give a lower mean or a higher maximum")
    low, high = 0.0, widest
    for _ in range(_HALVINGS):
        half = (low + high) / 2
        low, high = (half, high) if _mean(_mu(median, half, top), half, top) < mean else (low, half)
    return _mu(median, high, top), high


CODE_TOKENS = TokenProfile(TokenLengths(2047.8, 1469, 7437), TokenLengths(27.9, 13, 1899))
"""Azure LLM inference 2023, code completion: mean, median and maximum as published."""
CONVERSATION_TOKENS = TokenProfile(TokenLengths(1154.7, 1020, 14050), TokenLengths(211.1, 129, 1000))
"""Azure LLM inference 2023, conversation: mean, median and maximum as published."""
