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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Run
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
)
from sllm_mini.inference import Engine, StreamedModel, next_runnable_layer, stream_model
from sllm_mini.inference import overlap as overlap_module
from sllm_mini.inference.overlap import COMPUTE_LANE, WAIT_LANE
from sllm_mini.lab.bench.document import read_document
from sllm_mini.lab.overlap import Start, described_overlap
from sllm_mini.lab.overlap.document import KIND, Series, assemble, one_layer_seconds, pipeline_seconds
from sllm_mini.lab.overlap.picture import arrival_seconds
from sllm_mini.lab.overlap.start import MODES, Layer, Mode, Sample, record_start
from sllm_mini.lab.overlap.steps import HandedOut
from sllm_mini.loading import LoadOptions, load_model, start_load
from sllm_mini.types import Span, SpanRecorder, Warmth

pytestmark = pytest.mark.usefixtures("one_torch_thread")
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


class LayerByLayer(HandedOut):
    """A load whose bytes come when the test says so, or with `on_demand` when the model waits for them; `asked` in that order."""

    def __init__(self, checkpoint: Checkpoint, *, on_demand: bool = False) -> None:
        super().__init__(checkpoint)
        self.on_demand = on_demand
        self.asked: list[str] = []

    def wait_for(self, name: str, timeout: float | None = None) -> bool:
        self.asked.append(name)
        if self.on_demand:
            self.deliver(name)
        return super().wait_for(name, timeout)


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

    def fail_later() -> None:
        assert loading.settle() == loading.layers[3]  # the generation waits for it, and it will never come
        loading.fail(LoadError("the disk has gone"))

    thread = in_background(fail_later)
    with pytest.raises(LoadError, match="the disk has gone"):
        engine.complete(PROMPT, max_new_tokens=8)
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
    memory = weakref.ref(loading._memory)
    found: list[BaseException] = []

    def run() -> None:
        try:
            Engine(streamed.model).complete(PROMPT, max_new_tokens=8)
        except SllmError as error:
            found.append(error)

    thread = in_background(run)
    assert loading.settle() == loading.layers[1]  # it waits
    streamed.cancel()
    thread.join(5)
    assert [type(error) for error in found] == [LoadCancelled]
    assert all(parameter.is_meta for parameter in streamed.model.parameters())
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


class Interrupted(LayerByLayer):
    """The user presses Ctrl-C, once, while the pass waits for its second layer."""

    pressed = False

    def wait_for(self, name: str, timeout: float | None = None) -> bool:
        if name == self.layers[1] and not self.pressed:
            self.pressed = True
            raise KeyboardInterrupt
        return super().wait_for(name, timeout)


def test_after_a_ctrl_c_the_load_can_be_cancelled_waited_for_and_run_again(checkpoint_of: Save) -> None:
    """Torch tells hooks of every Exception that ends a pass, and a KeyboardInterrupt is none."""
    checkpoint, recorder = checkpoint_of("Llama"), SpanRecorder()
    cancelled, waited, again = (stream_model(Interrupted(checkpoint, on_demand=True), recorder=recorder) for _ in range(3))
    for streamed in (cancelled, waited, again):
        with pytest.raises(KeyboardInterrupt):
            logits_of(streamed.model)
    cancelled.cancel()
    assert all(parameter.is_meta for parameter in cancelled.model.parameters())
    waited.wait()
    assert hooks_of(waited.model) == 0
    recorder.spans.clear()
    assert torch.equal(logits_of(again.model), logits_of(waited.model))
    assert [span.name for span in recorder.spans if span.lane == COMPUTE_LANE] == checkpoint.index.layers[1:]  # the first had run


class Shared(LayerByLayer):
    """A load that is for others too: cancelling gives up the tensors, and it goes on (see `storage.Attachment`)."""

    given_up = False

    def cancel(self) -> None:
        self.given_up = True

    def wait(self, timeout: float | None = None) -> Any:
        if timeout == 0 and not self.done:
            raise TimeoutError
        if self.given_up:
            raise LoadError("the tensors were given up")
        return super().wait(timeout)


def test_giving_up_a_model_does_not_wait_for_a_load_that_others_share(checkpoint_of: Save) -> None:
    loading = Shared(checkpoint_of("Llama"), on_demand=True)
    streamed = stream_model(loading)
    streamed.cancel()
    assert all(parameter.is_meta for parameter in streamed.model.parameters())
    assert loading.asked == []
    for layer in loading.layers:
        loading.deliver(layer)
    with pytest.raises(LoadCancelled):  # and not whatever torch says of weights that are not there
        logits_of(streamed.model)
    whole = stream_model(Shared(loading.checkpoint, on_demand=True))
    expected = logits_of(whole.model)
    whole.cancel()
    assert torch.equal(logits_of(whole.model), expected)


def test_a_load_that_fails_beside_a_pass_that_needs_no_more_of_it_gives_memory_back(checkpoint_of: Save) -> None:
    loading = LayerByLayer(checkpoint_of("Llama"), on_demand=True)
    streamed = stream_model(loading)
    decoder = streamed.model.model
    decoder.layers = decoder.layers[:2]
    streamed.model.lm_head.register_forward_hook(lambda *_: loading.fail(LoadError("the disk has gone")))
    with pytest.raises(LoadError, match="the disk has gone"):
        logits_of(streamed.model)
    assert all(parameter.is_meta for parameter in streamed.model.parameters())


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


def samples_of(*, built: float | None = None, **seconds: float) -> dict[Mode, dict[int, Sample]]:
    return {mode: {0: Sample(seconds[mode], seconds[mode], 7, built if mode == "overlapped" else None)} for mode in MODES}


def test_one_layer_is_the_larger_of_its_parts_of_the_load_and_of_the_prefill() -> None:
    assert one_layer_seconds(LAYERS, 10, 2) == pytest.approx(3)  # 30 of 100 bytes
    assert one_layer_seconds(LAYERS, 1, 8) == pytest.approx(4)  # one of two


def test_the_pipeline_waits_for_each_layers_bytes_and_for_the_layer_before() -> None:
    seconds = [0.0, 1.0, 1.0, 2.0]
    assert pipeline_seconds(LAYERS, seconds, 10, 0) == pytest.approx(10)
    assert pipeline_seconds(LAYERS, seconds, 10, 4) == pytest.approx(12)  # bytes are slower: all but the head is hidden
    assert pipeline_seconds(LAYERS, seconds, 1, 40) == pytest.approx(40.6)  # computing is slower: only until layer 0 is there
    assert pipeline_seconds(LAYERS, seconds, 0, 4) == pytest.approx(4)


def test_the_pipeline_begins_with_the_later_of_the_module_and_the_first_bytes() -> None:
    seconds = [1.0, 1.0, 1.0, 1.0]  # the embedding's bytes are there after 4
    assert pipeline_seconds(LAYERS, seconds, 10, 40, built=3) == pipeline_seconds(LAYERS, seconds, 10, 40) == pytest.approx(44)
    assert pipeline_seconds(LAYERS, seconds, 10, 40, built=5) == pytest.approx(45)
    assert pipeline_seconds(LAYERS, seconds, 10, 4, built=5) == pytest.approx(11)  # it has caught up with the bytes before the last of them


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
    assert "built_seconds_median" not in prompt  # it was not measured
    late = Series(5, "asked for", [0.0, 1.0, 1.0, 2.0], samples_of(serial=14.0, overlapped=13.0, load=10.0, prefill=4.0, built=9.0))
    (prompt,) = assemble([late], LAYERS, device="cpu", cores=2, facts={})["prompts"]
    assert prompt["built_seconds_median"] == 9.0 and prompt["ratio_to_pipeline_median"] == pytest.approx(1)  # 9 and 4 of prefill


def test_the_command_measures_all_four_prints_saves_and_draws(checkpoint_of: Save, tmp_path: Path, run: Run) -> None:
    saved, picture = tmp_path / "overlap.json", tmp_path / "overlap.png"
    lengths = ("--tokens", 4, "--tokens", 9)
    ended = run("bench", "overlap", checkpoint_of("Llama, tied").path, "--rounds", 2, *lengths, "--threads", 1, "--save", saved, "--picture", picture)
    if ended.code and "cold" in ended.err:
        pytest.skip(f"nothing can be cold here: {ended.err}")
    assert not ended.code, ended.err
    document = read_document(saved, KIND)
    assert [(row["tokens"], row["mode"]) for row in document["results"]] == [(count, mode) for count in (4, 9) for mode in MODES]
    assert all(len(row["samples"]) == 2 and row["nbytes"] == sum(layer["nbytes"] for layer in document["layers"]) for row in document["results"])
    named = {f"{mode}_{count}_tokens_seconds" for mode in ("load", "prefill") for count in (4, 9)}
    assert document["limits"].keys() == named | {"processor_count"}
    for prompt in document["prompts"]:
        overlapped = next(row["samples"] for row in document["results"] if (row["tokens"], row["mode"]) == (prompt["tokens"], "overlapped"))
        assert all(0 < built < first for built, first in zip(prompt["built_seconds_samples"], overlapped, strict=True))
        assert all(built < pipeline for built, pipeline in zip(prompt["built_seconds_samples"], prompt["pipeline_seconds_samples"], strict=True))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert all(f"A prompt of {count} tokens (asked for)" in ended.out for count in (4, 9)) and ended.out.count("first token over the target") == 2


def test_two_recorded_starts_are_drawn_one_above_the_other(checkpoint_of: Save) -> None:
    starts = [record_start(checkpoint_of("Llama, tied"), mode, PROMPT) for mode in MODES[:2]]
    assert all(min(start.compute_seconds()) > 0 and 0 < start.built_seconds < start.seconds for start in starts)
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
        read_document(tmp_path / "other.json", KIND)
