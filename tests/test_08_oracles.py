"""Chapter 08: the formulas of queueing theory, against published figures, each other and queues served one by one."""

from __future__ import annotations

import heapq
import math
import random
import statistics
from collections import OrderedDict
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_mini.cluster.simulated import SimulationOptions, even_cluster, simulate
from sllm_mini.cluster.trace import TraceRequest
from sllm_mini.control.messages import ModelSpec
from sllm_mini.control.oracles import erlang_c, setup_queue
from sllm_mini.lab.caching import CatalogueModel, che_ratios
from sllm_mini.types import Tier

REPLICATIONS = 20
T_995 = 2.861
"""Student's t for 19 degrees of freedom: a two-sided interval of 99 %."""


def interval(replicate: Callable[[random.Random], float]) -> tuple[float, float]:
    """The 99 % confidence interval of a mean over independent replications."""
    values = [replicate(random.Random(seed)) for seed in range(REPLICATIONS)]
    half = T_995 * statistics.stdev(values) / math.sqrt(REPLICATIONS)
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def served_by(servers: int, rate: float, mean: float, requests: int, chance: random.Random) -> tuple[float, float]:
    """The mean wait and the share that waits of an M/M/c queue that is played request by request."""
    free, now, waited, waits = [0.0] * servers, 0.0, 0.0, 0
    for _ in range(requests):
        now += chance.expovariate(rate)
        start = max(now, heapq.heappop(free))
        waited += start - now
        waits += start > now
        heapq.heappush(free, start + chance.expovariate(1 / mean))
    return waited / requests, waits / requests


def served_with_setup(rate: float, service: Callable[[random.Random], float], setup: float, keep: float, requests: int, chance: random.Random) -> tuple[float, float]:
    """The mean wait and the cold fraction of one server that goes cold when idle for `keep`."""
    now, free, waited, cold = 0.0, -math.inf, 0.0, 0
    for _ in range(requests):
        now += chance.expovariate(rate)
        start = max(now, free)
        if now - free > keep:
            start += setup
            cold += 1
        waited += start - now
        free = start + service(chance)
    return waited / requests, cold / requests


def test_erlang_c_gives_the_known_wait() -> None:
    known = erlang_c(4, 3.2, 1.0)
    assert known.wait_seconds == pytest.approx(0.7455, abs=5e-5)
    assert known.wait_probability == pytest.approx(0.7455 * 0.8, abs=5e-5)  # C = Wq (c/s − λ), here Wq × 0.8


@pytest.mark.parametrize("load", [0.1, 0.5, 0.99])
def test_one_server_is_the_m_m_1_queue(load: float) -> None:
    one = erlang_c(1, load, 1.0)
    assert one.wait_probability == pytest.approx(load)
    assert one.wait_seconds == pytest.approx(load / (1 - load))


@given(st.integers(1, 60), st.floats(0.01, 0.98), st.floats(0.01, 100))
def test_erlang_c_equals_its_sum(servers: int, load: float, seconds: float) -> None:
    """The textbook's sum over states, against the recursion; seconds only scale."""
    offered = load * servers
    top = offered**servers / math.factorial(servers) / (1 - load)
    expected = top / (math.fsum(offered**k / math.factorial(k) for k in range(servers)) + top)
    got = erlang_c(servers, offered / seconds, seconds)
    assert got.wait_probability == pytest.approx(expected, rel=1e-9)
    assert got.wait_seconds == pytest.approx(expected * seconds / (servers - offered), rel=1e-9)


@pytest.mark.parametrize(("servers", "load"), [(1, 0.5), (4, 0.8)])
def test_a_queue_that_is_played_waits_as_erlang_says(servers: int, load: float) -> None:
    theory = erlang_c(servers, load * servers / 2, 2.0)
    low, high = interval(lambda chance: served_by(servers, load * servers / 2, 2.0, 10_000, chance)[0])
    assert low <= theory.wait_seconds <= high
    low, high = interval(lambda chance: served_by(servers, load * servers / 2, 2.0, 10_000, chance)[1])
    assert low <= theory.wait_probability <= high


@pytest.mark.parametrize(("keep", "wait", "cold"), [(0, 4.214, 0.1429), (1, 3.712, 0.1205), (3, 2.611, 0.0716)])
def test_setup_gives_the_known_figures(keep: float, wait: float, cold: float) -> None:
    got = setup_queue(0.5, 1.0, 5.0, keep)
    assert got.wait_seconds == pytest.approx(wait, abs=5e-4)
    assert got.cold_fraction == pytest.approx(cold, abs=5e-5)


@given(st.floats(0.01, 0.95), st.floats(0.1, 10))
def test_without_setup_and_with_endless_keep_alive_it_is_pollaczek_and_khinchine(load: float, seconds: float) -> None:
    plain = load / (1 - load) * seconds
    assert setup_queue(load / seconds, seconds, 0.0, 0.0).wait_seconds == pytest.approx(plain)
    forever = setup_queue(load / seconds, seconds, 7.0, math.inf)
    assert (forever.wait_seconds, forever.cold_fraction) == (pytest.approx(plain), 0.0)
    steady = setup_queue(load / seconds, seconds, 0.0, 0.0, service_second_moment=seconds**2)
    assert steady.wait_seconds == pytest.approx(plain / 2)


@pytest.mark.parametrize("keep", [0.0, 2.0])
@pytest.mark.parametrize(("service", "moment"), [(lambda chance: 1.0, 1.0), (lambda chance: chance.expovariate(1.0), 2.0)])
def test_a_server_that_is_played_waits_and_starts_cold_as_the_formula_says(keep: float, service: Callable[[random.Random], float], moment: float) -> None:
    theory = setup_queue(0.5, 1.0, 5.0, keep, service_second_moment=moment)
    low, high = interval(lambda chance: served_with_setup(0.5, service, 5.0, keep, 10_000, chance)[0])
    assert low <= theory.wait_seconds <= high
    low, high = interval(lambda chance: served_with_setup(0.5, service, 5.0, keep, 10_000, chance)[1])
    assert low <= theory.cold_fraction <= high


CATALOGUE = [f"m{rank:03}" for rank in range(200)]
SHARES = [1 / (rank + 1) ** 0.8 for rank in range(200)]
SLOTS = 40
CHE = che_ratios([CatalogueModel(name, share / sum(SHARES), 1000, 1.0) for name, share in zip(CATALOGUE, SHARES, strict=True)], 1000 * SLOTS).requests


def hits_of_a_list(chance: random.Random) -> float:
    """The share of requests that find their model among the last used, once the list is full."""
    last: OrderedDict[str, None] = OrderedDict()
    hits = 0
    for number, name in enumerate(chance.choices(CATALOGUE, SHARES, k=12_000)):
        hits += name in last and number >= 2_000
        last[name] = None
        last.move_to_end(name)
        if len(last) > SLOTS:
            last.popitem(last=False)
    return hits / 10_000


def hits_of_a_store(chance: random.Random) -> float:
    """The share of loads that come from the memory of a simulated node, through the controller. Its disk has no limit."""
    trace = [TraceRequest(float(second), name, 0, 0, None, 0.0) for second, name in enumerate(chance.choices(CATALOGUE, SHARES, k=2_000))]
    models = [ModelSpec(name=name, nbytes=1000) for name in CATALOGUE]
    options = SimulationOptions(keep="summary", store_dram_nbytes=1000 * SLOTS)
    loads = simulate(trace, even_cluster(1, devices=4), models, keep_alive="scale-to-zero", options=options).account.loads
    assert sum(loads) == 2_000
    return loads[Tier.DRAM] / (sum(loads) - SLOTS)  # the first ones find it empty


@pytest.mark.parametrize("play", [hits_of_a_list, hits_of_a_store])
def test_least_recently_used_hits_as_che_says(play: Callable[[random.Random], float]) -> None:
    low, high = interval(play)
    assert low <= CHE <= high
    assert high - low < 0.05 * CHE, "an interval so wide says nothing"


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: erlang_c(0, 1, 1), "at least one"),
        (lambda: erlang_c(4, 4, 1), "grows without end"),
        (lambda: erlang_c(1, 0, 1), "give numbers above 0"),
        (lambda: erlang_c(1, 1, math.nan), "give numbers above 0"),
        (lambda: setup_queue(1, 1, 1, 1), "grows without end"),
        (lambda: setup_queue(0.5, 1, -1, 1), "give numbers of 0 or more"),
        (lambda: setup_queue(0.5, 1, 1, -1), "give numbers of 0 or more"),
        (lambda: setup_queue(0.5, 1, 1, math.nan), "give numbers of 0 or more"),
        (lambda: setup_queue(0.5, 1, 1, 1, service_second_moment=0.5), "no second moment"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(ask: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ask()
