"""Execute while loading: layers that run as their bytes arrive, and what happens when they do not. Chapter 04.

The oracle is the same checkpoint loaded first and run then. Bytes that have not arrived are 0xFF, which is not a number
in any float type, so a layer that runs too early cannot give the right logits.
"""

from __future__ import annotations

import gc
import itertools
import json
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sllm_mini.checkpoint import Checkpoint, convert_checkpoint, open_checkpoint, save_checkpoint
from sllm_mini.device.fake import RecordingRuntime
from sllm_mini.errors import (
    FormatError,
    IntegrityError,
    LoadCancelled,
    LoadError,
    ModelError,
    SllmError,
    UnsupportedError,
)
from sllm_mini.inference import Engine, StreamedModel, next_runnable_layer, stream_model
from sllm_mini.inference import overlap as overlap_module
from sllm_mini.inference.overlap import COMPUTE_LANE, WAIT_LANE
from sllm_mini.lab.bench.document import save_document
from sllm_mini.lab.overlap import Options, Start, described_overlap, measure_overlap, read_overlap
from sllm_mini.lab.overlap.document import Series, assemble, one_layer_seconds, pipeline_seconds
from sllm_mini.lab.overlap.picture import arrival_seconds
from sllm_mini.lab.overlap.start import MODES, Layer, Mode, Sample
from sllm_mini.loading import LoadOptions, load_model, start_load
from sllm_mini.loading.plan import plan_load
from sllm_mini.loading.restore import restore_tensors
from sllm_mini.types import Progress, Span, SpanRecorder, Warmth

IDS = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PROMPT = [5, 17, 0, 33, 2, 80]
LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", LLAMA),
    "Llama, tied": ("Llama", LLAMA | {"tie_word_embeddings": True}),
    "Llama, one layer": ("Llama", LLAMA | {"num_hidden_layers": 1}),
    "Qwen2": ("Qwen2", LLAMA),
    "GPT-2": ("GPT2", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}),
    "GPT-2, untied": ("GPT2", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "tie_word_embeddings": False}),
    "OPT": (
        "OPT", {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "word_embed_proj_dim": 16, "max_position_embeddings": 64}
    ),
    "GPT-NeoX": (
        "GPTNeoX", {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 64}
    ),
}  # fmt: skip
CLASSES = {"GPT2": "GPT2LMHeadModel"}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models lose more to waking threads than they win."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model_of(family: str) -> Any:
    import transformers

    kind, settings = FAMILIES[family]
    torch.manual_seed(11)
    config = getattr(transformers, f"{kind}Config")(**(IDS | settings))
    model = getattr(transformers, CLASSES.get(kind, f"{kind}ForCausalLM"))(config).eval()
    for parameter in model.parameters():  # biases and norms too, which begin as zeros and ones
        torch.nn.init.normal_(parameter, std=0.3)
    return model


Save = Callable[[str], Checkpoint]


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Save:
    made: dict[str, Checkpoint] = {}

    def save(family: str) -> Checkpoint:
        if family not in made:
            folder = tmp_path_factory.mktemp("models")
            model_of(family).save_pretrained(folder / "source")
            made[family] = convert_checkpoint(folder / "source", folder / "model")
        return made[family]

    return save


class Faulty(SpanRecorder):
    """Fails a load in its first read, once the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.now = threading.Event()

    @contextmanager
    def span(self, name: str, *, lane: str = "main", nbytes: int = 0, warmth: Warmth | None = None) -> Iterator[None]:
        if name == "read":
            self.now.wait(10)
            raise LoadError("the disk has gone")
        yield


class LayerByLayer:
    """A load whose bytes come when the test says so: `deliver(layer)`, `fail(error)`, or in `wait_for` with `on_demand`."""

    def __init__(self, checkpoint: Checkpoint, *, on_demand: bool = False) -> None:
        self.checkpoint = checkpoint
        self.on_demand = on_demand
        plan = plan_load(checkpoint.index, lambda _: 0, devices=1, names=None, chunk_nbytes=1 << 21, granule=4096)
        self._places = list(plan.places(0))
        self._bytes = torch.frombuffer(bytearray(b"".join((checkpoint.path / p.file).read_bytes() for p in checkpoint.index.partitions)), dtype=torch.uint8)
        self.base = torch.full_like(self._bytes, 0xFF)
        self._tensors = restore_tensors(self.base, self._places)
        self._arrived: set[str] = set()
        self.asked: list[str] = []
        self.error: BaseException | None = None
        self._changed = threading.Condition()

    def deliver(self, layer: str) -> None:
        number = self.layers.index(layer)
        for entry, offset in self._places:
            if entry.layer == number:
                self.base[offset : offset + entry.nbytes] = self._bytes[offset : offset + entry.nbytes]
        with self._changed:
            self._arrived.add(layer)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self.error = self.error or error
            self._tensors = {}
            self._changed.notify_all()

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        self._check()
        return self._tensors

    @property
    def layers(self) -> list[str]:
        return list(self.checkpoint.index.layers)

    @property
    def progress(self) -> Progress:
        return Progress(len(self._arrived), len(self.layers))

    @property
    def done(self) -> bool:
        return self.error is not None or len(self._arrived) == len(self.layers)

    def ready(self, name: str) -> bool:
        self._check()
        return name in self._arrived

    def wait_for(self, name: str, timeout: float | None = None) -> bool:
        self.asked.append(name)
        if self.on_demand:
            self.deliver(name)
        with self._changed:
            arrived = self._changed.wait_for(lambda: self.error is not None or name in self._arrived, timeout)
        self._check()
        return arrived

    def wait(self, timeout: float | None = None) -> Mapping[str, torch.Tensor]:
        for name in self.layers:
            self.wait_for(name, timeout)
        return self._tensors

    def cancel(self) -> None:
        if not self.done:
            self.fail(LoadCancelled("the load was cancelled"))

    def _check(self) -> None:
        if self.error is not None:
            raise self.error.with_traceback(None)


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([PROMPT])).logits
    return logits


def hooks_of(model: torch.nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def in_background(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def load_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("sllm-")]


# --- the decision ------------------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), max_size=12), st.integers(0, 12))
def test_the_next_layer_is_the_one_after_those_that_ran_if_its_bytes_are_there(ready: list[bool], executed: int) -> None:
    found = next_runnable_layer(executed, ready)
    assert found in (None, executed)
    assert (found is not None) == (ready[executed : executed + 1] == [True])


def test_a_layer_that_came_early_does_not_overtake() -> None:
    assert next_runnable_layer(0, [False, True, True]) is None
    assert next_runnable_layer(1, [True, True, False]) == 1
    assert next_runnable_layer(3, [True, True, True]) is None


def test_the_models_wait_on_that_decision(checkpoint_of: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that never lets a layer run is named; one that does not wait runs on bytes that are not there."""
    monkeypatch.setattr(overlap_module, "next_runnable_layer", lambda executed, ready: None)
    with pytest.raises(ModelError, match=r"'embedding' has all its bytes and next_runnable_layer\(0, …\)"):
        logits_of(stream_model(LayerByLayer(checkpoint_of("Llama"), on_demand=True)).model)
    monkeypatch.setattr(overlap_module, "next_runnable_layer", lambda executed, ready: executed)
    loading = LayerByLayer(checkpoint_of("Llama"))
    loading.deliver("embedding")
    assert logits_of(stream_model(loading).model).isnan().all()


# --- the same logits, whatever the order ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_runs_before_the_next_one_is_there(checkpoint_of: Save, family: str) -> None:
    checkpoint = checkpoint_of(family)
    expected = logits_of(load_model(checkpoint))
    loading = LayerByLayer(checkpoint, on_demand=True)  # a layer's bytes come when the model waits for them, no sooner
    streamed = stream_model(loading)
    assert streamed.fallback is None and streamed.waits and loading.asked == []
    assert torch.equal(logits_of(streamed.model), expected) and not expected.isnan().any()
    assert loading.asked == loading.layers
    assert not streamed.waits and hooks_of(streamed.model) == 0


@pytest.mark.parametrize("order", ["in order", "backwards", "shuffled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_bit_identical_whatever_order_bytes_come_in(checkpoint_of: Save, family: str, order: str) -> None:
    checkpoint = checkpoint_of(family)
    expected = Engine(load_model(checkpoint)).complete(PROMPT, max_new_tokens=5, stop_at_eos=False)
    loading = LayerByLayer(checkpoint)
    layers = loading.layers
    layers = layers[::-1] if order == "backwards" else random.Random(3).sample(layers, len(layers)) if order == "shuffled" else layers
    streamed = stream_model(loading)
    engine = Engine(streamed.model)

    def feed() -> None:
        for layer in layers:
            time.sleep(0.002)
            loading.deliver(layer)

    feeder = in_background(feed)
    found = engine.complete(PROMPT, max_new_tokens=5, stop_at_eos=False)
    feeder.join()
    assert found.token_ids == expected.token_ids
    assert torch.equal(logits_of(streamed.model), logits_of(load_model(checkpoint)))
    assert streamed.fallback is None


def test_a_checkpoint_of_the_bare_model(tmp_path: Path) -> None:
    """Its names lack the prefix ("h.0…" for "transformer.h.0…"), and its head is tied to the embedding."""
    model = model_of("GPT-2")
    model.transformer.save_pretrained(tmp_path / "source")
    checkpoint = convert_checkpoint(tmp_path / "source", tmp_path / "model")
    assert not any(tensor.name.startswith("transformer.") for tensor in checkpoint.index.tensors)
    loading = LayerByLayer(checkpoint, on_demand=True)
    streamed = stream_model(loading)
    assert torch.equal(logits_of(streamed.model), logits_of(model))
    assert loading.asked == loading.layers and streamed.fallback is None


def test_a_tie_that_is_saved_under_both_names_comes_with_the_embedding(tmp_path: Path) -> None:
    model = model_of("Llama, tied")
    checkpoint = save_checkpoint(model, tmp_path / "model")
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= {tensor.name for tensor in checkpoint.index.tensors}
    loading = LayerByLayer(checkpoint, on_demand=True)
    streamed = stream_model(loading)
    assert streamed.fallback is None
    assert torch.equal(logits_of(streamed.model), logits_of(model))
    assert loading.asked == loading.layers


def test_after_the_first_pass_nothing_is_asked_again(checkpoint_of: Save) -> None:
    loading = LayerByLayer(checkpoint_of("OPT"), on_demand=True)
    engine = Engine(stream_model(loading).model)
    generation = engine.generate(PROMPT, max_new_tokens=4, stop_at_eos=False)
    next(generation)
    asked = len(loading.asked)
    assert hooks_of(engine.model) == 0
    list(generation)
    assert len(loading.asked) == asked


def test_a_pass_that_leaves_layers_out_keeps_the_hooks_of_the_others(checkpoint_of: Save) -> None:
    loading = LayerByLayer(checkpoint_of("Llama"), on_demand=True)
    streamed = stream_model(loading)
    decoder = streamed.model.model
    layers = decoder.layers
    decoder.layers = layers[:2]
    logits_of(streamed.model)
    assert streamed.waits and not loading.ready("model.layers.3")
    decoder.layers = layers
    assert torch.equal(logits_of(streamed.model), logits_of(load_model(loading.checkpoint)))
    assert not streamed.waits


def test_spans_say_where_each_layer_waited_and_computed(checkpoint_of: Save) -> None:
    recorder = SpanRecorder()
    loading = LayerByLayer(checkpoint_of("Qwen2"), on_demand=True)
    logits_of(stream_model(loading, recorder=recorder).model)
    for lane in (WAIT_LANE, COMPUTE_LANE):
        assert [span.name for span in recorder.spans if span.lane == lane] == loading.layers
    own = [span for span in recorder.spans if span.lane in (WAIT_LANE, COMPUTE_LANE)]
    assert all(before.end <= after.start for before, after in itertools.pairwise(own))
    assert [span.name for span in recorder.spans[:2]] == ["skeleton", "fill"]


# --- real loads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", [True, False])
def test_an_engine_with_overlap_says_what_one_without_says(checkpoint_of: Save, verify: bool) -> None:
    checkpoint = checkpoint_of("GPT-NeoX")
    expected = Engine.load(checkpoint).complete(PROMPT, max_new_tokens=8, stop_at_eos=False)
    recorder = SpanRecorder()
    engine = Engine.load(checkpoint.path, overlap=True, verify=verify, recorder=recorder)
    assert engine.streamed is not None and engine.streamed.fallback is None
    assert engine.complete(PROMPT, max_new_tokens=8, stop_at_eos=False).token_ids == expected.token_ids
    assert engine.streamed.wait() is engine.model
    assert load_threads() == []
    names = {span.name for span in recorder.spans}
    assert {"tokenizer", "skeleton", "fill", "embedding", "head"} <= names and {"hash"} & names == ({"hash"} if verify else set())
    assert Engine.load(checkpoint).streamed is None


def test_waiting_first_takes_the_hooks_off(checkpoint_of: Save) -> None:
    engine = Engine.load(checkpoint_of("Llama"), overlap=True)
    assert engine.streamed is not None
    model = engine.streamed.wait()
    assert hooks_of(model) == 0 and torch.equal(logits_of(model), logits_of(load_model(checkpoint_of("Llama"))))


def test_a_layer_on_a_gpu_is_run_only_after_its_copies_are_done(checkpoint_of: Save) -> None:
    """The fake moves a copy's bytes only when an event after it is waited for, so a layer run earlier would see 0xCD or zeros."""
    checkpoint = checkpoint_of("Qwen2")
    runtime = RecordingRuntime(queries_before_done=2)
    streamed = stream_model(start_load(checkpoint, runtime.device(0)))
    assert torch.equal(logits_of(streamed.model), logits_of(load_model(checkpoint)))
    assert streamed.fallback is None and not streamed.waits
    streamed.wait()


# --- what cannot overlap is loaded first and says so ---------------------------------------------------------------------


def test_a_dtype_that_the_configuration_changes_is_loaded_first(tmp_path: Path) -> None:
    model_of("Llama").half().save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source/config.json").read_text())
    (tmp_path / "source/config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    checkpoint = convert_checkpoint(tmp_path / "source", tmp_path / "model")
    loading = LayerByLayer(checkpoint, on_demand=True)
    streamed = stream_model(loading)
    assert streamed.fallback is not None and "torch.float16 and config.json asks for torch.float32" in streamed.fallback
    assert not streamed.waits and hooks_of(streamed.model) == 0 and loading.done
    assert torch.equal(logits_of(streamed.model), logits_of(load_model(checkpoint)))


def test_a_tie_that_is_stored_twice_is_loaded_first(tmp_path: Path) -> None:
    model_of("Llama").save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source/config.json").read_text())
    (tmp_path / "source/config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    checkpoint = convert_checkpoint(tmp_path / "source", tmp_path / "model")
    streamed = stream_model(LayerByLayer(checkpoint, on_demand=True))
    assert streamed.fallback is not None and "stored twice" in streamed.fallback
    assert torch.equal(logits_of(streamed.model), logits_of(load_model(checkpoint)))


# --- loads that fail ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Llama", "GPT-2, untied"])
def test_a_load_that_fails_in_the_middle_fails_the_generation(checkpoint_of: Save, family: str) -> None:
    loading = LayerByLayer(checkpoint_of(family))
    streamed = stream_model(loading)
    engine = Engine(streamed.model)
    for layer in loading.layers[:3]:
        loading.deliver(layer)
    failed_at: list[float] = []

    def fail_later() -> None:
        time.sleep(0.05)
        failed_at.append(time.monotonic())
        loading.fail(LoadError("the disk has gone"))

    thread = in_background(fail_later)
    with pytest.raises(LoadError, match="the disk has gone"):
        engine.complete(PROMPT, max_new_tokens=8)
    assert time.monotonic() - failed_at[0] < 1
    thread.join()
    with pytest.raises(LoadError, match="the disk has gone"):  # and so does every later one
        engine.complete(PROMPT, max_new_tokens=8)
    assert all(parameter.is_meta for parameter in engine.model.parameters())
    with pytest.raises(LoadError, match="the disk has gone"):
        streamed.wait()


def test_a_real_load_that_fails_under_a_generation_leaves_no_thread_and_no_memory(checkpoint_of: Save) -> None:
    recorder = Faulty()
    loading = start_load(checkpoint_of("Llama"), options=LoadOptions(use_cached=False), recorder=recorder)
    engine = Engine(stream_model(loading).model)
    memory = weakref.ref(loading.tensors["model.norm.weight"])
    threading.Timer(0.05, recorder.now.set).start()
    with pytest.raises(LoadError, match="the disk has gone"):
        engine.complete(PROMPT, max_new_tokens=8)
    assert load_threads() == []
    assert all(parameter.is_meta for parameter in engine.model.parameters())
    gc.collect()
    assert memory() is None


def test_a_flipped_byte_of_the_last_layer_fails_the_generation_and_leaves_no_thread(tmp_path: Path) -> None:
    model_of("Llama").save_pretrained(tmp_path / "source")
    checkpoint = convert_checkpoint(tmp_path / "source", tmp_path / "model")
    last = checkpoint.index.tensors[-1]
    with (checkpoint.path / "data-00000.bin").open("r+b") as file:
        file.seek(last.offset)
        byte = file.read(1)
        file.seek(last.offset)
        file.write(bytes([byte[0] ^ 1]))
    corrupt = open_checkpoint(checkpoint.path)
    with pytest.raises(IntegrityError):  # so small a load may have failed before its model is made
        Engine.load(corrupt, overlap=True).complete(PROMPT, max_new_tokens=8)
    assert load_threads() == []


def test_a_cancelled_load_ends_a_waiting_generation_and_gives_memory_back(checkpoint_of: Save) -> None:
    loading = LayerByLayer(checkpoint_of("OPT"))
    streamed = stream_model(loading)
    loading.deliver("embedding")
    memory = weakref.ref(loading.base)
    found: list[BaseException] = []

    def run() -> None:
        try:
            Engine(streamed.model).complete(PROMPT, max_new_tokens=8)
        except SllmError as error:
            found.append(error)

    thread = in_background(run)
    while not loading.asked and thread.is_alive():
        time.sleep(0.001)
    streamed.cancel()
    thread.join(5)
    assert [type(error) for error in found] == [LoadCancelled]
    assert all(parameter.is_meta for parameter in streamed.model.parameters())
    del loading.base
    gc.collect()
    assert memory() is None


def test_cancelling_before_any_pass_gives_memory_back_and_after_the_load_does_nothing(checkpoint_of: Save) -> None:
    streamed = stream_model(LayerByLayer(checkpoint_of("Llama")))
    streamed.cancel()
    assert all(parameter.is_meta for parameter in streamed.model.parameters())
    with pytest.raises(LoadCancelled):
        logits_of(streamed.model)
    whole = stream_model(LayerByLayer(checkpoint_of("Llama"), on_demand=True))
    expected = logits_of(whole.model)
    whole.cancel()
    assert torch.equal(logits_of(whole.model), expected)


def test_a_model_that_is_dropped_while_it_loads_is_freed_at_once(checkpoint_of: Save) -> None:
    loading = LayerByLayer(checkpoint_of("Llama"))
    gc.disable()  # no cycle may hold a model of gigabytes until a collection
    try:
        streamed: StreamedModel | None = stream_model(loading)
        assert streamed is not None
        gone = weakref.ref(streamed.model)
        del streamed
        assert gone() is None
    finally:
        gc.enable()


def test_a_checkpoint_that_makes_no_model_fails_before_it_runs_and_leaves_no_thread(tmp_path: Path) -> None:
    model_of("Llama").save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source/config.json").read_text())
    (tmp_path / "source/config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    convert_checkpoint(tmp_path / "source", tmp_path / "model")
    with pytest.raises(ModelError, match="has shape"):
        Engine.load(tmp_path / "model", overlap=True)
    assert load_threads() == []


# --- the bench and its picture -----------------------------------------------------------------------------------------


LAYERS = (Layer("embedding", 40), Layer("model.layers.0", 20), Layer("model.layers.1", 30), Layer("head", 10))


def samples_of(**seconds: float) -> dict[Mode, dict[int, Sample]]:
    return {mode: {0: Sample(seconds[mode], seconds[mode], 7)} for mode in MODES}


def test_one_layer_is_the_larger_of_its_parts_of_the_load_and_of_the_prefill() -> None:
    assert one_layer_seconds(LAYERS, 10, 2) == pytest.approx(3)  # 30 of 100 bytes
    assert one_layer_seconds(LAYERS, 1, 8) == pytest.approx(4)  # one of two


def test_the_pipeline_waits_for_each_layers_bytes_and_for_the_layer_before() -> None:
    seconds = [0.0, 1.0, 1.0, 2.0]
    assert pipeline_seconds(LAYERS, seconds, 10, 0) == pytest.approx(10)
    assert pipeline_seconds(LAYERS, seconds, 10, 4) == pytest.approx(12)  # bytes are slower: all but the head is hidden
    assert pipeline_seconds(LAYERS, seconds, 1, 40) == pytest.approx(40.6)  # computing is slower: only until layer 0 is there
    assert pipeline_seconds(LAYERS, seconds, 0, 4) == pytest.approx(4)


def test_the_document_compares_within_a_round() -> None:
    series = Series(5, "asked for", [0.0, 1.0, 1.0, 2.0], samples_of(serial=14.0, overlapped=13.0, load=10.0, prefill=4.0))
    document = assemble([series], LAYERS, device="cpu", cores=2, facts={})
    (prompt,) = document["prompts"]
    assert prompt["target_seconds_median"] == pytest.approx(1.1 * 10 + 3) and prompt["ratio_to_target_median"] == pytest.approx(13 / 14)
    assert prompt["serial_over_overlapped_median"] == pytest.approx(14 / 13) and prompt["serial_over_sum_median"] == pytest.approx(1)
    assert prompt["ratio_to_pipeline_median"] == pytest.approx(13 / 12) and prompt["work_seconds_median"] == pytest.approx(7)
    assert {row["mode"]: row["ratio_to_limit"] for row in document["results"]} == {
        "serial": pytest.approx(10 / 14), "overlapped": pytest.approx(10 / 13), "load": None, "prefill": None
    }  # fmt: skip
    assert "work_seconds_median" not in assemble([series], LAYERS, device="cuda:0", cores=2, facts={})["prompts"][0]


def test_the_bench_measures_all_four_and_draws_two(checkpoint_of: Save, tmp_path: Path) -> None:
    checkpoint = checkpoint_of("Llama, tied")
    try:
        document, starts = measure_overlap(checkpoint.path, options=Options(rounds=2, tokens=(4, 9), threads=1))
    except UnsupportedError as error:
        pytest.skip(f"nothing can be cold here: {error}")
    saved = read_overlap(save_document(document, tmp_path / "overlap.json"))
    assert [(row["tokens"], row["mode"]) for row in saved["results"]] == [(count, mode) for count in (4, 9) for mode in MODES]
    assert all(len(row["samples"]) == 2 and row["nbytes"] == sum(layer["nbytes"] for layer in saved["layers"]) for row in saved["results"])
    assert saved["limits"].keys() == {"load_4_tokens_seconds", "prefill_4_tokens_seconds", "load_9_tokens_seconds", "prefill_9_tokens_seconds", "processor_count"}
    assert [start.mode for start in starts] == ["serial", "overlapped"]
    assert all(min(start.compute_seconds()) > 0 for start in starts)
    picture = described_overlap(starts, title="tiny")
    assert picture.png.startswith(b"\x89PNG") and "Run while loading: the last of the bytes of 6 layers" in picture.alt_text


def test_arrivals_follow_from_the_order_of_bytes() -> None:
    """Chunks of 60 and 40 bytes: the first ends within layer 1, whose last byte comes with the second."""
    spans = (Span("read", 1.0, 2.0, "disk", 60), Span("hash", 2.0, 2.5, "disk", 60), Span("read", 2.0, 3.0, "disk", 40), Span("hash", 3.0, 3.5, "disk", 40))
    start = Start("overlapped", LAYERS, spans)
    assert arrival_seconds(start) == [(1.0, 1.5), (1.0, 1.5), (2.0, 2.5), (2.0, 2.5)]


def test_a_file_that_is_no_such_document_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(FormatError, match="sllm-mini bench overlap --save"):
        read_overlap(tmp_path / "other.json")
