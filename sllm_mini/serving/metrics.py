"""`/metrics` in Prometheus' text format: what the cluster counts, read when it is scraped, and what the server counts itself. Chapter 11.

Reading wakes no model and is in no log. Labels are bounded: models are the first 200 that were asked for, then "(others)", routes
their patterns, codes ours. A scrape costs two questions to the thread that decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from sllm_mini.cluster.api import Cluster, Metrics, NodeReport
from sllm_mini.cluster.latency import BOUNDS, Histogram, Latencies
from sllm_mini.cluster.tally import MOST_MODELS, OTHERS
from sllm_mini.types import Tier, Warmth

Rows = Iterable[tuple[tuple[str, ...], float]]


class Meter:
    """Of one server, with a registry of its own. Counting is safe from several threads; `text` waits for the cluster. Raises SllmError once that
    has ended."""

    def __init__(self, cluster: Cluster) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Figures(cluster))
        self._refused = Counter("sllm_refused", "Answers that were errors, by their code.", ["code"], registry=self._registry)
        self._answers = Counter("sllm_http_requests", "Answers, by route and status.", ["route", "status"], registry=self._registry)
        self._open = Gauge("sllm_open_requests", "HTTP requests that are being answered.", registry=self._registry)

    def refused(self, code: str) -> None:
        self._refused.labels(code).inc()

    def opened(self) -> None:
        self._open.inc()

    def closed(self) -> None:
        self._open.dec()

    def answered(self, scope: Mapping[str, Any], status: int) -> None:
        """An answer begins. `scope` is the request's, once it has been routed: where nothing is, the path is the client's and no label."""
        self._answers.labels(getattr(scope.get("route"), "path", "(none)"), str(status)).inc()

    def text(self) -> bytes:
        """Of the type `prometheus_client.CONTENT_TYPE_LATEST`."""
        return generate_latest(self._registry)


class _Figures:
    """What a cluster says of itself, as families of metrics."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        metrics, nodes = self._cluster.metrics(), self._cluster.nodes()
        models = [each.spec.name for each in self._cluster.models()]
        yield from _counters(metrics)
        yield from _histograms(metrics.latencies)
        yield _gauge("waiting_requests", "Requests that have not run yet.", (), [((), metrics.waiting)])
        yield _gauge("running_requests", "All others that are not over.", (), [((), metrics.running)])
        yield _gauge("nodes", "Nodes that are alive, are lost, or are lost and being brought back.", ("state",), _states(nodes))
        yield _gauge("instances", 'Instances, by the model they have ("": none) and how warm they are.', ("model", "warmth"), _instances(nodes, models))
        yield from _stores(nodes)


def _counters(metrics: Metrics) -> Iterator[Metric]:
    yield _counter("requests", "Requests that are over, by outcome.", ("outcome",), (((name,), value) for name, value in metrics.outcomes.items()))
    yield _counter("turned_away", "Requests that were not taken because so many waited.", (), [((), metrics.turned_away)])
    yield _counter("tokens", "Tokens of requests that are over.", ("kind",), [(("input",), metrics.input_tokens), (("output",), metrics.output_tokens)])
    yield _counter("restarts", "How often requests began again elsewhere.", (), [((), metrics.restarts)])
    yield _counter("starts", "Starts of instances, by the rung of the warmth ladder they climbed from.", ("rung",), _named(metrics.starts))
    yield _counter("cold_starts", "Answered requests that waited for a start, by its rung.", ("rung",), _named({rung: count for rung, count in metrics.cold_requests.items() if rung < Warmth.READY}))
    yield _counter("tier_hits", "Loads of weights, by the tier they were read from.", ("tier",), _named(metrics.loads))
    yield _counter("loaded_bytes", "Bytes of weights, by the tier they were read from.", ("tier",), _named(metrics.loaded_nbytes))
    yield _counter("migrations", "Live migrations, by outcome.", ("outcome",), [(("moved",), metrics.migrations), (("failed",), metrics.failed_migrations)])
    yield _counter("node_revivals", "Starts of nodes that were lost, by outcome.", ("outcome",), [(("returned",), metrics.revivals), (("failed",), metrics.failed_revivals)])
    yield _counter("preemptions", "Requests that were stopped for others.", (), [((), metrics.preemptions)])


def _histograms(latencies: Mapping[str, Latencies]) -> Iterator[Metric]:
    first = HistogramMetricFamily("sllm_ttft_seconds", "From arrival to the first token, by the rung of the start it waited for.", labels=("model", "rung"))
    for model, each in latencies.items():
        for warmth, histogram in each.first_token.items():
            first.add_metric((model, warmth.name.lower()), *_buckets(histogram))
    yield first
    for name, words, attribute in (
        ("itl", "Between two tokens of a request.", "between_tokens"), ("e2e", "From arrival to the end, of requests that were answered.", "whole"),
        ("queue", "From arrival to an instance.", "queue"), ("load", "Moving weights, of requests that waited for that.", "load"),
    ):  # fmt: skip
        family = HistogramMetricFamily(f"sllm_{name}_seconds", words, labels=("model",))
        for model, each in latencies.items():
            family.add_metric((model,), *_buckets(getattr(each, attribute)))
        yield family


def _instances(nodes: Iterable[NodeReport], models: list[str]) -> Rows:
    """Also those that a model has none of: a gauge that is gone tells nothing."""
    known = set(models[:MOST_MODELS])
    counts = {(name, warmth): 0 for name in known for warmth in Warmth if warmth > Warmth.COLD}
    for node in nodes:
        for each in node.instances:
            name = each.model or ""
            key = name if not name or name in known else OTHERS, each.warmth
            counts[key] = counts.get(key, 0) + 1
    return [((name, warmth.name.lower()), count) for (name, warmth), count in sorted(counts.items())]


def _states(nodes: Iterable[NodeReport]) -> Rows:
    counts = {"alive": 0, "lost": 0, "returning": 0}
    for node in nodes:
        counts["alive" if node.alive else "lost" if node.returns_at is None else "returning"] += 1
    return [((state,), count) for state, count in counts.items()]


def _stores(nodes: Iterable[NodeReport]) -> Iterator[Metric]:
    stores = [(each.name, each.store) for each in nodes if each.store is not None]
    for what, words in (("used", "What models occupy of nodes' stores."), ("budget", "What nodes' stores may hold.")):
        rows = [((name, tier), getattr(store, f"{tier}_{what}_nbytes")) for name, store in stores for tier in ("dram", "disk")]
        yield _gauge(f"store_{what}_bytes", words, ("node", "tier"), rows)
    yield _gauge("shared_bytes", "Memory that is kept running for all workers of a node.", ("node",), [((name,), store.shared_nbytes) for name, store in stores])


def _buckets(histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
    return list(zip((*map(str, BOUNDS), "+Inf"), accumulate(histogram.counts), strict=True)), histogram.seconds


def _named(figures: Mapping[Warmth, int] | Mapping[Tier, int]) -> Rows:
    return [((key.name.lower(),), value) for key, value in figures.items()]


def _counter(name: str, words: str, labels: tuple[str, ...], rows: Rows) -> Metric:
    return _filled(CounterMetricFamily(f"sllm_{name}", words, labels=labels), rows)


def _gauge(name: str, words: str, labels: tuple[str, ...], rows: Rows) -> Metric:
    return _filled(GaugeMetricFamily(f"sllm_{name}", words, labels=labels), rows)


def _filled(family: CounterMetricFamily | GaugeMetricFamily, rows: Rows) -> Metric:
    for values, figure in rows:
        family.add_metric(values, figure)
    return family

