"""Chapter 01: the layout plan, the execution order, the hash tree and the index, each against a plain oracle."""

from __future__ import annotations

import struct

import msgspec
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm_mini.checkpoint.hashing import CHUNK_NBYTES, LEAF_NBYTES, chunk_digest, chunk_digests
from sllm_mini.checkpoint.index import (
    BLOCK_NBYTES,
    CompanionEntry,
    Index,
    PartitionEntry,
    TensorEntry,
    decode_index,
    encode_index,
)
from sllm_mini.checkpoint.layout import StorageSpec, execution_order, plan_layout
from sllm_mini.errors import FormatError

storages = st.lists(st.builds(StorageSpec, st.integers(0, 20_000), st.sampled_from([None, 0, 1])), max_size=30)


@given(storages, st.integers(1, 50_000), st.sampled_from([1, 16, 256]))
def test_a_layout_keeps_order_alignment_devices_and_limits(specs: list[StorageSpec], limit: int, alignment: int) -> None:
    layout = plan_layout(specs, partition_nbytes=limit, alignment=alignment)
    assert len(layout.placements) == len(specs)
    last: dict[int, tuple[int, int]] = {}
    members: dict[int, int] = {}
    for spec, place in zip(specs, layout.placements, strict=True):
        assert place.offset % alignment == 0
        assert layout.partition_devices[place.partition] == spec.device
        _, end = last.get(place.partition, (0, 0))
        assert end <= place.offset < end + alignment, "each storage starts right behind the one before it"
        last[place.partition] = (place.offset, place.offset + spec.nbytes)
        members[place.partition] = members.get(place.partition, 0) + (spec.nbytes > 0)
        assert last[place.partition][1] <= layout.partition_nbytes[place.partition]
    for partition, nbytes in enumerate(layout.partition_nbytes):
        assert nbytes % BLOCK_NBYTES == 0 and nbytes - last[partition][1] < BLOCK_NBYTES, "padded to whole blocks, no further"
        assert last[partition][1] <= limit or members[partition] <= 1, "only a single large storage may exceed the limit"


def test_execution_order_of_the_usual_families() -> None:
    llama = ["lm_head.weight", "model.norm.weight", "model.layers.10.w", "model.layers.2.w", "model.embed_tokens.weight"]
    assert execution_order(llama) == [
        ("embedding", ["model.embed_tokens.weight"]),
        ("model.layers.2", ["model.layers.2.w"]),
        ("model.layers.10", ["model.layers.10.w"]),
        ("head", ["lm_head.weight", "model.norm.weight"]),
    ]
    gpt2 = ["transformer.h.0.attn.bias", "transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.bias", "h.1.w"]
    assert [layer for layer, _ in execution_order(gpt2)] == ["embedding", "h.1", "transformer.h.0", "head"]
    opt = ["model.decoder.embed_positions.weight", "model.decoder.layers.0.fc1.weight", "model.decoder.final_layer_norm.bias"]
    assert [layer for layer, _ in execution_order(opt)] == ["embedding", "model.decoder.layers.0", "head"]
    t5 = ["decoder.block.0.layer.0.w", "encoder.block.1.layer.0.w", "shared.weight"]
    assert [layer for layer, _ in execution_order(t5)] == ["encoder.block.1", "decoder.block.0", "head"]


@given(st.lists(st.text(alphabet="abh.0123layers_embed", min_size=1, max_size=20), unique=True, max_size=30))
def test_execution_order_loses_no_name(names: list[str]) -> None:
    groups = execution_order(names)
    assert sorted(name for _, group in groups for name in group) == sorted(names)
    assert len({layer for layer, _ in groups}) == len(groups)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 5 * LEAF_NBYTES + 7), st.integers(0, 2**32 - 1))
def test_a_chunk_digest_is_the_hash_of_its_leaves_hashes(nbytes: int, seed: int) -> None:
    data = (struct.pack("<I", seed) * (nbytes // 4 + 1))[:nbytes]
    leaves = b"".join(xxhash.xxh3_64_digest(data[at : at + 65536])[::-1] for at in range(0, nbytes, 65536))
    assert chunk_digest(memoryview(data)) == xxhash.xxh3_64(leaves).hexdigest()


def test_chunks_are_hashed_apart() -> None:
    data = bytearray(2 * CHUNK_NBYTES + 4096)
    before = chunk_digests(memoryview(data))
    data[CHUNK_NBYTES] ^= 1
    after = chunk_digests(memoryview(data))
    assert [one == two for one, two in zip(before, after, strict=True)] == [True, False, True]


def small_index() -> Index:
    return Index(
        total_nbytes=4096,
        block_nbytes=BLOCK_NBYTES,
        chunk_nbytes=CHUNK_NBYTES,
        leaf_nbytes=LEAF_NBYTES,
        partitions=[PartitionEntry("data-00000.bin", 4096, 4096, "none", None, "0123456789abcdef")],
        layers=["embedding", "head"],
        tensors=[
            TensorEntry("a", "float32", (2, 3), (3, 1), 0, 0, 24, 0, 0),
            TensorEntry("tie", "float32", (3,), (1,), 0, 12, 12, 0, 1),
            TensorEntry("b", "int8", (), (), 0, 256, 1, 1, 1),
            TensorEntry("empty", "int64", (0, 5), (5, 1), 0, 256, 0, 2, 1),
        ],
        composites=[],
        companions=[CompanionEntry("config.json", 2, "0" * 16)],
    )


def test_an_index_comes_back_as_it_was() -> None:
    assert decode_index(encode_index(small_index()), "index.json") == small_index()


def test_every_flipped_bit_of_an_index_is_found() -> None:
    raw = bytearray(encode_index(small_index()))
    for bit in range(len(raw) * 8):
        raw[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError):
            decode_index(bytes(raw), "index.json")
        raw[bit // 8] ^= 1 << bit % 8
    for changed in (bytes(raw) + b"\n", bytes(raw) + b" ", b" " + bytes(raw)):
        with pytest.raises(FormatError):
            decode_index(changed, "index.json")


def change(tensor: int, **fields: object) -> Index:
    index = small_index()
    index.tensors[tensor] = msgspec.structs.replace(index.tensors[tensor], **fields)
    return index


@pytest.mark.parametrize(
    ("index", "says"),
    [
        (change(2, offset=8), "overlap"),
        (change(2, offset=4096), "ends outside"),
        (change(0, nbytes=20), "do not span"),
        (change(0, stride=(4, 1)), "do not span"),
        (change(1, offset=13, storage=0), "misaligned"),
        (change(2, name="a"), "two tensors"),
        (change(2, dtype="float128"), "unknown dtype"),
        (change(2, partition=1), "does not exist"),
        (change(2, layer=0), "execution order"),
        (change(2, layer=2), "execution order"),
        (change(0, stride=(3,)), "strides"),
        (msgspec.structs.replace(small_index(), total_nbytes=1), "add up"),
        (msgspec.structs.replace(small_index(), chunk_nbytes=1), "chunks"),
        (msgspec.structs.replace(small_index(), companions=[CompanionEntry("../x", 2, "0" * 16)]), "plain file name"),
        (msgspec.structs.replace(small_index(), companions=[CompanionEntry("data-00007.bin", 2, "0" * 16)]), "plain file name"),
    ],
)
def test_a_rule_that_is_broken_is_named(index: Index, says: str) -> None:
    with pytest.raises(FormatError, match=says) as caught:
        decode_index(encode_index(index), "some/index.json")
    assert "some/index.json" in str(caught.value)
