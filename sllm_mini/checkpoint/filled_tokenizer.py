"""A tokenizer for shapes without one: the tiny model's byte-level BPE, its vocabulary filled up to the size asked for.

The published tokenizers are megabytes of other people's data, and a random model needs none of their merges; what it
needs is that every id it emits can be seen. So the first ids split English text as the tiny model's do, and any other
id decodes to its own number, such as ⟨5123⟩. Costs the text of the vocabulary (4 MB for 128,256 entries). Taught in
chapter 01.
"""

from __future__ import annotations

import json
from typing import Any

from sllm_mini.checkpoint.shapes import Shape
from sllm_mini.errors import ModelError, ResourceError
from sllm_mini.resources import resource

# transformers reads every Qwen2 tokenizer with these parts, whatever its files say; saying the same keeps readers agreed.
_QWEN_2 = {
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {
                    "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                },
                "behavior": "Isolated",
                "invert": False,
            },
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        ],
    },
}
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def filled_tokenizer(shape: Shape) -> dict[str, str]:
    """The text of tokenizer.json and tokenizer_config.json with exactly the shape's `vocab_size` entries, by file name.

    Ids of the tiny tokenizer keep their text, except its special tokens and those whose id the shape gives to a special
    token of its own (OPT's 1 and 2): a displaced piece moves to the first free id above. Raises ResourceError if the
    tiny tokenizer is absent or unreadable, ModelError if it does not fit. Safe from several threads.
    """
    source = resource("data/models/tiny/tokenizer.json")
    size = shape.config["vocab_size"]
    try:
        parts = json.loads(source.read_text(encoding="utf-8"))
        pieces = {number: text for text, number in parts["model"]["vocab"].items()}
        ours = {token["content"] for token in parts["added_tokens"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResourceError(f"{source} is not a tokenizer that can be read ({error!r}); reinstall sllm_mini") from error
    if size < len(pieces) + len(shape.special_tokens):
        raise ModelError(f"a vocabulary of {size} has no room for the {len(pieces)} entries of the tiny tokenizer; make it larger")
    vocabulary = [f"⟨{number}⟩" for number in range(size)]
    displaced = []
    for number, piece in pieces.items():
        if number in shape.special_tokens and piece not in ours:
            displaced.append(piece)
        elif piece not in ours:
            vocabulary[number] = piece
    for number, text in shape.special_tokens.items():
        vocabulary[number] = text
    free = (number for number in range(max(pieces) + 1, size) if number not in shape.special_tokens)
    for number, piece in zip(free, displaced, strict=False):
        vocabulary[number] = piece
    parts["model"]["vocab"] = {text: number for number, text in enumerate(vocabulary)}
    parts["added_tokens"] = [{"id": number, "content": text, **_FLAGS} for number, text in sorted(shape.special_tokens.items())]
    names = {role: shape.special_tokens.get(shape.config.get(f"{role}_id", -1)) for role in ("bos_token", "eos_token", "pad_token")}
    parts["post_processor"] = _prepend(names["bos_token"], shape.config["bos_token_id"]) if shape.prepends_bos else None
    if shape.config["model_type"] == "qwen2":
        parts |= _QWEN_2
        names["pad_token"] = names["eos_token"]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{role: text for role, text in names.items() if text is not None},
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.config.get("max_position_embeddings", shape.config.get("n_positions")),
    }
    return {
        "tokenizer.json": json.dumps(parts, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
    }


def _prepend(text: str | None, number: int) -> dict[str, Any]:
    """The post-processor that begins every text with one special token."""
    begin, first = {"SpecialToken": {"id": text, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    special = {text: {"id": text, "ids": [number], "tokens": [text]}}
    return {"type": "TemplateProcessing", "single": [begin, first], "pair": [begin, first, second], "special_tokens": special}
