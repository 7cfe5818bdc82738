"""Chapter 05: what was made before a fork is what would be made after it, and a start that takes it says the same."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import is_gone, on_the_path
from store_process import eventually

from sllm_mini.checkpoint import Checkpoint, WriteOptions, convert_checkpoint, save_checkpoint
from sllm_mini.cluster import Node
from sllm_mini.cluster.nodes import launchers
from sllm_mini.cluster.nodes.rung_memory import RungMemory
from sllm_mini.cluster.nodes.worker_messages import Rung
from sllm_mini.cluster.zygote import prepare_in
from sllm_mini.errors import SllmError, UnsupportedError
from sllm_mini.inference import templates
from sllm_mini.loading.model import build_skeleton
from sllm_mini.resources import resource
from sllm_mini.storage import Store
from sllm_mini.types import Warmth

PROMPT = [3, 4, 5, 6]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    templates._made.clear()
    yield
    templates._made.clear()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return convert_checkpoint(resource("data/models/tiny"), tmp_path_factory.mktemp("models") / "tiny")


def small(family: str) -> Any:
    """A model of that family with random weights, of a few thousand parameters."""
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 50, "max_position_embeddings": 32}
    sizes |= {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "ffn_dim": 32, "word_embed_proj_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(7)
    return getattr(transformers, f"{family}ForCausalLM" if family != "GPT2" else "GPT2LMHeadModel")(getattr(transformers, f"{family}Config")(**sizes))


@pytest.mark.parametrize("family", ["Llama", "OPT", "GPT2", "Qwen2", "Bloom"])
def test_a_skeleton_that_was_made_before_is_the_one_that_would_be_made_now(family: str, tmp_path: Path) -> None:
    """Nothing is drawn for it, so the random numbers that come after it are those that would have come."""
    checkpoint = save_checkpoint(small(family), tmp_path / "small")
    threads = torch.get_num_threads()
    templates.prepare(checkpoint.path)
    assert torch.get_num_threads() == threads
    torch.manual_seed(3)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    fresh, template = build_skeleton(checkpoint), templates.take(checkpoint)
    assert torch.equal(torch.rand(1), drawn)
    assert template is not None and template.tokenizer is None and templates.take(checkpoint) is None
    mine, other = dict(template.model.named_parameters(remove_duplicate=False)), dict(fresh.named_parameters(remove_duplicate=False))
    assert mine.keys() == other.keys() and all(each.is_meta and not each.requires_grad for each in mine.values())
    assert all((mine[name].shape, mine[name].dtype) == (other[name].shape, other[name].dtype) for name in mine)
    buffers = dict(fresh.named_buffers())
    assert buffers.keys() == dict(template.model.named_buffers()).keys()
    assert all(torch.equal(value, buffers[name]) for name, value in template.model.named_buffers())


def test_a_start_from_a_template_says_what_one_without_says(tiny: Checkpoint, tmp_path: Path) -> None:
    said = []
    with Store(tmp_path / "store", dram_nbytes=1 << 28) as store:
        store.register("tiny", tiny.path)
        for prepared in (False, True):
            if prepared:
                templates.prepare(tiny.path)
            with Node(store, node_id="n") as node, node.start("tiny") as instance:
                engine = instance.ready(60.0)
                found = engine.complete("Once upon a time", max_new_tokens=12)
                said.append((found.text, found.token_ids, engine.name, {span.name for span in instance.spans if span.lane == "main"}))
                del engine
    assert said[0] == said[1] and said[0][0]
    assert templates.take(tiny) is None, "the start did not take it"


def test_what_was_made_of_another_checkpoint_is_not_taken(tiny: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "small"
    first = save_checkpoint(small("Llama"), path)
    templates.prepare(path)
    second = save_checkpoint(small("OPT"), path, options=WriteOptions(overwrite=True))
    assert first.digest != second.digest and templates.take(second) is None and templates.take(tiny) is None


def test_only_so_many_are_kept_and_none_of_what_cannot_be_made(tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "MOST", 2)
    made = []
    for number in range(3):
        model = small("Llama")
        model.generation_config.max_new_tokens = number + 1  # so that each has a digest of its own
        with torch.no_grad():
            next(iter(model.parameters())).add_(number)
        made.append(save_checkpoint(model, tmp_path / f"small-{number}"))
        templates.prepare(made[-1].path)
    assert [templates.take(each) is not None for each in made] == [False, True, True]
    with pytest.raises(SllmError):
        templates.prepare(tmp_path / "nothing")
    monkeypatch.setattr(templates, "_MOST_TENSORS", 3)
    with pytest.raises(UnsupportedError, match="made at each start"):
        templates.prepare(tiny.path)
    assert not templates._made


def test_zygotes_prepare_what_was_registered_and_so_does_the_one_that_comes_after(tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, str]] = []

    def recorded(path: str, entry: str, source: str, *, patience: float) -> str:
        asked.append((path, source, prepare_in(path, entry, source, patience=patience)))
        return asked[-1][-1]

    monkeypatch.setattr(launchers, "prepare_in", recorded)
    launcher, deaths = launchers.ZygoteLauncher(), list[str]()
    try:
        launcher.prepare(os.fspath(tiny.path))
        launcher.prepare(os.fspath(tmp_path / "nothing"))  # told in the log, and to nobody
        first = launcher._home
        assert first is not None and first.zygote is not None
        assert asked == [(first.path, os.fspath(tiny.path), "")]
        first.zygote.kill()
        launcher.launch("w", deaths.append).close()
        eventually(lambda: len(asked) == 2, 60.0)
        second = launcher._home
        assert second is not None and second.path != first.path and asked[1] == (second.path, os.fspath(tiny.path), "")
        launcher.launch("x", deaths.append).close()
    finally:
        launcher.close()
    assert not deaths


PREPARES = """
import os, threading, time

def slowly(path):
    open(path + ".begun", "w").close()
    while not os.path.exists(path + ".go on"):
        time.sleep(0.01)

def with_a_thread(path):
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
"""


@pytest.fixture
def launcher_that_prepares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], launchers.ZygoteLauncher]]:
    """Its zygotes import next to nothing, and prepare by a function of that name."""
    made = []

    def make(name: str) -> launchers.ZygoteLauncher:
        monkeypatch.setattr(launchers, "PREPARE", f"odd_prepares:{name}")
        made.append(launchers.ZygoteLauncher(fork_seconds=0.5))
        return made[-1]

    monkeypatch.setattr(launchers, "IMPORTS", ())
    with on_the_path(tmp_path, "odd_prepares", PREPARES):
        yield make
        for launcher in made:
            launcher.close()


def test_a_zygote_that_prepares_is_not_taken_for_one_that_hangs(launcher_that_prepares: Callable[[str], launchers.ZygoteLauncher], tmp_path: Path) -> None:
    launcher, source = launcher_that_prepares("slowly"), os.fspath(tmp_path / "model")
    home = launcher._home
    with ThreadPoolExecutor(2) as beside:
        preparing = beside.submit(launcher.prepare, source)
        eventually(lambda: os.path.exists(source + ".begun"), 60.0)
        launching = beside.submit(launcher.launch, "w", lambda _: None)
        with pytest.raises(TimeoutError):
            launching.result(1.5)  # it would be given up by now
        Path(source + ".go on").touch()
        preparing.result(60.0)
        launching.result(60.0).close()
    assert launcher._home is home


def test_a_zygote_that_can_fork_no_more_is_replaced_once(
    launcher_that_prepares: Callable[[str], launchers.ZygoteLauncher], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "sllm_mini.cluster")
    launcher, source = launcher_that_prepares("with_a_thread"), os.fspath(tmp_path / "model")
    first = launcher._home
    assert first is not None and first.zygote is not None
    launcher.prepare(source)
    (told,) = [each.getMessage() for each in caplog.records if "is made anew at each start" in each.getMessage()]
    assert source in told and "started 1 thread" in told
    launcher.launch("w", lambda _: None).close()
    second = launcher._home
    assert second is not first and is_gone(first.zygote.pid)
    launcher.launch("x", lambda _: None).close()
    assert launcher._home is second


def test_the_memory_of_a_rung_is_counted_now_and_then() -> None:
    memory = RungMemory()
    due = []
    for climb in range(23):
        measured = memory.due("m", Warmth.READY, last=True)
        due.append(measured)
        rung = memory.told("m", Rung(Warmth.READY, 0.1 * climb, 100 + climb if measured else 0, 50 if measured else 0), measured=measured)
        assert rung.seconds == 0.1 * climb and rung.private_nbytes == 100 + 10 * (climb // 10) and rung.proportional_nbytes == 50
    assert [number for number, each in enumerate(due) if each] == [0, 10, 20]
    assert memory.due("other", Warmth.READY, last=True)
    assert [memory.due("m", Warmth.DRAM, last=False) for _ in range(2)] == [False, True], "a first start goes by without being held up"
    memory.forget("m")
    assert memory.due("m", Warmth.READY, last=True)
    never = memory.told("new", Rung(Warmth.DRAM, 1.0, 0, 0), measured=False)  # its first climb failed before it was counted
    assert never.private_nbytes == 0 and memory.due("new", Warmth.DRAM, last=True)
