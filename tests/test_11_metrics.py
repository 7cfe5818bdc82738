"""What a server tells of itself: figures that agree with what was asked of it, labels that no client chooses, and reading that wakes nothing.
Chapter 11."""

from __future__ import annotations

from collections.abc import Iterator
from math import nan

import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving_world import World, open_world

from sllm_mini.cluster.accounting import Accounting
from sllm_mini.cluster.api import RequestReport
from sllm_mini.cluster.latency import BOUNDS, Histogram
from sllm_mini.cluster.tally import MOST_MODELS, OTHERS, Tally
from sllm_mini.inference.ownership.ledger import LedgerPiece
from sllm_mini.types import Epoch, Tier, Warmth

Labels = frozenset[tuple[str, str]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with open_world(tmp_path_factory.mktemp("metrics")) as opened:
        yield opened


class Scrape:
    """All samples of one."""

    def __init__(self, world: World) -> None:
        reply = world.send("GET", "/metrics")
        assert reply.status == 200 and reply.headers["content-type"].startswith("text/plain")
        self.samples: dict[tuple[str, Labels], float] = {}
        for family in text_string_to_metric_families(reply.body.decode()):
            for sample in family.samples:
                key = sample.name, frozenset(sample.labels.items())
                assert key not in self.samples, "a series that is there twice"
                self.samples[key] = sample.value

    def get(self, name: str, **labels: str) -> float:
        return self.samples.get((name, frozenset(labels.items())), 0.0)

    def values(self, label: str) -> set[str]:
        return {value for _, labels in self.samples for name, value in labels if name == label}


def test_the_figures_are_those_of_what_was_asked(world: World) -> None:
    before = Scrape(world)
    replies = [world.complete(seed=number, max_tokens=6) for number in range(5)] + [world.complete(model="nobody"), world.complete(max_tokens=0)]
    documents = [each.document for each in replies[:5]]
    tokens = [each["usage"]["completion_tokens"] for each in documents]
    after = Scrape(world)

    def grown(name: str, **labels: str) -> float:
        return after.get(name, **labels) - before.get(name, **labels)

    assert grown("sllm_requests_total", outcome="answered") == 5 and grown("sllm_requests_total", outcome="failed") == 0
    assert grown("sllm_tokens_total", kind="output") == sum(tokens) and grown("sllm_tokens_total", kind="input") == 15
    assert grown("sllm_itl_seconds_count", model="a") == sum(tokens) - 5
    assert all(grown(f"sllm_{name}_seconds_count", model="a") == 5 for name in ("e2e", "queue"))
    firsts = {rung: grown("sllm_ttft_seconds_count", model="a", rung=rung) for rung in ("cold", "ready")}
    cold = sum(each["choices"][0]["sllm"]["rung"] == "cold" for each in documents)
    assert firsts == {"cold": cold, "ready": 5 - cold} and grown("sllm_cold_starts_total", rung="cold") == cold
    told = sum(each["choices"][0]["sllm"]["queue_seconds"] for each in documents)
    assert grown("sllm_queue_seconds_sum", model="a") == pytest.approx(told, abs=1e-4)
    assert grown("sllm_refused_total", code="model_not_found") == 1 and grown("sllm_refused_total", code="invalid_value") == 1
    assert [grown("sllm_http_requests_total", route="/v1/completions", status=status) for status in ("200", "404", "400")] == [5, 1, 1]


def test_it_says_what_runs_and_what_stores_hold(world: World) -> None:
    world.complete()
    found, (node,) = Scrape(world), world.cluster.nodes()
    assert node.store is not None
    assert found.get("sllm_store_used_bytes", node=node.name, tier="dram") == node.store.dram_used_nbytes > 0
    assert found.get("sllm_store_budget_bytes", node=node.name, tier="dram") == node.store.dram_budget_nbytes
    assert found.get("sllm_instances", model="a", warmth="ready") == 1 and ("sllm_instances", frozenset({("model", "b.2"), ("warmth", "ready")})) in found.samples
    assert (found.get("sllm_nodes", state="alive"), found.get("sllm_nodes", state="lost")) == (1, 0)
    assert found.get("sllm_waiting_requests") == found.get("sllm_running_requests") == 0 and found.get("sllm_open_requests") >= 1  # the scrape's own
    loads = sum(found.get("sllm_tier_hits_total", tier=tier) for tier in ("remote", "disk", "dram"))
    assert loads >= 1 and sum(found.get("sllm_loaded_bytes_total", tier=tier) for tier in ("remote", "disk", "dram")) >= loads
    assert found.get("sllm_starts_total", rung="cold") >= 1 and found.get("sllm_migrations_total", outcome="moved") == 0


def test_what_a_client_makes_up_is_no_label(world: World) -> None:
    world.complete(model="my-own-name")
    for path in ("/my-own-name", "/v1/models/my-own-name", "/admin/models/my-own-name/load", "/admin/requests/my-own-name"):
        world.send("GET", path)
    world.send("POST", "/v1/completions", b"{", x_request_id="my-own-name")
    found = Scrape(world)
    assert not any("my-own-name" in value for name, labels in found.samples for _, value in labels)
    assert found.values("route") <= {"(none)", "/v1/completions", "/v1/models/{name:path}", "/admin/models/{name}/load", "/admin/requests/{request_id}", "/metrics", "/health"}
    assert found.get("sllm_http_requests_total", route="(none)", status="404") == 1


def test_reading_wakes_nobody_and_lets_nobody_stay_longer(world: World) -> None:
    """Not one byte in the event log, and each idle instance ends when it would have."""
    world.complete()
    assert world.cluster.wait(lambda cluster: all(not each.requests and each.ends_at is not None for node in cluster.nodes() for each in node.instances), 20)

    def state() -> tuple[int, list[tuple[int, Warmth, float | None]]]:
        return sum(map(len, world.cluster.log())), [(each.instance, each.warmth, each.ends_at) for node in world.cluster.nodes() for each in node.instances]

    before, starts = state(), world.cluster.metrics().starts
    assert any(at is not None for _, _, at in before[1])
    for path in ("/metrics", "/health", "/v1/models", "/admin/ps", "/v1/models/b.2"):
        for _ in range(100 if path == "/metrics" else 20):
            assert world.send("GET", path).status == 200
    assert state() == before
    assert world.cluster.metrics().starts == starts


def test_a_figure_is_in_the_first_bucket_that_holds_it() -> None:
    histogram = Histogram()
    histogram.add(0.0, BOUNDS[0], BOUNDS[0] * 1.01, BOUNDS[-1], BOUNDS[-1] + 1, nan)
    assert (histogram.counts[0], histogram.counts[1], histogram.counts[-2], histogram.counts[-1], sum(histogram.counts)) == (2, 1, 1, 1, 5)
    assert list(BOUNDS) == sorted(set(BOUNDS)) and BOUNDS[:3] == (0.001, 0.002, 0.005)


def report(model: str, **fields: object) -> RequestReport:
    given = {"assigned": 11.0, "first": 12.0, "ended": 15.0, "outcome": "answered", **fields}
    return RequestReport("r", model, 10.0, **given)  # type: ignore[arg-type]


def test_latencies_are_kept_for_so_many_models_and_for_what_was_reached() -> None:
    tally = Tally()
    pieces = [LedgerPiece(place, 0, "", Epoch(1), 100.0 + place) for place in range(4)]
    tally.add(report("m", rung=Warmth.DRAM, tier=Tier.DISK, load_seconds=0.3), pieces)
    tally.add(report("m", assigned=nan, first=nan, outcome="refused"))
    tally.add(report("m", outcome="cancelled"), pieces[:1])
    found = tally.latencies["m"]
    assert [sum(each.counts) for each in (found.whole, found.queue, found.load, found.between_tokens)] == [1, 2, 1, 3]
    assert (found.whole.seconds, found.queue.seconds, found.load.seconds, found.between_tokens.seconds) == (5.0, 2.0, 0.3, 3.0)
    assert {warmth: sum(each.counts) for warmth, each in found.first_token.items()} == {Warmth.DRAM: 1, Warmth.READY: 1}
    for number in range(300):
        tally.add(report(f"model-{number}"))
    assert len(tally.latencies) == MOST_MODELS + 1 and sum(tally.latencies[OTHERS].whole.counts) == 300 - (MOST_MODELS - 1)
    shown = tally.metrics(Accounting(), waiting=0, running=0).latencies
    tally.add(report("m"))
    assert sum(shown["m"].whole.counts) == 1, "what was shown changes no more"
