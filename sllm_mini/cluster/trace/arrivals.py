"""When requests come and whom they ask: renewal processes, a daily rhythm by thinning, Zipf's popularity.

Taught in chapter 08. Every process is an iterator over chance that is handed in, so a seed repeats it and no length of
trace needs memory.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate


def gamma_arrivals(requests_per_second: float, cv: float, chance: random.Random) -> Iterator[float]:
    """Instants in seconds, without end: gaps are Gamma with mean 1/rate and coefficient of variation `cv`.

    A CV of 1 is a Poisson process, 0 a clock; at 8, ServerlessLLM's bursts, most gaps are next to nothing and a few very
    long. Raises ValueError for a rate or CV that cannot be.
    """
    if not 0 < requests_per_second < math.inf:
        raise ValueError(f"{requests_per_second} requests per second are no rate; give a number above 0")
    if not 0 <= cv <= 100:
        raise ValueError(f"a coefficient of variation of {cv} cannot be drawn; give 0 to 100")
    return _gamma_arrivals(1 / requests_per_second, cv, chance)


def _gamma_arrivals(mean: float, cv: float, chance: random.Random) -> Iterator[float]:
    now = 0.0
    shape, scale = (1 / cv**2, mean * cv**2) if cv else (0.0, 0.0)
    while True:
        now += chance.gammavariate(shape, scale) if cv else mean
        yield now


def daily_rhythm(amplitude: float, period_seconds: float = 86_400.0, peak_seconds: float = 54_000.0) -> Callable[[float], float]:
    """A rate over its mean as a function of time: a sine from 1 − amplitude to 1 + amplitude, highest at `peak_seconds`.

    The peak is at 15:00 unless told otherwise. Raises ValueError for an amplitude outside 0 to 1 or no period.
    """
    if not 0 <= amplitude <= 1:
        raise ValueError(f"an amplitude of {amplitude} makes a rate below 0; give 0 to 1")
    if not 0 < period_seconds < math.inf:
        raise ValueError(f"a period of {period_seconds} s is none; give seconds above 0")
    return lambda now: 1 + amplitude * math.cos(2 * math.pi * (now - peak_seconds) / period_seconds)


def thinned(arrivals: Iterator[float], share: Callable[[float], float], chance: random.Random) -> Iterator[float]:
    """Keeps each arrival with probability `share(now)`, 0 to 1 (Lewis and Shedler, 1979).

    A Poisson process at the highest rate becomes one whose rate follows `share`.
    """
    return (now for now in arrivals if chance.random() < share(now))


def zipf_shares(count: int, exponent: float) -> list[float]:
    """The i-th of `count` models is asked for in proportion to i^-exponent; the shares add up to 1.

    Raises ValueError without models or for an exponent that is no number of 0 or more.
    """
    if count < 1 or not 0 <= exponent < math.inf:
        raise ValueError(f"{count} models with exponent {exponent} have no popularity; give at least one, and an exponent of 0 or more")
    weights = [rank**-exponent for rank in range(1, count + 1)]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def chooser(names: Sequence[str], shares: Sequence[float], chance: random.Random) -> Callable[[], str]:
    """A function that draws a name by its share; O(log n)."""
    edges = list(accumulate(shares))
    draw, total, last = chance.random, edges[-1], len(names) - 1
    return lambda: names[min(last, bisect_right(edges, draw() * total))]
