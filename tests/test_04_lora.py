"""LoRA adapters on a resident base: exactness, swapping, refusals. Chapter 04.

The oracle is PEFT itself: the same base, wrapped by it, with the adapter that it wrote.
"""

from __future__ import annotations

import gc
import json
import math
import shutil
import statistics
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sllm_mini.checkpoint import convert_checkpoint, save_checkpoint
from sllm_mini.errors import FormatError, IntegrityError, ModelError, SllmError
from sllm_mini.inference import Engine
from sllm_mini.inference.lora import Adapters
from sllm_mini.loading import load_model

pytestmark = pytest.mark.usefixtures("one_torch_thread")
IDS = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64}
FAMILIES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "Llama": ("LlamaForCausalLM", SHAPE | {"intermediate_size": 48, "num_key_value_heads": 2}, ["q_proj", "v_proj", "down_proj", "lm_head"]),
    "Qwen2": ("Qwen2ForCausalLM", SHAPE | {"intermediate_size": 48, "num_key_value_heads": 2}, ["k_proj", "o_proj", "gate_proj"]),
    "GPT2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}, ["c_attn", "c_proj", "c_fc"]),
    "OPT": ("OPTForCausalLM", SHAPE | {"ffn_dim": 48, "word_embed_proj_dim": 32}, ["q_proj", "v_proj", "fc1"]),
    "GPTNeoX": ("GPTNeoXForCausalLM", SHAPE | {"intermediate_size": 48}, ["query_key_value", "dense_4h_to_h"]),
}
TOKENS = torch.arange(3, 20)[None]


def base_of(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    import transformers

    kind, settings, _ = FAMILIES[family]
    torch.manual_seed(5)
    config = getattr(transformers, f"{family}Config")(**(IDS | settings | changes))
    model = getattr(transformers, kind)(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


def peft() -> Any:
    return pytest.importorskip("peft", reason="PEFT, the oracle of this test, is not on the path; make test runs this file again with it")


def make_adapter(folder: Path, family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """An adapter whose B is not zero, as PEFT saves one after training."""
    wanted = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.5, "target_modules": FAMILIES[family][2], "fan_in_fan_out": family == "GPT2"} | settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft().get_peft_model(base_of(family), peft().LoraConfig(**wanted), autocast_adapter_dtype=False)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.data = torch.empty_like(parameter).normal_(std=0.2, generator=generator).to(dtype)
        wrapped.save_pretrained(folder, save_embedding_layers=False)
    return folder


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS).logits


def by_peft(family: str, folder: Path, dtype: torch.dtype = torch.float32, *, widen: bool = False) -> torch.Tensor:
    """PEFT's logits. It makes an adapter's weights as wide as the base's; with `widen`, its default, at least float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft().PeftModel.from_pretrained(base_of(family, dtype), folder, autocast_adapter_dtype=widen)
    return logits_of(wrapped.eval())


# --- the same as PEFT --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", ["as PEFT wrote it", "converted"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_pefts_to_the_last_bit_and_the_bases_again_after_it(family: str, origin: str, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", family)
    save_checkpoint(base_of(family), tmp_path / "base")
    base = load_model(tmp_path / "base")
    if origin == "converted":
        convert_checkpoint(folder, tmp_path / "converted")
    adapters = Adapters(base)
    plain = logits_of(base)
    loaded = adapters.load("a", tmp_path / "converted" if origin == "converted" else folder)
    assert loaded.nbytes == sum(tensor.nbytes for tensor in load_file(folder / "adapter_model.safetensors").values())
    assert adapters.active is None and torch.equal(logits_of(base), plain)
    adapters.use("a")
    expected = by_peft(family, folder)
    assert not torch.allclose(expected, plain, atol=1e-2)
    assert torch.equal(logits_of(base), expected)
    adapters.use(None)
    assert torch.equal(logits_of(base), plain) and torch.equal(plain, logits_of(base_of(family)))


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"r": 1, "lora_alpha": 1},
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 7}, "alpha_pattern": {"v_proj": 3}},
        {"target_modules": "all-linear"},
        {"target_modules": r".*layers\.[02]\..*(q|o)_proj"},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.1\..*"},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": ["model.layers.0.mlp.up_proj"]},
        {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_scaling_and_targets_mean_what_they_mean_to_peft(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", "Llama", **settings)
    base = base_of("Llama")
    adapters = Adapters(base)
    adapters.load("a", folder)
    adapters.use("a")
    assert torch.equal(logits_of(base), by_peft("Llama", folder))


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16], ids=str)
def test_a_half_precision_base_computes_as_peft_does(held: torch.dtype, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", "Llama", dtype=held)
    base = base_of("Llama", torch.bfloat16)
    adapters = Adapters(base)
    adapters.load("a", folder)
    adapters.use("a")
    assert torch.equal(logits_of(base), by_peft("Llama", folder, torch.bfloat16, widen=held == torch.float32))


# --- many adapters beside one base -------------------------------------------------------------------------------


def test_swapping_among_adapters_neither_copies_nor_changes_the_base(tmp_path: Path) -> None:
    folders = {name: make_adapter(tmp_path / name, "Qwen2", seed=seed) for seed, name in enumerate("abc")}
    base = base_of("Qwen2")
    before = {name: (value.data_ptr(), value._version, value.clone()) for name, value in base.named_parameters()}
    names = set(base.state_dict())
    adapters = Adapters(base)
    for name, folder in folders.items():
        adapters.load(name, folder)
    assert adapters.resident.keys() == folders.keys()
    expected: dict[str | None, torch.Tensor] = {None: logits_of(base_of("Qwen2"))}
    expected.update({name: by_peft("Qwen2", folder) for name, folder in folders.items()})
    swaps: tuple[str | None, ...] = ("a", "b", None, "c", "a", "a", None)
    for chosen in swaps:
        adapters.use(chosen)
        assert adapters.active == chosen
        assert torch.equal(logits_of(base), expected[chosen])
    for name, value in base.named_parameters():
        address, version, content = before[name]
        assert value.data_ptr() == address and value._version == version and torch.equal(value, content)
    assert set(base.state_dict()) == names, "an adapter must not show in what the base would save"
    assert not any(module._forward_hooks for module in base.modules())


def test_unloading_frees_the_adapter_and_leaves_the_others(tmp_path: Path) -> None:
    base = base_of("Llama")
    adapters = Adapters(base)
    for seed, name in enumerate("ab"):
        adapters.load(name, make_adapter(tmp_path / name, "Llama", seed=seed))
    adapters.use("a")
    gone = weakref.ref(next(iter(adapters.resident["a"].layers.values())).a)
    adapters.unload("a")
    gc.collect()
    assert gone() is None and adapters.active is None
    assert torch.equal(logits_of(base), logits_of(base_of("Llama")))
    adapters.use("b")
    assert torch.equal(logits_of(base), by_peft("Llama", tmp_path / "b"))
    with pytest.raises(ValueError, match=r"no adapter named 'a' is loaded; these are: 'b'"):
        adapters.use("a")
    assert adapters.active == "b"
    with pytest.raises(ValueError, match="no adapter named 'a'"):
        adapters.unload("a")
    with pytest.raises(ValueError, match="loaded already"):
        adapters.load("b", tmp_path / "b")


def test_an_engine_generates_with_the_adapter_in_use(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", "Llama")
    engine = Engine(base_of("Llama"))
    plain = engine.complete([5, 6, 7], max_new_tokens=8, stop_at_eos=False).token_ids
    adapters = Adapters(engine.model)
    adapters.load("a", folder)
    adapters.use("a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft().PeftModel.from_pretrained(base_of("Llama"), folder).eval()
        expected = wrapped.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False, eos_token_id=None)[0, 3:].tolist()
    changed = engine.complete([5, 6, 7], max_new_tokens=8, stop_at_eos=False).token_ids
    assert list(changed) == expected and changed != plain
    adapters.use(None)
    assert engine.complete([5, 6, 7], max_new_tokens=8, stop_at_eos=False).token_ids == plain


def test_a_swap_is_a_small_part_of_a_load_and_of_a_decode_step(tmp_path: Path) -> None:
    """Medians of interleaved samples on a base whose decode step is cheap; a swap does not grow with the weights."""
    deep: dict[str, Any] = {"num_hidden_layers": 8, "hidden_size": 256, "intermediate_size": 512}
    base = base_of("Llama", **deep)
    folders = []
    for seed in (0, 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = peft().get_peft_model(base_of("Llama", **deep), peft().LoraConfig(r=16, target_modules=["q_proj", "v_proj", "up_proj"]))
            wrapped.save_pretrained(tmp_path / str(seed))
        folders.append(tmp_path / str(seed))
    adapters = Adapters(base)
    for number, folder in enumerate(folders):
        adapters.load(str(number), folder)
    samples: dict[str, list[float]] = {"swap": [], "load": [], "step": []}

    def timed(what: str, body: Callable[[], Any]) -> None:
        start = time.perf_counter()
        body()
        samples[what].append(time.perf_counter() - start)

    for turn in range(30):
        timed("swap", lambda chosen=str(turn % 2): adapters.use(chosen))  # type: ignore[misc]
        timed("load", lambda: adapters.load("again", folders[0]))
        adapters.unload("again")
        with torch.inference_mode():
            timed("step", lambda: base(TOKENS[:, :1]))
    swap, load, step = (statistics.median(samples[what]) for what in ("swap", "load", "step"))
    print(f"swap / load = {swap / load:.4f}, swap / decode step = {swap / step:.4f}, for {len(adapters.resident['0'].layers)} layers")
    assert swap < load / 4 and swap < step / 4


@pytest.mark.gpu
def test_an_adapter_on_a_gpu_lies_beside_its_base_and_leaves_it_as_it_was(tmp_path: Path) -> None:
    save_checkpoint(base_of("Llama"), tmp_path / "base")
    generator = torch.Generator().manual_seed(2)
    shapes = {"A": (4, 32), "B": (48, 4)}
    layers = [f"model.layers.{number}.mlp.up_proj" for number in range(3)]
    tensors = {f"base_model.model.{layer}.lora_{letter}.weight": torch.randn(shape, generator=generator) for layer in layers for letter, shape in shapes.items()}
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    convert_checkpoint(tmp_path / "adapter", tmp_path / "converted")
    base = load_model(tmp_path / "base", "cuda")
    tokens = TOKENS.cuda()
    adapters = Adapters(base)
    with torch.inference_mode():
        plain = base(tokens).logits
        for name, folder in (("a", "adapter"), ("b", "converted")):
            loaded = adapters.load(name, tmp_path / folder)
            assert all(delta.a.is_cuda and delta.b.is_cuda for delta in loaded.layers.values())
        adapters.use("a")
        first = base(tokens).logits
        adapters.use("b")
        assert torch.equal(base(tokens).logits, first) and not torch.allclose(first, plain, atol=1e-2)
        adapters.use(None)
        assert torch.equal(base(tokens).logits, plain)


# --- what is refused ---------------------------------------------------------------------------------------------


def changed_config(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def changed_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


Q = "base_model.model.model.layers.0.self_attn.q_proj"
REFUSALS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "dora": (lambda folder: changed_config(folder, use_dora=True), "use_dora to 'True', which is not applied here"),
    "saved modules": (lambda folder: changed_config(folder, modules_to_save=["lm_head"]), "modules_to_save"),
    "biases": (lambda folder: changed_config(folder, bias="all"), "bias to 'all'"),
    "an initialisation that changes the base": (lambda folder: changed_config(folder, init_lora_weights="pissa"), "init_lora_weights to 'pissa'"),
    "a field of a later PEFT": (lambda folder: changed_config(folder, frobnicate={"x": 1}), "frobnicate"),
    "another kind": (lambda folder: changed_config(folder, peft_type="IA3"), "of the kind 'IA3'"),
    "a rank of 0": (lambda folder: changed_config(folder, r=0), "rank is smaller than 1"),
    "a field of another type": (lambda folder: changed_config(folder, r="four"), "not a configuration of a LoRA adapter"),
    "a broken pattern": (lambda folder: changed_config(folder, target_modules="(q_proj"), "not a regular expression"),
    "another rank": (lambda folder: changed_config(folder, r=3), r"shape \(4, 32\) .*rank 3 need .*\(3, 32\)"),
    "a layer too many": (lambda folder: changed_config(folder, target_modules=["q_proj", "v_proj", "down_proj", "lm_head", "k_proj"]), "that it holds no weights for"),
    "a layer too few": (lambda folder: changed_config(folder, target_modules=["v_proj", "down_proj", "lm_head"]), "does not target"),
    "not JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), "not a configuration"),
    "no configuration": (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter_config.json"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "pickled weights are not read"),
    "a half pair": (lambda folder: changed_weights(folder, lambda tensors: tensors.pop(f"{Q}.lora_B.weight")), "B of layer 'model.layers.0.self_attn.q_proj' is missing"),
    "whole numbers": (
        lambda folder: changed_weights(folder, lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.ones(4, 32, dtype=torch.int64)})), "int64"
    ),
    "an embedding": (
        lambda folder: changed_weights(folder, lambda tensors: tensors.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 96)})),
        "not the A or B of a linear layer",
    ),
    "a copy of a base weight": (
        lambda folder: changed_weights(folder, lambda tensors: tensors.update({"base_model.model.lm_head.base_layer.weight": torch.ones(96, 32)})),
        "save it again with save_embedding_layers=False",
    ),
    "another base": (
        lambda folder: changed_weights(
            folder, lambda tensors: tensors.update({f"base_model.model.model.layers.9.x.lora_{letter}.weight": torch.ones(4, 4) for letter in "AB"})
        ),
        "not a linear layer of this base model",
    ),
    "a truncated file": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes()[:-5]), "its tensors end at byte"
    ),
    "nothing": (lambda folder: (changed_weights(folder, dict.clear), changed_config(folder, target_modules=[])), "holds no weights"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSALS)
def test_what_does_not_fit_is_one_error_and_changes_nothing(what: str, tmp_path: Path) -> None:
    damage, message = REFUSALS[what]
    base = base_of("Llama")
    adapters = Adapters(base)
    adapters.load("good", make_adapter(tmp_path / "good", "Llama"))
    adapters.use("good")
    expected = logits_of(base)
    folder = shutil.copytree(tmp_path / "good", tmp_path / "bad")
    damage(folder)
    with pytest.raises(SllmError, match=message):
        adapters.load("bad", folder)
    assert adapters.active == "good" and adapters.resident.keys() == {"good"}
    assert torch.equal(logits_of(base), expected)


def test_an_adapter_of_another_family_or_width_is_refused(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", "Llama")
    with pytest.raises(ModelError, match="not a linear layer of this base model"):
        Adapters(base_of("GPT2")).load("a", folder)
    with pytest.raises(ModelError, match=r"A of layer .* has shape \(4, 32\)"):
        Adapters(base_of("Llama", hidden_size=64)).load("a", folder)


def test_a_converted_adapter_is_checked_against_its_hashes(tmp_path: Path) -> None:
    convert_checkpoint(make_adapter(tmp_path / "adapter", "Llama"), tmp_path / "converted")
    data = tmp_path / "converted" / "data-00000.bin"
    raw = bytearray(data.read_bytes())
    raw[300] ^= 4
    data.write_bytes(raw)
    adapters = Adapters(base_of("Llama"))
    with pytest.raises(IntegrityError):
        adapters.load("a", tmp_path / "converted")
    assert not adapters.resident


def test_a_model_that_is_no_adapter_is_refused(tmp_path: Path) -> None:
    base = base_of("Llama")
    save_checkpoint(base, tmp_path / "base")
    with pytest.raises(ModelError, match=r"no adapter_config\.json, so it is not an adapter"):
        Adapters(base).load("a", tmp_path / "base")
    with pytest.raises(ModelError, match=r"there is no adapter_config\.json"):
        Adapters(base).load("a", tmp_path)


def test_a_duplicate_key_in_a_configuration_is_not_read_two_ways(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", "Llama")
    raw = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(raw.replace('"use_dora": false', '"use_dora": false, "r": 4'))
    base = base_of("Llama")
    adapters = Adapters(base)
    adapters.load("a", folder)
    adapters.use("a")
    assert torch.equal(logits_of(base), by_peft("Llama", folder))
    assert math.isfinite(float(logits_of(base).sum()))


def test_format_errors_name_the_file(tmp_path: Path) -> None:
    folder = changed_config(make_adapter(tmp_path / "adapter", "Llama"), r=-1)
    with pytest.raises(FormatError, match=r"adapter_config\.json"):
        Adapters(base_of("Llama")).load("a", folder)
