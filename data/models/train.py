"""Trains the tiny Llama-shaped model and its tokenizer from scratch on the text of `corpus.py` (chapter 00).

    python data/models/train.py --out out/tiny --log out/tiny.log

A plain torch loop: AdamW, warm-up, cosine. Three steps of four take 8 rows of 256 tokens (short documents, packed); every
fourth takes 2 rows of 1 024, each starting with a long story whose end needs its beginning. The same options, seed, thread
count, machine and library versions give the same bytes; elsewhere the validation loss agrees within 2 %. Costs about
15 million floating point operations per token trained and less than 2 GB of memory. Not safe to call from several
threads: it sets torch's seed and thread count.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TextIO

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import corpus
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SHORT, LONG = 256, 1024  # row lengths in tokens
TOKENS_PER_STEP = 2048
VALIDATION_ROWS = {SHORT: 32, LONG: 8}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """Everything that decides the bytes of the result. `tokenizer_chars` is how much text the tokenizer is trained on."""

    steps: int = 3000
    seed: int = 0
    threads: int = 1
    precision: str = "bfloat16"  # of the matrix products; the weights and their updates are float32 always
    peak_rate: float = 2.5e-3
    warmup_steps: int = 100
    vocab_size: int = 1024
    tokenizer_chars: int = 4_000_000
    evaluate_every: int = 100

    def __post_init__(self) -> None:
        if self.steps < 1 or self.threads < 1 or self.evaluate_every < 1:
            raise ValueError("steps, threads and evaluate_every are counts: give at least 1")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision is {self.precision!r}; it can be float32 or bfloat16")

    def rate(self, step: int) -> float:
        """The learning rate of a step: a linear warm-up, then a cosine down to 2 % of the peak."""
        warmup = min(self.warmup_steps, max(1, self.steps // 10))
        if step < warmup:
            return self.peak_rate * (step + 1) / warmup
        done = (step - warmup) / max(1, self.steps - warmup)
        return self.peak_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def train_tokenizer(options: TrainOptions) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in which every digit is a token of its own, so that numbers are spelled one way only."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()

    def texts() -> Iterator[str]:
        chars = 0
        for short, long in zip(corpus.documents(options.seed, "train"), corpus.documents(options.seed, "train", long=True), strict=True):
            for text in (short, long):
                for token in corpus.SPECIAL:
                    text = text.replace(token, "")
                yield text
                chars += len(text)
            if chars >= options.tokenizer_chars:
                return

    trainer = trainers.BpeTrainer(
        vocab_size=options.vocab_size,
        special_tokens=list(corpus.SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    begin = tokenizer.token_to_id(corpus.BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{corpus.BEGIN} $A", pair=f"{corpus.BEGIN} $A $B", special_tokens=[(corpus.BEGIN, begin)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=corpus.BEGIN,
        eos_token=corpus.END,
        pad_token=corpus.PAD,
        additional_special_tokens=[corpus.SYSTEM, corpus.USER, corpus.ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=LONG,
        clean_up_tokenization_spaces=False,
    )


def _encoded(tokenizer: PreTrainedTokenizerFast, texts: Iterator[str]) -> Iterator[list[int]]:
    # The texts carry their own <|begin|>, so no special token is added. Batches of 64 keep the tokenizer's cores busy.
    while True:
        batch = tokenizer.backend_tokenizer.encode_batch(list(islice(texts, 64)), add_special_tokens=False)
        yield from (encoding.ids for encoding in batch)


def rows(tokenizer: PreTrainedTokenizerFast, seed: int, stream: str, length: int) -> Iterator[list[int]]:
    """An endless stream of rows of `length` token ids, packed with documents; rows of LONG each begin with a long story."""
    short = _encoded(tokenizer, corpus.documents(seed, stream if length == SHORT else f"{stream}-fill"))
    long = _encoded(tokenizer, corpus.documents(seed, stream, long=True))
    pending: list[int] = []
    while True:
        row = pending if length == SHORT else next(long)
        while len(row) < length:
            row = row + next(short)
        yield row[:length]
        pending = row[length:]


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained model: 6 layers of width 192, 6 query heads on 2 key-value heads, tied embeddings, 2.6 million weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2 * LONG,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
        initializer_range=0.06,  # about 1 / sqrt(width); the usual 0.02 suits wider models and learns more slowly here
    )
    return LlamaForCausalLM(config)


def token_losses(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """The loss in nats of each token after the first, given those before it: [rows, length] ids to [rows, length - 1]."""
    logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")


def evaluate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int = 0, stream: str = "validation") -> dict[int, float]:
    """Mean validation loss in nats per token for each row length, in float32, on text of a stream that is never trained on."""
    losses: dict[int, float] = {}
    model.eval()
    with torch.no_grad():
        for length, count in VALIDATION_ROWS.items():
            batch = torch.tensor(list(islice(rows(tokenizer, seed, stream, length), count)))
            parts = [token_losses(model, part) for part in batch.split(TOKENS_PER_STEP // length)]
            losses[length] = torch.cat(parts).mean().item()
    model.train()
    return losses


def _groups(model: LlamaForCausalLM) -> list[dict[str, object]]:
    # Norm weights are gains around one: pulling them to zero would only fight the loss.
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def train(options: TrainOptions, out: Path, log: TextIO = sys.stdout) -> dict[str, object]:
    """Trains, writes the model, its tokenizer, loss_curve.csv and training.json to `out`, and gives back what the last holds.

    Existing files of those names in `out` are replaced, at the end, when training has succeeded.
    """
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    torch.use_deterministic_algorithms(True)
    begun = time.perf_counter()
    tokenizer = train_tokenizer(options)
    model = make_model(tokenizer)
    model.train()
    optimizer = torch.optim.AdamW(_groups(model), lr=options.peak_rate, betas=(0.9, 0.95), fused=True)
    sources = {length: rows(tokenizer, options.seed, "train", length) for length in (SHORT, LONG)}
    curve: list[dict[str, float]] = []
    recent: list[float] = []
    for step in range(options.steps):
        length = LONG if step % 4 == 3 else SHORT
        batch = torch.tensor(list(islice(sources[length], TOKENS_PER_STEP // length)))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.precision == "bfloat16"):
            loss = token_losses(model, batch).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = options.rate(step)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if (step + 1) % options.evaluate_every == 0 or step + 1 == options.steps:
            held_out = evaluate(model, tokenizer, options.seed)
            entry = {"step": step + 1, "tokens": (step + 1) * TOKENS_PER_STEP, "train_loss": sum(recent) / len(recent)}
            curve.append(entry | {f"validation_loss_{length}": value for length, value in held_out.items()})
            recent.clear()
            seconds = time.perf_counter() - begun
            print(json.dumps(curve[-1] | {"seconds": round(seconds), "tokens_per_second": round(entry["tokens"] / seconds)}), file=log, flush=True)
    return _save(options, out, model, tokenizer, curve, time.perf_counter() - begun)


def _save(
    options: TrainOptions,
    out: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    curve: list[dict[str, float]],
    seconds: float,
) -> dict[str, object]:
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # the library leaves it readable by its owner alone
    tokenizer.save_pretrained(out, save_jinja_files=False)
    with open(out / "loss_curve.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(curve[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: f"{value:.5f}" if isinstance(value, float) else value for key, value in line.items()} for line in curve)
    facts: dict[str, object] = {
        "steps": options.steps,
        "seed": options.seed,
        "threads": options.threads,
        "precision": options.precision,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": round(seconds),
        **{key: value for key, value in curve[-1].items() if key != "step"},
        "sha256": hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return facts


def main(arguments: list[str] | None = None) -> None:
    """The command line: reads the options, trains, prints the facts of the run as JSON."""
    default = TrainOptions()
    parser = argparse.ArgumentParser(description="Train the tiny model and its tokenizer from scratch.")
    parser.add_argument("--steps", type=int, default=default.steps, help=f"optimizer steps of {TOKENS_PER_STEP} tokens ({default.steps})")
    parser.add_argument("--seed", type=int, default=default.seed, help=f"of the text and the weights ({default.seed})")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny", help="folder to write (data/models/tiny)")
    parser.add_argument("--threads", type=int, default=default.threads, help=f"threads; another count gives other bytes ({default.threads})")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default=default.precision, help="of matrix products; without bfloat16 instructions float32 is faster")
    parser.add_argument("--log", type=Path, help="write progress to this file instead of the terminal")
    given = parser.parse_args(arguments)
    transformers.utils.logging.disable_progress_bar()
    try:
        options = TrainOptions(steps=given.steps, seed=given.seed, threads=given.threads, precision=given.precision)
    except ValueError as error:
        parser.error(str(error))
    if given.log is None:
        facts = train(options, given.out)
    else:
        with open(given.log, "w", encoding="utf-8") as log:
            facts = train(options, given.out, log)
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
