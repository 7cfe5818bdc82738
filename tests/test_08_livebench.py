"""A trace on a live cluster and in simulated time: what is played, measured, compared. Chapter 08. Engines are doubles (`fake_engine`)."""

from __future__ import annotations

import json
import time
import urllib.request
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from command_line import run_command

from sllm_mini.checkpoint import Checkpoint, convert_checkpoint
from sllm_mini.cluster.simulated import SimulationOptions, even_cluster, simulate
from sllm_mini.cluster.trace.request import Trace, TraceLabel, TraceRequest
from sllm_mini.cluster.trace.workloads import burst_trace
from sllm_mini.control import messages as m
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.messages import ModelSpec
from sllm_mini.control.replay import read_log
from sllm_mini.control.state import NodeState
from sllm_mini.errors import FormatError, SllmError
from sllm_mini.eviction import LRU
from sllm_mini.lab.livebench import Calibration, Options, measure_calibration, measure_cluster, read_cluster, row_of
from sllm_mini.lab.livebench.agreement import agreement, decisions_of, ratio_interval
from sllm_mini.lab.livebench.calibrate import TOKENS, Learned, predictions
from sllm_mini.lab.livebench.figures import measured_figures, starts_of
from sllm_mini.lab.livebench.play import Played, frozen, play, shared_zygote, with_shared_zygote
from sllm_mini.lab.livebench.workload import asks, fitted
from sllm_mini.lab.tiers.origin import Origin
from sllm_mini.resources import resource
from sllm_mini.types import Tier, Warmth

OPTIONS = Options(cluster="inprocess:1", devices=1, models=2, stored=1, pace_seconds=0.001, remote_bytes_per_second=200e6, engine="fake_engine:make")
NBYTES = 10**7
REQUESTS = [TraceRequest(0.3 * number, f"model-0{number % 2}", 20, 8) for number in range(8)]
"""One device and two models in turn: each start is a cold one, from the remote store as only one of them fits in memory."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return convert_checkpoint(resource("data/models/tiny"), tmp_path_factory.mktemp("tiny") / "tiny.sllm")


@pytest.fixture(scope="module")
def played(tiny: Checkpoint) -> Played:
    return play(REQUESTS, tiny, OPTIONS)


def simulated_log(models: int = 2, stored: int | None = 0, **options: Any) -> list[bytes]:
    lines: list[bytes] = []
    specs = [ModelSpec(name=f"model-0{number}", nbytes=NBYTES, process_seconds=0.01, ready_seconds=0.01, decode_seconds_per_token=0.01) for number in range(models)]
    nodes = even_cluster(1, devices=models - 1, dram_nbytes=1 << 40, remote_bytes_per_second=NBYTES)
    trace = [TraceRequest(3.0 * number, f"model-0{number % models}", 1, 1) for number in range(3 * models)]
    simulate(trace, nodes, specs, log=lines.append, options=SimulationOptions(store_dram_nbytes=stored, store_disk_nbytes=0, **options))
    return lines


# What is played


def test_a_trace_is_cut_to_the_context_dealt_out_to_the_models_and_made_faster() -> None:
    trace = [TraceRequest(float(number), f"service-{number}", 3000, 900) for number in range(5)]
    found = fitted(trace, replace(OPTIONS, speed=4.0), context=1000, most=4)
    assert [each.arrival_seconds for each in found.requests] == [0.0, 0.25, 0.5, 0.75]
    assert [each.model for each in found.requests] == ["model-00", "model-01", "model-00", "model-01"]
    assert all(each.input_tokens + each.output_tokens == 1000 for each in found.requests) and found.shortened == 4
    first, again = asks(found.requests, 50, seed=1), asks(found.requests, 50, seed=1)
    assert first == again != asks(found.requests, 50, seed=2)
    assert all(len(ask.prompt) == each.input_tokens and max(map(int, ask.prompt)) < 50 for ask, each in zip(first, found.requests, strict=True))


def test_functions_and_nothing_cannot_be_played() -> None:
    with pytest.raises(SllmError, match="function"):
        fitted([TraceRequest(0.0, "java-01", 0, 0, None, 1.0)], OPTIONS, 100)
    with pytest.raises(SllmError, match="no requests"):
        fitted([], OPTIONS, 100)
    for wrong in ({"cluster": "simulated:2"}, {"cluster": "local"}, {"devices": 0}, {"speed": 0.0}):
        with pytest.raises(ValueError):
            replace(OPTIONS, **wrong)


def test_a_remote_store_with_a_rate_gives_the_bytes_no_faster(tmp_path: Path) -> None:
    data = bytes(range(256)) * 4096
    (tmp_path / "data").write_bytes(data)
    rate = 4 * len(data)
    with Origin(tmp_path, rate) as origin:
        begun = time.monotonic()
        for name in ("model", "model-07"):
            assert urllib.request.urlopen(f"{origin.url.rpartition('/')[0]}/{name}/data", timeout=30).read() == data
        assert time.monotonic() - begun > 2 * 0.9 * (len(data) - (128 << 10)) / rate  # each has a burst of its own


def test_a_live_run_says_what_was_asked_and_its_log_replays(played: Played) -> None:
    assert [report.outcome for report in played.reports] == ["answered"] * len(REQUESTS)
    assert len(played.gaps) == sum(each.output_tokens - 1 for each in REQUESTS) and len(played.lateness) == len(REQUESTS)
    assert played.replayed == sum(1 for _ in read_log(played.log)) > 3 * len(REQUESTS)
    assert all(report.arrived >= each.arrival_seconds and report.first > report.assigned for report, each in zip(played.reports, REQUESTS, strict=True))
    starts = starts_of(played.log)
    assert {each.warmth for each in starts} == {Warmth.COLD} and {each.tier for each in starts} == {Tier.REMOTE} and 2 <= len(starts) <= len(REQUESTS)
    assert {climb.warmth for climb in played.climbs} == set(Warmth) - {Warmth.COLD}


def test_what_memory_lost_is_not_taken_to_be_on_a_disk_that_never_had_it(played: Played) -> None:
    records = list(read_log(played.log))
    assert any(isinstance(record.event, m.Evicted) for record in records)
    assert {action.tier for record in records for action in record.actions if isinstance(action, m.Start)} == {Tier.REMOTE}


def test_figures_of_a_run_explain_it(played: Played, tiny: Checkpoint) -> None:
    figures = measured_figures(played, tiny)
    starts = starts_of(played.log)
    own = sum(each.seconds - each.queued_seconds - each.load_seconds for each in starts) / len(starts)
    assert figures.process_seconds + figures.runtime_seconds + figures.ready_seconds == pytest.approx(own)
    assert figures.remote_bytes_per_second < 1.1 * OPTIONS.remote_bytes_per_second and figures.decode_seconds_per_token >= OPTIONS.pace_seconds
    spec = figures.spec(ModelSpec(name="a", nbytes=1, concurrency=4))
    assert (spec.name, spec.concurrency, spec.ready_seconds) == ("a", 4, figures.ready_seconds)
    with pytest.raises(SllmError, match="says nothing"):
        measured_figures(replace(played, log=[]), tiny)


# An estimator that learns no more


def test_a_frozen_estimator_says_the_same_whatever_comes(played: Played) -> None:
    estimator = frozen(played.learned)
    node, spec = NodeState(OPTIONS.nodes()[0], free_devices=[0], free_nbytes=1 << 40), ModelSpec(name="model-00", nbytes=NBYTES)
    before = estimator.start(node, spec, Warmth.COLD, Tier.REMOTE, 0.0)
    learning = Estimator()
    learning.restore(played.learned)
    for each in (estimator, learning):
        each.observe_start(node, spec, Warmth.COLD, Tier.REMOTE, 50.0, 0.0, before, load_seconds=40.0)
    assert estimator.start(node, spec, Warmth.COLD, Tier.REMOTE, 0.0) == before < learning.start(node, spec, Warmth.COLD, Tier.REMOTE, 0.0)
    assert estimator.errors("what")["start"].worst_seconds == pytest.approx(50.0 - before)


def test_predictions_of_a_log_are_those_of_its_starts(played: Played) -> None:
    learned = Estimator().save()
    log = played.log  # of an estimator that learned: under serverlessllm on one node it decides alike
    found = predictions(log, OPTIONS, learned)
    assert {kind for kind, _, _ in found} == {"start from COLD by REMOTE"}
    assert [seconds for _, _, seconds in found] == [each.seconds for each in starts_of(log)]


# Decisions


def test_equal_runs_agree_and_the_first_other_decision_is_told() -> None:
    log = simulated_log()
    mine = decisions_of(log)
    assert agreement(mine, mine, 0.0)["actions_alike"] == len(mine.actions) and agreement(mine, mine, 0.0)["first_different"] is None
    place = next(number for number, (_, action) in enumerate(mine.actions) if isinstance(action, m.Start) and number > 3)
    at, action = mine.actions[place]
    other = replace(mine, actions=[*mine.actions[:place], (at, replace_struct(action)), *mine.actions[place + 1 :]], requests={**mine.requests, 0: ("elsewhere", Warmth.READY)})
    found = agreement(mine, other, began=1.0)
    assert found["actions_alike"] == place and found["first_different"]["live"]["seconds"] == at - 1.0
    assert found["same_node"] == found["same_start"] == 1 - 1 / len(mine.requests)
    shorter = agreement(mine, replace(mine, actions=mine.actions[:2]), 0.0)
    assert shorter["actions_alike"] == 2 and shorter["first_different"]["simulated"] is None


def replace_struct(action: Any) -> Any:
    import msgspec

    return msgspec.structs.replace(action, node="elsewhere")


def test_the_interval_is_of_blocks_and_the_same_for_a_seed() -> None:
    even = [(1.0, 1.1)] * 40
    assert ratio_interval(even, 0) == pytest.approx((1.1, 1.1))
    runs = [(1.0, 2.0 if number // 10 % 2 else 1.0) for number in range(200)]
    interval, alone = ratio_interval(runs, 3), ratio_interval(runs, 3, block=1)
    assert interval is not None and alone is not None
    low, high = interval
    assert 1.0 < low < 1.5 < high < 2.0 and ratio_interval(runs, 3) == (low, high) != ratio_interval(runs, 4)
    assert high - low > 1.5 * (alone[1] - alone[0])  # neighbours are alike: fewer of them are news
    assert ratio_interval(even[:19], 0) is None


# A store that instances serve from


def test_what_an_instance_serves_from_is_not_evicted() -> None:
    """Two devices, three models in turn, memory for two: what serves stays, and a third is read past the store."""
    log = simulated_log(models=3, stored=2 * NBYTES, leases="instance", eviction=LRU)
    serving: dict[int, str] = {}
    evicted = 0
    for record in read_log(log):
        if isinstance(record.event, m.Evicted) and record.event.tier is Tier.DRAM:
            evicted += 1
            assert record.event.model not in serving.values()
        for action in record.actions:
            if isinstance(action, m.Start):
                serving[action.instance] = action.model
            elif isinstance(action, m.Descend):
                del serving[action.instance]
    assert evicted


def test_room_is_made_when_a_load_begins_where_it_is_read_into_place() -> None:
    def leads(**options: Any) -> list[float]:
        """Seconds from each eviction to the load that it made room for."""
        evicted, found = 0.0, []
        for record in read_log(simulated_log(models=3, stored=2 * NBYTES, **options)):
            if isinstance(record.event, m.Evicted) and record.event.tier is Tier.DRAM:
                evicted = record.now
            elif isinstance(record.event, m.Cached) and evicted:
                found.append(record.now - evicted)
        return found

    assert leads(leases="instance") == pytest.approx([1.0] * len(leads(leases="instance"))) and leads(leases="instance")
    assert leads() == pytest.approx([0.0] * len(leads())) and leads()


# The documents


def test_the_document_sets_the_simulation_beside_the_live_run(tmp_path: Path) -> None:
    log, saved = tmp_path / "events.jsonl", tmp_path / "document.json"
    found = measure_cluster(Trace(TraceLabel("even", "a test", "synthetic"), REQUESTS), OPTIONS, most=6, log=log)
    live, other = row_of(found, "live"), row_of(found, "simulated")
    assert list(live) == list(other) and live["answered"] == other["answered"] == 6
    assert 2 <= live["starts"] <= 6 and abs(live["starts"] - other["starts"]) <= 2  # two threads held up by others can let requests of one model meet, or not
    assert found["replayed_events"] == sum(1 for _ in read_log(log.read_bytes().splitlines(keepends=True)))
    assert {row["name"] for row in found["rungs"]} == {"PROCESS", "RUNTIME", "DRAM", "DEVICE", "READY"}
    assert found["results"][0]["inter_token_seconds"]["p50"] > 0 and found["agreement"]["same_start"] > 0.5  # two processes on one machine are not as even as the simulation
    saved.write_text(json.dumps(found))
    assert row_of(read_cluster(saved), "live") == live


def test_a_calibration_predicts_another_trace_than_it_learned_from(tmp_path: Path) -> None:
    calibration = Calibration(learn_seconds=2.0, seconds=3.0, requests_per_second=6.0, repeats=1)
    assert list(calibration.trace(0, OPTIONS)) != list(calibration.trace(1, OPTIONS))[: len(list(calibration.trace(0, OPTIONS)))]
    learned = tmp_path / "learned.json"
    found = measure_calibration(OPTIONS, calibration, learned=learned)
    known = Learned.read(learned)
    assert found["learned"]["cold_starts"] == known.cold_starts > 1 and found["simulated"]["answered"] == found["results"][0]["live"]["answered"]
    assert found["first_token_seconds_mean"]["ratio"] == found["results"][0]["first_token_mean_ratio"]
    assert sum(row["count"] for row in found["predictions"] if row["name"].startswith("start")) == found["results"][0]["live"]["starts"]
    assert list(found["results"][0]["live"]) == list(found["simulated"])
    learned.write_text("{}")
    with pytest.raises(FormatError, match="learn again"):
        measure_calibration(OPTIONS, calibration, learned=learned)
    with pytest.raises(ValueError):
        Calibration(seeds=(1, 1))


def test_the_command_plays_a_trace_and_says_that_its_log_replays(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from sllm_mini.cluster.trace.file import write_trace

    trace, log = tmp_path / "short.csv", tmp_path / "events.jsonl"
    write_trace(trace, burst_trace(requests=4, requests_per_second=4.0, cv=1.0, models=2, tokens=TOKENS, seed=1))
    run = partial(run_command, capfd)
    said = run("bench", "cluster", str(trace), "--cluster", "inprocess:1", "--models", "2", "--pace", "1ms", "--remote-rate", "200MB/s", "--save-log", str(log))
    assert said.code == 0, said.err
    assert "same actions" in said.out and "simulated over live" in said.out
    assert run("replay", str(log)).code == 0
    for wrong in (["bench", "cluster"], ["bench", "cluster", str(trace), "--calibrate"], ["bench", "cluster", str(trace), "--pace", "fast"]):
        assert run(*wrong).code == 2
    assert run("bench", "cluster", str(trace), "--placement", "nearest").code == 1


def test_nodes_of_one_machine_fork_from_one_zygote_that_outlives_them(tiny: Checkpoint) -> None:
    """Real engines; each node is said to keep what a machine of its own would."""
    options = replace(OPTIONS, cluster="local:2", models=1, engine="")
    zygotes = set()
    for _ in range(2):
        found = play(REQUESTS[:3:2], tiny, options)
        assert found.result.answered == 2 and {climb.warmth for climb in found.climbs} >= {Warmth.PROCESS, Warmth.RUNTIME, Warmth.READY}
        assert len(found.shared_nbytes) == 2 and len({*found.shared_nbytes.values()}) == 1 and min(found.shared_nbytes.values()) > 1e8
        zygotes.add(shared_zygote().pid)
    assert len(zygotes) == 1
    assert with_shared_zygote(options.live(tiny), "inprocess") == options.live(tiny)
    assert not with_shared_zygote(OPTIONS.live(tiny), "local").node.zygote
