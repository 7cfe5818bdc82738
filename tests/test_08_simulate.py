"""The simulator comes to what theory says, keeps account of every device-second, and gives the same result twice."""

from __future__ import annotations

import gc
import json
import math
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from command_line import Run as RunCommand
from hypothesis import given, settings
from hypothesis import strategies as st

import sllm_mini
from sllm_mini.cluster.simulated import (
    MisfitWarning,
    RequestRow,
    SimulatedCluster,
    SimulationError,
    SimulationOptions,
    SimulationResult,
    even_cluster,
    make_policies,
    misfits,
    move_rounds,
    simulate,
    write_chrome_trace,
)
from sllm_mini.cluster.simulated.links import QueuedLink, SharedLink
from sllm_mini.cluster.simulated.policies import AUTOSCALERS, KEEP_ALIVES, PLACEMENTS
from sllm_mini.cluster.simulated.store import SimulatedStore
from sllm_mini.cluster.simulated.summary import Counters, exact_spread
from sllm_mini.cluster.trace import Trace, TraceLabel, TraceRequest, write_trace
from sllm_mini.control import messages as m
from sllm_mini.control.cluster import Cluster
from sllm_mini.control.controller import Controller
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.keepalive import FixedKeepAlive
from sllm_mini.control.oracles import erlang_c, setup_queue
from sllm_mini.control.policy import Prewarm
from sllm_mini.control.replay import replay
from sllm_mini.control.state import ModelState
from sllm_mini.errors import SllmError
from sllm_mini.eviction import LFU, LRU, Policy, keep_prefix
from sllm_mini.types import Tier, Warmth

GB = 10**9
SUMMARY = SimulationOptions(keep="summary")
T_999 = {7: 5.41, 9: 4.78}
"""Student's t, two-sided 99.9 %, by degrees of freedom."""


def model(name: str = "m", **figures: Any) -> m.ModelSpec:
    return m.ModelSpec(name=name, **{"nbytes": 0, **figures})


def poisson(count: int, rate: float, seconds: float, seed: int, models: Sequence[str] = ("m",), weights: Sequence[float] | None = None) -> Iterator[TraceRequest]:
    """Poisson arrivals, exponential run times of this mean."""
    chance, now = Random(seed), 0.0
    for name in chance.choices(models, weights, k=count):
        now += chance.expovariate(rate)
        yield TraceRequest(now, name, 0, 0, None, chance.expovariate(1 / seconds) if seconds else 0.0)


def within_interval(samples: Sequence[float], expected: float, *, narrow: float) -> None:
    """`expected` lies in the 99.9 % confidence interval of replications, which is narrow enough to say something."""
    half = T_999[len(samples) - 1] * statistics.stdev(samples) / math.sqrt(len(samples))
    mean = statistics.mean(samples)
    assert half < narrow * expected, f"the interval {mean:.4g} ± {half:.2g} says too little about {expected:.4g}"
    assert abs(mean - expected) <= half, f"{mean:.4g} ± {half:.2g} is not {expected:.4g}"


# Oracles


def test_four_servers_wait_as_erlang_says() -> None:
    expected = erlang_c(4, 3.2, 1.0)
    waits, delayed = [], []
    for seed in range(10):
        result = simulate(
            poisson(12_000, 3.2, 1.0, seed), even_cluster(1, devices=4), [model(min_instances=4, max_instances=4)], keep_alive="forever",
            options=SimulationOptions(keep="requests"),
        )  # fmt: skip
        waits.append(result.wait.mean)
        delayed.append(float((result.requests.column("start") > result.requests.column("arrived")).mean()))
        assert result.cold == 0
    within_interval(waits, expected.wait_seconds, narrow=0.2)
    within_interval(delayed, expected.wait_probability, narrow=0.1)


@pytest.mark.parametrize("keep_alive_seconds", [0.0, 1.0, 3.0])
def test_set_up_and_keep_alive_cost_what_the_queue_says(keep_alive_seconds: float) -> None:
    expected = setup_queue(0.5, 1.0, 5.0, keep_alive_seconds)
    waits, cold = [], []
    for seed in range(8):
        result = simulate(
            poisson(8_000, 0.5, 1.0, seed), even_cluster(1, devices=1), [model(max_instances=1, ready_seconds=5.0)],
            keep_alive=FixedKeepAlive(keep_alive_seconds), options=SUMMARY,
        )  # fmt: skip
        waits.append(result.wait.mean)
        cold.append(result.cold_fraction)
    within_interval(waits, expected.wait_seconds, narrow=0.1)
    within_interval(cold, expected.cold_fraction, narrow=0.1)


def test_a_store_with_lru_hits_as_che_says() -> None:
    from sllm_mini.lab.caching import CatalogueModel, che_ratios

    names = [f"m{rank:03}" for rank in range(200)]
    shares = [1 / (rank + 1) ** 0.8 for rank in range(200)]
    total = sum(shares)
    expected = che_ratios([CatalogueModel(name, share / total, 1000, 1.0) for name, share in zip(names, shares, strict=True)], 40_000).requests
    result = simulate(
        poisson(40_000, 1.0, 0.0, 3, names, shares), even_cluster(1, devices=64), [model(name, nbytes=1000) for name in names], keep_alive="scale-to-zero",
        options=SimulationOptions(keep="summary", store_dram_nbytes=40_000),
    )  # fmt: skip
    loads = result.account.loads
    assert sum(loads) == 40_000
    assert loads[Tier.DRAM] / sum(loads) == pytest.approx(expected, rel=0.03)
    assert loads[Tier.REMOTE] == 200  # once each: the disk has no limit


@pytest.mark.parametrize("keep_alive", ["scale-to-zero", "rainbowcake"])
def test_littles_law_holds(keep_alive: str) -> None:
    result = simulate(
        poisson(5_000, 2.0, 1.5, 5, ["a", "b", "c"]), even_cluster(2, devices=2),
        [model(name, nbytes=GB, ready_seconds=0.3) for name in "abc"], keep_alive=keep_alive,
    )  # fmt: skip
    assert result.mean_in_system == pytest.approx(result.arrived / result.seconds * result.latency.mean, rel=1e-9)


# A busy little cluster under every policy


MODELS = [
    m.ModelSpec(
        name=f"m{number}", nbytes=(4 + number) * GB, devices=1 + (number % 4 == 3), concurrency=1 + number % 2, process_seconds=1.0, runtime_seconds=2.0,
        ready_seconds=0.5, process_nbytes=GB // 10, runtime_nbytes=GB, prefill_seconds_per_token=2e-4, decode_seconds_per_token=0.02,
        runtime="torch" if number % 3 else "vllm",
    )
    for number in range(8)
]  # fmt: skip


def tokens(count: int, rate: float, seed: int, models: Sequence[m.ModelSpec] = MODELS) -> Iterator[TraceRequest]:
    chance, now = Random(seed), 0.0
    for spec in chance.choices(models, [1 / (rank + 1) for rank in range(len(models))], k=count):
        now += chance.expovariate(rate)
        yield TraceRequest(now, spec.name, chance.randrange(10, 800), chance.randrange(0, 200))


LOSSES = [
    (40.0, m.NodeLost("node-0001")),
    (55.0, m.RequestCancelled(70)),
    (60.0, m.NodeJoined(even_cluster(2, devices=2)[1])),
    (90.0, m.InstanceFailed(3, "the process died", 0)),
    (120.0, m.NodeLost("node-0000")),
    (130.0, m.NodeJoined(even_cluster(1, devices=3)[0])),
]  # fmt: skip


def busy(**changed: Any) -> SimulationResult:
    settings = {"nodes": even_cluster(3, devices=2, disk=("m0", "m1")), "models": MODELS, "events": LOSSES, **changed}
    options = settings.pop("options", SimulationOptions(store_dram_nbytes=12 * GB, store_disk_nbytes=30 * GB, batch_slowdown=0.2, jitter=0.1))
    return simulate(settings.pop("trace", tokens(300, 2.0, 1)), settings.pop("nodes"), settings.pop("models"), options=options, **settings)


EVERY_POLICY = sorted(
    {(place, "fixed-10min", "per-request") for place in PLACEMENTS}
    | {("serverlessllm", keep, "per-request") for keep in KEEP_ALIVES}
    | {("serverlessllm", "fixed-10min", scale) for scale in AUTOSCALERS}
)


@pytest.mark.parametrize(("placement", "keep_alive", "autoscaler"), EVERY_POLICY)
def test_every_second_of_every_device_is_accounted_for(placement: str, keep_alive: str, autoscaler: str) -> None:
    result = busy(placement=placement, keep_alive=keep_alive, autoscaler=autoscaler)
    account = result.account
    assert sum(account.gpu_seconds) + account.free_gpu_seconds == pytest.approx(account.total_gpu_seconds, rel=1e-9)
    assert min(account.gpu_seconds) >= 0 and account.free_gpu_seconds >= 0
    # node-0002 was there all the time, the other two came back after a pause, one of them with three devices
    assert account.total_gpu_seconds == pytest.approx(2 * result.seconds + 2 * (result.seconds - 20) + 2 * 120 + 3 * (result.seconds - 130))
    assert result.arrived == 300 == result.answered + result.refused + result.requests.count("cancelled") + result.unanswered
    assert result.unanswered == 0
    assert result.requests.count("cancelled") <= 1
    assert result.mean_in_system * result.seconds == pytest.approx(sum(row.latency_seconds for row in result.requests), rel=1e-9)


def rows_in_order(rows: Iterable[RequestRow]) -> None:
    for row in rows:
        if row.outcome == "answered":
            assert row.arrived <= row.start <= row.first_token <= row.end
            assert row.start + 0.02 * row.output_tokens <= row.end + 1e-6


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_times_of_a_request_are_in_order(placement: str) -> None:
    rows_in_order(busy(placement=placement).requests)


def test_what_is_done_to_requests_is_in_the_account() -> None:
    moved, preempted = busy(placement="serverlessllm"), busy(placement="shepherd")
    assert moved.account.migrations == sum(row.migrations for row in moved.requests) > 0
    assert preempted.account.preemptions == sum(row.preemptions for row in preempted.requests) > 0
    assert preempted.account.lost_seconds > 0
    assert 0 < moved.account.paused_seconds < moved.account.moved_seconds


@pytest.mark.parametrize("placement", ["random", "serverlessllm"])
def test_the_same_arguments_give_the_same_result(placement: str) -> None:
    logs: list[list[bytes]] = [[], []]
    one, two = (busy(placement=placement, keep_alive="rainbowcake", log=log.append) for log in logs)
    assert logs[0] == logs[1]
    assert list(one.requests) == list(two.requests) or str(list(one.requests)) == str(list(two.requests))  # NaN is not NaN
    assert one.spans == two.spans
    assert {**one.totals(), "wall_seconds": 0} == {**two.totals(), "wall_seconds": 0}


def test_the_log_of_a_run_can_be_replayed() -> None:
    log: list[bytes] = []
    result = busy(log=log.append)
    estimator = Estimator()
    policies = make_policies("serverlessllm", "fixed-10min", "per-request", estimator)
    assert replay(log, Controller(policies.placement, policies.keep_alive, policies.autoscaler, estimator)) == len(log) == result.event_count


def test_spans_of_an_instance_do_not_overlap_and_fill_its_device_seconds() -> None:
    result = busy(events=(), options=SimulationOptions(), keep_alive="scale-to-zero", placement="locality", models=[spec for spec in MODELS if spec.concurrency == 1],
                  trace=tokens(100, 0.5, 4, [spec for spec in MODELS if spec.concurrency == 1]))  # fmt: skip
    by_instance: dict[int, list[Any]] = {}
    for span in result.spans:
        by_instance.setdefault(span.instance, []).append(span)
    for spans in by_instance.values():
        spans.sort(key=lambda span: span.start)
        assert all(before.end <= after.start + 1e-9 for before, after in pairwise(spans))
    covered = sum(len(span.devices) * (span.end - span.start) for span in result.spans)
    assert covered == pytest.approx(sum(result.account.gpu_seconds), rel=1e-6)


def test_no_time_of_a_device_goes_undrawn_where_a_move_comes_to_nothing() -> None:
    """Requests that end on their way leave their target held until then, which is a span of its own."""
    from sllm_mini.lab.scheduling.worked import small_burst

    result = small_burst("serverlessllm")
    assert result.account.failed_migrations == sum(span.what == "held" for span in result.spans) > 0
    covered = sum(len(span.devices) * (span.end - span.start) for span in result.spans)
    assert covered == pytest.approx(sum(result.account.gpu_seconds), rel=1e-9)
    assert any(span.what == "cut" and span.end == result.seconds for span in result.spans), "and a start goes on when the run ends"
    assert max(span.end for span in result.spans) == result.seconds


class WarmsOnce(FixedKeepAlive):
    """One more instance at second 10, which goes after `seconds` without a request."""

    def on_deploy(self, model: ModelState, cluster: Cluster, now: float) -> Sequence[Prewarm]:
        return [Prewarm(10.0, model.spec.name, Warmth.READY)]


def test_a_climb_that_nothing_used_is_wasted() -> None:
    """A pre-warm from second 10 to 15, and 3 idle seconds: wasted altogether where no request came in time."""
    spec = model(devices=1, process_seconds=5.0, process_nbytes=10**6)

    def after(seconds: float) -> SimulationResult:
        requests = [TraceRequest(seconds, "m", 0, 0, None, 1.0)]
        return simulate(requests, even_cluster(1, devices=1), [spec], keep_alive=WarmsOnce(3.0), autoscaler="per-request", options=SimulationOptions(until=60.0))

    used, unused = after(16.0).account, after(40.0).account
    assert (used.unused_climb_gpu_seconds, used.unused_climb_byte_seconds) == (0.0, 0.0)
    assert used.wasted_gpu_seconds == used.idle_gpu_seconds == pytest.approx(1.0 + 3.0)
    assert unused.unused_climb_gpu_seconds == pytest.approx(5.0)
    assert unused.wasted_gpu_seconds == pytest.approx(5.0 + 3.0 + 3.0)
    assert unused.wasted_mb_seconds == pytest.approx(5.0 + 3.0 + 3.0)
    cut = simulate([TraceRequest(0.0, "m", 0, 0, None, 1.0)], even_cluster(1, devices=2), [spec], keep_alive=WarmsOnce(3.0), options=SimulationOptions(until=12.0))
    assert cut.account.unused_climb_gpu_seconds == pytest.approx(2.0), "a climb that the end of the run cut off was used by nobody"
    totals = after(40.0).totals()
    assert (totals["gpu_seconds_unused_climbs"], totals["mb_seconds_unused_climbs"]) == (pytest.approx(5.0), pytest.approx(5.0))


# Closed form


def test_a_request_takes_its_prefill_and_its_tokens() -> None:
    spec = model(min_instances=1, prefill_seconds_per_token=0.01, decode_seconds_per_token=0.5)
    (row,) = simulate([TraceRequest(10.0, "m", 100, 4)], even_cluster(1), [spec]).requests
    assert (row.start, row.first_token, row.end) == (10.0, pytest.approx(11.5), pytest.approx(13.0))
    assert row.warmth is Warmth.READY


def test_a_cold_start_is_the_sum_of_its_rungs_and_waits_for_the_loads_before_it() -> None:
    spec = model(nbytes=10 * GB, process_seconds=1.0, runtime_seconds=2.0, ready_seconds=0.5, decode_seconds_per_token=1.0)
    requests = [TraceRequest(0.0, "m", 0, 1), TraceRequest(0.5, "m", 0, 1)]
    nodes = even_cluster(1, devices=2, remote_bytes_per_second=1e9)
    result = simulate(requests, nodes, [spec], autoscaler="per-request", options=SimulationOptions(until=30.0))
    first, second = result.requests
    assert (first.start, first.warmth) == (pytest.approx(13.5), Warmth.COLD)
    assert [span.what for span in result.spans if span.instance == first.instance][:4] == ["process", "runtime", "load", "ready"]
    assert second.arrived == 0.5 and second.start == pytest.approx(14.5)  # it takes over the first instance, ready before its own
    assert second.warmth is Warmth.READY
    assert result.cold == 1
    queued = [span for span in result.spans if span.what == "queue"]
    assert [(span.start, span.end) for span in queued] == [(pytest.approx(3.5), pytest.approx(13.0))]


def test_requests_in_one_batch_slow_each_other_down() -> None:
    spec = model(min_instances=1, max_instances=1, concurrency=2, decode_seconds_per_token=1.0)
    requests = [TraceRequest(1.0, "m", 0, 10), TraceRequest(6.0, "m", 0, 5)]
    result = simulate(requests, even_cluster(1), [spec], options=SimulationOptions(batch_slowdown=0.5))
    # alone for 5 tokens, then both at two thirds of the pace for 5 tokens each, which is 7.5 s
    assert [row.end for row in result.requests] == [pytest.approx(13.5), pytest.approx(13.5)]


def test_a_lost_node_costs_the_prefill_again_but_no_token() -> None:
    spec = model(prefill_seconds_per_token=0.1, decode_seconds_per_token=1.0)
    events = [(8.5, m.NodeLost("node-0000")), (20.0, m.NodeJoined(even_cluster(1)[0]))]
    (row,) = simulate([TraceRequest(1.0, "m", 20, 10)], even_cluster(1), [spec], events=events).requests
    # prefill to 3.0, 5 tokens by 8.5; from 20.0 the prefill of 25 tokens, then 5 tokens
    assert (row.first_token, row.end) == (pytest.approx(4.0), pytest.approx(27.5))


def test_a_move_has_rounds_and_a_pause() -> None:
    rounds, pause = move_rounds(1000, 0.001, 0.01, 20)
    assert rounds == pytest.approx(1.0 + 0.1)  # 1000 tokens, then the 100 that came meanwhile; 10 are left for the pause
    assert pause == pytest.approx(0.01)
    assert move_rounds(1000, 0.0, 0.01, 20) == (0.0, 0.0)
    assert move_rounds(1000, 0.02, 0.01, 20)[1] > 1  # recomputing is slower than decoding: the gap never closes


@pytest.mark.parametrize("eviction", [LRU, LFU])
def test_the_quick_store_evicts_as_the_policy_says(eviction: Policy) -> None:
    same = Policy("the same, by the general way", eviction.priority)
    stores = [SimulatedStore(50, 120, policy) for policy in (eviction, same)]
    chance = Random(2)
    for now in range(2000):
        name = f"m{min(chance.randrange(30), chance.randrange(30))}"
        nbytes = 5 + int(name[1:]) % 7
        changes = []
        for store in stores:
            tier = store.lease(name)
            changes.append((tier, list(store.loaded(name, nbytes, tier, 1.0, float(now)))))
        assert changes[0] == changes[1]


class FixedPlan:
    """Starts an instance for each request on the node that its number says, runs the request there, and lets it go."""

    def __init__(self, nodes: int) -> None:
        self.nodes = nodes

    def handle(self, event: m.AnyEvent, now: float) -> list[m.AnyAction]:
        if isinstance(event, m.RequestArrived):
            node, device = f"node-{event.request % self.nodes:04}", event.request // self.nodes
            return [m.Start(event.request, node, event.model, Warmth.COLD, Warmth.READY, Tier.DISK, (device,), 1)]
        if isinstance(event, m.InstanceReached):
            return [m.Assign(event.instance, event.instance, 1)]
        if isinstance(event, m.RequestFinished):
            return [m.Descend(event.request, Warmth.COLD, 2)]
        return []


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.floats(0, 10), st.integers(1, 50), st.booleans()), min_size=1, max_size=20), st.floats(1.0, 8.0), st.sampled_from(["node", "link", "shared"])
)  # fmt: skip
def test_more_bandwidth_makes_no_request_of_a_fixed_plan_later(requests: list[tuple[float, int, bool]], factor: float, links: Any) -> None:
    models = [model(f"m{number}", nbytes=nbytes * GB, process_seconds=0.5) for number, (_, nbytes, _) in enumerate(requests)]
    trace = [TraceRequest(at, f"m{number}", 0, 0, None, 1.0) for number, at in enumerate(sorted(at for at, _, _ in requests))]
    disk = tuple(spec.name for spec, (_, _, there) in zip(models, requests, strict=True) if there)
    ends = []
    for scale in (1.0, factor):
        rates = {f"{tier}_bytes_per_second": rate * scale for tier, rate in (("remote", 1e9), ("disk", 4e9), ("dram", 2e10))}
        cluster = SimulatedCluster(FixedPlan(2), even_cluster(2, devices=20, disk=disk, **rates), models, SimulationOptions(links=links))
        cluster.run(trace)
        ends.append({row.request: row.end for row in cluster.table})
    assert len(ends[0]) == len(requests)
    assert all(ends[1][request] <= end + 1e-9 for request, end in ends[0].items())


class Timed:
    """A load as a link sees it."""

    queued_seconds = 0.0


@settings(max_examples=60)
@given(st.lists(st.tuples(st.floats(0, 20), st.floats(0, 5)), min_size=1, max_size=12))
def test_a_link_is_busy_no_longer_than_its_loads_need(loads: list[tuple[float, float]]) -> None:
    """Both kinds of link are never idle while there is a load, so each is done with all of them at the same time."""
    ends = []
    for link in (QueuedLink[Timed](), SharedLink[Timed]()):
        waiting, done, last = sorted(loads), 0, 0.0
        while done < len(loads):
            at = link.next_at()
            if waiting and (at is None or waiting[0][0] < at):
                now, seconds = waiting.pop(0)
                link.submit(Timed(), seconds, now)
            else:
                assert at is not None and at >= last - 1e-9
                last = at
                done += len(link.take(at))
        ends.append(last)
    assert ends[0] == pytest.approx(ends[1], abs=1e-6)


# What is asked for and cannot be


class Wrong:
    def __init__(self, *actions: m.AnyAction) -> None:
        self.actions = list(actions)

    def handle(self, event: m.AnyEvent, now: float) -> list[m.AnyAction]:
        return self.actions if isinstance(event, m.RequestArrived) else []


def start(instance: int, device: int, warmth: Warmth = Warmth.COLD) -> m.Start:
    return m.Start(instance, "node-0000", "m", warmth, Warmth.READY, Tier.REMOTE, (device,), 1)


@pytest.mark.parametrize(
    ("actions", "words"),
    [
        ([start(0, 0), start(1, 0)], "device 0 of node-0000, which is not free"),
        ([start(0, 9)], "device 9 of node-0000, which is not free"),
        ([start(0, 0, Warmth.DRAM)], "was to climb from DRAM"),
        ([start(0, 0), m.Assign(0, 0, 1)], "assigned to instance 0, which is at COLD"),
        ([m.Start(0, "node-0000", "big", Warmth.COLD, Warmth.DRAM, Tier.REMOTE, (), 1)], "memory that node-0000 has not"),
    ],
)
def test_what_the_controller_may_not_do_is_an_error(actions: list[m.AnyAction], words: str) -> None:
    cluster = SimulatedCluster(Wrong(*actions), even_cluster(1, devices=1), [model(), model("big", nbytes=10**15)])
    with pytest.raises(SimulationError, match=words):
        cluster.run([TraceRequest(1.0, "m", 1, 1)])


def test_a_trace_out_of_order_is_an_error() -> None:
    with pytest.raises(SimulationError, match="sort the trace"):
        simulate([TraceRequest(2.0, "m", 1, 1), TraceRequest(1.0, "m", 1, 1)], even_cluster(1), [model()])


def test_a_policy_that_nobody_has_is_an_error() -> None:
    with pytest.raises(SllmError, match=r"choose one of .*rainbowcake"):
        simulate([], even_cluster(1), [model()], keep_alive="rainbow")


@pytest.mark.parametrize(
    "wrong", [
        {"links": "bus"}, {"keep": "rows"}, {"store_dram_nbytes": -1}, {"store_disk_nbytes": 1e9}, {"jitter": -0.1}, {"jitter": "much"}, {"batch_slowdown": math.nan},
        {"patience_seconds": 0.0}, {"until": math.inf}, {"move_gap_tokens": 2.5}, {"seed": -1}, {"eviction": "lru"}, {"eviction": keep_prefix(LRU)},
    ]
)  # fmt: skip
def test_options_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    (field,) = wrong
    with pytest.raises(m.SpecError, match=field):
        SimulationOptions(**wrong)


NODE: dict[str, Any] = {"name": "n", "devices": 1, "dram_nbytes": 1, "remote_bytes_per_second": 1.0, "disk_bytes_per_second": 1.0, "dram_bytes_per_second": 1.0}


@pytest.mark.parametrize(
    "wrong", [
        {"nbytes": -1}, {"nbytes": 14e9}, {"nbytes": math.inf}, {"devices": -1}, {"concurrency": 0}, {"concurrency": "8"}, {"min_instances": -1}, {"max_instances": 0},
        {"process_nbytes": -1}, {"runtime_nbytes": math.nan}, {"ready_seconds": math.nan}, {"process_seconds": math.inf}, {"runtime_seconds": -0.1},
        {"decode_seconds_per_token": "0.1"}, {"prefill_seconds_per_token": True}, {"runtime": ""}, {"name": ""}, {"name": 3}, {"name": " a"},
    ]
)  # fmt: skip
def test_a_model_that_cannot_be_is_refused_in_one_sentence(wrong: dict[str, Any]) -> None:
    (field,) = wrong
    with pytest.raises(m.SpecError, match=rf"{field} .*; (give|name)"):
        m.ModelSpec(**dict[str, Any](name="m", nbytes=1) | wrong)
    with pytest.raises(SllmError, match="min_instances no larger than max_instances"):
        model(min_instances=3, max_instances=2)


def test_a_field_that_nobody_has_is_refused_wherever_specs_are_read() -> None:
    import msgspec

    kinds: list[tuple[type[m.NodeSpec | m.ModelSpec], dict[str, Any]]] = [(m.NodeSpec, NODE), (m.ModelSpec, {"name": "m", "nbytes": 1})]
    for kind, fields in kinds:
        assert msgspec.convert(fields, kind).name == fields["name"]
        with pytest.raises(msgspec.ValidationError, match="unknown field `colour`"):
            msgspec.json.decode(json.dumps(fields | {"colour": 1}), type=kind)


@pytest.mark.parametrize(
    "wrong", [
        {"devices": -1}, {"dram_nbytes": -1}, {"dram_nbytes": 1e9}, {"remote_bytes_per_second": 0.0}, {"disk_bytes_per_second": math.nan}, {"dram_bytes_per_second": math.inf},
        {"disk_bytes_per_second": -1.0}, {"disk_bytes_per_second": "fast"}, {"disk": "m"}, {"disk": ["m"]}, {"disk": ("m", 3)}, {"name": ""},
    ]
)  # fmt: skip
def test_a_node_that_cannot_be_is_refused_in_one_sentence(wrong: dict[str, Any]) -> None:
    (field,) = wrong
    with pytest.raises(m.SpecError, match=rf"{field} .*; (give|name)"):
        m.NodeSpec(**NODE | wrong)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"nodes": 4}, "the nodes are 4; give a list of NodeSpec"),
        ({"trace": None}, "the requests are None; give a list of TraceRequest"),
        ({"events": 3}, "the events are 3; give a list of pairs"),
        ({"nodes": [*even_cluster(1), *even_cluster(2)]}, "two nodes are named 'node-0000'"),
        ({"models": [model(), model()]}, "two models are named 'm'"),
        ({"models": [{"name": "m"}]}, "model 1 is .*; give a ModelSpec"),
        ({"trace": [(0.0, "m", 1, 1)]}, "request 0 of the trace is .*; give a TraceRequest"),
        ({"trace": [TraceRequest(math.nan, "m", 1, 1)]}, "request 0 of the trace is .* 0 or more"),
        ({"trace": [TraceRequest(0.0, "m", -1, 1)]}, "request 0 of the trace is .* 0 or more"),
        ({"trace": [TraceRequest(0.0, "m", 0, 0, None, math.inf)]}, "request 0 of the trace runs for inf s"),
        ({"events": [m.NodeLost("node-0000")]}, "give pairs of a second"),
        ({"options": {"links": "node"}}, "give SimulationOptions"),
        ({"placement": 3}, r"the placement policy is 3, which has no choose_instance; give a name \(random"),
        ({"keep_alive": FixedKeepAlive}, "the keep-alive policy is .*, a class; give a name"),
    ],
)
def test_arguments_of_another_kind_are_told_in_one_sentence(wrong: dict[str, Any], words: str) -> None:
    arguments = {"trace": [], "nodes": even_cluster(1), "models": [model()], **wrong}
    with pytest.raises(SllmError, match=words):
        simulate(arguments.pop("trace"), arguments.pop("nodes"), arguments.pop("models"), **arguments)
    for nodes in (0, -1, 2.0):
        with pytest.raises(m.SpecError, match="a whole number of 1 or more"):
            even_cluster(nodes)
    with pytest.raises(m.SpecError, match="a list of names"):
        even_cluster(1, disk="m")


def test_a_model_that_fits_nowhere_is_told_before_the_run() -> None:
    """By devices, by memory, and by both where no one node has both; what comes later by an event counts."""
    nodes = [m.NodeSpec(**NODE | {"name": "many", "devices": 4, "dram_nbytes": 10}), m.NodeSpec(**NODE | {"name": "much", "devices": 1, "dram_nbytes": 90})]
    models = [
        model("a", devices=8), model("b", process_nbytes=100), model("c", devices=2, process_nbytes=50), model("d", devices=2, process_nbytes=50),
        model("e", devices=4, process_nbytes=10), model("f", devices=0, nbytes=90), model("g", devices=0, nbytes=91),
    ]  # fmt: skip
    said = misfits(nodes, models)
    assert [words.split(" need")[0] for words in said] == ["the model a", "the model b", "the models c, d", "the model g"]
    assert said[0] == "the model a needs 8 devices and 0 bytes of host memory on one node, and the largest, many, has 4 and 10; give a larger node or a smaller model"
    assert misfits(nodes, [model(str(number), devices=9) for number in range(5)])[0].startswith("the models 0, 1, 2 and 2 more need 9 devices")
    assert misfits([], models) == ["there is no node, so no model can start; give at least one"]
    with pytest.warns(MisfitWarning, match="the model m needs 2 devices"):
        simulate([], even_cluster(1, devices=1), [model(devices=2)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        simulate([], even_cluster(1, devices=1), [model(devices=2)], events=[(1.0, m.NodeJoined(m.NodeSpec(**NODE | {"devices": 2})))])


def test_requests_that_nothing_happens_to_are_unanswered() -> None:
    """The only device belongs to another model, which always has an instance."""
    result = simulate([TraceRequest(1.0, "b", 1, 1)], even_cluster(1, devices=1), [model("a", min_instances=1), model("b")], placement="availability")
    assert (result.answered, result.unanswered) == (0, 1)


def test_totals_have_the_same_keys_whatever_was_answered() -> None:
    nothing, busily = simulate([], even_cluster(1), [model()]).totals(), busy().totals()
    assert nothing.keys() == busily.keys()
    assert nothing["first_token_seconds_p99"] is nothing["cold_fraction"] is nothing["events_per_request"] is None and nothing["answered"] == 0
    assert None not in busily.values()
    refused = simulate([TraceRequest(0.0, "m", 1, 1), TraceRequest(1.0, "m", 1, 1)], even_cluster(1), [model()], events=[(0.5, m.ModelDeleted("m"))]).to_dict()
    assert [set(row) for row in refused["models"]] == [set(row) for row in busy().to_dict()["models"][:1]] and json.dumps(refused, allow_nan=False)


def test_a_model_that_nobody_has_is_refused() -> None:
    result = simulate([TraceRequest(0.0, "other", 1, 1)], even_cluster(1), [model()])
    (row,) = result.requests
    assert (row.outcome, row.model, result.refused) == ("refused", "", 1)
    assert math.isnan(row.start)


# What is kept


def test_sums_are_the_same_whatever_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sllm_mini.cluster.simulated.driver._BUFFER", 104 * 50)  # several chunks
    results = [busy(options=SimulationOptions(keep=keep)) for keep in ("everything", "requests", "summary")]
    exact, rows, sums = (result.to_dict() for result in results)
    for document in (exact, rows, sums):
        document["totals"].pop("wall_seconds")
    assert exact == rows
    assert results[1].spans == [] and not list(results[2].requests)
    assert sums.pop("percentiles_exact") is False and exact.pop("percentiles_exact") is True
    for name, value in exact["totals"].items():
        assert sums["totals"][name] == pytest.approx(value, rel=0.02 if "_seconds_p" in name else 1e-9), name
    assert [row["model"] for row in sums["models"]] == [row["model"] for row in exact["models"]]
    for mine, theirs in zip(sums["models"], exact["models"], strict=True):
        assert mine["latency_seconds_mean"] == pytest.approx(theirs["latency_seconds_mean"])
        assert (mine["answered"], mine["cold"], mine["first_token_seconds_max"]) == (theirs["answered"], theirs["cold"], theirs["first_token_seconds_max"])


def test_streamed_percentiles_are_half_a_percent_off_at_most() -> None:
    import numpy as np

    numbers = np.random.default_rng(0).lognormal(0.0, 2.0, 50_000)
    counters = Counters()
    for part in np.array_split(numbers, 7):
        counters.add(part)
    streamed, exact = counters.spread(), exact_spread(numbers)
    for name in ("p50", "p90", "p95", "p99"):
        assert getattr(streamed, name) == pytest.approx(getattr(exact, name), rel=0.0075)
    assert (streamed.count, streamed.largest) == (exact.count, exact.largest)
    assert streamed.mean == pytest.approx(exact.mean)


def test_memory_does_not_grow_with_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of memory that driver and controller hold at the end: a thing kept for each request would be 20 000 more."""
    monkeypatch.setattr("sllm_mini.cluster.simulated.driver._BUFFER", 104 * 1024)
    held = []
    for count in (5_000, 5_000, 25_000):  # the first one warms up
        estimator = Estimator()
        policies = make_policies("serverlessllm", "rainbowcake", "per-request", estimator)
        controller = Controller(policies.placement, policies.keep_alive, policies.autoscaler, estimator)
        gc.collect()
        before = sys.getallocatedblocks()
        cluster = SimulatedCluster(controller, even_cluster(2, devices=2), [model(name, ready_seconds=1.0) for name in "abcd"], SUMMARY)
        cluster.run(poisson(count, 1.0, 1.0, 1, "abcd"))
        gc.collect()
        held.append(sys.getallocatedblocks() - before)
    assert held[2] - held[1] < 3_000


def test_a_chrome_trace_has_every_span(tmp_path: Path) -> None:
    result = busy()
    assert write_chrome_trace(tmp_path / "run.json", result.spans) == len(result.spans) > 0
    events = json.loads((tmp_path / "run.json").read_text())["traceEvents"]
    assert {event["args"]["name"] for event in events if event["name"] == "process_name"} == {"node-0000", "node-0001", "node-0002"}
    complete = [event for event in events if event["ph"] == "X"]
    assert len(complete) == len(result.spans)
    assert all(event["dur"] > 0 for event in complete)
    assert {event["cat"] for event in complete} >= {"process", "runtime", "load", "ready", "run", "idle"}


def test_the_public_names() -> None:
    assert sllm_mini.simulate is simulate
    assert sllm_mini.SimulationResult is SimulationResult


# The command line


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    path = tmp_path / "busy.csv"
    write_trace(path, Trace(TraceLabel("busy", "a test", "synthetic", 1), tuple(tokens(60, 1.0, 1))))
    return path


def test_a_trace_is_simulated_from_the_command_line(run: RunCommand, trace_file: Path, tmp_path: Path) -> None:
    ended = run(
        "simulate", trace_file, "--nodes", 2, "--devices", 2, "--weights", "2GB", "--keep-alive", "rainbowcake", "--json", "--chrome-trace",
        tmp_path / "run.json", "--events", tmp_path / "events.jsonl",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    (result,) = ended.document["runs"]
    assert result["policies"] == {"placement": "serverlessllm", "keep_alive": "rainbowcake", "autoscaler": "per-request"}
    assert result["totals"]["arrived"] == 60 == result["totals"]["answered"]
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == result["totals"]["events"] + 1  # the header
    assert json.loads((tmp_path / "run.json").read_text())["traceEvents"]


def test_policies_are_compared_in_all_combinations(run: RunCommand, trace_file: Path) -> None:
    ended = run("simulate", trace_file, trace_file, "--placement", "locality", "--placement", "random", "--keep-alive", "scale-to-zero", "--keep-alive", "forever", "--flat", "--json")
    results = ended.document["runs"]
    assert [(each["policies"]["placement"], each["policies"]["keep_alive"]) for each in results] == [
        ("locality", "scale-to-zero"), ("locality", "forever"), ("random", "scale-to-zero"), ("random", "forever"),
    ]  # fmt: skip
    assert all(each["totals"]["arrived"] == 120 and not each["percentiles_exact"] for each in results)
    table = run("simulate", trace_file, "--placement", "locality", "--placement", "random")
    assert table.code == 0 and "locality" in table.out and "random" in table.out


def test_own_models_and_nodes_are_read_from_files(run: RunCommand, trace_file: Path, tmp_path: Path) -> None:
    import msgspec

    models, nodes = tmp_path / "models.json", tmp_path / "nodes.json"
    models.write_bytes(msgspec.json.encode(MODELS))
    nodes.write_bytes(msgspec.json.encode(even_cluster(2, devices=3)))
    document = run("simulate", trace_file, "--models", models, "--cluster", nodes, "--json").document
    assert [spec["name"] for spec in document["models"]] == [spec.name for spec in MODELS]
    assert [node["devices"] for node in document["nodes"]] == [3, 3]
    models.write_text('[{"nbytes": 3}]')
    ended = run("simulate", trace_file, "--models", models, "--json")
    assert (ended.code, ended.out) == (1, "") and "model 1 is wrong: Object missing required field `name`" in ended.error["message"]


@pytest.mark.parametrize(
    ("option", "text", "words"),
    [
        ("--models", "[", "it is no JSON list of models"),
        ("--models", '{"name": "m"}', "it is no JSON list of models"),
        ("--models", "[]", "one at least"),
        ("--models", "[3]", "model 1 is no object"),
        ("--models", '[{"name": "m", "nbyte": 3}]', "model 1 has the field 'nbyte', which ModelSpec has not; did you mean nbytes?"),
        ("--models", '[{"name": "m", "nbytes": 3, "colour": 1}]', "its fields are name, nbytes"),
        ("--models", '[{"name": "m", "nbytes": 3}, {"name": "m", "nbytes": 4}]', "model 2 is named 'm' as one before it"),
        ("--models", '[{"name": "m", "nbytes": 3, "concurrency": 0}]', "model 1 is wrong: the model 'm' has concurrency 0; give a whole number of 1 or more"),
        ("--models", '[{"name": "m", "nbytes": "3"}]', "model 1 is wrong: Expected `int`, got `str`"),
        ("--cluster", json.dumps([NODE | {"disk_bytes_per_second": 0}]), "the node 'n' has disk_bytes_per_second 0"),
        ("--cluster", json.dumps([NODE, NODE]), "node 2 is named 'n' as one before it"),
        ("--cluster", json.dumps([NODE | {"device": 3}]), "did you mean devices?"),
    ],
)
def test_a_file_of_models_or_nodes_is_read_strictly(run: RunCommand, trace_file: Path, tmp_path: Path, option: str, text: str, words: str) -> None:
    path = tmp_path / "given.json"
    path.write_text(text)
    ended = run("simulate", trace_file, option, path, "--json")
    assert (ended.code, ended.out) == (1, "") and words in ended.error["message"] and ended.error["path"] == str(path)


def test_a_file_says_all_or_the_options_do(run: RunCommand, trace_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "given.json"
    path.write_text(json.dumps([{"name": "m0", "nbytes": 3, "devices": 9}]))
    for wrong in (("--weights", "14GB"), ("--model-devices", 1), ("--start-seconds", 5.0), ("--min-instances", 0), ("--max-instances", 9)):
        ended = run("simulate", trace_file, "--models", path, *wrong)
        assert ended.code == 2 and f"leave out {wrong[0]}" in ended.err, wrong
    path.write_text(json.dumps([NODE]))
    for wrong in (("--nodes", 4), ("--devices", 4), ("--memory", "512GB")):
        ended = run("simulate", trace_file, "--cluster", path, *wrong)
        assert ended.code == 2 and f"leave out {wrong[0]}" in ended.err, wrong


def test_what_cannot_come_right_is_warned_of_and_run(run: RunCommand, trace_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "models.json"
    path.write_text(json.dumps([{"name": "m0", "nbytes": 3, "devices": 9}]))
    ended = run("simulate", trace_file, "--models", path, "--devices", 2, "--json")
    assert ended.code == 0
    warned = ended.document["warnings"]
    assert warned[0].startswith("the model m0 needs 9 devices and 0 bytes of host memory on one node, and the largest, node-0000, has 2 and")
    assert len(warned) == 2 and "more, which" in warned[1]
    assert [line for line in ended.err.splitlines() if line.startswith("Warning: ")] == [f"Warning: {words}" for words in warned]
    assert run("simulate", trace_file, "--json").document["warnings"] == []


def test_functions_are_played_as_functions(run: RunCommand) -> None:
    """A request with a duration and no tokens needs memory and no device, unless options say otherwise."""
    ended = run("simulate", "faas", "--flat", "--json")
    assert {(spec["devices"], spec["nbytes"]) for spec in ended.document["models"]} == {(0, 100_000_000)}
    assert {spec["runtime"] for spec in ended.document["models"]} == {"java", "nodejs", "python"}
    assert sum(value for name, value in ended.document["runs"][0]["gpu_seconds"].items() if name != "free") == 0
    table = run("simulate", "faas", "--flat")
    assert "for 20 functions on" in table.out and "idle host memory" in table.out
    given = run("simulate", "faas", "--flat", "--model-devices", 1, "--weights", "1GB", "--json").document["models"]
    assert {(spec["devices"], spec["nbytes"]) for spec in given} == {(1, 10**9)}
    tokened = run("simulate", "burst", "--flat", "--json").document["models"]
    assert {(spec["devices"], spec["nbytes"]) for spec in tokened} == {(1, 14 * 10**9)}


def test_help_names_every_policy(run: RunCommand) -> None:
    ended = run("simulate", "--help")
    said = ended.out.split("Policies:")[1]
    assert ended.code == 0 and all(name in said for name in (*PLACEMENTS, *KEEP_ALIVES, *AUTOSCALERS))


def test_a_log_that_is_cut_off_has_no_name(run: RunCommand, trace_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the midst leaves neither the file nor a hidden one; what was there before stays."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "events.jsonl").write_text("before")

    def stopped(*arguments: Any, log: Callable[[bytes], object], **options: Any) -> None:
        log(b"{}")
        assert len(list(folder.iterdir())) == 2
        raise KeyboardInterrupt

    monkeypatch.setattr("sllm_mini.cluster.simulated.simulate", stopped)
    assert run("simulate", trace_file, "--events", folder / "events.jsonl").code == 130
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("events.jsonl", "before")]


def test_a_log_is_replayed_by_what_its_first_line_says(run: RunCommand, trace_file: Path, tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    assert run("simulate", trace_file, "--keep-alive", "rainbowcake", "--autoscaler", "target-concurrency", "--devices", 1, "--nodes", 2, "--events", log).code == 0
    ended = run("replay", log, "--json")
    assert ended.code == 0, ended.err
    lines = log.read_bytes().splitlines(keepends=True)
    assert ended.document["events"] == len(lines) - 1 and ended.document["policies"]["keep_alive"] == "rainbowcake"
    assert "under serverlessllm, rainbowcake, target-concurrency" in run("replay", log).out
    header = json.loads(lines[0])
    for first, words in (
        (header | {"keep_alive": "scale-to-zero"}, "as recorded"), (header | {"keep_alive": "none"}, "no keep-alive policy 'none'"), (header | {"version": 2}, "reads version 1"),
        (header | {"seed": 1}, "wrong header"), (header | {"max_failures": 0}, "options that cannot be"),
    ):  # fmt: skip
        log.write_bytes(json.dumps(first, separators=(",", ":")).encode() + b"\n" + b"".join(lines[1:]))
        ended = run("replay", log, "--json")
        assert ended.code == 1 and words in ended.error["message"], words
    log.write_bytes(b"".join(lines[1:]))
    assert "names no policies" in run("replay", log, "--json").error["message"]
    log.write_bytes(b"".join(lines)[:-40])
    assert f"line {len(lines)} of the event log" in run("replay", log, "--json").error["message"]


def test_wrong_usage_is_told_before_anything_runs(run: RunCommand, trace_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("simulate", trace_file, "--keep-alive", "none").code == 1
    assert run("simulate", trace_file, "--placement", "random", "--placement", "locality", "--events", tmp_path / "e").code == 2
    assert run("simulate", trace_file, "--flat", "--chrome-trace", tmp_path / "c").code == 2
    assert run("simulate", tmp_path / "none.csv").code == 1
    assert "did you mean burst?" in run("simulate", "burts", "--json").error["message"]
    assert run("simulate", trace_file, "--start-seconds", "inf").code == run("simulate", trace_file, "--start-seconds", "nan").code == 2
    assert run("simulate", trace_file, "--min-instances", 3, "--max-instances", 2).code == 2
    with monkeypatch.context() as patched:
        patched.setattr("sllm_mini.cluster.simulated.simulate", lambda *_, **__: pytest.fail("it ran"))
        assert "choose one of" in run("simulate", trace_file, "--placement", "random", "--placement", "rondom", "--json").error["message"]


def test_the_bench_compares_with_a_bare_queue(run: RunCommand, tmp_path: Path) -> None:
    pytest.importorskip("simpy")
    from sllm_mini.lab.simulating import Options, measure_simulating, read_simulating
    from sllm_mini.lab.simulating.document import SIMPY

    document = measure_simulating(options=Options(rounds=2, requests=200, warm_up=0, nodes=(2, 3), growing=(2, 4)))
    assert [row["name"] for row in document["results"]][-1] == SIMPY
    assert document["results"][-1]["ratio_to_reference_median"] == 1.0
    for row in document["results"][:-1]:
        assert row["events_per_request"] >= 2 and row["ratio_to_reference_min"] <= row["ratio_to_reference_median"] <= row["ratio_to_reference_max"]
    assert [row["nodes"] for row in document["growth"]] == [2, 4, 2, 4, 2, 4]
    assert [row["ratio_to_smallest_median"] for row in document["growth"]][::2] == [1.0, 1.0, 1.0]
    assert {row["name"].split()[0] for row in document["policies"]} == {"placement", "keep-alive", "autoscaler"}
    assert len(document["policies"]) == len(PLACEMENTS) + len(KEEP_ALIVES) + len(AUTOSCALERS)
    ended = run("bench", "simulate", "--rounds", 1, "--requests", 100, "--warm-up", 0, "--nodes", 2, 3, "--json", "--save", tmp_path / "saved.json")
    assert ended.code == 0, ended.err
    assert read_simulating(tmp_path / "saved.json") == ended.document


def test_a_warm_up_is_run_and_not_counted() -> None:
    from sllm_mini.lab.simulating.workload import churn, queues, run_simulated

    cold, warm = run_simulated(queues(1), 300, 0), run_simulated(queues(1), 300, 0, warm_up=1)
    assert cold.requests == warm.requests == 300
    assert cold.events >= 600 and warm.events >= 540  # some that came before are finished after
    assert warm.events < 1200 and warm.seconds > 0
    backlog = run_simulated(churn(256), 100, 0, warm_up=1)  # as many as came before are answered, cold, while few arrive
    assert backlog.answered > backlog.cold > backlog.requests and backlog.cold_fraction == backlog.cold / backlog.answered


def test_the_steady_workload_is_as_skewed_as_azures_functions() -> None:
    from sllm_mini.lab.simulating.workload import azure_exponent, run_simulated, steady

    for models in (80, 10_000):
        exponent = azure_exponent(models)
        weights = [rank**-exponent for rank in range(1, models + 1)]
        assert sum(weights[: round(0.186 * models)]) / sum(weights) == pytest.approx(0.996, abs=5e-4)
    ran = run_simulated(steady(2), 2_000, 0, warm_up=1)
    assert ran.cold < 0.05 * ran.requests and ran.events < 2.5 * ran.requests


def test_the_bench_says_that_simpy_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from sllm_mini.lab.simulating import Options, measure_simulating

    find: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "simpy" else find(name, *rest))
    document = measure_simulating(options=Options(rounds=1, requests=100, warm_up=0, nodes=(2, 2), growing=(2,)))
    assert [skipped["name"] for skipped in document["skipped"]] == ["SimPy, one M/M/4 queue"]
    assert document["reference"] is None and all("ratio_to_reference_median" not in row for row in document["results"])
