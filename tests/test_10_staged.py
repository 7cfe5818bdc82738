"""Chapter 10: a model whose layers are in several places gives the tokens of the whole one, and hands its requests to it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moving import World
from test_04_overlap import PROMPT, Save, checkpoint_of  # noqa: F401 - a fixture

from sllm_mini.checkpoint import Checkpoint
from sllm_mini.control.multicast import binomial_pipeline, joint_stages, summarize
from sllm_mini.errors import ModelError, StageError
from sllm_mini.inference import Engine, SamplingOptions, Session
from sllm_mini.inference.pieces import Piece, needed_tensors
from sllm_mini.inference.staged import Pipeline, StagedEngine, StageServer
from sllm_mini.loading.load import load_tensors
from sllm_mini.loading.model import build_skeleton

pytestmark = pytest.mark.usefixtures("one_torch_thread")
FAMILIES = ["Llama", "Llama, tied", "Qwen2", "GPT-2", "OPT", "GPT-NeoX"]
PROMPTS = [PROMPT, [7], [9, 3, 3, 50, 11, 12, 13, 14, 15, 61]]


def piece_of(checkpoint: Checkpoint, start: int, stop: int) -> Piece:
    """With the tensors it needs and no others."""
    tensors = load_tensors(checkpoint.path)
    return Piece(checkpoint, {name: tensors[name] for name in needed_tensors(checkpoint, build_skeleton(checkpoint), start, stop)}, start, stop)


@contextmanager
def staged(checkpoint: Checkpoint, cuts: Sequence[int], folder: Path, *, engines: int = 1, **hooks: Any) -> Iterator[tuple[list[StagedEngine], list[StageServer]]]:
    """Stages that end at `cuts`, the engine's own last."""
    with ExitStack() as stack:
        ends = [0, *cuts]
        servers = []
        for number, (start, stop) in enumerate(pairwise(ends)):
            servers.append(StageServer(piece_of(checkpoint, start, stop), folder / f"s{number}", **hooks))
            stack.callback(servers[-1].close)
        last = piece_of(checkpoint, ends[-1], 4)
        made = []
        for _ in range(engines):
            made.append(StagedEngine(last, [server.address for server in servers], patience_seconds=10))
            stack.callback(made[-1].close)
        yield made, servers


def alone(checkpoint: Checkpoint, prompts: Sequence[Sequence[int]], **options: Any) -> list[tuple[int, ...]]:
    engine = Engine.load(checkpoint)
    return [engine.complete(prompt, stop_at_eos=False, **options).token_ids for prompt in prompts]


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_give_the_tokens_of_the_whole_model(family: str, checkpoint_of: Save, tmp_path: Path) -> None:  # noqa: F811
    checkpoint = checkpoint_of(family)
    for sampling in (SamplingOptions(), SamplingOptions(temperature=1.0, seed=5, repetition_penalty=1.2)):
        expected = alone(checkpoint, PROMPTS, max_new_tokens=9, sampling=sampling)
        with staged(checkpoint, (1, 3), tmp_path) as ([engine], _):
            runs = [engine.generate(prompt, max_new_tokens=9, stop_at_eos=False, sampling=sampling) for prompt in PROMPTS]
            got = [tuple(piece.token_id for piece in run) for run in runs]
            assert got == expected
            assert engine.runner.can_batch == Engine.load(checkpoint).runner.can_batch


@settings(max_examples=12, deadline=None)
@given(
    cuts=st.sampled_from([cut for n in range(4) for cut in combinations((1, 2, 3), n)]),
    prompts=st.lists(st.lists(st.integers(0, 95), min_size=1, max_size=12), min_size=1, max_size=4),
    limits=st.lists(st.integers(1, 8), min_size=4, max_size=4),
)
def test_any_cut_gives_the_same_tokens(tmp_path_factory: pytest.TempPathFactory, checkpoint_of: Save, cuts: tuple[int, ...], prompts: list[list[int]], limits: list[int]) -> None:  # noqa: F811
    """Texts of unlike lengths end at different steps, so rows are swapped and given back at every stage."""
    checkpoint = checkpoint_of("Llama")
    whole = Engine.load(checkpoint)
    with staged(checkpoint, cuts, tmp_path_factory.mktemp("s")) as ([engine], _):
        runs = [engine.generate(prompt, max_new_tokens=limit, stop_at_eos=False) for prompt, limit in zip(prompts, limits, strict=False)]
        for run, prompt, limit in zip(runs, prompts, limits, strict=False):
            assert tuple(piece.token_id for piece in run) == whole.complete(prompt, max_new_tokens=limit, stop_at_eos=False).token_ids


def test_a_long_prompt_goes_in_bounded_messages(checkpoint_of: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr("sllm_mini.inference.staged.PASS_TOKENS", 8)
    prompt = [(7 * n) % 96 for n in range(30)]
    checkpoint = checkpoint_of("Llama")
    with staged(checkpoint, (2,), tmp_path) as ([engine], _):
        assert [engine.complete(prompt, max_new_tokens=5, stop_at_eos=False).token_ids] == alone(checkpoint, [prompt], max_new_tokens=5)


def test_stages_work_at_once(checkpoint_of: Save, tmp_path: Path) -> None:  # noqa: F811
    """Two stages, each a wait of 20 ms a pass: two engines have both of them busy."""
    busy, most, lock = [0], [0], threading.Lock()

    def wait() -> None:
        with lock:
            busy[0] += 1
            most[0] = max(most[0], busy[0])
        time.sleep(0.02)
        with lock:
            busy[0] -= 1

    checkpoint = checkpoint_of("Llama")
    expected = alone(checkpoint, PROMPTS[:2], max_new_tokens=8)
    with staged(checkpoint, (1, 2), tmp_path, engines=2, before_pass=wait) as (engines, _):
        pipeline = Pipeline(engines)
        runs = [pipeline.generate(prompt, max_new_tokens=8, stop_at_eos=False) for prompt in PROMPTS[:2]]
        got: list[tuple[int, ...]] = [(), ()]

        def read(n: int) -> None:
            got[n] = tuple(piece.token_id for piece in runs[n])

        threads = [threading.Thread(target=read, args=(n,)) for n in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert got == expected and most[0] == 2
        assert [len(engine.requests) for engine in engines] == [0, 0]


def test_a_stage_that_dies_ends_the_requests_and_is_named(checkpoint_of: Save, tmp_path: Path) -> None:  # noqa: F811
    with staged(checkpoint_of("Llama"), (1, 2), tmp_path) as ([engine], servers):
        runs = [engine.generate(prompt, max_new_tokens=20, stop_at_eos=False) for prompt in PROMPTS]
        for run in runs:
            next(run)
        servers[1].close()
        for run in runs:
            with pytest.raises(StageError, match="stage 1") as caught:
                list(run)
            assert caught.value.stage == 1
        assert not engine.requests
        with pytest.raises(StageError, match="stage 1"):
            engine.complete(PROMPT, max_new_tokens=2)


def test_what_does_not_fit_is_refused(checkpoint_of: Save, tmp_path: Path) -> None:  # noqa: F811
    checkpoint = checkpoint_of("Llama")
    server = StageServer(piece_of(checkpoint, 0, 1), tmp_path / "s")
    try:
        with pytest.raises(ModelError, match="do not make a model"):
            StagedEngine(piece_of(checkpoint, 2, 4), [server.address])
        other = piece_of(checkpoint_of("Qwen2"), 1, 4)
        with pytest.raises(ModelError, match="and not of"):
            StagedEngine(other, [server.address])
        engine = StagedEngine(piece_of(checkpoint, 1, 4), [server.address])
        with pytest.raises(ModelError, match="mode="):
            _ = engine.kv_nbytes_per_token
        engine.close()
    finally:
        server.close()
    with pytest.raises(StageError, match="cannot be reached"):
        StagedEngine(piece_of(checkpoint, 1, 4), [tmp_path / "nobody"])
    with pytest.raises(ModelError, match="are not here"):
        Piece(checkpoint, {}, 0, 1)


@pytest.mark.parametrize("family", ["Llama", "GPT-2"])
def test_requests_leave_for_a_node_that_is_whole_and_their_texts_go_on(family: str, checkpoint_of: Save, tmp_path: Path) -> None:  # noqa: F811
    """While they are read: no token is lost or doubled, and the engine of stages has none left."""
    checkpoint = checkpoint_of(family)
    expected = alone(checkpoint, PROMPTS, max_new_tokens=40)
    with staged(checkpoint, (1, 3), tmp_path, before_pass=lambda: time.sleep(0.003)) as ([engine], _):
        engines: dict[str, Any] = {"source": engine, "destination": Engine.load(checkpoint)}
        with World(engines.__getitem__) as world:
            for number, prompt in enumerate(PROMPTS):
                world.submit("source", Session(f"r{number}", engine.name, tuple(prompt), len(prompt), 40, stop_at_eos=False))
            world.start()
            for number in range(len(PROMPTS)):
                while world.ledger.count(f"r{number}") < 3:
                    time.sleep(0.002)
                report = world.move(f"r{number}")
                assert report is not None and report.outcome == "moved" and report.owner == "destination", report
            assert not engine.requests
            assert [world.read(f"r{number}")[0] for number in range(len(PROMPTS))] == expected


# --- who serves what ---


@given(st.lists(st.frozensets(st.integers(0, 5)), min_size=1, max_size=4), st.lists(st.frozensets(st.integers(0, 5), max_size=3), min_size=1, max_size=5))
def test_stages_are_the_fewest_that_cover_all_layers(held: list[frozenset[int]], needs: list[frozenset[int]]) -> None:
    stages = joint_stages(needs, held)
    n = len(needs)

    def some_node(start: int, stop: int) -> bool:
        return any(frozenset().union(*needs[start:stop]) <= have for have in held)

    fewest = next((k + 1 for k in range(n) for cut in combinations(range(1, n), k) if all(some_node(a, b) for a, b in pairwise((0, *cut, n)))), None)
    assert (len(stages) or None) == fewest
    if stages:
        assert [stage.start for stage in stages] == [0, *(stage.stop for stage in stages[:-1])] and stages[-1].stop == n
        assert all(needs[layer] <= held[stage.node] for stage in stages for layer in range(stage.start, stage.stop))


@pytest.mark.parametrize("nodes", [4, 8])
def test_a_group_serves_from_the_joint_tick_on_and_before_any_node_is_whole(nodes: int) -> None:
    plan = binomial_pipeline(nodes, 16)
    figures, arrivals = summarize(plan), plan.arrivals()[1:]
    needs = [{block} for block in range(16)]

    def at(tick: int) -> list[set[int]]:
        return [{block for block, came in node.items() if came <= tick} for node in arrivals]

    assert joint_stages(needs, at(figures.joint)) and not joint_stages(needs, at(figures.joint - 1))
    assert figures.joint <= min(figures.complete[1:])
