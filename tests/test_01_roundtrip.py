"""Chapter 01: what is saved comes back, bit for bit, for every dtype, shape, stride, offset, tie and composite."""

from __future__ import annotations

import ctypes
import os
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from sllm_mini.checkpoint import (
    WriteOptions,
    convert_checkpoint,
    export_safetensors,
    open_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from sllm_mini.checkpoint.composite import _wrappers, allow_composite
from sllm_mini.checkpoint.dtypes import ITEM_NBYTES, SAFETENSORS_CODES, torch_dtype
from sllm_mini.errors import FormatError, UnsupportedError
from sllm_mini.loading import load_tensors

DTYPES = sorted(ITEM_NBYTES)
PLAIN_TORCH_DTYPES = {
    str(value).removeprefix("torch.")
    for value in vars(torch).values()
    if isinstance(value, torch.dtype) and not str(value).startswith(("torch.q", "torch.bits16"))
}


def elements(tensor: torch.Tensor) -> bytes:
    """The bytes of a strided tensor's elements in row-major order, read from its address without torch's help."""
    item = tensor.element_size()
    if tensor.numel() == 0:
        return b""
    extent = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    start = np.frombuffer(ctypes.string_at(tensor.data_ptr(), extent * item), np.uint8)
    strides = [step * item for step in tensor.stride()] + [1]
    return np.lib.stride_tricks.as_strided(start, [*tensor.shape, item], strides).tobytes()


def assert_same(found: torch.Tensor, saved: torch.Tensor) -> None:
    assert (found.dtype, found.shape, found.stride()) == (saved.dtype, saved.shape, saved.stride())
    assert elements(found) == elements(saved)


@st.composite
def views(draw: st.DrawFn) -> torch.Tensor:
    """A view of random bytes: any dtype, shapes with 0 and 1, any non-negative strides, any offset."""
    item_dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    stride = [draw(st.integers(0, 9)) for _ in shape]
    offset = draw(st.integers(0, 7))
    extent = 0 if 0 in shape else 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    nbytes = (offset + extent + draw(st.integers(0, 3))) * ITEM_NBYTES[item_dtype]
    seed = draw(st.integers(0, 2**32 - 1))
    raw = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, max(nbytes, 16) // 16 * 16 + 16, np.uint8))
    return raw.view(torch_dtype(item_dtype)).as_strided(shape, stride, offset)


FAST = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # hundreds of small checkpoints: no disk to wait for
quick = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def test_every_plain_torch_dtype_has_a_place_in_the_format() -> None:
    assert set(ITEM_NBYTES) >= PLAIN_TORCH_DTYPES
    for name, nbytes in ITEM_NBYTES.items():
        if hasattr(torch, name):
            assert torch_dtype(name).itemsize == nbytes, name


@quick
@given(tensors=st.lists(views(), min_size=1, max_size=5), limit=st.sampled_from([1, 4096, 1 << 30]), cached=st.booleans())
def test_strided_views_of_every_dtype_come_back_bit_for_bit(tensors: list[torch.Tensor], limit: int, cached: bool) -> None:
    saved = {f"t{number}": tensor for number, tensor in enumerate(tensors)}
    with tempfile.TemporaryDirectory(dir=FAST) as folder:
        save_checkpoint(saved, f"{folder}/c", options=WriteOptions(partition_nbytes=limit))
        verify_checkpoint(f"{folder}/c")
        found = load_tensors(f"{folder}/c")
    assert found.keys() == saved.keys()
    for name in saved:
        assert_same(found[name], saved[name])


@quick
@given(data=st.data())
def test_views_of_one_storage_stay_views_of_one_storage(data: st.DataObject) -> None:
    base = torch.from_numpy(np.random.default_rng(data.draw(st.integers(0, 999))).integers(0, 256, 256, np.uint8))
    saved = {}
    for number in range(data.draw(st.integers(2, 6))):
        dtype = data.draw(st.sampled_from([torch.uint8, torch.int16, torch.float32, torch.complex128]))
        whole = base.view(dtype)
        start = data.draw(st.integers(0, whole.numel() - 1))
        saved[f"t{number}"] = whole[start : data.draw(st.integers(start, whole.numel()))]
    with tempfile.TemporaryDirectory(dir=FAST) as folder:
        checkpoint = save_checkpoint(saved, f"{folder}/c")
        found = load_tensors(f"{folder}/c")
    spans = {name: (tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()) for name, tensor in saved.items()}
    for name, tensor in saved.items():
        assert_same(found[name], tensor)
        for other in saved:
            (a, b), (c, d) = spans[name], spans[other]
            if max(a, c) < min(b, d):  # they share bytes, so they must lie as they lay
                assert found[other].data_ptr() - found[name].data_ptr() == c - a
    covered = {byte for a, b in spans.values() for byte in range(a, b)}
    stored = {byte for entry in checkpoint.index.tensors for byte in range(entry.offset, entry.offset + entry.nbytes)}
    assert len(stored) == len(covered), "shared bytes are saved once"


def test_a_tied_weight_is_saved_once_and_a_write_reaches_both_names(tmp_path: Path) -> None:
    weight = torch.randn(512, 1024)
    checkpoint = save_checkpoint({"lm_head.weight": weight, "model.embed_tokens.weight": weight}, tmp_path / "c")
    assert checkpoint.nbytes == weight.nbytes
    found = load_tensors(tmp_path / "c")
    found["lm_head.weight"][0, 0] = 42.0
    assert found["model.embed_tokens.weight"][0, 0] == 42.0


def test_tied_parameters_of_a_module(tmp_path: Path) -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(10, 4)
            self.head = torch.nn.Linear(4, 10, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("scale", torch.tensor(3, dtype=torch.int64))

    module = Tied()
    save_checkpoint(module, tmp_path / "c")
    found = load_tensors(tmp_path / "c")
    assert found.keys() == module.state_dict().keys()
    assert found["head.weight"].data_ptr() == found["embed.weight"].data_ptr()
    for name, tensor in module.state_dict().items():
        assert torch.equal(found[name], tensor)


def test_conjugate_and_negative_views_are_saved_as_what_they_mean(tmp_path: Path) -> None:
    values = torch.randn(5, dtype=torch.complex64)
    saved = {"conj": values.conj(), "imag": values.conj().imag, "plain": values}
    assert saved["conj"].is_conj() and saved["imag"].is_neg()
    save_checkpoint(saved, tmp_path / "c")
    found = load_tensors(tmp_path / "c")
    for name in saved:
        assert torch.equal(found[name], saved[name].resolve_conj().resolve_neg())


@pytest.mark.filterwarnings("ignore:torch.quantize_per")
def test_composites_come_back_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = torch.randn(6, 8).relu()
    saved = {
        "per_tensor": torch.quantize_per_tensor(dense, 0.1, 3, torch.quint8),
        "per_tensor32": torch.quantize_per_tensor(dense, 0.01, 0, torch.qint32),
        "per_channel": torch.quantize_per_channel(dense, torch.rand(6).double() + 0.1, torch.zeros(6, dtype=torch.int64), 0, torch.qint8),
        "coo": dense.to_sparse(),
        "uncoalesced": torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 2.0], (2, 3)),
        "csr": dense.to_sparse_csr(),
        "csc": dense.to_sparse_csc(),
        "bsr": dense.to_sparse_bsr((2, 2)),
        "bsc": dense.to_sparse_bsc((2, 2)),
        "plain": dense,
    }
    checkpoint = save_checkpoint(saved, tmp_path / "c")
    assert {composite.name for composite in checkpoint.index.composites} == saved.keys() - {"plain"}
    found = load_tensors(tmp_path / "c")
    assert found.keys() == saved.keys()
    for name, tensor in saved.items():
        assert (found[name].dtype, found[name].shape, found[name].layout) == (tensor.dtype, tensor.shape, tensor.layout)
        if tensor.is_quantized:
            assert found[name].qscheme() == tensor.qscheme()
            assert torch.equal(found[name].int_repr(), tensor.int_repr()) and torch.equal(found[name].dequantize(), tensor.dequantize())
        else:
            assert torch.equal(found[name].to_dense(), tensor.to_dense())
    assert found["uncoalesced"].is_coalesced() is False
    one = load_tensors(tmp_path / "c", names=["csr"])
    assert list(one) == ["csr"] and torch.equal(one["csr"].to_dense(), dense)


class Scaled(torch.Tensor):
    """A wrapper subclass as quantisation libraries write them: integers and a scale."""

    @staticmethod
    def __new__(cls, values: torch.Tensor, scale: torch.Tensor, bits: int):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values: torch.Tensor, scale: torch.Tensor, bits: int) -> None:
        self.values_, self.scale, self.bits = values, scale, bits

    def __tensor_flatten__(self):
        return ["values_", "scale"], {"bits": self.bits}

    @classmethod
    def __tensor_unflatten__(cls, parts, context, size, stride):
        return cls(parts["values_"], parts["scale"], context["bits"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values_, args[0].scale, args[0].bits)
        raise NotImplementedError(func)


def test_a_wrapper_class_is_saved_and_loaded_only_if_the_program_allows_it(tmp_path: Path) -> None:
    tensor = Scaled(torch.arange(6, dtype=torch.int8).view(2, 3), torch.tensor(0.5), 8)
    with pytest.raises(UnsupportedError, match="allow_composite"):
        save_checkpoint({"w": tensor}, tmp_path / "c")
    allow_composite(Scaled)
    try:
        save_checkpoint({"w": tensor}, tmp_path / "c")
        found = load_tensors(tmp_path / "c")["w"]
        assert isinstance(found, Scaled) and found.bits == 8
        assert torch.equal(found.values_, tensor.values_) and torch.equal(found.scale, tensor.scale)
    finally:
        _wrappers.clear()
    with pytest.raises(FormatError, match="allow-list"):
        load_tensors(tmp_path / "c")


@pytest.mark.parametrize(
    ("value", "why"),
    [(torch.empty(2, device="meta"), "meta device"), ("text", "not a tensor"), (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "cannot be saved")],
)
def test_what_has_no_bytes_is_refused_by_name(tmp_path: Path, value: object, why: str) -> None:
    with pytest.raises(UnsupportedError, match=why) as caught:
        save_checkpoint({"the.culprit": value}, tmp_path / "c")
    assert "the.culprit" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@quick
@given(tensors=st.lists(views(), min_size=1, max_size=5), shard=st.sampled_from([1, 64, 1 << 30]))
def test_export_gives_back_the_same_tensors(tensors: list[torch.Tensor], shard: int) -> None:
    known = set(SAFETENSORS_CODES.values()) - {"float8_e8m0fnu"}  # the safetensors library cannot make that one in torch yet
    saved = {f"t{number}": tensor for number, tensor in enumerate(tensors) if str(tensor.dtype).removeprefix("torch.") in known}
    with tempfile.TemporaryDirectory(dir=FAST) as folder:
        save_checkpoint(saved, f"{folder}/c")
        files = export_safetensors(f"{folder}/c", f"{folder}/st", max_shard_nbytes=shard)
        found = {}
        for file in files:
            with safe_open(file, "pt") as opened:
                found.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118 - a safe_open is no mapping
        assert found.keys() == saved.keys()
        for name, tensor in saved.items():
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
            assert elements(found[name]) == elements(tensor)
        convert_checkpoint(f"{folder}/st", f"{folder}/again")
        again = load_tensors(f"{folder}/again")
        for name, tensor in saved.items():
            assert elements(again[name]) == elements(tensor)


def test_export_writes_a_tie_once_and_names_it(tmp_path: Path) -> None:
    weight = torch.randn(64, 64)
    save_checkpoint({"lm_head.weight": weight, "model.embed_tokens.weight": weight, "view": weight[3]}, tmp_path / "c")
    (file,) = export_safetensors(tmp_path / "c", tmp_path / "st")
    with safe_open(file, "pt") as opened:
        assert set(opened.keys()) == {"model.embed_tokens.weight", "view"}
        assert opened.metadata()["lm_head.weight"] == "model.embed_tokens.weight"
        assert torch.equal(opened.get_tensor("view"), weight[3])
    assert file.stat().st_size < weight.nbytes * 1.1


def test_export_refuses_a_dtype_that_safetensors_lacks_before_writing(tmp_path: Path) -> None:
    save_checkpoint({"x": torch.zeros(4, dtype=torch.complex128)}, tmp_path / "c")
    with pytest.raises(UnsupportedError, match="complex128"):
        export_safetensors(tmp_path / "c", tmp_path / "st")
    assert not (tmp_path / "st").exists()


def test_the_same_tensors_give_the_same_bytes_whatever_the_number_of_threads(tmp_path: Path) -> None:
    torch.manual_seed(1)
    saved = {f"model.layers.{number}.w": torch.randn(1000, 1500) for number in range(10)}
    for threads in (1, 3):
        save_checkpoint(saved, tmp_path / f"c{threads}", options=WriteOptions(threads=threads, partition_nbytes=20 << 20))
    for file in sorted(path.name for path in (tmp_path / "c1").iterdir()):
        assert (tmp_path / "c1" / file).read_bytes() == (tmp_path / "c3" / file).read_bytes()
    assert len(open_checkpoint(tmp_path / "c1").index.partitions) == 4


def test_saving_warns_of_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_checkpoint({"x": torch.ones(3)}, tmp_path / "c")
        load_tensors(tmp_path / "c")
