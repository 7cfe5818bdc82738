"""The model that moves in `bench migrate`: small, with random weights and a long context, so that two fit on any laptop."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from sllm_mini.checkpoint import Checkpoint, convert_checkpoint, open_checkpoint
from sllm_mini.checkpoint.random_model import make_model
from sllm_mini.checkpoint.shapes import Shape

SMALL = Shape(
    name="small-llama",
    source="made for this bench, published by nobody",
    trust="it is its own definition",
    dtype="float32",
    parameters=29_368_832,
    config={
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1536,
        "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 8192,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "initializer_range": 0.02, "tie_word_embeddings": False, "attention_bias": False,
        "mlp_bias": False, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "bos_token_id": 0, "eos_token_id": 1, "dtype": "float32",
    },
    special_tokens={0: "<s>", 1: "</s>"},
)  # fmt: skip
"""A Llama of our own: its keys and values take 16 KiB a token."""


def moving_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """`SMALL` with random weights (seed 0) as a checkpoint below `folder`, made on first use. Raises what making one raises."""
    path = Path(folder) / SMALL.name
    if (path / "index.json").exists():
        return open_checkpoint(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".making-") as scratch:
        return convert_checkpoint(make_model(SMALL, Path(scratch, SMALL.name)), path)
