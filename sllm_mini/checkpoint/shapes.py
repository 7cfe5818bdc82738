"""The published shapes `make-model` can write: each model's own configuration, as data (chapter 01).

A shape is everything about a model but its trained values: names, sizes and types of its tensors, and how its
vocabulary is numbered. Loading times depend on nothing else. Costs nothing to import: no torch, no transformers.

The configurations are the `config.json` of the repository that `source` names, in the spelling of transformers 5
(`dtype`, `rope_parameters`). Left out: what names a tool's version, sampling defaults (GPT-2's
`task_specific_params`) and settings no model reads any more (`prefix`, `activation_dropout`, `pretraining_tp`).
`trust` says how far values and parameter count were checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from sllm_mini.errors import ModelError


@dataclass(frozen=True, slots=True)
class Shape:
    """One published model without its weights.

    `config` is a transformers configuration with its `model_type`; `parameters` counts each tied tensor once;
    `special_tokens` gives the text of the ids that `config` names; `prepends_bos` whether the published tokenizer
    begins every text with the beginning-of-sequence token. Immutable, so safe from several threads.
    """

    name: str
    source: str
    trust: str
    dtype: str
    parameters: int
    config: Mapping[str, Any]
    special_tokens: Mapping[int, str]
    prepends_bos: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of its weights in the published dtype."""
        return self.parameters * (4 if self.dtype == "float32" else 2)


_COPIES = "values agree with public copies of the file; the parameter count with published ones and by arithmetic"
_TO_THE_BYTE = f"{_COPIES}; the sizes of its weight files agree to the byte"
_PARTLY = "values agree with public copies of the file; the parameter count by arithmetic only"

_OPT = {
    "model_type": "opt",
    "vocab_size": 50272,
    "max_position_embeddings": 2048,
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "attention_dropout": 0.0,
    "dropout": 0.1,
    "layerdrop": 0.0,
    "init_std": 0.02,
    "use_cache": True,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
_OPT_TOKENS = {1: "<pad>", 2: "</s>"}

_LLAMA_3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "use_cache": True,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_LLAMA_3_TOKENS = {128000: "<|begin_of_text|>", 128001: "<|end_of_text|>"}

_QWEN_25 = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "use_mrope": False,
    "initializer_range": 0.02,
    "use_cache": True,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}
_QWEN_25_TOKENS = {151643: "<|endoftext|>"}


def _opt(name: str, trust: str, parameters: int, layers: int, hidden: int, heads: int) -> Shape:
    config = {
        **_OPT,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "ffn_dim": 4 * hidden,
        "num_attention_heads": heads,
    }
    return Shape(name, f"facebook/{name}", trust, "float16", parameters, config, _OPT_TOKENS, prepends_bos=True)


def _llama_3_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


_ALL = (
    Shape(
        "gpt2",
        "openai-community/gpt2",
        _COPIES,
        "float32",
        124_439_808,
        {
            "model_type": "gpt2",
            "vocab_size": 50257,
            "n_positions": 1024,
            "n_ctx": 1024,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "n_inner": None,
            "activation_function": "gelu_new",
            "attn_pdrop": 0.1,
            "embd_pdrop": 0.1,
            "resid_pdrop": 0.1,
            "layer_norm_epsilon": 1e-05,
            "initializer_range": 0.02,
            "summary_type": "cls_index",
            "summary_use_proj": True,
            "summary_activation": None,
            "summary_proj_to_labels": True,
            "summary_first_dropout": 0.1,
            "use_cache": True,
            "bos_token_id": 50256,
            "eos_token_id": 50256,
        },
        {50256: "<|endoftext|>"},
    ),
    _opt("opt-125m", _COPIES, 125_239_296, layers=12, hidden=768, heads=12),
    _opt("opt-1.3b", _COPIES, 1_315_758_080, layers=24, hidden=2048, heads=32),
    _opt("opt-6.7b", _PARTLY, 6_658_473_984, layers=32, hidden=4096, heads=32),
    Shape(
        "llama-3.2-1b",
        "meta-llama/Llama-3.2-1B",
        _TO_THE_BYTE,
        "bfloat16",
        1_235_814_400,
        {
            **_LLAMA_3,
            "num_hidden_layers": 16,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_attention_heads": 32,
            "head_dim": 64,
            "rope_parameters": _llama_3_rope(32.0),
            "tie_word_embeddings": True,
        },
        _LLAMA_3_TOKENS,
        prepends_bos=True,
    ),
    Shape(
        "llama-3.1-8b",
        "meta-llama/Llama-3.1-8B",
        _TO_THE_BYTE,
        "bfloat16",
        8_030_261_248,
        {
            **_LLAMA_3,
            "num_hidden_layers": 32,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "head_dim": 128,
            "rope_parameters": _llama_3_rope(8.0),
            "tie_word_embeddings": False,
        },
        _LLAMA_3_TOKENS,
        prepends_bos=True,
    ),
    Shape(
        "qwen2.5-0.5b",
        "Qwen/Qwen2.5-0.5B",
        _TO_THE_BYTE,
        "bfloat16",
        494_032_768,
        {
            **_QWEN_25,
            "vocab_size": 151936,
            "max_position_embeddings": 32768,
            "num_hidden_layers": 24,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "max_window_layers": 24,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
        },
        _QWEN_25_TOKENS,
    ),
    Shape(
        "qwen2.5-7b",
        "Qwen/Qwen2.5-7B",
        _COPIES,
        "bfloat16",
        7_615_616_512,
        {
            **_QWEN_25,
            "vocab_size": 152064,
            "max_position_embeddings": 131072,
            "num_hidden_layers": 28,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_window_layers": 28,
            "sliding_window": 131072,
            "tie_word_embeddings": False,
        },
        _QWEN_25_TOKENS,
    ),
)

SHAPES: Mapping[str, Shape] = MappingProxyType({shape.name: shape for shape in _ALL})
"""Every published shape by its name on the command line."""


def find_shape(name: str) -> Shape:
    """The published shape called `name`. Raises ModelError, listing the names, if there is none."""
    shape = SHAPES.get(name)
    if shape is None:
        raise ModelError(f"there is no published shape called {name!r}; choose one of {', '.join(SHAPES)}")
    return shape
