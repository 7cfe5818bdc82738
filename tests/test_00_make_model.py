"""make-model: published shapes, seeded random weights, and directories that transformers takes for its own."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from sllm_mini.checkpoint import filled_tokenizer, random_model, streams
from sllm_mini.checkpoint.random_model import make_model
from sllm_mini.checkpoint.random_weights import RandomWeights
from sllm_mini.checkpoint.safetensors_file import read_header
from sllm_mini.checkpoint.shapes import SHAPES, Shape, find_shape
from sllm_mini.errors import CheckpointExistsError, ModelError, ResourceError, WriteError
from sllm_mini.resources import resource
from sllm_mini.types import Progress

TINY_SPECIAL = ["<|pad|>", "<|begin|>", "<|end|>", "<|endoftext|>"]
TEXTS = ["The fox counts 3 red apples.", "  two  spaces\n\tand a tab", "naïve café — 日本語 🦊", "<|begin|> is plain text here", ""]


def train_tokenizer(path: Path, special: list[str]) -> Path:
    """A byte-level BPE of 1,024 entries, as the repository's tiny model has one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(2, 9))) for _ in range(500)]
    lines = [" ".join(rng.choice(words, 200)) for _ in range(40)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tiny") / "tokenizer.json", TINY_SPECIAL)


@pytest.fixture(autouse=True)
def use_tiny_tokenizer(tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filled_tokenizer, "resource", lambda name: tiny_tokenizer)


def small(name: str, **changes: Any) -> Shape:
    """A published shape with two narrow layers and 2,000 tokens: the same family, ties and special tokens."""
    shape = SHAPES[name]
    if shape.config["model_type"] == "gpt2":
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
    else:
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 160, "ffn_dim": 160}
        sizes |= {"num_key_value_heads": 2, "head_dim": 16, "word_embed_proj_dim": 64, "max_window_layers": 2}
    config = {**shape.config, **{key: value for key, value in sizes.items() if key in shape.config}, "vocab_size": 2000}
    ids = {number: number if number < 1024 else 2000 - (max(shape.special_tokens) - number) - 1 for number in shape.special_tokens}
    config |= {key: ids[config[key]] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    special = {ids[number]: text for number, text in shape.special_tokens.items()}
    return dataclasses.replace(shape, config=config | changes, special_tokens=special)


FAMILIES = ["gpt2", "opt-125m", "llama-3.2-1b", "llama-3.1-8b", "qwen2.5-0.5b", "qwen2.5-7b"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


# --- shapes ---


def arithmetic(config: dict[str, Any]) -> int:
    """Parameters of the four families, added up by hand."""
    vocab = config["vocab_size"]
    if config["model_type"] == "gpt2":
        width = config["n_embd"]
        layer = 4 * width + (3 * width * width + 3 * width) + (width * width + width) + (8 * width * width + 5 * width)
        return vocab * width + config["n_positions"] * width + config["n_layer"] * layer + 2 * width
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    if config["model_type"] == "opt":
        inner = config["ffn_dim"]
        layer = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
        return vocab * width + (config["max_position_embeddings"] + 2) * width + layers * layer + 2 * width
    head = config.get("head_dim", width // config["num_attention_heads"])
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    layer = 2 * width * queries + 2 * width * keys + 3 * width * config["intermediate_size"] + 2 * width
    if config["model_type"] == "qwen2":
        layer += queries + 2 * keys
    return vocab * width * (1 if config["tie_word_embeddings"] else 2) + layers * layer + width


@pytest.mark.parametrize("name", SHAPES)
def test_the_model_of_each_shape_has_the_published_number_of_parameters(name: str) -> None:
    shape = SHAPES[name]
    assert arithmetic(dict(shape.config)) == shape.parameters
    model = random_model._skeleton(shape, shape.dtype)
    assert model.num_parameters() == shape.parameters
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    files = random_model._plan_files(model, 5_000_000_000, RandomWeights(0, shape.dtype, 0.02))
    assert sum(file.nbytes - file.storages[0].nbytes for file in files) == shape.nbytes


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("llama-3.2-1b", [2_471_645_608]),
        ("llama-3.1-8b", [4_976_698_672, 4_999_802_720, 4_915_916_176, 1_168_138_808]),
        ("qwen2.5-0.5b", [988_097_824]),
    ],
)
def test_weight_files_have_the_published_sizes_to_the_byte(name: str, published: list[int]) -> None:
    files = random_model._plan_files(random_model._skeleton(SHAPES[name], "bfloat16"), 5_000_000_000, RandomWeights(0, "bfloat16", 0.02))
    assert [file.nbytes for file in files] == published


def test_every_shape_is_described() -> None:
    assert set(SHAPES) == {"gpt2", "opt-125m", "opt-1.3b", "opt-6.7b", "llama-3.2-1b", "llama-3.1-8b", "qwen2.5-0.5b", "qwen2.5-7b"}
    for name, shape in SHAPES.items():
        assert name == shape.name == name.lower()
        assert shape.source and shape.trust and shape.dtype in ("float16", "bfloat16", "float32")
        for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
            assert role not in shape.config or shape.config[role] in shape.special_tokens


@pytest.mark.parametrize("name", SHAPES)
def test_configurations_survive_a_round_trip_through_transformers(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = random_model._skeleton(SHAPES[name], SHAPES[name].dtype).config
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    # What tells where a configuration came from differs; what describes the model does not.
    origin = {"_name_or_path", "transformers_version"}
    assert {k: v for k, v in again.to_dict().items() if k not in origin} == {k: v for k, v in config.to_dict().items() if k not in origin}
    for key, value in SHAPES[name].config.items():
        if key != "sliding_window":  # transformers drops the window where none is used
            assert getattr(again, key) == value


# --- the directory ---


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_loads_it_and_would_have_saved_the_same_bytes(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    made = make_model(small(name), tmp_path / "made", seed=7, max_shard_nbytes=150_000)
    model, report = AutoModelForCausalLM.from_pretrained(made, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert str(model.dtype) == f"torch.{SHAPES[name].dtype}"
    # A model that was loaded may be saved in the order of some older file; one that was built is saved in its own.
    built = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(made), dtype=model.dtype)
    built.load_state_dict(model.state_dict())
    built.save_pretrained(tmp_path / "saved", max_shard_size=150_000)
    ours, theirs = contents(made), contents(tmp_path / "saved")
    assert set(ours) - set(theirs) == {"README.md", "tokenizer.json", "tokenizer_config.json"}
    assert len(theirs) > 4  # several files of weights
    for file, content in theirs.items():
        if file.endswith(".json"):
            assert json.loads(ours[file]) == json.loads(content)
        assert ours[file] == content, f"{file} differs from what save_pretrained writes"

    tokenizer = AutoTokenizer.from_pretrained(made)
    prompt = tokenizer("The fox", return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    assert tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_the_safetensors_library_and_our_reader_see_the_same(tmp_path: Path) -> None:
    from safetensors import safe_open

    made = make_model(small("qwen2.5-7b"), tmp_path / "made", max_shard_nbytes=200_000)
    index = json.loads((made / "model.safetensors.index.json").read_text())
    files = sorted(made.glob("model-*.safetensors"))
    assert [file.name for file in files] == [f"model-{n + 1:05d}-of-{len(files):05d}.safetensors" for n in range(len(files))]
    seen = {}
    for file in files:
        entries = {entry.name: entry for entry in read_header(file)}
        with safe_open(file, framework="pt") as opened:
            assert set(opened.keys()) == set(entries)
            assert opened.metadata() == {"format": "pt"}
            for name, entry in entries.items():
                tensor = opened.get_tensor(name)
                assert tuple(tensor.shape) == entry.shape and str(tensor.dtype) == f"torch.{entry.dtype}" == "torch.bfloat16"
                raw = tensor.view(torch.uint8).numpy().tobytes()
                assert raw == file.read_bytes()[entry.offset : entry.offset + entry.nbytes]
                seen[name] = file.name
        assert len(entries) == 1 or sum(entry.nbytes for entry in entries.values()) <= 200_000
    assert seen == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors_of(made).values())


def test_one_file_needs_no_index_and_shards_change_no_weight(tmp_path: Path) -> None:
    shape = small("llama-3.1-8b")
    whole = make_model(shape, tmp_path / "whole")
    parts = make_model(shape, tmp_path / "parts", max_shard_nbytes=1)
    assert sorted(path.name for path in whole.glob("model*")) == ["model.safetensors"]
    one, many = tensors_of(whole), tensors_of(parts)
    assert len(list(parts.glob("*.safetensors"))) == len(many) == len(one)
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_the_card_says_what_the_weights_are(tmp_path: Path) -> None:
    made = make_model(small("opt-125m"), tmp_path / "made", seed=41, dtype="float32")
    card = (made / "README.md").read_text()
    assert all(text in card for text in ("random weights", "seed 41", "facebook/opt-125m", "float32", SHAPES["opt-125m"].trust))
    assert json.loads((made / "config.json").read_text())["dtype"] == "float32"
    assert {tensor.dtype for tensor in tensors_of(made).values()} == {torch.float32}


# --- the weights ---


def draw(dtype: str, count: int, *, seed: int = 0, name: str = "w", first: int = 0) -> torch.Tensor:
    kind = getattr(torch, dtype)
    tensor = torch.empty(count, dtype=kind)
    RandomWeights(seed, dtype, 0.02).fill(name, first, memoryview(tensor.view(torch.uint8).numpy()))
    return tensor


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_weights_are_normal(dtype: str) -> None:
    weights = draw(dtype, 1_000_000).double()
    assert abs(weights.mean().item()) < 4 * 0.02 / 1000
    assert weights.std().item() == pytest.approx(0.02, rel=0.005)
    normal = statistics.NormalDist(0, 0.02)
    for place in (-0.05, -0.02, -0.005, 0.003, 0.01, 0.03, 0.06):  # well off the values that rounding can shift
        share = (weights < place).double().mean().item()
        assert share == pytest.approx(normal.cdf(place), abs=0.003)
    halves = weights.reshape(2, -1)
    assert abs((halves[0] * halves[1]).mean().item()) < 4 * 0.02**2 / 700  # neighbours in time are independent


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 10.46), ("float16", 13.44)])
def test_a_compressor_sees_what_it_would_see_of_normal_weights(dtype: str, bits: float) -> None:
    weights = draw(dtype, 3_000_000)
    normal = (torch.randn(3_000_000, generator=torch.Generator().manual_seed(0)) * 0.02).to(weights.dtype)

    def entropy(tensor: torch.Tensor) -> float:
        share = torch.unique(tensor.view(torch.int16), return_counts=True)[1].double() / len(tensor)
        return -(share * share.log2()).sum().item()

    assert entropy(weights) == pytest.approx(entropy(normal), abs=0.02)
    assert entropy(weights) == pytest.approx(bits, abs=0.02)
    raw, reference = (t[:500_000].view(torch.uint8).numpy().tobytes() for t in (weights, normal))
    assert len(zlib.compress(raw, 1)) == pytest.approx(len(zlib.compress(reference, 1)), rel=0.005)
    blocks = weights.view(torch.int64).reshape(-1, 8)  # 64 bytes that occur twice would mean a pool
    assert len(torch.unique(blocks, dim=0)) == len(blocks)


@hypothesis.settings(max_examples=25)
@hypothesis.given(first=st.integers(0, 300_000), count=st.integers(0, 200_000), dtype=st.sampled_from(["bfloat16", "float32"]))
def test_any_range_is_a_part_of_the_same_tensor(first: int, count: int, dtype: str) -> None:
    whole = _whole(dtype)
    assert torch.equal(draw(dtype, count, first=first), whole[first : first + count])


_WHOLE: dict[str, torch.Tensor] = {}


def _whole(dtype: str) -> torch.Tensor:
    if dtype not in _WHOLE:
        _WHOLE[dtype] = draw(dtype, 500_000)
    return _WHOLE[dtype]


def test_seeds_names_and_runs_differ() -> None:
    first, *others = [draw("bfloat16", 1000, **key) for key in ({}, {"seed": 1}, {"name": "v"}, {"first": 1 << 17})]
    assert not any(torch.equal(first, other) for other in others)
    assert len({tuple(other.tolist()) for other in others}) == len(others)


def test_norms_are_one_biases_zero_and_the_rest_is_random(tmp_path: Path) -> None:
    for family in ("gpt2", "opt-125m", "qwen2.5-0.5b"):
        for name, tensor in tensors_of(make_model(small(family), tmp_path / family)).items():
            if name.endswith("bias"):
                assert not tensor.any(), name
            elif "norm" in name or ".ln_" in name:
                assert torch.equal(tensor, torch.ones_like(tensor)), name
            else:
                assert tensor.ndim == 2 and tensor.double().std().item() == pytest.approx(0.02, rel=0.1), name


def test_the_same_bytes_for_any_number_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = small("llama-3.2-1b", hidden_size=256)  # a tensor longer than one generator's run
    one = make_model(shape, tmp_path / "one", threads=1)
    made = {"two": make_model(shape, tmp_path / "two", threads=2)}
    monkeypatch.setattr(streams, "SLAB_NBYTES", 1 << 16)  # many slabs, borders inside tensors and runs
    made["five"] = make_model(shape, tmp_path / "five", threads=5)
    monkeypatch.setattr(streams, "_set_direct", lambda fd, on: None)
    made["page cache"] = make_model(shape, tmp_path / "page cache", threads=2)
    for folder in made.values():
        assert contents(folder) == contents(one)
    other = make_model(shape, tmp_path / "other", seed=1)
    assert contents(other)["model.safetensors"] != contents(one)["model.safetensors"]


def test_progress_counts_every_byte_on_the_calling_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "SLAB_NBYTES", 1 << 16)
    seen: list[Progress] = []
    threads = set()

    def progress(step: Progress) -> None:
        seen.append(step)
        threads.add(threading.current_thread())

    made = make_model(small("gpt2"), tmp_path / "made", max_shard_nbytes=300_000, progress=progress)
    nbytes = sum(path.stat().st_size for path in made.glob("*.safetensors"))
    assert [step.done_nbytes for step in seen] == sorted(step.done_nbytes for step in seen)
    assert seen[-1] == Progress(nbytes, nbytes) and len(seen) > 5
    assert threads == {threading.current_thread()}


# --- the tokenizer ---


@pytest.mark.parametrize("name", ["gpt2", "opt-125m", "llama-3.2-1b", "qwen2.5-0.5b", "qwen2.5-7b"])  # every vocabulary once
def test_every_id_of_a_published_vocabulary_can_be_seen(name: str, tiny_tokenizer: Path) -> None:
    from tokenizers import Tokenizer

    shape = SHAPES[name]
    tiny = Tokenizer.from_file(str(tiny_tokenizer))
    tokenizer = Tokenizer.from_str(filled_tokenizer.filled_tokenizer(shape)["tokenizer.json"])
    size = shape.config["vocab_size"]
    assert tokenizer.get_vocab_size() == size == len(set(tokenizer.get_vocab().values()))
    own = {number: tiny.id_to_token(number) for number in range(len(TINY_SPECIAL), 1024)}
    names = {number: f"⟨{number}⟩" for number in range(size)} | own | dict(shape.special_tokens)
    assert {number: text for text, number in tokenizer.get_vocab().items()} == names
    same = [[number] for number in own if number not in shape.special_tokens]
    assert tokenizer.decode_batch(same) == tiny.decode_batch(same)
    rest = [number for number in range(1024, size, 97) if number not in shape.special_tokens]
    assert tokenizer.decode_batch([[number] for number in rest]) == [names[number] for number in rest]
    for number, text in shape.special_tokens.items():
        assert tokenizer.decode([number], skip_special_tokens=False) == text and tokenizer.decode([number]) == ""
    for number in set(range(len(TINY_SPECIAL))) - set(shape.special_tokens):
        assert tokenizer.decode([number]) == f"⟨{number}⟩"  # what is special to the tiny model is not to this one


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tokenizer_works_offline(name: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    shape = small(name)
    tokenizer = AutoTokenizer.from_pretrained(make_model(shape, tmp_path / "made"))
    assert len(tokenizer) == tokenizer.vocab_size == shape.config["vocab_size"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (shape.config["bos_token_id"], shape.config["eos_token_id"])
    pads_with_end = shape.config["eos_token_id"] if name.startswith("qwen") else None
    assert tokenizer.pad_token_id == shape.config.get("pad_token_id", pads_with_end)
    plain = Tokenizer.from_file(str(tmp_path / "made" / "tokenizer.json"))
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == plain.encode(text).ids  # what transformers makes of the file is what the file says
        assert ids[: shape.prepends_bos] == [shape.config["bos_token_id"]] * shape.prepends_bos
        assert tokenizer.decode(ids[shape.prepends_bos :]) == text
        assert all(number < 1024 for number in ids[shape.prepends_bos :])
    assert tokenizer.convert_tokens_to_ids("⟨1500⟩") == 1500
    assert tokenizer.decode([1500, 1501], skip_special_tokens=True) == "⟨1500⟩⟨1501⟩"


def test_pieces_that_special_ids_displace_move_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import Tokenizer

    plain = train_tokenizer(tmp_path / "plain.json", [])  # ids 1 and 2 are letters here, and OPT's <pad> and </s>
    monkeypatch.setattr(filled_tokenizer, "resource", lambda name: plain)
    before = Tokenizer.from_file(str(plain))
    after = Tokenizer.from_str(filled_tokenizer.filled_tokenizer(SHAPES["opt-125m"])["tokenizer.json"])
    assert [after.id_to_token(n) for n in (1, 2, 1024, 1025, 1026)] == ["<pad>", "</s>", before.id_to_token(1), before.id_to_token(2), "⟨1026⟩"]
    text = "".join(before.id_to_token(n) for n in (1, 2)) * 3
    assert after.encode(text).ids[0] == 2 and after.decode(after.encode(text).ids) == text


def test_the_tokenizer_that_ships_is_one_this_can_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        shipped = resource("data/models/tiny/tokenizer.json")
    except ResourceError:
        pytest.skip("the tiny model is not in this checkout")
    from tokenizers import Tokenizer

    monkeypatch.setattr(filled_tokenizer, "resource", lambda name: shipped)
    for shape in (SHAPES["opt-125m"], SHAPES["llama-3.2-1b"], SHAPES["qwen2.5-0.5b"]):
        tokenizer = Tokenizer.from_str(filled_tokenizer.filled_tokenizer(shape)["tokenizer.json"])
        assert tokenizer.get_vocab_size() == shape.config["vocab_size"]
        for text in TEXTS:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            assert tokenizer.decode(ids) == text


# --- what goes wrong ---


def test_an_unknown_name_lists_the_names(tmp_path: Path) -> None:
    for name in ("llama-4", "GPT2", ""):
        with pytest.raises(ModelError, match="no published shape") as caught:
            make_model(name, tmp_path / "made")
        assert all(known in str(caught.value) for known in SHAPES)
    with pytest.raises(ModelError):
        find_shape("opt")


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"dtype": "float64"}, {"threads": 0}, {"max_shard_nbytes": 0}])
def test_bad_options_are_refused_before_anything_is_written(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        make_model("gpt2", tmp_path / "made", **options)
    assert not list(tmp_path.iterdir())


def test_a_vocabulary_must_hold_the_tiny_one(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="vocabulary of 1000"):
        make_model(small("gpt2", vocab_size=1000), tmp_path / "made")


def test_an_existing_target_is_refused(tmp_path: Path) -> None:
    made = make_model(small("gpt2"), tmp_path / "made")
    before = contents(made)
    with pytest.raises(CheckpointExistsError):
        make_model(small("gpt2"), made, seed=1)
    assert contents(made) == before
    make_model(small("gpt2"), made, seed=1, overwrite=True)
    assert contents(made)["model.safetensors"] != before["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_overwrite_replaces_models_only(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    make_model(small("gpt2"), home, overwrite=True)  # an empty directory
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("ten years of work")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "link").symlink_to(home)
    for target in (other, tmp_path / "file", tmp_path / "link"):
        with pytest.raises(CheckpointExistsError):
            make_model(small("gpt2"), target, overwrite=True)
    assert (other / "thesis.txt").read_text() and (tmp_path / "file").read_text()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    for target in (tmp_path / "file" / "made", Path("/proc/made")):
        with pytest.raises(WriteError) as caught:
            make_model(small("gpt2"), target)
        assert "cannot be written" in str(caught.value)


def test_a_directory_without_permission(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(WriteError, match="Permission denied"):
        make_model(small("gpt2"), tmp_path / "closed" / "made")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {"vocab": []}, "added_tokens": []}', '{"model": {}}'])
def test_a_tiny_tokenizer_that_is_absent_or_broken(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "tokenizer.json"
    if content:
        broken.write_text(content)
    monkeypatch.setattr(filled_tokenizer, "resource", lambda name: broken)
    with pytest.raises(ResourceError, match=r"tokenizer\.json"):
        make_model(small("gpt2"), tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "SLAB_NBYTES", 1 << 16)
    calls = iter(range(1000))

    def pwrite(fd: int, view: memoryview, at: int) -> int:
        if next(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, view, at)

    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(WriteError, match="No space left"):
        make_model(small("gpt2"), tmp_path / "made", threads=2)
    assert not list(tmp_path.iterdir())


def test_a_write_that_needs_the_page_cache_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make_model(small("gpt2"), tmp_path / "expected")

    def pwrite(fd: int, view: memoryview, at: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, view[:70_001], at)  # and writes a part at a time

    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", pwrite)
    assert contents(make_model(small("gpt2"), tmp_path / "made")) == contents(expected)


def test_a_caller_that_gives_up_leaves_nothing(tmp_path: Path) -> None:
    def progress(step: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_model(small("gpt2"), tmp_path / "made", progress=progress)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here ({mounted.stderr.strip() or 'not root'})")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_found_before_a_weight_is_drawn(tiny_disk: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(WriteError, match="free"):
        patch.setattr(RandomWeights, "fill", lambda *arguments: pytest.fail("a weight was drawn"))
        make_model(small("gpt2", n_embd=256), tiny_disk / "made")
    assert not list(tiny_disk.iterdir())
    make_model(small("gpt2"), tiny_disk / "made")
    assert (tiny_disk / "made" / "model.safetensors").exists()


def run_python(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def test_kill_9_leaves_nothing_visible_and_the_next_run_cleans_up(tmp_path: Path, tiny_tokenizer: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from sllm_mini.checkpoint import filled_tokenizer, random_model, streams
filled_tokenizer.resource = lambda name: Path(sys.argv[2])
streams.SLAB_NBYTES = 1 << 20
def progress(step):
    print("half way", flush=True)
    time.sleep(600)
random_model.make_model("gpt2", sys.argv[1], progress=progress, threads=1)
"""
    target = tmp_path / "models" / "made"
    with run_python(code, target, tiny_tokenizer) as child:
        assert child.stdout is not None and child.stdout.readline() == "half way\n"
        child.send_signal(signal.SIGKILL)
    assert [path.name[0] for path in target.parent.iterdir()] == ["."]  # hidden
    make_model(small("gpt2"), target)
    assert [path.name for path in target.parent.iterdir()] == ["made"]


def test_memory_does_not_grow_with_the_model(tmp_path: Path, tiny_tokenizer: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
import torch, transformers.models.opt.modeling_opt
from sllm_mini.checkpoint import filled_tokenizer, random_model, shapes
filled_tokenizer.resource = lambda name: Path(sys.argv[2])
random_model._skeleton(shapes.SHAPES["opt-125m"], "float16")  # what transformers imports at first use
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
made = random_model.make_model("opt-125m", sys.argv[1], threads=2)
grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
print(grown, (made / "model.safetensors").stat().st_size)
"""
    with run_python(code, tmp_path / "made", tiny_tokenizer) as child:
        assert child.stdout is not None
        grown, nbytes = map(int, child.stdout.read().split())
    assert nbytes > 250_000_000
    assert grown < 100_000_000


def test_importing_costs_neither_torch_nor_transformers() -> None:
    code = "import sys, sllm_mini.checkpoint.random_model; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    with run_python(code) as child:
        assert child.stdout is not None and child.stdout.read().strip() == "[]"
