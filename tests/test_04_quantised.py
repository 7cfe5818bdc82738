"""Checkpoints saved in int8 or fp8 come back bit for bit, and load with no step through full precision. Chapter 04.

Oracles: torchao's own tensors, the model that was saved, and transformers' `from_pretrained` of the same directory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from sllm_mini.checkpoint import (
    convert_checkpoint,
    export_safetensors,
    open_checkpoint,
    quantised,
    save_checkpoint,
    verify_checkpoint,
)
from sllm_mini.checkpoint.composite import flatten_composite, restore_composite
from sllm_mini.checkpoint.index import CompositeEntry
from sllm_mini.errors import FormatError, ModelError, SllmError, UnsupportedError
from sllm_mini.inference import Engine
from sllm_mini.inference.lora import Adapters
from sllm_mini.loading import load_model, load_tensors

pytest.importorskip("torchao", reason="torchao, whose tensors these tests save, is not on the path; make test runs this file again with it")

pytestmark = pytest.mark.usefixtures("one_torch_thread")
IDS = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
LLAMA = SHAPE | {"intermediate_size": 48, "num_key_value_heads": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", LLAMA),
    "Llama, tied": ("LlamaForCausalLM", LLAMA | {"tie_word_embeddings": True}),
    "Qwen2": ("Qwen2ForCausalLM", LLAMA),
    "OPT": ("OPTForCausalLM", SHAPE | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "GPTNeoX": ("GPTNeoXForCausalLM", SHAPE | {"intermediate_size": 48}),
}
TOKENS = torch.arange(3, 20)[None]
METHODS = ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig")


def base_of(family: str, **changes: Any) -> Any:
    import transformers

    kind, settings = FAMILIES[family]
    torch.manual_seed(5)
    config = getattr(transformers, kind.replace("ForCausalLM", "Config"))(**(IDS | settings | {"dtype": "bfloat16"} | changes))
    model = getattr(transformers, kind)(config).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter, dtype=torch.float32).mul_(0.3).to(config.dtype)  # buffers stay as wide as they are
    return model


def quantise(model: Any, method: str = "Int8WeightOnlyConfig", **settings: Any) -> Any:
    """The same model, every linear layer's weight int8 or fp8."""
    import torchao.quantization

    torchao.quantization.quantize_(model, getattr(torchao.quantization, method)(**settings))
    return model


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS).logits


def parts_of(tensor: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    names, attributes = tensor.__tensor_flatten__()
    return {name: getattr(tensor, name) for name in names}, attributes


def assert_same_tensor(found: Any, expected: Any) -> None:
    assert type(found) is type(expected) and found.dtype == expected.dtype and found.shape == expected.shape
    (ours, our_attributes), (theirs, their_attributes) = parts_of(found), parts_of(expected)
    assert ours.keys() == theirs.keys() and our_attributes == their_attributes
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype and ours[name].shape == theirs[name].shape
        assert torch.equal(ours[name].contiguous().view(torch.uint8), theirs[name].contiguous().view(torch.uint8)), name


# --- bit for bit -------------------------------------------------------------------------------------------------


def weights() -> dict[str, Any]:
    """Weights of every form that torchao 0.18 makes int8 or fp8 on a CPU."""
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        PerGroup,
        PerTensor,
        quantize_,
    )

    configs = {
        "int8": Int8WeightOnlyConfig(),
        "int8 in groups": Int8WeightOnlyConfig(granularity=PerGroup(32)),
        "int8 of one scale": Int8WeightOnlyConfig(granularity=PerTensor()),
        "int8 with int8 activations": Int8DynamicActivationInt8WeightConfig(),
        "fp8": Float8WeightOnlyConfig(),
        "fp8 e5m2": Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2),
    }
    made = {}
    for name, config in configs.items():
        torch.manual_seed(3)
        layer = torch.nn.Linear(64, 48, dtype=torch.bfloat16)
        quantize_(layer, config)
        made[f"{name}.weight"] = layer.weight.detach()
    return made


def test_every_form_of_weight_comes_back_bit_for_bit(tmp_path: Path) -> None:
    saved = weights()
    saved["bare"] = saved["fp8.weight"]
    checkpoint = save_checkpoint(saved | {"plain": torch.ones(3)}, tmp_path / "c")
    verify_checkpoint(checkpoint)
    found = load_tensors(tmp_path / "c")
    assert found.keys() == saved.keys() | {"plain"}
    for name, expected in saved.items():
        assert_same_tensor(found[name], expected)
        assert torch.equal(found[name].dequantize(), expected.dequantize()), name
    only = load_tensors(tmp_path / "c", names=["fp8.weight"])
    assert_same_tensor(only["fp8.weight"], saved["fp8.weight"])


def test_an_int8_weight_with_a_scale_per_row_needs_no_library(tmp_path: Path) -> None:
    """As bitsandbytes stores them: two plain tensors."""
    generator = torch.Generator().manual_seed(0)
    saved = {"layer.weight": torch.randint(-127, 128, (48, 64), dtype=torch.int8, generator=generator), "layer.SCB": torch.rand(48, generator=generator)}
    save_checkpoint(saved, tmp_path / "c")
    found = load_tensors(tmp_path / "c")
    assert all(found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in saved.items())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_computes_what_it_computed(family: str, method: str, tmp_path: Path) -> None:
    model = quantise(base_of(family), method)
    checkpoint = save_checkpoint(model, tmp_path / "c")
    assert any(composite.name.startswith("lm_head") or composite.name.startswith("embed_out") for composite in checkpoint.index.composites)
    found = load_model(tmp_path / "c")
    assert torch.equal(logits_of(found), logits_of(model))
    ours, theirs = dict(found.named_parameters()), dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if hasattr(value, "__tensor_flatten__"):
            assert_same_tensor(ours[name], value)
        else:
            assert torch.equal(ours[name], value)
    # One allocation: the parts are views into what was loaded.
    held = [part for value in ours.values() for part in (parts_of(value)[0].values() if hasattr(value, "__tensor_flatten__") else [value])]
    assert {part.untyped_storage().data_ptr() for part in held} == {held[0].untyped_storage().data_ptr()}
    assert held[0].untyped_storage().nbytes() == checkpoint.nbytes


@pytest.mark.parametrize("method", METHODS)
def test_an_engine_generates_what_transformers_generates_with_it(method: str, tmp_path: Path) -> None:
    model = quantise(base_of("Llama"), method)
    save_checkpoint(model, tmp_path / "c")
    expected = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=10, do_sample=False, eos_token_id=None)[0, 3:].tolist()
    engine = Engine.load(tmp_path / "c")
    assert list(engine.complete([5, 6, 7], max_new_tokens=10, stop_at_eos=False).token_ids) == expected


def test_an_adapter_fits_a_quantised_base(tmp_path: Path) -> None:
    model = quantise(base_of("Llama"))
    plain = logits_of(model)
    generator = torch.Generator().manual_seed(1)
    name = "model.layers.1.mlp.up_proj"
    a, b = torch.randn(4, 32, generator=generator), torch.randn(48, 4, generator=generator)
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file({f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": [name]}))
    adapters = Adapters(model)
    adapters.load("a", folder)
    adapters.use("a")
    layer, x = model.get_submodule(name), torch.randn(2, 5, 32, generator=generator).bfloat16()
    with torch.inference_mode():
        given = layer(x)
        adapters.use(None)
        expected = (layer(x) + (x.float() @ a.T @ b.T) * 2.0).bfloat16()
    assert torch.equal(given, expected)
    assert torch.equal(logits_of(model), plain)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_a_model_loaded_to_a_gpu_computes_what_it_computed_there(method: str, tmp_path: Path) -> None:
    model = quantise(base_of("Llama"), method)
    save_checkpoint(model, tmp_path / "c")
    found = load_model(tmp_path / "c", "cuda")
    assert all(parameter.is_cuda for parameter in found.parameters())
    with torch.inference_mode():
        assert torch.equal(found(TOKENS.cuda()).logits, model.to("cuda")(TOKENS.cuda()).logits)


# --- no step through full precision ------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Notes what is computed on quantised weights, and every operation that gives a real float tensor of such a shape."""

    def __init__(self, shapes: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes, self.on_weights, self.floats = shapes, set[str](), set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(hasattr(value, "__tensor_flatten__") for value in args):
            self.on_weights.add(func._opname)
        elif isinstance(result, torch.Tensor) and not result.is_meta and result.is_floating_point() and result.itemsize > 1 and tuple(result.shape) in self.shapes:
            self.floats.add(func._opname)
        return result


@pytest.mark.parametrize("method", METHODS)
def test_no_operation_makes_a_weight_in_full_precision(method: str, tmp_path: Path) -> None:
    model = quantise(base_of("Llama", vocab_size=97), method)
    save_checkpoint(model, tmp_path / "c")
    shapes = {tuple(value.shape) for value in model.parameters() if hasattr(value, "__tensor_flatten__")}
    assert len(shapes) > 3
    with Watch(shapes - {tuple(model.model.embed_tokens.weight.shape)}) as watch:
        found = load_model(tmp_path / "c")
    assert watch.on_weights <= {"detach", "alias"}, "a quantised weight is wrapped and put into its place, nothing else"
    # A Linear asks for memory before its weight can move to the meta device; nothing is ever written to it.
    assert watch.floats <= {"empty", "detach"}
    with Watch(shapes) as watch:
        found.model.layers[0].mlp.up_proj.weight.dequantize()
        found.model.layers[0].mlp.up_proj.weight.to(torch.float32)
    assert not watch.on_weights | watch.floats <= {"empty", "detach", "alias"}, "the watch sees such a step"


MEASURE = """
import sys
from sllm_mini.inference import Engine
from sllm_mini.lab.counters import counted
from sllm_mini.loading import load_model
load_model(sys.argv[1])  # whatever imports
with counted() as counters:
    engine = Engine(load_model(sys.argv[2]))
print(counters.peak_nbytes)
"""


def test_peak_memory_is_that_of_the_quantised_bytes(tmp_path: Path) -> None:
    """Half precision of the same weights would take twice as much, full precision four times."""
    save_checkpoint(quantise(base_of("Llama")), tmp_path / "small")
    wide = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8}
    checkpoint = save_checkpoint(quantise(base_of("Llama", **wide)), tmp_path / "wide")
    in_int8 = sum(tensor.nbytes for tensor in checkpoint.index.tensors if tensor.dtype == "int8")
    assert in_int8 > 0.95 * checkpoint.nbytes > 40e6
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "wide")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout.split()[-1])
    print(f"peak memory grew by {grown / checkpoint.nbytes:.2f} of the checkpoint's {checkpoint.nbytes:,} bytes")
    assert 0.5 * checkpoint.nbytes < grown < 1.25 * checkpoint.nbytes


# --- Hugging Face directories ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """As transformers writes quantised models: safetensors with the parts of each weight, described in the metadata."""
    import torchao.quantization
    import transformers

    folder = tmp_path_factory.mktemp("hf")
    base_of("Llama").save_pretrained(folder / "plain")
    found = {"plain": folder / "plain"}
    for method in METHODS:
        config = transformers.TorchAoConfig(getattr(torchao.quantization, method)())
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "plain", quantization_config=config)
        for shards in ("one file", "shards"):
            found[f"{method}, {shards}"] = folder / f"{method}-{shards[:3]}"
            model.save_pretrained(found[f"{method}, {shards}"], max_shard_size="5GB" if shards == "one file" else "10KB")
    return found


@pytest.mark.parametrize("shards", ["one file", "shards"])
@pytest.mark.parametrize("method", METHODS)
def test_a_converted_directory_is_from_pretraineds_model(directories: dict[str, Path], method: str, shards: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    origin = directories[f"{method}, {shards}"]
    assert (len(list(origin.glob("*.safetensors"))) > 2) == (shards == "shards")
    expected = AutoModelForCausalLM.from_pretrained(origin)
    checkpoint = convert_checkpoint(origin, tmp_path / "c")
    assert len(checkpoint.index.composites) == 14
    found = load_model(checkpoint)
    assert torch.equal(logits_of(found), logits_of(expected))
    save_checkpoint(expected, tmp_path / "live")  # its configuration names the method, too
    assert torch.equal(logits_of(load_model(tmp_path / "live")), logits_of(expected))
    for source in ("c", "live"):
        export_safetensors(tmp_path / source, tmp_path / f"{source}-back", max_shard_nbytes=20_000)
        assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / f"{source}-back")), logits_of(expected))


def test_conversion_and_verification_need_no_torchao(directories: dict[str, Path], tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["torchao"] = sys.modules["torch"] = sys.modules["transformers"] = None
from sllm_mini.checkpoint import convert_checkpoint, verify_checkpoint
verify_checkpoint(convert_checkpoint({str(directories["Int8WeightOnlyConfig, one file"])!r}, {str(tmp_path / "c")!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def rewritten(origin: Path, folder: Path, *, metadata: Mapping[str, str | None] | None = None, **config: Any) -> Path:
    """A copy of a directory with other metadata in its weights and other fields in its configuration."""
    folder.mkdir()
    with safe_open(origin / "model.safetensors", "pt") as file:
        texts = {**(file.metadata() or {}), **(metadata or {})}
    save_file(load_file(origin / "model.safetensors"), folder / "model.safetensors", {key: value for key, value in texts.items() if value is not None})
    (folder / "config.json").write_text(json.dumps(json.loads((origin / "config.json").read_text()) | config))
    return folder


def test_a_directory_whose_metadata_does_not_fit_is_refused(directories: dict[str, Path], tmp_path: Path) -> None:
    origin = directories["Int8WeightOnlyConfig, one file"]
    name = "model.layers.0.mlp.up_proj.weight"
    with safe_open(origin / "model.safetensors", "pt") as file:
        text = file.metadata()[name]
    cases = {
        "lost": (None, "that the file's metadata does not describe"),
        "garbled": ("{", "that the file's metadata does not describe"),
        "other": (text.replace("Int8Tensor", "Int4Tensor"), "is a Int4Tensor of torchao; only Int8Tensor and Float8Tensor"),
        "more": (text.replace('"scale"', '"scale", "bias"'), "_weight_bias', which no file holds"),
    }
    for case, (changed, message) in cases.items():
        with pytest.raises(SllmError, match=message):
            convert_checkpoint(rewritten(origin, tmp_path / case, metadata={name: changed}), tmp_path / f"{case}.sllm")
        assert not (tmp_path / f"{case}.sllm").exists()


# --- what is refused ---------------------------------------------------------------------------------------------


def changed(entry: CompositeEntry, **fields: Any) -> CompositeEntry:
    description = json.loads(str(entry.meta[quantised.DESCRIPTION]))
    for path, value in fields.items():
        if path in ("_type", "_tensor_data_names"):
            description[path] = value
        else:
            description["_data"][path] = value
    return CompositeEntry(name=entry.name, kind=entry.kind, parts=entry.parts, meta={quantised.DESCRIPTION: json.dumps(description)})


def test_a_description_that_does_not_fit_is_refused() -> None:
    """It comes from a file: it may name no code, and describe nothing that torchao would trip over later."""
    entry, parts = flatten_composite("fp8.weight", weights()["fp8.weight"])
    short = {part: parts[full] for part, full in entry.parts.items()}
    path = Path("c")
    restore_composite(entry, short, path)
    described = {
        "another class": changed(entry, _type="Int8Tensor"),
        "other parts": changed(entry, _tensor_data_names=["qdata"]),
        "no dtype": changed(entry, dtype={"_type": "torch.dtype", "_data": "load"}),
        "a method": changed(entry, kernel_preference={"_type": "KernelPreference", "_data": "__class__"}),
        "a class": changed(entry, act_quant_kwargs={"_type": "os.system", "_data": {"command": "true"}}),
        "a nested dtype": changed(
            entry, act_quant_kwargs={"_type": "QuantizeTensorToFloat8Kwargs", "_data": {"float8_dtype": {"_type": "torch.dtype", "_data": "hub"}}}
        ),
        "other blocks": changed(entry, block_size=[1, 5]),
        "blocks of nothing": changed(entry, block_size=[1, 0]),
        "too few blocks": changed(entry, block_size=[64]),
        "not JSON": CompositeEntry(name=entry.name, kind=entry.kind, parts=entry.parts, meta={quantised.DESCRIPTION: "{"}),
        "no description": CompositeEntry(name=entry.name, kind=entry.kind, parts=entry.parts, meta={}),
    }
    for case, wrong in described.items():
        with pytest.raises(FormatError, match=r"composite 'fp8\.weight' cannot be built"):
            restore_composite(wrong, short, path)
            pytest.fail(case)
    with pytest.raises(FormatError, match="its scales have the shape"):
        restore_composite(entry, {**short, "scale": short["scale"][:5]}, path)


def test_without_torchao_nothing_is_read_and_one_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(quantise(base_of("Llama")), tmp_path / "c")
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    for load in (load_model, load_tensors):
        with pytest.raises(UnsupportedError, match=r"install it with: pip install torchao$"):
            load(tmp_path / "c")
    assert len(open_checkpoint(tmp_path / "c").index.composites) == 15
    parts = load_tensors(tmp_path / "c", names=["model.norm.weight"])
    assert parts["model.norm.weight"].dtype == torch.bfloat16


def test_converting_says_that_loading_needs_torchao(directories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    said = "need torchao to be loaded; install it with: pip install torchao"
    assert said not in run("convert", directories["Int8WeightOnlyConfig, one file"], tmp_path / "a").out
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    assert said in run("convert", directories["Int8WeightOnlyConfig, one file"], tmp_path / "b").out
    assert said not in run("convert", directories["plain"], tmp_path / "c").out


def test_a_configuration_that_asks_for_more_than_the_weights_are_is_refused(directories: dict[str, Path], tmp_path: Path) -> None:
    quantised_config = json.loads((directories["Int8WeightOnlyConfig, one file"] / "config.json").read_text())["quantization_config"]
    cases: dict[str, tuple[str, dict[str, Any], str]] = {
        "plain weights": ("plain", {"quantization_config": quantised_config}, "holds none of its tensors; convert the model again"),
        "another method": ("plain", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "of another kind than torchao's"),
        "another dtype": ("Int8WeightOnlyConfig, one file", {"dtype": "float32"}, "computes in torch.bfloat16 but config.json asks for torch.float32"),
    }
    for case, (origin, config, message) in cases.items():
        convert_checkpoint(rewritten(directories[origin], tmp_path / case, **config), tmp_path / f"{case}.sllm")
        with pytest.raises(ModelError, match=message):
            load_model(tmp_path / f"{case}.sllm")
        assert load_tensors(tmp_path / f"{case}.sllm")
