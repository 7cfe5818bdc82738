"""What queueing theory says exactly: the answers that a simulator must come to, and that chapters set beside it.

Taught in chapters 08 and 09. Pure arithmetic, safe from any thread. LRU's hit ratios by Che's approximation, which chapter
03 needs first, are `lab.caching.che_ratios`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, inf, isnan


@dataclass(frozen=True, slots=True)
class QueueWait:
    """Of an M/M/c queue: the probability of having to wait, and the mean wait in seconds over all requests."""

    wait_probability: float
    wait_seconds: float


@dataclass(frozen=True, slots=True)
class SetupWait:
    """Of an M/G/1 queue with set-up: the mean wait before service in seconds, and the share of requests that start it cold."""

    wait_seconds: float
    cold_fraction: float


def erlang_c(servers: int, requests_per_second: float, service_seconds: float) -> QueueWait:
    """M/M/c: Poisson arrivals, exponential service of this mean, one queue (Erlang, 1917).

    Erlang-B by its recursion, B0 = 1 and Bk = a·B(k−1) / (k + a·B(k−1)) with a = λ·s; then C = B / (1 − ρ(1 − B)) and the
    wait C / (c/s − λ). Costs O(servers). Raises ValueError for a queue that grows without end or figures that cannot be.
    """
    if servers < 1:
        raise ValueError(f"{servers} servers serve nobody; give at least one")
    offered = _offered(requests_per_second, service_seconds, servers)
    blocked = 1.0
    for number in range(1, servers + 1):
        blocked = offered * blocked / (number + offered * blocked)
    waits = blocked / (1 - offered / servers * (1 - blocked))
    return QueueWait(waits, waits / (servers / service_seconds - requests_per_second))


def setup_queue(
    requests_per_second: float, service_seconds: float, setup_seconds: float, keep_alive_seconds: float, *, service_second_moment: float | None = None
) -> SetupWait:
    """M/G/1 whose server goes cold after being idle for `keep_alive_seconds`, and then needs `setup_seconds` to start.

    With p = exp(−λτ), the probability that an idle period outlasts the keep-alive, D' is D with probability p, else 0:
    wait = λ·E[S²] / (2(1 − ρ)) + (2·E[D'] + λ·E[D'²]) / (2(1 + λ·E[D'])), cold fraction = p(1 − ρ) / (1 + λ·E[D']) (Welch,
    1964, for the set-up). `service_second_moment` is E[S²] in s², that of an exponential service unless given; an infinite
    keep-alive is allowed. Raises ValueError for a queue that grows without end or figures that cannot be.
    """
    busy = _offered(requests_per_second, service_seconds, 1)
    second = 2 * service_seconds**2 if service_second_moment is None else service_second_moment
    if not service_seconds**2 * (1 - 1e-9) <= second < inf:
        raise ValueError(f"a service of mean {service_seconds} s has no second moment of {second} s²; give at least {service_seconds**2} s²")
    if not 0 <= setup_seconds < inf or isnan(keep_alive_seconds) or keep_alive_seconds < 0:
        raise ValueError(f"set-up in {setup_seconds} s and keep-alive for {keep_alive_seconds} s cannot be; give numbers of 0 or more")
    outlasts = exp(-requests_per_second * keep_alive_seconds)
    mean, square = outlasts * setup_seconds, outlasts * setup_seconds**2
    rate = requests_per_second
    wait = rate * second / (2 * (1 - busy)) + (2 * mean + rate * square) / (2 * (1 + rate * mean))
    return SetupWait(wait, outlasts * (1 - busy) / (1 + rate * mean))


def _offered(requests_per_second: float, service_seconds: float, servers: int) -> float:
    """The offered load in servers. Raises ValueError unless it is below `servers`."""
    if not (0 < requests_per_second < inf and 0 < service_seconds < inf):
        raise ValueError(f"{requests_per_second} requests/s of {service_seconds} s each cannot be; give numbers above 0")
    offered = requests_per_second * service_seconds
    if offered >= servers:
        raise ValueError(f"{requests_per_second} requests/s of {service_seconds} s each keep {offered:g} servers busy and there are {servers}; the queue grows without end")
    return offered
