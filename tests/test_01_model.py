"""Chapter 01: a filled model is `from_pretrained`'s model, and a converted directory holds its tensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from sllm_mini.checkpoint import convert_checkpoint, export_safetensors, open_checkpoint, save_checkpoint
from sllm_mini.errors import CheckpointError, IntegrityError, ModelError
from sllm_mini.loading import load_model, load_tensors
from sllm_mini.types import SpanRecorder

SHAPE = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA = {**SHAPE, "intermediate_size": 96, "num_key_value_heads": 2}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama-tied-bf16": LlamaConfig(**LLAMA, dtype="bfloat16", tie_word_embeddings=True),
    "llama-rope-scaled": LlamaConfig(
        **LLAMA,
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "gpt2": GPT2Config(vocab_size=320, n_embd=64, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2),
    "opt-fp16": OPTConfig(vocab_size=320, hidden_size=64, ffn_dim=96, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=32, dtype="float16"),
    "qwen2": Qwen2Config(**LLAMA),
    "mistral": MistralConfig(**LLAMA, sliding_window=16),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        folders[name] = tmp_path_factory.mktemp("hf") / name
        model.save_pretrained(folders[name], max_shard_size="100KB" if name == "qwen2" else "5GB")
    return folders


def assert_same_model(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    ids = torch.arange(3, 60)[None]
    with torch.inference_mode():
        assert torch.equal(found(ids).logits, expected(ids).logits)
    ours, theirs = dict(found.named_parameters()), dict(expected.named_parameters())
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]), name
    ours, theirs = dict(found.named_buffers()), dict(expected.named_buffers())
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("origin", ["converted", "saved live"])
def test_a_loaded_model_is_that_of_from_pretrained(directories: dict[str, Path], tmp_path: Path, name: str, origin: str) -> None:
    expected = AutoModelForCausalLM.from_pretrained(directories[name])
    if origin == "converted":
        convert_checkpoint(directories[name], tmp_path / "c")
    else:
        save_checkpoint(expected, tmp_path / "c")
    found = load_model(tmp_path / "c")
    assert_same_model(found, expected)
    assert type(found) is type(expected) and not found.training
    assert found.generation_config == expected.generation_config
    if expected.config.tie_word_embeddings:
        assert found.get_output_embeddings().weight is found.get_input_embeddings().weight


def test_parameters_are_the_loaded_bytes_without_a_second_copy(directories: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = convert_checkpoint(directories["llama-tied-bf16"], tmp_path / "c")
    model = load_model(tmp_path / "c")
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert len(storages) == 1
    assert next(model.parameters()).untyped_storage().nbytes() == checkpoint.nbytes


def test_a_sharded_directory_converts_to_the_same_tensors(directories: dict[str, Path], tmp_path: Path) -> None:
    files = sorted(directories["qwen2"].glob("*.safetensors"))
    assert len(files) > 2
    convert_checkpoint(directories["qwen2"], tmp_path / "c")
    expected = {name: tensor for file in files for name, tensor in load_file(file).items()}
    found = load_tensors(tmp_path / "c")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)
    (single,) = export_safetensors(tmp_path / "c", tmp_path / "back")
    again = load_file(single)
    assert again.keys() == expected.keys() and all(torch.equal(again[name], expected[name]) for name in again)
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path / "back"), AutoModelForCausalLM.from_pretrained(directories["qwen2"]))


def test_small_files_come_along_and_code_does_not(directories: dict[str, Path], tmp_path: Path) -> None:
    origin = shutil.copytree(directories["gpt2"], tmp_path / "hf")
    for name in ("tokenizer.json", "vocab.txt", "chat_template.jinja", "LICENSE.txt", "modeling_evil.py", "notes.md", "model.onnx"):
        (origin / name).write_text("x")
    checkpoint = convert_checkpoint(origin, tmp_path / "c")
    carried = {companion.file for companion in checkpoint.index.companions}
    assert carried == {"config.json", "generation_config.json", "tokenizer.json", "vocab.txt", "chat_template.jinja", "LICENSE.txt"}
    assert (tmp_path / "c" / "vocab.txt").read_text() == "x"


def test_a_bare_model_without_prefix_still_fits(directories: dict[str, Path], tmp_path: Path) -> None:
    origin = shutil.copytree(directories["gpt2"], tmp_path / "hf")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(origin / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)  # a mask that old files carry and the model ignores
    save_file(tensors, origin / "model.safetensors", {"format": "pt"})
    convert_checkpoint(origin, tmp_path / "c")
    assert_same_model(load_model(tmp_path / "c"), AutoModelForCausalLM.from_pretrained(directories["gpt2"]))


def test_tensors_that_do_not_fit_the_model_are_named(directories: dict[str, Path], tmp_path: Path) -> None:
    origin = shutil.copytree(directories["llama-tied-bf16"], tmp_path / "hf")
    tensors = load_file(origin / "model.safetensors")
    lost = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, origin / "model.safetensors")
    convert_checkpoint(origin, tmp_path / "missing")
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(tmp_path / "missing")
    save_file({**tensors, "model.layers.1.mlp.up_proj.weight": lost[:-1].contiguous()}, origin / "model.safetensors")
    convert_checkpoint(origin, tmp_path / "shape")
    with pytest.raises(ModelError, match="shape"):
        load_model(tmp_path / "shape")
    save_file({**tensors, "model.layers.1.mlp.up_proj.weight": lost, "surplus": lost.clone()}, origin / "model.safetensors")
    convert_checkpoint(origin, tmp_path / "surplus")
    with pytest.warns(UserWarning, match="surplus"):
        load_model(tmp_path / "surplus")


def test_a_checkpoint_without_a_usable_configuration_is_refused(directories: dict[str, Path], tmp_path: Path) -> None:
    save_checkpoint({"x": torch.ones(2)}, tmp_path / "bare")
    with pytest.raises(ModelError, match=r"config\.json"):
        load_model(tmp_path / "bare")
    for change in ({"model_type": "no-such-model"}, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, {"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}):
        origin = shutil.copytree(directories["gpt2"], tmp_path / "hf", dirs_exist_ok=True)
        config = json.loads((directories["gpt2"] / "config.json").read_text()) | change
        (origin / "config.json").write_text(json.dumps(config))
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        convert_checkpoint(origin, tmp_path / "c")
        with pytest.raises(ModelError):
            load_model(tmp_path / "c")


def test_a_damaged_configuration_is_found_before_it_is_believed(directories: dict[str, Path], tmp_path: Path) -> None:
    convert_checkpoint(directories["gpt2"], tmp_path / "c")
    config = (tmp_path / "c" / "config.json").read_bytes()
    (tmp_path / "c" / "config.json").write_bytes(config.replace(b'"n_layer": 3', b'"n_layer": 2'))
    assert open_checkpoint(tmp_path / "c").nbytes > 0
    with pytest.raises(IntegrityError, match=r"config\.json"):
        load_model(tmp_path / "c")


def test_the_skeleton_is_built_while_bytes_are_read(directories: dict[str, Path], tmp_path: Path) -> None:
    convert_checkpoint(directories["gpt2"], tmp_path / "c")
    recorder = SpanRecorder()
    load_model(tmp_path / "c", recorder=recorder)
    spans = {(span.lane, span.name): span for span in recorder.spans}
    loader, skeleton = spans["loader", "bytes"], spans["main", "skeleton"]
    assert loader.start <= skeleton.start < spans["main", "fill"].start
    assert loader.nbytes == open_checkpoint(tmp_path / "c").nbytes


def test_building_a_skeleton_leaves_torch_as_it_was(directories: dict[str, Path], tmp_path: Path) -> None:
    register, dtype = torch.nn.Module.register_parameter, torch.get_default_dtype()
    convert_checkpoint(directories["opt-fp16"], tmp_path / "c")
    load_model(tmp_path / "c")
    assert torch.nn.Module.register_parameter is register and torch.get_default_dtype() == dtype
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"


@pytest.mark.parametrize("name", ["tokenizer.json", "added_tokens.json", "model.safetensors", "modeling_evil.py"])
def test_a_file_that_no_hash_covers_is_not_believed(directories: dict[str, Path], tmp_path: Path, name: str) -> None:
    convert_checkpoint(directories["gpt2"], tmp_path / "c")
    (tmp_path / "c" / name).write_text("{}")
    with pytest.raises(IntegrityError, match="not listed") as caught:
        open_checkpoint(tmp_path / "c")
    assert name in str(caught.value)


def test_a_pickle_is_refused_as_a_file_too(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02" * 100)
    with pytest.raises(CheckpointError, match="pickles"):
        convert_checkpoint(tmp_path / "pytorch_model.bin", tmp_path / "c")
