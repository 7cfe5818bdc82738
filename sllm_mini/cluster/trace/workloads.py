"""Synthetic traces: bursts over models of unequal popularity, a day with its rhythm, and functions in three runtimes.

Taught in chapters 08 and 09. Each function returns a `Trace` labelled synthetic that makes its requests on demand: the
same arguments give the same requests, ten million need no memory, and one costs some microseconds. Arrivals are rounded
to microseconds. Arrivals, models and tokens draw from generators of their own, so that changing one leaves the others.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, takewhile
from operator import attrgetter, itemgetter
from typing import TypeVar

from sllm_mini.cluster.trace.arrivals import chooser, daily_rhythm, gamma_arrivals, thinned, zipf_shares
from sllm_mini.cluster.trace.request import Again, Trace, TraceLabel, TraceRequest
from sllm_mini.cluster.trace.tokens import CONVERSATION_TOKENS, TokenProfile

_T = TypeVar("_T")
_Asked = tuple[float, str]  # when, and for which model
_arrival: Callable[[TraceRequest], float] = attrgetter("arrival_seconds")

FAAS_RUNTIMES = {"nodejs": 6, "python": 9, "java": 5}
"""Functions by runtime in RainbowCake's workload."""
FAAS_CVS = (0.2, 8.0)
"""The least and the largest CV of inter-arrival times there."""


def burst_trace(
    *,
    requests: int | None = None,
    seconds: float | None = None,
    requests_per_second: float,
    cv: float = 8.0,
    models: int | Sequence[str] = 16,
    exponent: float = 0.9,
    apart: bool = False,
    tokens: TokenProfile = CONVERSATION_TOKENS,
    seed: int = 0,
) -> Trace:
    """ServerlessLLM's workload: Gamma arrivals of CV 8, split over several models by Zipf's popularity.

    `models` are names, the most popular first, or how many to name model-00, model-01, …; the exponent is a choice of
    ours. One process of this CV is split at random, so that the rarer a model, the nearer its own CV is to 1; with
    `apart` each model has a process of this CV at its share of the rate. `cv=1` is Poisson either way. Ends after
    `requests` or before `seconds`, whichever is given and comes first. Raises ValueError for figures that cannot be.
    """
    names = _named(models)
    shares = zipf_shares(len(names), exponent)
    _check_end(requests, seconds)
    gamma_arrivals(requests_per_second, cv, random.Random(0))  # so that a wrong figure is told now and not at the first request

    def start() -> Iterator[TraceRequest]:
        if apart:
            rates = [requests_per_second * share for share in shares]
            processes = [gamma_arrivals(rate, cv, _chance(seed, name)) for name, rate in zip(names, rates, strict=True)]
            asked: Iterator[_Asked] = heapq.merge(*map(_asked_alone, names, processes))
        else:
            asked = _asked(gamma_arrivals(requests_per_second, cv, _chance(seed, "arrivals")), names, shares, seed)
        return _requests(_ended(asked, requests, seconds, itemgetter(0)), tokens, seed)

    whose = " of each model" if apart else ""
    source = f"burst_trace: Gamma arrivals{whose}, {requests_per_second:g} requests/s, CV {cv:g}; {len(names)} models, Zipf exponent {exponent:g}"
    return Trace(TraceLabel("burst", source, "synthetic", seed), Again(start))


def diurnal_trace(
    *,
    requests: int | None = None,
    seconds: float | None = None,
    requests_per_second: float,
    amplitude: float = 0.8,
    period_seconds: float = 86_400.0,
    models: int | Sequence[str] = 16,
    exponent: float = 0.9,
    tokens: TokenProfile = CONVERSATION_TOKENS,
    seed: int = 0,
) -> Trace:
    """A Poisson process whose rate follows a day: `requests_per_second` is the mean over one `period_seconds`.

    The rate is highest 15/24 into the period. Otherwise as `burst_trace`. Raises ValueError for figures that cannot be.
    """
    names = _named(models)
    shares = zipf_shares(len(names), exponent)
    _check_end(requests, seconds)
    rhythm = daily_rhythm(amplitude, period_seconds, period_seconds * 15 / 24)
    peak = 1 + amplitude
    gamma_arrivals(requests_per_second, 1.0, random.Random(0))

    def start() -> Iterator[TraceRequest]:
        chance = _chance(seed, "arrivals")
        arrivals = thinned(gamma_arrivals(requests_per_second * peak, 1.0, chance), lambda now: rhythm(now) / peak, chance)
        return _requests(_ended(_asked(arrivals, names, shares, seed), requests, seconds, itemgetter(0)), tokens, seed)

    source = f"diurnal_trace: {requests_per_second:g} requests/s on average ± {amplitude:.0%} over {period_seconds:g} s; {len(names)} models, Zipf exponent {exponent:g}"
    return Trace(TraceLabel("diurnal", source, "synthetic", seed), Again(start))


@dataclass(frozen=True, slots=True)
class FaasFunction:
    """A function of the FaaS trace: its runtime, how it is called, and how long it runs on average."""

    name: str
    runtime: str
    mean_gap_seconds: float
    cv: float
    mean_run_seconds: float


def faas_functions(seed: int = 0) -> list[FaasFunction]:
    """Twenty functions as in RainbowCake's workload: 6 Node.js, 9 Python, 5 Java; CVs of gaps from 0.2 to 8.

    The CVs are spread evenly on a logarithmic scale and dealt out at random. Mean gaps (1 to 30 min) and mean run times
    (50 ms to 5 s), log-uniform, are choices of ours. What a start of each costs is for the simulator to say.
    """
    chance = _chance(seed, "functions")
    total = sum(FAAS_RUNTIMES.values())
    least, most = FAAS_CVS
    cvs = [least * (most / least) ** (at / (total - 1)) for at in range(total)]
    chance.shuffle(cvs)
    names = [(f"{runtime}-{number:02d}", runtime) for runtime, count in FAAS_RUNTIMES.items() for number in range(1, count + 1)]
    return [
        FaasFunction(name, runtime, 60 * 30 ** chance.random(), cv, 0.05 * 100 ** chance.random())
        for (name, runtime), cv in zip(names, cvs, strict=True)
    ]


def faas_trace(*, requests: int | None = None, seconds: float | None = None, functions: Sequence[FaasFunction] | None = None, seed: int = 0) -> Trace:
    """RainbowCake's workload: each function by a Gamma process of its own, merged; a run lasts exponentially long.

    Each process begins at its first gap, so a function of long gaps may not come at all in a short trace. Models are the
    names of `functions` (`faas_functions(seed)` unless given); they have a duration and no tokens. Ends as `burst_trace`
    does. Raises ValueError for figures that cannot be.
    """
    chosen = tuple(faas_functions(seed) if functions is None else functions)
    _check_end(requests, seconds)
    for function in chosen:
        if not (function.mean_gap_seconds > 0 and function.mean_run_seconds > 0):
            raise ValueError(f"{function.name} is called every {function.mean_gap_seconds} s for {function.mean_run_seconds} s; give numbers above 0")
        gamma_arrivals(1 / function.mean_gap_seconds, function.cv, random.Random(0))

    def calls(function: FaasFunction) -> Iterator[TraceRequest]:
        chance = _chance(seed, function.name)
        for now in gamma_arrivals(1 / function.mean_gap_seconds, function.cv, chance):
            yield TraceRequest(round(now, 6), function.name, 0, 0, None, round(chance.expovariate(1 / function.mean_run_seconds), 6))

    def start() -> Iterator[TraceRequest]:
        merged = heapq.merge(*map(calls, chosen), key=_arrival)
        return _ended(merged, requests, seconds, _arrival)

    runtimes = ", ".join(f"{sum(f.runtime == runtime for f in chosen)} {runtime}" for runtime in dict.fromkeys(f.runtime for f in chosen))
    return Trace(TraceLabel("faas", f"faas_trace: Gamma arrivals for each of {len(chosen)} functions ({runtimes})", "synthetic", seed), Again(start))


def assign_models(trace: Trace, models: int | Sequence[str], *, exponent: float = 0.9, seed: int = 0) -> Trace:
    """The same requests, each asking for a model drawn by Zipf's popularity: how a trace of one service becomes one of many.

    Streams as `trace` does; it stays of its kind, and its source says what was done. Raises ValueError as `burst_trace`.
    """
    names = _named(models)
    shares = zipf_shares(len(names), exponent)
    return Trace(
        TraceLabel(trace.label.name, f"{trace.label.source}; {len(names)} models assigned by Zipf's popularity, exponent {exponent:g}", trace.label.kind, seed),
        Again(partial(_assigned, trace, names, shares, seed)),
    )


def _assigned(trace: Trace, names: Sequence[str], shares: Sequence[float], seed: int) -> Iterator[TraceRequest]:
    choose = chooser(names, shares, _chance(seed, "models"))
    for r in trace:
        yield TraceRequest(r.arrival_seconds, choose(), r.input_tokens, r.output_tokens, r.prefix, r.duration_seconds)


def _asked(arrivals: Iterator[float], names: Sequence[str], shares: Sequence[float], seed: int) -> Iterator[_Asked]:
    choose = chooser(names, shares, _chance(seed, "models"))
    return ((now, choose()) for now in arrivals)


def _asked_alone(name: str, arrivals: Iterator[float]) -> Iterator[_Asked]:
    return ((now, name) for now in arrivals)


def _requests(asked: Iterator[_Asked], tokens: TokenProfile, seed: int) -> Iterator[TraceRequest]:
    inputs, outputs = tokens.input.sampler(_chance(seed, "input")), tokens.output.sampler(_chance(seed, "output"))
    for now, name in asked:
        yield TraceRequest(round(now, 6), name, inputs(), outputs())


def _chance(seed: int, purpose: str) -> random.Random:
    return random.Random(f"{seed}:{purpose}")


def _named(models: int | Sequence[str]) -> tuple[str, ...]:
    if isinstance(models, str) or (not isinstance(models, int) and len(set(models)) != len(models)):
        raise ValueError(f"the models are {models!r}; give how many there are, or a list of different names")
    return tuple(f"model-{number:02d}" for number in range(models)) if isinstance(models, int) else tuple(models)


def _check_end(requests: int | None, seconds: float | None) -> None:
    if (requests is None and seconds is None) or (requests is not None and requests < 0) or (seconds is not None and not seconds >= 0):
        raise ValueError(f"a trace of {requests} requests in {seconds} s has no end; give requests, seconds or both, 0 or more")


def _ended(items: Iterator[_T], requests: int | None, seconds: float | None, instant: Callable[[_T], float]) -> Iterator[_T]:
    before = items if seconds is None else takewhile(lambda item: instant(item) < seconds, items)
    return before if requests is None else islice(before, requests)
