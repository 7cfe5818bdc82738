"""Chapters 08 to 10: what every policy of the three tables keeps to, and what each alone promises, seen from outside.

All through `simulate`. Who changes a policy so that a promise breaks fails here, whatever its own tests say. Three traces
serve: one where everything happens (nodes are lost, requests cancelled); one whose starts take no time, so that keeping
warm changes nothing but who finds what; and one of single requests far apart, where each start can be worked out by hand.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from msgspec.structs import replace

from sllm_mini.cluster.simulated import (
    RequestRow,
    SimulatedCluster,
    SimulationOptions,
    SimulationResult,
    even_cluster,
    make_policies,
    simulate,
)
from sllm_mini.cluster.simulated.policies import AUTOSCALERS, KEEP_ALIVES, PLACEMENTS
from sllm_mini.cluster.trace import TraceRequest
from sllm_mini.control import messages as m
from sllm_mini.control.autoscale import KnativePodAutoscaler, PerRequest
from sllm_mini.control.controller import Controller
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.keepalive import Clairvoyant, FixedKeepAlive, HybridHistogram
from sllm_mini.control.policy import KeepAlive
from sllm_mini.types import Warmth

GB = 10**9
COLD, PROCESS, RUNTIME, DRAM, DEVICE, READY = Warmth
USUAL = {"placement": "serverlessllm", "keep_alive": "fixed-10min", "autoscaler": "per-request"}
TABLES = {"placement": PLACEMENTS, "keep_alive": KEEP_ALIVES, "autoscaler": AUTOSCALERS}
EVERY = [USUAL, *({**USUAL, role: name} for role, names in TABLES.items() for name in names if name != USUAL[role])]
"""Each policy of a table once, beside the usual two."""


def named(policies: dict[str, str]) -> str:
    return next((name for role, name in policies.items() if name != USUAL[role]), "usual")


def ask(at: float, model: str = "f", seconds: float = 1.0) -> TraceRequest:
    return TraceRequest(at, model, 0, 0, None, seconds)


def rows(result: SimulationResult) -> dict[int, RequestRow]:
    """By request; one that ended twice is an error."""
    found = {row.request: row for row in result.requests}
    assert len(found) == len(result.requests), "a request has two ends"
    return found


# Where everything happens


LANGUAGE_MODELS = [
    m.ModelSpec(
        name=f"m{number}", nbytes=(4 + number) * GB, devices=1 + (number == 3), concurrency=1 + number % 2, process_seconds=1.0, runtime_seconds=2.0, ready_seconds=0.5,
        process_nbytes=GB // 10, runtime_nbytes=GB, prefill_seconds_per_token=2e-4, decode_seconds_per_token=0.02, runtime="torch" if number % 2 else "vllm",
    )
    for number in range(6)
]  # fmt: skip


def storm(seed: int, policies: Mapping[str, str] = USUAL, models: Sequence[m.ModelSpec] = LANGUAGE_MODELS) -> tuple[SimulationResult, list[bytes]]:
    """90 requests for these models on three nodes, two of which are lost and one of which comes back; with the log."""
    chance, now, trace = Random(seed), 0.0, list[TraceRequest]()
    for spec in chance.choices(models, [1 / (rank + 1) for rank in range(len(models))], k=90):
        now += chance.expovariate(1.5)
        trace.append(TraceRequest(now, spec.name, chance.randrange(10, 800), chance.randrange(0, 200), chance.choice((None, "p", "pq"))))
    events: list[tuple[float, m.AnyEvent]] = [
        (now * 0.3, m.NodeLost("node-0001")), (now * 0.4, m.RequestCancelled(30)), (now * 0.5, m.InstanceFailed(2, "the process died", 0)),
        (now * 0.6, m.NodeJoined(even_cluster(2, devices=2)[1])), (now * 0.8, m.NodeLost("node-0000")),
    ]  # fmt: skip
    log: list[bytes] = []
    options = SimulationOptions(store_dram_nbytes=12 * GB, store_disk_nbytes=30 * GB, batch_slowdown=0.2, jitter=0.1, seed=seed)
    return simulate(trace, even_cluster(3, devices=2, disk=("m0", "m1")), models, events=events, options=options, log=log.append, **dict[str, Any](policies)), log


@pytest.mark.parametrize("policies", EVERY, ids=named)
def test_every_request_ends_once_and_the_same_arguments_give_the_same_run(policies: dict[str, str]) -> None:
    for seed in range(2):
        result, log = storm(seed, policies)
        ended = rows(result)
        assert sorted(ended) == list(range(90)) and result.unanswered == 0
        assert {row.outcome for row in ended.values()} <= {"answered", "refused", "cancelled"}
        assert [each for each, row in ended.items() if row.outcome == "cancelled"] in ([], [30]), "nobody else went away"
        assert all(row.arrived <= row.start <= row.first_token <= row.end for row in ended.values() if row.outcome == "answered")
        assert result.mean_in_system * result.seconds == pytest.approx(sum(row.end - row.arrived for row in ended.values())), "Little's law"
        again, lines = storm(seed, policies)
        assert lines == log and repr(list(again.requests)) == repr(list(result.requests)) and again.spans == result.spans
        assert {**again.totals(), "wall_seconds": 0} == {**result.totals(), "wall_seconds": 0}


def test_another_seed_is_another_run() -> None:
    assert storm(0)[1] != storm(1)[1]


@pytest.mark.parametrize("policies", EVERY, ids=named)
def test_when_all_is_over_nothing_is_left(policies: dict[str, str]) -> None:
    """The models are deleted while requests still run; a day later nobody remembers anything but OpenWhisk its initial stem cells."""
    estimator = Estimator()
    made = make_policies(policies["placement"], policies["keep_alive"], policies["autoscaler"], estimator)
    controller = Controller(made.placement, made.keep_alive, made.autoscaler, estimator)
    chance = Random(5)
    trace = [TraceRequest(0.7 * number, chance.choice(LANGUAGE_MODELS).name, 100, chance.randrange(200)) for number in range(80)]
    events = [(trace[-1].arrival_seconds + 0.01, m.ModelDeleted(spec.name)) for spec in LANGUAGE_MODELS]
    cluster = SimulatedCluster(controller, even_cluster(3, devices=2), LANGUAGE_MODELS, SimulationOptions(until=200_000.0))
    cluster.run(trace, events)
    assert len(cluster.table) == 80
    known = controller.cluster
    assert not (known.models or known.requests or controller.plans.pending or controller.warming.prewarms or controller.timers.pending)
    left = [(each.model, each.warmth, each.runtime) for each in known.instances.values()]
    cells = [(None, RUNTIME, name) for name in ("torch", "vllm")] if policies["keep_alive"] == "stem-cells" else []
    assert set(left) <= set(cells) and all(left.count(cell) <= 2 for cell in cells)
    assert all(len(node.free_devices) == 2 for node in known.nodes.values())
    names = {spec.name for spec in LANGUAGE_MODELS}
    for part in (made.placement, made.keep_alive, made.autoscaler):
        held = [getattr(part, name) for name in getattr(type(part), "__slots__", ()) if isinstance(getattr(part, name, None), dict)]
        assert not any(names & set(each) for each in held), f"{type(part).__name__} still knows a model that is gone"


# More bandwidth


@pytest.mark.parametrize("keep_alive", ["scale-to-zero", "forever"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_more_bandwidth_is_never_slower_where_the_plan_stays(placement: str, keep_alive: str) -> None:
    """One request after the other, so that who is idle is the same at any bandwidth; all links are scaled alike, so that no
    estimate changes order. A keep-alive that ends by the clock promises nothing: what ends sooner is idle for longer."""
    models = [m.ModelSpec(name=f"m{number}", nbytes=(2 + number) * GB, process_seconds=0.5) for number in range(4)]
    chance = Random(7)
    trace = [ask(100.0 * number, chance.choice(models).name) for number in range(40)]
    latencies = []
    for factor in (1, 2, 8):
        rates = {f"{tier}_bytes_per_second": rate * factor for tier, rate in (("remote", 1e9), ("disk", 4e9), ("dram", 2e10))}
        result = simulate(trace, even_cluster(3, devices=2, disk=("m1",), **rates), models, placement=placement, keep_alive=keep_alive)
        latencies.append([(row.end - row.arrived, row.warmth) for _, row in sorted(rows(result).items())])
    for slow, fast in pairwise(latencies):
        for (before, warmth), (after, same) in zip(slow, fast, strict=True):
            assert same == warmth and (after < before if warmth < READY else after == before)


# Starts that take no time


def functions(seed: int, count: int = 400, models: int = 5) -> list[TraceRequest]:
    """Gaps of seconds and of quarters of an hour, so that every keep-alive is too short for some of them."""
    chance, now, trace = Random(seed), 0.0, list[TraceRequest]()
    for _ in range(count):
        now += chance.choice((0.5, 5.0, 400.0)) * chance.expovariate(1)
        trace.append(ask(now, f"f{chance.randrange(models)}", chance.expovariate(1 / 20)))
    return trace


def kept(trace: Sequence[TraceRequest], keep_alive: KeepAlive | str, **changed: Any) -> SimulationResult:
    """On one node with memory for all, with as many instances as requests at once."""
    names = sorted({each.model for each in trace})
    models = [m.ModelSpec(name=name, nbytes=100, devices=0, process_nbytes=10, runtime_nbytes=50) for name in names]
    machine = even_cluster(1, devices=0, disk=names, remote_bytes_per_second=1e15, disk_bytes_per_second=1e15, dram_bytes_per_second=1e15)
    return simulate(trace, machine, models, **{"placement": "availability", "keep_alive": keep_alive, **changed})


def cold(result: SimulationResult) -> set[int]:
    return {request for request, row in rows(result).items() if row.warmth < READY}


def most_at_once(trace: Iterable[TraceRequest]) -> int:
    """Of one model's requests, each of which runs as soon as it comes."""
    steps = sorted(step for each in trace for step in ((each.arrival_seconds, 1), (each.arrival_seconds + (each.duration_seconds or 0.0), -1)))
    now = most = 0
    for _, change in steps:
        now += change
        most = max(most, now)
    return most


ORDERED: list[KeepAlive | str] = [
    "scale-to-zero", FixedKeepAlive(1.0), FixedKeepAlive(30.0), FixedKeepAlive(300.0), "fixed-10min", FixedKeepAlive(900.0), "fixed-20min", "forever",
]  # fmt: skip


@pytest.mark.parametrize("placement", [name for name in PLACEMENTS if name not in ("random", "deepserve")])
def test_who_keeps_longer_finds_cold_no_request_that_was_warm(placement: str) -> None:
    """Holds for one fixed time against a longer one, with memory for all and starts that take no time, where the instance
    used last takes the next request: then the idle ones are a stack, and the shorter time's stack is a part of the longer
    one's. With starts that take time, one that was cold ends later and may outlive the longer time. `random` and `deepserve`
    take any of the idle ones, and policies that learn may be led astray by one more arrival."""
    for seed in range(2):
        trace = functions(seed)
        found = [cold(kept(trace, keep_alive, placement=placement)) for keep_alive in ORDERED]
        assert all(longer <= shorter for shorter, longer in pairwise(found))
        assert len({len(each) for each in found}) == len(ORDERED), "two times differ in nothing: the trace shows nothing"


@pytest.mark.parametrize("seed", range(3))
def test_cold_starts_lie_between_none_kept_and_all_kept(seed: int) -> None:
    """Without room to win, none beats who keeps all but one that starts ahead of its request; none is worse than who keeps nothing."""
    trace = functions(seed)
    peaks = sum(most_at_once(each for each in trace if each.model == name) for name in {each.model for each in trace})
    found = {name: cold(kept(trace, name)) for name in KEEP_ALIVES}
    assert found["scale-to-zero"] == set(range(len(trace))), "each request has a start of its own"
    assert len(found["forever"]) == len(found["greedy-dual"]) == peaks, "as many starts as ever ran at once: nothing goes while there is room"
    assert found["forever"] == found["greedy-dual"]
    assert found["stem-cells"] == found["fixed-10min"], "a stem cell makes a start shorter, not fewer"
    assert found["buffered"] < found["fixed-10min"], "a spare serves who came too late, and takes nothing away"
    assert all(found["forever"] <= each for name, each in found.items() if name not in ("buffered", "hybrid-histogram", "rainbowcake"))


def clairvoyant(trace: Sequence[TraceRequest], estimator: Estimator) -> Clairvoyant:
    arrivals: dict[str, list[float]] = {}
    for each in trace:
        arrivals.setdefault(each.model, []).append(each.arrival_seconds)

    def next_arrival(model: str, now: float) -> float | None:
        place = bisect_left(arrivals[model], now)
        return arrivals[model][place] if place < len(arrivals[model]) else None

    return Clairvoyant(next_arrival, estimator)


@cache
def apart(seed: int) -> tuple[TraceRequest, ...]:
    """No two requests at once, gaps of a minute to three quarters of an hour."""
    chance, now, trace = Random(seed), 0.0, list[TraceRequest]()
    for _ in range(150):
        now += chance.choice((60.0, 300.0, 1300.0, 2700.0)) + chance.expovariate(1)
        trace.append(ask(now, f"f{chance.randrange(3)}", 5.0))
    return tuple(trace)


def sparse(seed: int, keep_alive: KeepAlive | str, estimator: Estimator | None = None) -> SimulationResult:
    models = [
        m.ModelSpec(name=f"f{number}", nbytes=GB, devices=0, process_seconds=1.0, runtime_seconds=2.0, ready_seconds=0.5, process_nbytes=GB // 10, runtime_nbytes=GB)
        for number in range(3)
    ]  # fmt: skip
    machine = even_cluster(1, devices=0, disk=[spec.name for spec in models])
    return simulate(apart(seed), machine, models, placement="availability", keep_alive=keep_alive, estimator=estimator)


@pytest.mark.parametrize("seed", range(2))
def test_nobody_beats_who_knows_the_future(seed: int) -> None:
    """Of single requests the clairvoyant finds none cold and wastes less memory than whoever finds as few."""
    estimator = Estimator()
    bound = sparse(seed, clairvoyant(apart(seed), estimator), estimator)
    assert bound.cold == 0
    for name in KEEP_ALIVES:
        result = sparse(seed, name)
        assert result.cold >= bound.cold
        assert result.cold or result.account.wasted_mb_seconds > 10 * bound.account.wasted_mb_seconds, "it is as warm for less"
        assert name == "scale-to-zero" or result.account.wasted_mb_seconds > bound.account.wasted_mb_seconds
    assert bound.account.wasted_mb_seconds < 1e-3 * sparse(seed, "forever").account.wasted_mb_seconds


@pytest.mark.parametrize("seed", range(2))
def test_keeping_longer_costs_memory_and_buys_warm_starts(seed: int) -> None:
    results = [sparse(seed, keep_alive) for keep_alive in ORDERED]
    wasted = [result.account.wasted_mb_seconds for result in results]
    assert wasted[0] == 0 and wasted == sorted(wasted)
    assert [result.cold for result in results] == sorted((result.cold for result in results), reverse=True)


# Nothing idle


@pytest.mark.parametrize("policies", [each for each in EVERY if each["keep_alive"] == "fixed-10min"], ids=named)
def test_scale_to_zero_wastes_no_idle_memory(policies: dict[str, str]) -> None:
    """Of models with one device each: where a start needs two, the one that is free first waits for the other."""
    account = storm(3, {**policies, "keep_alive": "scale-to-zero"}, [spec for spec in LANGUAGE_MODELS if spec.devices == 1])[0].account
    assert account.idle_mb_seconds == 0 and account.idle_gpu_seconds == 0
    assert sum(account.starts) > 20


# Rung by rung


RUNGS: dict[str, list[tuple[float, Warmth]]] = {
    "scale-to-zero": [(0.5, COLD), (5000, COLD)],
    "fixed-10min": [(599, READY), (601, COLD)],
    "fixed-20min": [(1199, READY), (1201, COLD)],
    "forever": [(1e6, READY)],
    "buffered": [(599, READY), (601, COLD)],
    "stem-cells": [(599, READY), (601, RUNTIME), (1e6, RUNTIME)],
    "hybrid-histogram": [(239 * 60, READY), (241 * 60, COLD)],
    "greedy-dual": [(1e6, READY)],
    "rainbowcake": [(299, READY), (301, RUNTIME), (479, RUNTIME), (481, PROCESS), (599, PROCESS), (601, COLD)],
}


def test_every_keep_alive_has_its_rungs() -> None:
    assert set(RUNGS) == set(KEEP_ALIVES)


@pytest.mark.parametrize(("name", "gap", "rung"), [(name, *case) for name, cases in RUNGS.items() for case in cases])
def test_how_warm_the_second_request_finds_it(name: str, gap: float, rung: Warmth) -> None:
    """By the seconds since the first one ended; nothing was known of the model before."""
    spec = m.ModelSpec(name="f", nbytes=100, devices=0, process_seconds=1.0, runtime_seconds=2.0, ready_seconds=0.5, process_nbytes=10**6, runtime_nbytes=10**6)
    first = rows(simulate([ask(2000.0)], even_cluster(1), [spec], keep_alive=name))[0]
    result = rows(simulate([ask(2000.0), ask(first.end + gap)], even_cluster(1), [spec], keep_alive=name))
    climb = {COLD: 3.5, PROCESS: 2.5, RUNTIME: 0.5, READY: 0.0}[rung]
    assert result[1].warmth == rung
    assert result[1].start - result[1].arrived == pytest.approx(climb, abs=1e-6)


# How many


@pytest.mark.parametrize(
    ("name", "at_once", "soon", "in_all"),
    [("per-request", 20, 20, 20), ("target-concurrency", 1, 6, 20), ("knative", 1, 1, 1), ("queue-length", 3, 3, 3), ("bounded-queue", 34, 34, 34)],
)
def test_how_many_instances_forty_requests_get(name: str, at_once: int, soon: int, in_all: int) -> None:
    """Forty at once for a model of two requests an instance, whose start takes a minute, under each autoscaler's own options."""
    spec = m.ModelSpec(name="f", nbytes=0, devices=0, concurrency=2, process_seconds=50.0)
    result = simulate([ask(0.0, "f", 10.0)] * 40, even_cluster(1), [spec], autoscaler=name)
    begun = sorted(span.start for span in result.spans if span.what == "process")
    assert [sum(start < until for start in begun) for until in (0.5, 5.5, 49.0)] == [at_once, soon, in_all]
    assert result.answered + result.refused == 40


def test_who_has_been_idle_longest_is_scaled_down_first() -> None:
    """Two instances that need not stay from the first second on; one request after the other comes to the one used last, and a
    tick finds both idle."""
    spec = m.ModelSpec(name="f", nbytes=0, devices=0, min_instances=2)
    events = [(0.9, m.ModelDeployed(m.ModelSpec(name="f", nbytes=0, devices=0)))]
    trace = [ask(0.3, "f", 0.4), ask(0.3, "f", 0.5), *(ask(0.6 + second, "f", 0.5) for second in range(1, 200))]
    result = simulate(trace, even_cluster(1), [spec], keep_alive="forever", autoscaler=KnativePodAutoscaler(target=1.0, utilisation=1.0), events=events)
    ended = {span.instance: span.end for span in result.spans}
    assert len(ended) == 2 and min(ended.values()) < 190 < max(ended.values()), "one of the two was let go"
    assert len({row.instance for row in result.requests if row.arrived > 1}) == 1, "and it was not the one at work"


# Who gives way


@pytest.mark.parametrize("placement", ["availability", "serverlessllm", "affinity"])
@pytest.mark.parametrize("keep_alive", [name for name in KEEP_ALIVES if name != "scale-to-zero"])
def test_who_has_been_idle_longest_gives_way_unless_it_is_worth_more(keep_alive: str, placement: str) -> None:
    """Two devices, three models: a is used three times, then b once, then c needs a device. Only greedy-dual counts uses."""
    models = [m.ModelSpec(name=name, nbytes=10**6, ready_seconds=0.5) for name in "abc"]
    trace = [ask(1000.0 + at, name) for at, name in ((0, "a"), (10, "a"), (20, "a"), (30, "b"), (40, "c"), (50, "b"))]
    found = rows(simulate(trace, even_cluster(1, devices=2), models, placement=placement, keep_alive=keep_alive))
    assert found[2].warmth == READY and found[4].warmth < READY
    assert (found[5].warmth < READY) == (keep_alive == "greedy-dual")


# Where


def begun_on(placement: str, trace: Sequence[TraceRequest], models: Sequence[m.ModelSpec], nodes: Sequence[m.NodeSpec], **changed: Any) -> list[str]:
    """The nodes on which instances were started, in order."""
    result = simulate(trace, nodes, models, **{"placement": placement, "keep_alive": "scale-to-zero", **changed})
    assert result.answered == len(trace)
    return [span.node for span in sorted(result.spans, key=lambda span: (span.start, span.instance)) if span.what == "process"]


NEAR = {"random": False, "availability": False, "locality": True, "shepherd": True, "serverlessllm": True, "affinity": False, "deepserve": True, "hydraserve": True}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_who_looks_for_the_weights_starts_where_they_are(placement: str) -> None:
    """One request after the other, five free machines; even four links together are slower than the disk. Those that do not look go to the last machine now and then, not always."""
    nodes = [*even_cluster(4, devices=1), m.NodeSpec(name="with-weights", devices=1, dram_nbytes=10**12, remote_bytes_per_second=1e9, disk_bytes_per_second=9e9, dram_bytes_per_second=2e10, disk=tuple(f"m{number}" for number in range(20)))]  # fmt: skip
    models = [m.ModelSpec(name=f"m{number}", nbytes=10 * GB, process_seconds=0.1) for number in range(20)]
    begun = begun_on(placement, [ask(100.0 * number, f"m{number}") for number in range(20)], models, nodes)
    assert len(begun) == 20
    if NEAR[placement]:
        assert set(begun) == {"with-weights"}
    else:
        assert 0 < begun.count("with-weights") < 12 and len(set(begun)) == 5


@pytest.mark.parametrize("placement", [name for name in PLACEMENTS if name != "random"])
def test_no_idle_instance_gives_way_while_another_machine_is_free(placement: str) -> None:
    """Two machines, equally quick: after the first model has come to rest, the second starts on the other machine."""
    models = [m.ModelSpec(name=name, nbytes=GB, process_seconds=0.1) for name in ("a", "b", "c", "d")]
    for first, second in (("a", "b"), ("b", "c"), ("c", "d"), ("d", "a")):
        trace = [ask(0.0, first), ask(100.0, second), ask(200.0, first)]
        found = rows(simulate(trace, even_cluster(2, devices=1), models, placement=placement, keep_alive="forever"))
        together = placement == "affinity" and found[2].warmth < READY  # both like the same machine best
        assert together or found[2].warmth == READY


def test_affinity_gives_each_model_a_machine_of_its_own_choice_and_others_do_not() -> None:
    models = [m.ModelSpec(name=f"m{number}", nbytes=GB, process_seconds=0.1) for number in range(12)]
    trace = [ask(100.0 * number, f"m{number % 12}") for number in range(36)]
    begun = begun_on("affinity", trace, models, even_cluster(5, devices=1))
    assert begun[:12] == begun[12:24] == begun[24:] and len(set(begun)) > 2
    elsewhere = begun_on("random", trace, models, even_cluster(5, devices=1))
    assert elsewhere[:12] != elsewhere[12:24]


def test_a_split_fetch_takes_a_share_of_the_time() -> None:
    """Sixteen gigabytes over one link of one gigabyte a second, or over four: as many as help, and no more than there are."""
    spec = m.ModelSpec(name="a", nbytes=16 * GB, process_seconds=0.5)
    for nodes, seconds in ((1, 16.0), (2, 8.0), (4, 4.0), (9, 4.0)):
        machines = even_cluster(nodes, devices=1, remote_bytes_per_second=1e9)
        (row,) = simulate([ask(0.0, "a")], machines, [spec], placement="hydraserve").requests
        assert row.start == pytest.approx(seconds + 0.5)
        (row,) = simulate([ask(0.0, "a")], machines, [spec], placement="serverlessllm").requests
        assert row.start == pytest.approx(16.5)


@pytest.mark.parametrize(("placement", "near"), [("deepserve", True), ("serverlessllm", False)])
def test_a_prefix_goes_where_it_was_read(placement: str, near: bool) -> None:
    """Two instances, made by two requests at once; then one after the other asks with the first's prefix or the second's."""
    spec = m.ModelSpec(name="a", nbytes=GB, prefill_seconds_per_token=1e-3, decode_seconds_per_token=1e-2)
    trace = [TraceRequest(0.0, "a", 10, 10, "left"), TraceRequest(0.0, "a", 10, 10, "right")]
    trace += [TraceRequest(20.0, "a", 10, 10, "left"), TraceRequest(20.0, "a", 10, 10, "right")]
    trace += [TraceRequest(40.0 + 10 * number, "a", 10, 10, name) for number, name in enumerate(("right", "left", "left", "right", "left"))]
    found = rows(simulate(trace, even_cluster(2, devices=1), [spec], placement=placement, keep_alive="forever"))
    left, right = found[2].instance, found[3].instance
    assert left != right
    assert ([found[number].instance for number in range(4, 9)] == [right, left, left, right, left]) == near


# Least instances


@pytest.mark.parametrize("policies", EVERY, ids=named)
def test_what_a_model_is_to_have_ready_is_ready_whatever_the_policies_say(policies: dict[str, str]) -> None:
    """Provisioned instances: two of a model, asked for twice at once after an hour, and nobody waits. Its `max_instances` hold, too."""
    spec = m.ModelSpec(name="a", nbytes=GB, min_instances=2, max_instances=3, process_seconds=1.0)
    trace = [ask(3600.0 * hour, "a", 5.0) for hour in (1, 2) for _ in range(2)] + [ask(3.0 * 3600, "a", 5.0)] * 9
    result = simulate(trace, even_cluster(3, devices=2), [spec], **dict[str, Any](policies))
    found = rows(result)
    assert all(found[number].warmth == READY and found[number].start == found[number].arrived for number in range(4))
    assert result.answered == 13
    lives: dict[int, list[float]] = {}
    for span in result.spans:
        if span.warmth >= DRAM:  # a stem cell has no model
            lives.setdefault(span.instance, []).extend((span.start, span.end))
    assert max(sum(min(other) <= min(life) < max(other) for other in lives.values()) for life in lives.values()) <= 3, "more than there may be"


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_who_is_kept_for_good_is_not_waited_for(placement: str) -> None:
    """The weights of b are where a is kept ready for good; there is another machine."""
    near, free = even_cluster(1, devices=1, disk=("a", "b"))[0], even_cluster(2, devices=1)[1]
    models = [m.ModelSpec(name="a", nbytes=GB, min_instances=1), m.ModelSpec(name="b", nbytes=GB)]
    assert simulate([ask(60.0, "b")], [near, free], models, placement=placement).answered == 1


def test_a_stem_cell_that_is_taken_is_made_anew_beside_the_one_that_is_left() -> None:
    estimator = Estimator()
    policies = make_policies("availability", "stem-cells", "per-request", estimator)
    controller = Controller(policies.placement, policies.keep_alive, policies.autoscaler, estimator)
    spec = m.ModelSpec(name="a", nbytes=GB, process_nbytes=10**6, runtime_nbytes=10**6)
    SimulatedCluster(controller, even_cluster(1, devices=1), [spec], SimulationOptions(until=10_000.0)).run([ask(100.0, "a", 500.0)])
    assert [(each.model, each.warmth) for each in controller.cluster.instances.values()] == [(None, Warmth.RUNTIME)] * 2


def test_new_figures_of_an_idle_model_do_not_begin_its_idle_time_anew() -> None:
    """One that was to stay may go: its keep-alive is asked again, long after the request that it counts from."""
    policy = HybridHistogram()
    controller = Controller(make_policies("availability", "forever", "per-request", Estimator()).placement, policy, PerRequest())
    kept_ready = m.ModelSpec(name="f", nbytes=GB, min_instances=1)
    events = [(3000.0, m.ModelDeployed(replace(kept_ready, min_instances=0)))]
    SimulatedCluster(controller, even_cluster(1, devices=1), [kept_ready], SimulationOptions(until=4000.0)).run([ask(10.0), ask(3600.0)], events)
    assert [minute for minute, count in enumerate(policy._idle["f"].counts) if count] == [59]
