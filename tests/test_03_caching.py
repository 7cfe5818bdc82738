"""Chapter 03: the simulated caches against theory, exact formulas and caches written the plain way."""

from __future__ import annotations

import itertools
import math
import random
import struct
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest

from sllm_mini.eviction import GDSF, LFU, LRU, POLICIES, Policy, Resident, Victim, keep_prefix
from sllm_mini.lab.caching import (
    GRANULE_NBYTES,
    CachePoint,
    CatalogueModel,
    HitRatios,
    bound_ratios,
    characteristic_requests,
    che_ratios,
    hit_curves,
    hit_ratio_alt_text,
    hit_ratio_text,
    plot_hit_ratios,
    request_stream,
    simulate_cache,
    zipf_catalogue,
)
from sllm_mini.lab.figure import describe

METRICS = ("requests", "nbytes", "seconds")


def total_nbytes(catalogue: list[CatalogueModel]) -> int:
    return sum(model.nbytes for model in catalogue)


@pytest.fixture(scope="module")
def catalogue() -> list[CatalogueModel]:
    return zipf_catalogue(120, seed=3)


@pytest.fixture(scope="module")
def stream(catalogue: list[CatalogueModel]) -> list[CatalogueModel]:
    return request_stream(catalogue, 9000, seed=4)


@pytest.fixture(scope="module")
def points(catalogue: list[CatalogueModel], stream: list[CatalogueModel]) -> list[CachePoint]:
    sizes = [int(share * total_nbytes(catalogue)) for share in (0.1, 0.25, 0.5)]
    return hit_curves(stream, sizes, warm_up=1500)


# The workload


def test_a_catalogue_is_zipf_and_its_sizes_owe_nothing_to_popularity() -> None:
    catalogue = zipf_catalogue(500, exponent=0.8, seed=1)
    assert math.fsum(model.share for model in catalogue) == pytest.approx(1)
    assert catalogue[0].share / catalogue[31].share == pytest.approx(32**0.8)
    assert all(model.nbytes % GRANULE_NBYTES == 0 and 0.95e9 <= model.nbytes <= 30.1e9 for model in catalogue)
    halves = [sum(math.log(model.nbytes) for model in half) / 250 for half in (catalogue[:250], catalogue[250:])]
    assert abs(halves[0] - halves[1]) < 0.3  # three standard deviations of log-uniform sizes
    rates = {round((model.nbytes / (model.cost_seconds - 0.2)) / 1e8) for model in catalogue}
    assert rates == {5, 30}


def test_the_same_seed_gives_the_same_workload_and_another_does_not() -> None:
    assert zipf_catalogue(20, seed=5) == zipf_catalogue(20, seed=5) != zipf_catalogue(20, seed=6)
    catalogue = zipf_catalogue(20)
    assert request_stream(catalogue, 50, seed=5) == request_stream(catalogue, 50, seed=5) != request_stream(catalogue, 50, seed=6)


def test_requests_come_as_often_as_their_shares_say(catalogue: list[CatalogueModel], stream: list[CatalogueModel]) -> None:
    for model in catalogue[:10]:
        expected = model.share * len(stream)
        assert abs(stream.count(model) - expected) < 4 * math.sqrt(expected)


@pytest.mark.parametrize("wrong", [(0, 1, 2), (3, 0, 2), (3, 9, 8)])
def test_a_catalogue_that_cannot_be_is_refused(wrong: tuple[int, int, int]) -> None:
    models, smallest, largest = wrong
    with pytest.raises(ValueError, match="give at least one"):
        zipf_catalogue(models, smallest_nbytes=smallest, largest_nbytes=largest)


# The simulation


def plain_lru(stream: list[CatalogueModel], cache_nbytes: int) -> float:
    """An ordered dictionary that drops its oldest entries."""
    cache: OrderedDict[str, int] = OrderedDict()
    hits = 0
    for model in stream:
        if model.name in cache:
            hits += 1
            cache.move_to_end(model.name)
        elif model.nbytes <= cache_nbytes:
            while sum(cache.values()) + model.nbytes > cache_nbytes:
                cache.popitem(last=False)
            cache[model.name] = model.nbytes
    return hits / len(stream)


def plain_lfu(stream: list[CatalogueModel], cache_nbytes: int, *, remember: bool) -> float:
    """Counts of uses, the rarest goes; the count goes with it unless it is remembered."""
    cache: dict[str, int] = {}
    count: dict[str, int] = {}
    asked: dict[str, int] = {}
    hits = 0
    for now, model in enumerate(stream):
        hits += model.name in cache
        if model.name not in cache and model.nbytes <= cache_nbytes:
            while sum(cache.values()) + model.nbytes > cache_nbytes:
                victim = min(cache, key=lambda name: (count[name], asked[name]))
                del cache[victim]
                if not remember:
                    del count[victim]
            cache[model.name] = model.nbytes
        if model.nbytes <= cache_nbytes:
            count[model.name] = count.get(model.name, 0) + 1
            asked[model.name] = now
    return hits / len(stream)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.4])
def test_simulated_lru_and_lfu_hit_as_often_as_plain_caches(share: float) -> None:
    catalogue = zipf_catalogue(40, seed=8)
    stream = request_stream(catalogue, 1500, seed=9)
    size = int(share * total_nbytes(catalogue))
    assert simulate_cache(stream, size, LRU).requests == plain_lru(stream, size)
    assert simulate_cache(stream, size, LFU).requests == plain_lfu(stream, size, remember=True)
    assert simulate_cache(stream, size, LFU, remember_uses=False).requests == plain_lfu(stream, size, remember=False)


def test_lru_for_two_of_four_models_hits_as_often_as_the_exact_formula_says() -> None:
    """King (1971): in a cache of two, i is there with probability p_i + Σ p_j p_i / (1 − p_j)."""
    shares = [0.4, 0.3, 0.2, 0.1]
    catalogue = [CatalogueModel(f"m{i}", share, 100, 1.0) for i, share in enumerate(shares)]
    exact = sum(p * (p + sum(q * p / (1 - q) for j, q in enumerate(shares) if j != i)) for i, p in enumerate(shares))
    hits = simulate_cache(request_stream(catalogue, 40_000, seed=2), 200, LRU, warm_up=100, granule_nbytes=1)
    assert hits.requests == pytest.approx(exact, abs=4 * math.sqrt(0.25 / 40_000))
    assert hits.requests == pytest.approx(hits.nbytes) == pytest.approx(hits.seconds)  # all models alike


@pytest.mark.parametrize("policy", [*POLICIES.values(), keep_prefix(LRU, 3 << 30)], ids=lambda policy: policy.name)
def test_a_cache_never_holds_more_than_it_may_and_what_it_holds_is_what_is_found(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    from sllm_mini.lab import caching

    catalogue = zipf_catalogue(30, seed=1)
    size = int(0.3 * total_nbytes(catalogue))
    density = {model.name: model.cost_seconds / model.nbytes for model in catalogue}
    held: list[int] = []

    def watched(residents: list[Resident], needed: int, policy: Policy, granule: int) -> list[Victim]:
        held.append(sum(resident.nbytes for resident in residents))
        # A part costs its part of the whole, so a cut changes nothing in greedy-dual's order.
        assert all(resident.cost_seconds / resident.nbytes == pytest.approx(density[resident.name]) for resident in residents)
        victims = choose(residents, needed, policy, granule)
        assert sum(victim.nbytes for victim in victims) >= needed
        return victims

    choose = caching.choose_victims
    monkeypatch.setattr(caching, "choose_victims", watched)
    ratios = simulate_cache(request_stream(catalogue, 2000), size, policy)
    assert len(held) > 100
    assert max(held) <= size
    assert 0 < ratios.nbytes < 1


def test_a_cache_that_holds_everything_misses_each_model_once() -> None:
    catalogue = zipf_catalogue(10)
    stream = request_stream(catalogue, 500)
    assert simulate_cache(stream, total_nbytes(catalogue), GDSF).requests == 1 - len(set(stream)) / 500
    assert simulate_cache(stream, total_nbytes(catalogue), GDSF, warm_up=400) == HitRatios(1.0, 1.0, 1.0)


def test_a_model_larger_than_the_cache_pushes_nothing_out() -> None:
    small, large = CatalogueModel("small", 0.5, 10, 1.0), CatalogueModel("large", 0.5, 1000, 100.0)
    ratios = simulate_cache([small, large, small, large, small], 100, LRU, warm_up=1, granule_nbytes=1)
    assert ratios == HitRatios(0.5, 20 / 2020, 2 / 202)


def test_part_of_a_model_counts_for_its_bytes_and_seconds_and_not_as_a_hit() -> None:
    first, second = CatalogueModel("first", 0.5, 100, 10.0), CatalogueModel("second", 0.5, 100, 4.0)
    ratios = simulate_cache([first, second, first], 160, keep_prefix(LRU), warm_up=2, granule_nbytes=10)
    assert ratios == HitRatios(0.0, 0.6, 0.6)
    assert simulate_cache([first, second, first], 160, LRU, warm_up=2, granule_nbytes=10) == HitRatios(0.0, 0.0, 0.0)


def test_a_warm_up_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="none left"):
        simulate_cache([CatalogueModel("a", 1.0, 1, 1.0)], 10, LRU, warm_up=1)
    with pytest.raises(ValueError, match="none left"):
        simulate_cache([], 10, LRU)


# Theory


@pytest.mark.parametrize("share", [0.02, 0.2, 0.9])
def test_ches_time_solves_its_equation(catalogue: list[CatalogueModel], share: float) -> None:
    size = int(share * total_nbytes(catalogue))
    time = characteristic_requests(catalogue, size)
    there = sum(model.nbytes * (1 - math.exp(-model.share * time)) for model in catalogue if model.nbytes <= size)
    assert there == pytest.approx(size, rel=1e-6)


def test_che_where_everything_fits_and_where_nothing_does(catalogue: list[CatalogueModel]) -> None:
    assert che_ratios(catalogue, total_nbytes(catalogue)) == HitRatios(1.0, 1.0, 1.0)
    assert che_ratios(catalogue, min(model.nbytes for model in catalogue) - 1) == HitRatios(0.0, 0.0, 0.0)


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_lru_is_within_three_per_cent_of_che_for_a_large_catalogue(share: float) -> None:
    catalogue = zipf_catalogue(1000, seed=11)
    size = int(share * total_nbytes(catalogue))
    simulated = simulate_cache(request_stream(catalogue, 80_000, seed=12), size, LRU, warm_up=5000)
    theory = che_ratios(catalogue, size)
    for metric in METRICS:
        assert getattr(simulated, metric) == pytest.approx(getattr(theory, metric), rel=0.03)


def test_no_whole_filling_is_worth_more_than_the_bound_and_equal_sizes_reach_it() -> None:
    catalogue = zipf_catalogue(9, seed=2)
    for share in (0.15, 0.5, 0.8):
        size = share * total_nbytes(catalogue)
        best = dict.fromkeys(METRICS, 0.0)
        for chosen in itertools.chain.from_iterable(itertools.combinations(catalogue, n) for n in range(10)):
            if sum(model.nbytes for model in chosen) <= size:
                for metric, worth in zip(METRICS, (lambda m: 1, lambda m: m.nbytes, lambda m: m.cost_seconds), strict=True):
                    value = sum(m.share * worth(m) for m in chosen) / sum(m.share * worth(m) for m in catalogue)
                    best[metric] = max(best[metric], value)
        bound = bound_ratios(catalogue, int(size))
        assert all(best[metric] <= getattr(bound, metric) + 1e-12 for metric in METRICS)
    alike = [replace(model, nbytes=100) for model in catalogue]
    assert bound_ratios(alike, 300).requests == pytest.approx(sum(model.share for model in alike[:3]))


def test_no_policy_passes_the_bound(catalogue: list[CatalogueModel], points: list[CachePoint]) -> None:
    """2 % is more than three standard deviations of 7500 independent requests."""
    for point in points:
        bound = bound_ratios(catalogue, point.cache_nbytes)
        for metric in METRICS:
            assert getattr(point.ratios, metric) <= getattr(bound, metric) + 0.02, (point, metric)


def test_lfu_beats_lru_and_greedy_dual_saves_more_seconds_than_lru(points: list[CachePoint]) -> None:
    """Popularity stands still here, so counting it can only help; the order may turn where it moves."""
    by = {(point.policy, point.cache_nbytes): point.ratios for point in points}
    for size in {point.cache_nbytes for point in points}:
        assert by["lfu", size].requests > by["lru", size].requests
        assert by["lfu", size].nbytes > by["lru", size].nbytes
        assert by["gdsf", size].seconds > 1.03 * by["lru", size].seconds


def test_lfu_comes_close_to_the_bound_where_sizes_are_equal() -> None:
    catalogue = [replace(model, nbytes=GRANULE_NBYTES, cost_seconds=1.0) for model in zipf_catalogue(60)]
    lfu = simulate_cache(request_stream(catalogue, 12_000, seed=1), 20 * GRANULE_NBYTES, LFU, warm_up=4000)
    assert lfu.requests == pytest.approx(bound_ratios(catalogue, 20 * GRANULE_NBYTES).requests, rel=0.05)


def test_lfu_loses_to_greedy_dual_when_yesterdays_favourites_are_forgotten() -> None:
    """The clock is what ages a count."""
    catalogue = [replace(model, nbytes=GRANULE_NBYTES, cost_seconds=1.0) for model in zipf_catalogue(60)]
    names = [model.name for model in catalogue]
    random.Random(5).shuffle(names)
    renamed = [replace(model, name=name) for model, name in zip(catalogue, names, strict=True)]
    stream = request_stream(catalogue, 6000, seed=1) + request_stream(renamed, 3000, seed=2)
    lfu, gdsf = (simulate_cache(stream, 20 * GRANULE_NBYTES, policy, warm_up=6000).requests for policy in (LFU, GDSF))
    assert gdsf > lfu


# The picture


def test_the_figure_draws_every_policy_beside_theory(catalogue: list[CatalogueModel], points: list[CachePoint], tmp_path: Path) -> None:
    figure = plot_hit_ratios(points, catalogue)
    assert len(figure.axes) == 3
    for ax, metric in zip(figure.axes, METRICS, strict=True):
        lines = {line.get_label(): line for line in ax.get_lines()}
        assert list(lines)[: len(POLICIES)] == list(POLICIES)
        drawn = [point for point in points if point.policy == "lru"]
        assert list(lines["lru"].get_ydata()) == pytest.approx([100 * getattr(point.ratios, metric) for point in drawn])  # type: ignore[arg-type]
        assert list(lines["lru"].get_xdata()) == pytest.approx([point.cache_nbytes / 1e9 for point in drawn])  # type: ignore[arg-type]
        che = lines["lru by Che's approximation"]
        assert che.get_linestyle() == "--"
        assert che.get_ydata()[-1] == pytest.approx(100 * getattr(che_ratios(catalogue, drawn[-1].cache_nbytes), metric))  # type: ignore[index]
    assert "%" in figure.axes[0].get_ylabel() and "GB" in figure.axes[1].get_xlabel()
    saved = describe(figure, hit_ratio_alt_text(points, catalogue)).save(tmp_path / "hits.png")
    assert struct.unpack(">I", saved.read_bytes()[16:20])[0] > 800


def test_the_words_name_the_best_policy_and_its_figures(catalogue: list[CatalogueModel], points: list[CachePoint]) -> None:
    text = hit_ratio_text(points, catalogue)
    middle = sorted({point.cache_nbytes for point in points})[1]
    best = max((point for point in points if point.cache_nbytes == middle), key=lambda point: point.ratios.nbytes)
    assert f"bytes found: {best.policy} {best.ratios.nbytes:.1%}" in text
    assert "Che's approximation" in text
    alone = [point for point in points if point.policy == "gdsf"]
    assert "Che" not in hit_ratio_text(alone, catalogue)
    assert all(name in hit_ratio_alt_text(points, catalogue) for name in POLICIES)


def test_one_size_can_be_drawn_and_none_cannot(catalogue: list[CatalogueModel], points: list[CachePoint]) -> None:
    from matplotlib import pyplot

    pyplot.close(plot_hit_ratios(points[:1], catalogue))
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_hit_ratios([], catalogue)
