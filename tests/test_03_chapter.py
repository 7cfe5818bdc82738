"""Chapter 03: loads by tier are what they say, simulation and store agree, charts say what they show, every link has its heading."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from sllm_mini.checkpoint import Checkpoint, convert_checkpoint
from sllm_mini.device import get_device
from sllm_mini.device.base import ALIGNMENT
from sllm_mini.errors import UnsupportedError
from sllm_mini.eviction import GDSF, LFU, LRU
from sllm_mini.lab import hierarchy, livecache
from sllm_mini.lab import hierarchy_plots as plots
from sllm_mini.lab.caching import HitRatios, request_stream, simulate_cache, zipf_catalogue
from sllm_mini.lab.hierarchy import (
    CountedOrigin,
    PartialLoad,
    TierRun,
    attached,
    measure_partial,
    measure_tiers,
    resident_nbytes,
)
from sllm_mini.lab.livecache import SmallModels, StreamRun
from sllm_mini.lab.prefixes import cache_controls, draw_cache, plot_prefixes, prefix_points, prefixes_text
from sllm_mini.resources import resource
from sllm_mini.storage import Store
from sllm_mini.types import Tier


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return convert_checkpoint(resource("data/models/tiny"), tmp_path_factory.mktemp("hierarchy") / "tiny")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModels:
    return livecache.make_small_models(tmp_path_factory.mktemp("small"), [1, 3, 2, 1, 2, 4])


# Tiers


def test_every_tier_is_measured_and_leaves_nothing(tiny: Checkpoint, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with CountedOrigin(tiny.path) as remote, Store(tmp_path, dram_nbytes=64 << 20, disk_nbytes=64 << 20) as store:
        store.register("model", remote.url)
        runs = measure_tiers(store, "model", tiny, remote.port, rounds=2)
        assert [run.tier for run in runs] == [Tier.REMOTE, Tier.DISK, Tier.DRAM] * 2
        assert all(run.nbytes == tiny.nbytes and run.load_seconds > 0 and run.use_seconds > 0 for run in runs)
        assert all((run.limit_seconds == 0) == (run.tier is Tier.DRAM) for run in runs)
        figures = store.stats()
        assert figures.attached == {"remote": 2, "disk": 2, "dram": 2}, "each load found its bytes where it should"
        assert all(place.kernel_nbytes == place.used_nbytes for place in figures.places if place.place == "disk")
        assert [row[0] for row in plots.places_table(store).rows] == ["dram", "disk"]
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_model_crosses_the_network_once_for_two_tiers(tiny: Checkpoint, tmp_path: Path) -> None:
    with CountedOrigin(tiny.path) as remote, Store(tmp_path, dram_nbytes=64 << 20, disk_nbytes=64 << 20) as store:
        store.register("model", remote.url)
        before = remote.sent_nbytes
        with attached(store, "model") as attachment:
            attachment.wait()
        assert tiny.nbytes <= remote.sent_nbytes - before < 1.05 * tiny.nbytes + 100_000
        store.evict("model", "dram")
        before = remote.sent_nbytes
        with attached(store, "model") as attachment:
            attachment.wait()
        assert remote.sent_nbytes == before, "the disk cache had it"
        assert resident_nbytes(store, "model") == resident_nbytes(store, "model", "disk") == tiny.nbytes


def test_a_server_that_is_gone_is_said(tiny: Checkpoint) -> None:
    with CountedOrigin(tiny.path) as remote:
        assert remote.sent_nbytes >= 0
    with pytest.raises(UnsupportedError, match="does not count"):
        _ = remote.sent_nbytes


def test_a_gpu_adds_a_tier() -> None:
    from sllm_mini.device.fake import RecordingRuntime

    assert hierarchy.tiers_to(get_device("cpu")) == (Tier.REMOTE, Tier.DISK, Tier.DRAM)
    assert hierarchy.tiers_to(RecordingRuntime().device()) == tuple(Tier)


def rectangles(axes: Axes) -> list[Rectangle]:
    return [patch for patch in axes.patches if isinstance(patch, Rectangle)]


def made_up() -> list[TierRun]:
    times = ((Tier.REMOTE, (3.0, 1.5, 2.0)), (Tier.DISK, (1.0, 1.0, 1.0)), (Tier.DRAM, (0.0, 0.0, 0.0)))
    return [TierRun(tier, 10**9, seconds[number], 0.5, 0.25, seconds[number] / 2) for number in range(3) for tier, seconds in times]


def test_tiers_are_compared_round_by_round() -> None:
    runs = made_up()
    said = plots.tiers_text(runs)
    assert "the disk instead of the remote: x1.7 (1.3 to 2.3)" in said and "DRAM instead of the disk: x3.0 (3.0 to 3.0)" in said
    assert plots.tier_shares(runs, Tier.DISK) == pytest.approx([0.5] * 3) and said in plots.tiers_alt_text(runs)
    assert [bar.get_width() for bar in rectangles(plots.plot_tiers(runs))] == pytest.approx([2.0, 0.5, 1.0, 0.5, 0.0, 0.5])
    rows = plots.tiers_table(runs, {Tier.REMOTE: 1.0, Tier.DISK: 2.0, Tier.DRAM: 0.0}).rows
    assert [row[4] for row in rows] == ["x2.00", "x0.50", ""]
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.plot_tiers([])


def test_predictions_are_bytes_over_rates() -> None:
    limits = {Tier.REMOTE: 2.0, Tier.DISK: 0.5, Tier.DRAM: 0.0, Tier.DEVICE: 0.0}
    rows = plots.prediction_table(limits, 10**9).rows
    assert [(row[0], row[2], row[3]) for row in rows[2:]] == [
        ("remote, 100 Gbit/s network", "12.5 GB/s", "80.0 ms"), ("remote", "500 MB/s", "2.00 s"), ("disk", "2.00 GB/s", "500 ms"), ("dram", "", "0 s"),
    ]  # fmt: skip
    assert plots.prediction_table(limits, 10**9, on_gpu=True).rows[-1][0] == "device"


# Prefixes


def test_a_half_resident_model_moves_only_its_tail(tmp_path: Path) -> None:
    import torch

    from sllm_mini.checkpoint import save_checkpoint

    generator = torch.Generator().manual_seed(1)
    model = save_checkpoint({f"layers.{n}.weight": torch.randint(2**62, (ALIGNMENT // 8,), generator=generator) for n in range(8)}, tmp_path / "model")
    loads = measure_partial(model, tmp_path / "store", chunk_nbytes=ALIGNMENT, rounds=2)
    assert [load.found_nbytes for load in loads] == [0, 4 * ALIGNMENT] * 2
    assert all(load.found_nbytes + load.moved_nbytes == model.nbytes for load in loads)
    assert all(len(load.ready) == len(model.index.layers) and list(load.ready) == sorted(load.ready, key=lambda step: step[1]) for load in loads)
    states = {"whole": model.nbytes, "half": 4 * ALIGNMENT}
    layers = len(model.index.layers)
    assert plots.residency_text(model, states) == f"whole: 16.8 MB, {layers} of {layers} layers whole; half: 8.39 MB, {layers // 2} of {layers} layers whole."
    axes = plots.plot_residency(model, ALIGNMENT, states)
    assert [len(found.get_paths()) for found in axes.collections] == [8, 0, 4, 4]


def test_tied_tensors_belong_to_the_first_layer(tiny: Checkpoint) -> None:
    found = plots._layer_bounds(tiny)
    (first, *_, (low, high)) = found.values()
    assert high - low < first[1] - first[0], "the head's weight is the embedding's; of its own it has a norm"
    bounds = list(found.values())
    assert all(low < high for low, high in bounds) and all(one[1] <= other[0] for one, other in pairwise(bounds))


def test_arrivals_are_drawn_as_they_came() -> None:
    def load(found: int, *seconds: float) -> PartialLoad:
        return PartialLoad(found, 10**9 - found, tuple((f"layer {number}", moment) for number, moment in enumerate(seconds)))

    loads = [load(0, 0.2, 0.4), load(5 * 10**8, 0.0, 0.1), load(0, 0.3, 0.6), load(5 * 10**8, 0.01, 0.2), load(0, 0.4, 0.8)]
    assert [kind.seconds for kind in hierarchy.median_partial(loads)] == [0.6, 0.2]
    said = plots.arrival_text(loads)
    assert "nothing of it in DRAM the first layer is ready after 300 ms, the last after 600 ms, and 1.00 GB are moved" in said
    assert said in plots.arrival_alt_text(loads)
    staircases = [line for line in plots.plot_arrival(loads).lines if line.get_drawstyle() == "steps-post"]
    assert [list(np.asarray(line.get_xdata())) for line in staircases] == [pytest.approx([0, 300, 600]), pytest.approx([0, 10, 200])]


def test_generous_prefixes_are_worse_than_none() -> None:
    catalogue = zipf_catalogue(60, seed=1)
    stream = request_stream(catalogue, 1500, seed=2)
    cache = sum(model.nbytes for model in catalogue) // 5
    points = prefix_points(catalogue, stream, cache, prefixes=(1, 2 * 10**9))
    whole = simulate_cache(stream, cache, GDSF, warm_up=300)
    assert points[0].ratios.seconds > 0.9 * whole.seconds and points[1].prefixes_share > 1
    assert points[1].ratios.seconds < 0.75 * whole.seconds and points[1].ratios.requests < 0.9 * whole.requests
    assert f"{points[1].ratios.seconds:.0%} at worst, with 2.00 GB each" in prefixes_text(points, whole)
    assert len(plot_prefixes(points, whole).lines) == 7


def test_the_widget_draws_its_own_controls() -> None:
    drawn = draw_cache(*(control.value for control in cache_controls().values()), requests=300)
    assert "simulated" in drawn.caption and drawn.caption in drawn.alt_text


# The policies, simulated and on the store


def test_the_simulation_foretells_the_store_to_the_request(small: SmallModels) -> None:
    stream = request_stream(small.catalogue, 40, seed=7)
    policies = {"lru": LRU, "lfu": LFU}
    memory = 6 * ALIGNMENT
    foretold, found = livecache.predict_stream(small, stream, memory, policies), livecache.play_stream(small, stream, memory, policies)
    for guess, got in zip(foretold, found, strict=True):
        assert 0 < guess.ratios.requests < 1
        assert (guess.ratios.requests, guess.ratios.nbytes) == pytest.approx((got.ratios.requests, got.ratios.nbytes))
    assert "Hits as foretold to the request: lru, lfu of 40 requests" in plots.streams_text(foretold, found, 40)


def test_a_prediction_is_misses_and_hits(small: SmallModels) -> None:
    one = small.catalogue[0]
    run = livecache.predict_stream(small, [one, one, one, one], one.nbytes, {"lru": LRU})[0]
    assert run.ratios.requests == 0.75 and run.seconds == pytest.approx(one.cost_seconds + 3 * small.hit_seconds)


def test_models_are_as_large_as_they_were_to_be(small: SmallModels) -> None:
    assert [model.nbytes // ALIGNMENT for model in small.catalogue] == [1, 3, 2, 1, 2, 4] and small.nbytes == 13 * ALIGNMENT
    assert sum(model.share for model in small.catalogue) == pytest.approx(1)
    sizes = livecache.shuffled_chunks(12, seed=5)
    assert (min(sizes), max(sizes), len(sizes)) == (4, 40, 12)


def test_streams_are_drawn_in_pairs() -> None:
    def run(policy: str, share: float, seconds: float) -> StreamRun:
        return StreamRun(policy, HitRatios(share, share, share), seconds)

    foretold, found = [run("lru", 0.5, 2.0), run("gdsf", 0.6, 1.0)], [run("lru", 0.5, 3.0), run("gdsf", 0.58, 1.5)]
    figure = plots.plot_streams(foretold, found)
    assert [[bar.get_height() for bar in rectangles(ax)] for ax in figure.axes] == [pytest.approx([50, 60, 50, 58]), pytest.approx([2, 1, 3, 1.5])]
    said = plots.streams_text(foretold, found, 100)
    assert "to the request: lru; off: gdsf by -2 of 100" in said and "lru x1.50, gdsf x1.50" in said and "with gdsf, 1.50 s" in said
    assert said in plots.streams_alt_text(foretold, found, 100)
