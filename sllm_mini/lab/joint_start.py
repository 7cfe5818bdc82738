"""`bench multicast --serve` as one call: the first token of a burst, served from partial models by several nodes, and where each waits for its own copy.

Two live clusters of node processes that speak TCP differ in one option, `LiveOptions.joint`. Of each, half of the nodes have the model in memory
and no device, and feed the other half, which has a device each: in each round and on each cluster, in a shuffled order, as many requests come at
once as there are of these. Without `joint` a node takes its request while its bytes arrive and runs each layer when it is there, so its first
token comes with its last block: that is what is waited for. Every text must be the same in all runs. Shown in chapter 10.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from sllm_mini.checkpoint import Checkpoint, convert_checkpoint
from sllm_mini.checkpoint.hashing import CHUNK_NBYTES
from sllm_mini.cluster.api import Ask, Deployment
from sllm_mini.cluster.live.driver import LiveCluster
from sllm_mini.cluster.live.options import ControlOptions, LiveOptions, NodeOptions
from sllm_mini.cluster.simulated.run import even_cluster
from sllm_mini.control.messages import InstanceLoaded, InstanceReached, ModelSpec
from sllm_mini.control.multicast import JointStart, joint_start, k_way_pipeline, summarize
from sllm_mini.control.replay import read_log
from sllm_mini.errors import ResourceError
from sllm_mini.lab.tiers.origin import Origin
from sllm_mini.loading.probe import measure_machine
from sllm_mini.storage.incoming import cut_blocks
from sllm_mini.storage.layer_blocks import blocks_of_layers

KIND = "sllm-mini bench multicast --serve"
JOINT, WHOLE = "joint", "whole"
_SECONDS = 120.0
_HOST = "127.0.0.1"
_WIDTH, _INNER = 256, 688
_LAYER_NBYTES = 4 * (4 * _WIDTH * _WIDTH + 3 * _WIDTH * _INNER + 2 * _WIDTH)


@dataclass(frozen=True, slots=True)
class Options:
    """How to measure. `nodes`: how many nodes have the model in the end, half of which have it at the start. `blocks` of 2 MiB, about, are the model's.
    Raises ValueError for what measures nothing."""

    rounds: int = 3
    nodes: tuple[int, ...] = (4,)
    blocks: int = 16
    bytes_per_second: float = 20e6
    tokens: int = 48
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.blocks < 4 or self.tokens < 1 or self.bytes_per_second <= 0:
            raise ValueError("a joint start has at least one round, four blocks and a token, and links have a speed")
        if not self.nodes or any(count < 4 or count % 2 for count in self.nodes):
            raise ValueError(f"{', '.join(map(str, self.nodes))} nodes cannot be halved so that several serve together; give even numbers of 4 or more")


@dataclass(frozen=True, slots=True)
class Sample:
    """One burst, in seconds since it came: the first token of all its requests, the mean of their first tokens, and the first whole copy."""

    first: float
    mean: float
    whole: float
    texts: tuple[tuple[int, ...], ...]


def measure_joint_start(options: Options | None = None, *, folder: str | os.PathLike[str] | None = None, on_stage: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Measures every number of nodes; returns the document. Files lie below `folder` (None: the system's place for such) and are removed. Raises
    ResourceError for texts that differ, SllmError for a node that does not come up, OSError."""
    options = options or Options()
    say = on_stage or (lambda _: None)
    runner, rows = random.Random(options.seed), []
    with tempfile.TemporaryDirectory(prefix="sllm-joint-", dir=folder) as name, ExitStack() as stack:
        say("making a model")
        checkpoint = _make(Path(name, "model"), options)
        origin = stack.enter_context(Origin(Path(checkpoint.path)))
        sizes, needs = [block.nbytes for block in cut_blocks(checkpoint.index, CHUNK_NBYTES)], blocks_of_layers(checkpoint.index, CHUNK_NBYTES)
        blocks, seconds = len(sizes), (max(sizes) / options.bytes_per_second, min(sizes) / options.bytes_per_second)
        for count in options.nodes:
            samples: dict[str, list[Sample]] = {JOINT: [], WHOLE: []}
            with ExitStack() as opened:
                say(f"starting {count} nodes, twice")
                clusters = {way: opened.enter_context(_open(Path(name, f"{way}-{count}"), count, way == JOINT, options)) for way in samples}
                for turn in range(options.rounds):
                    for way in runner.sample(list(clusters), 2):
                        say(f"{count} nodes, round {turn + 1} of {options.rounds}: {way}")
                        samples[way].append(_burst(clusters[way], f"m{turn}", f"{origin.url.rpartition('/')[0]}/m{turn}", checkpoint, count // 2, options.tokens))
            plan = k_way_pipeline(count, blocks, count // 2, runs=True)
            rows.append(row_of(count, samples, joint_start(plan, needs), min(summarize(plan).complete[plan.sources :]), seconds))
        return {
            "kind": KIND,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "machine": asdict(measure_machine(name)),
            "model": {"blocks": blocks, "block_nbytes": CHUNK_NBYTES, "nbytes": checkpoint.nbytes, "layers": len(needs), "weights": "random (seed 0)"},
            "method": asdict(options) | {"links": "token buckets on loopback", "transport": "TCP"},
            "results": rows,
            "skipped": [],
        }


def row_of(nodes: int, samples: Mapping[str, Sequence[Sample]], planned: JointStart, whole_ticks: int, block_seconds: tuple[float, float]) -> dict[str, Any]:
    """A number of nodes in figures. `ratio` is the first token served jointly over that of a whole copy, of the same round; `floor` is the time of the
    plan's ticks at the link's nominal rate, without a process, a message or a pass: `block_seconds` of the longest block each, of the shortest once. `lead` is how long before the first whole copy of its own run the
    joint burst had its first token. Raises ResourceError where texts differ. Pure."""
    joint, whole = samples[JOINT], samples[WHOLE]
    if len({sample.texts for sample in (*joint, *whole)}) != 1:
        raise ResourceError(f"with {nodes} nodes, texts that were begun by several nodes are not those of one; a stage computed something else")
    longest, shortest = block_seconds
    values = {
        "joint_first": [sample.first for sample in joint],
        "whole_first": [sample.first for sample in whole],
        "ratio": [ours.first / theirs.first for ours, theirs in zip(joint, whole, strict=True)],
        "mean_ratio": [ours.mean / theirs.mean for ours, theirs in zip(joint, whole, strict=True)],
        "lead": [sample.whole - sample.first for sample in joint],
    }
    row: dict[str, Any] = {
        "name": f"{nodes} nodes", "nodes": nodes, "sources": nodes // 2, "stages": len(planned.stages), "joint_ticks": planned.tick, "whole_ticks": whole_ticks,
        "joint_floor": (planned.tick - 1) * longest + shortest, "whole_floor": (whole_ticks - 1) * longest + shortest, "floor_ratio": planned.tick / whole_ticks, "texts": len(joint) + len(whole),
    }  # fmt: skip
    for key, taken in values.items():
        row |= {f"{key}_median": statistics.median(taken), f"{key}_min": min(taken), f"{key}_max": max(taken)}
    return row


def _make(path: Path, options: Options) -> Checkpoint:
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(options.seed)
    layers = max(2, round(options.blocks * CHUNK_NBYTES / _LAYER_NBYTES))
    config = LlamaConfig(
        hidden_size=_WIDTH, intermediate_size=_INNER, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4, vocab_size=512, max_position_embeddings=options.tokens + 16,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    source = path / "source"
    config.save_pretrained(source)
    weights = {name: torch.nn.init.normal_(parameter.data, std=0.3) for name, parameter in LlamaForCausalLM(config).named_parameters()}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    return convert_checkpoint(path / "source", path / "model.sllm")


def _open(folder: Path, count: int, joint: bool, options: Options) -> LiveCluster:
    specs = [replace(spec, devices=0) if number < count // 2 else spec for number, spec in enumerate(even_cluster(count, devices=1))]
    node = NodeOptions(
        store_dram_nbytes=4 * (options.blocks + 8) * CHUNK_NBYTES, block_nbytes=CHUNK_NBYTES, link_bytes_per_second=options.bytes_per_second, beat_seconds=0.5, silent_seconds=10.0,
    )  # fmt: skip
    live = LiveOptions(node=node, host=_HOST, multicast="binomial", overlap=True, joint=joint, gather_seconds=0.05, join_seconds=_SECONDS)
    return LiveCluster.open("local", specs, ControlOptions(), folder, live)


def _burst(cluster: LiveCluster, model: str, source: str, checkpoint: Checkpoint, count: int, tokens: int) -> Sample:
    """As many requests at once as nodes want the model, which as many others have."""
    cluster.deploy(Deployment(ModelSpec(name=model, nbytes=checkpoint.nbytes), source))
    holders = [node.name for node in cluster.nodes() if not node.spec.devices]
    if failed := [each.error for each in cluster.spread(model, holders, timeout=_SECONDS).values() if each.error]:
        raise ResourceError(f"a node could not be given the model: {failed[0]}")
    before = cluster.now
    streams = [cluster.submit(Ask(model, [5, 6, 7, number], tokens, stop_at_eos=False)) for number in range(count)]
    texts = tuple(tuple(piece.token_id for piece in stream) for stream in streams)
    firsts = [stream.wait(_SECONDS).first - before for stream in streams]
    if not cluster.wait(lambda _: bool(_whole(cluster, before)), _SECONDS):
        raise ResourceError(f"no node had {model} whole within {_SECONDS:g} s")
    sample = Sample(min(firsts), statistics.mean(firsts), min(_whole(cluster, before)) - before, texts)
    cluster.delete(model)
    if not cluster.wait(lambda _: not any(node.instances or node.store is None or node.store.dram_used_nbytes for node in cluster.nodes()), _SECONDS):
        raise ResourceError(f"nodes still hold {model} {_SECONDS:g} s after it was deleted")
    return sample


def _whole(cluster: LiveCluster, since: float) -> list[float]:
    """When instances had their last byte, since then."""
    return [
        record.now for record in read_log(cluster.log())
        if record.now >= since and (isinstance(record.event, InstanceLoaded) or (isinstance(record.event, InstanceReached) and record.event.whole))
    ]  # fmt: skip
