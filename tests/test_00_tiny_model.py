"""The tiny trained model in data/models/: its text, its training, and what the shipped weights can do."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

MODELS = Path(__file__).resolve().parents[1] / "data" / "models"
TINY = MODELS / "tiny"
NUMBER = r"[A-Za-z0-9]+"


@pytest.fixture(scope="module")
def scripts() -> Iterator[tuple[Any, Any]]:
    """The modules `corpus` and `train`, with torch's process-wide settings put back afterwards."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(MODELS))
        yield importlib.import_module("corpus"), importlib.import_module("train")
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    for name in ("corpus", "train", "words"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(TINY).eval()


def answers(model: Any, tokenizer: Any, prompts: list[str], count: int) -> list[str]:
    """Greedy continuations of prompts that carry their own special tokens, batched with padding on the left."""
    batch = tokenizer(prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**batch, max_new_tokens=count, do_sample=False)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in output[:, batch["input_ids"].shape[1] :]]


def chat_prompt(tokenizer: Any, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


# --- the text ---------------------------------------------------------------------------------------------------------


def texts(corpus: Any, count: int, seed: int = 0, stream: str = "train", long: bool = False) -> list[str]:
    return list(islice(corpus.documents(seed, stream, long), count))


def test_the_text_is_the_same_for_a_seed_and_different_for_another(scripts: Any) -> None:
    corpus, _ = scripts
    once = texts(corpus, 500)
    assert texts(corpus, 500) == once
    others = [texts(corpus, 500, seed=1), texts(corpus, 500, stream="validation"), texts(corpus, 500, long=True)]
    assert all(len(set(other) & set(once)) < 25 for other in others)


def test_the_text_does_not_depend_on_the_hash_seed_of_the_process() -> None:
    outputs = [
        subprocess.run(
            [sys.executable, MODELS / "corpus.py", "--count", "300"],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONIOENCODING": "utf-8"},
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) > 100_000


def test_every_sum_in_the_text_is_right(scripts: Any) -> None:
    corpus, _ = scripts

    def value(word: str) -> int:
        return int(word) if word.isdigit() else corpus.NUMBERS.index(word.lower())

    text = "\n".join(texts(corpus, 4000) + texts(corpus, 200, long=True))
    pattern = rf"({NUMBER}) (\+|-|plus|minus) ({NUMBER}) (?:=|is) ({NUMBER})"
    found = re.findall(pattern, text)
    assert len(found) > 5000
    for a, sign, b, result in found:
        assert (value(a) + value(b) if sign in ("+", "plus") else value(a) - value(b)) == value(result)
    assert len({(a, sign, b) for a, sign, b, _ in found if a.isdigit() and sign in "+-"}) > 400  # of 462
    counted = re.findall(rf"{pattern},[\"”] \w+ [^.]+\. (?:Now|So now|Then) [^.]*?(?:had|were) ({NUMBER})", text)
    assert len(counted) > 200
    for *_, result, had in counted:
        assert value(result) == value(had)


def test_the_text_is_varied_and_its_vocabulary_small(scripts: Any) -> None:
    corpus, _ = scripts
    documents = texts(corpus, 4000)
    sentences = [s for text in documents for s in re.split(r"(?<=[.!?])[\"”]? |\n|<\|\w+\|>", text) if s]
    assert len(set(sentences)) > 12_000
    assert 400 < len(set(re.findall(r"\w+", " ".join(documents).lower()))) < 900
    assert not re.search(r"[{}]|\ba [aeiou]|  ", " ".join(documents)), "an unfilled slot, a wrong article or a double space"
    assert {"é", "“", "”", "—"} < set("".join(documents))


def test_the_end_of_a_long_story_needs_its_beginning(scripts: Any, tokenizer: Any) -> None:
    corpus, _ = scripts
    lengths, recalled = [], 0
    for text in texts(corpus, 200, long=True):
        paragraphs = text.split("\n\n")
        lengths.append(len(tokenizer(text, add_special_tokens=False)["input_ids"]))
        for pattern in (r"The secret word is (\w+)", r"the number (\w+)", r"bring ([\w. ]+? an? [\w ]+)\."):
            told, last = re.search(pattern, paragraphs[0]), paragraphs[-1]
            if told:
                recalled += 1
                assert told[1] in last
                assert told[0] not in "".join(paragraphs[1:-1])
    assert recalled > 300
    assert sum(length <= 1024 for length in lengths) >= 0.98 * len(lengths)
    assert sum(length >= 600 for length in lengths) >= 0.4 * len(lengths)


def test_chats_in_the_text_are_written_as_the_chat_template_writes_them(scripts: Any, tokenizer: Any) -> None:
    corpus, _ = scripts
    chats = [text for text in texts(corpus, 400) if text.startswith((corpus.BEGIN + corpus.USER, corpus.BEGIN + corpus.SYSTEM))]
    assert len(chats) > 60
    assert any(corpus.SYSTEM in text for text in chats)
    for text in chats:
        turns = re.findall(r"<\|(system|user|assistant)\|>\n(.*?)<\|end\|>\n", text, flags=re.DOTALL)
        messages = [{"role": role, "content": content} for role, content in turns]
        assert tokenizer.apply_chat_template(messages, tokenize=False) == text


# --- the tokenizer ----------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=80))
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = _cached_tokenizer()
    assume(not any(token in text for token in tokenizer.all_special_tokens))  # the name of one is that token, wherever it stands
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


_TOKENIZERS: list[Any] = []


def _cached_tokenizer() -> Any:
    # hypothesis does not take fixtures of a wider scope gladly; loading once a run is enough.
    if not _TOKENIZERS:
        _TOKENIZERS.append(AutoTokenizer.from_pretrained(TINY))
    return _TOKENIZERS[0]


def test_characters_can_span_tokens_and_digits_never_merge(tokenizer: Any) -> None:
    for text in ("Zoé said, “Hello” — and left.", "A star 🌟, rain 🌧️ and 日本語.", "12 + 7 = 19."):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert b"".join(_bytes_of(tokenizer, i) for i in ids).decode() == text
    star = tokenizer("🌟", add_special_tokens=False)["input_ids"]
    assert len(star) > 1
    assert "\ufffd" in tokenizer.decode(star[:1])
    assert tokenizer.convert_ids_to_tokens(tokenizer("2048", add_special_tokens=False)["input_ids"]) == list("2048")


def _bytes_of(tokenizer: Any, token_id: int) -> bytes:
    # GPT-2's byte alphabet: printable bytes stand for themselves, the others for the code points from 256 on.
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    table = {chr(byte): byte for byte in kept} | {chr(256 + i): byte for i, byte in enumerate(others)}
    return bytes(table[character] for character in tokenizer.convert_ids_to_tokens(token_id))


# --- the training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "precision"), [(2, "float32"), pytest.param(3, "bfloat16", marks=pytest.mark.slow)])
def test_some_steps_give_the_same_bytes_in_another_process(scripts: Any, tmp_path: Path, steps: int, precision: str) -> None:
    """In bfloat16, as the shipped one was, a step takes six seconds here."""
    _, train = scripts
    command = [sys.executable, str(MODELS / "train.py"), "--steps", str(steps), "--precision", precision, "--out", str(tmp_path / "there")]
    with (
        open(tmp_path / "log", "w", encoding="utf-8") as log,
        open(tmp_path / "other log", "w", encoding="utf-8") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, "PYTHONHASHSEED": "3"}) as other,
    ):
        try:
            facts = train.train(train.TrainOptions(steps=steps, precision=precision), tmp_path / "here", log)
            other.wait()
        finally:
            other.kill()
    assert other.returncode == 0, (tmp_path / "other log").read_text(encoding="utf-8")
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json", "loss_curve.csv"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes(), name
    assert facts["sha256"] == hashlib.sha256((tmp_path / "there" / "model.safetensors").read_bytes()).hexdigest()
    # The tokenizer is trained on integers alone, so every machine makes the one that is shipped.
    shipped, made = (json.loads((folder / "tokenizer.json").read_text("utf-8")) for folder in (TINY, tmp_path / "here"))
    assert made["model"] == shipped["model"]


def test_another_seed_trains_on_other_rows(scripts: Any, tokenizer: Any) -> None:
    _, train = scripts
    first = [next(train.rows(tokenizer, seed, "train", length)) for seed in (0, 1) for length in (train.SHORT, train.LONG)]
    assert [len(row) for row in first] == [train.SHORT, train.LONG] * 2
    assert first[0] != first[2] and first[1] != first[3]
    assert next(train.rows(tokenizer, 0, "train", train.SHORT)) == first[0]


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--threads", "0"], ["--precision", "int8"]])
def test_bad_options_are_refused_before_anything_is_written(scripts: Any, tmp_path: Path, arguments: list[str]) -> None:
    _, train = scripts
    with pytest.raises(SystemExit) as stopped:
        train.main([*arguments, "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert not (tmp_path / "out").exists()


# --- what is shipped --------------------------------------------------------------------------------------------------


def test_the_folder_is_small_and_whole() -> None:
    files = [path for path in MODELS.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    names = {path.name for path in TINY.iterdir()}
    assert names >= {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "loss_curve.csv", "training.json", "README.md",
    }  # fmt: skip
    digest = hashlib.sha256((TINY / "model.safetensors").read_bytes()).hexdigest()
    assert json.loads((TINY / "training.json").read_text("utf-8"))["sha256"] == digest
    assert digest in (TINY / "README.md").read_text("utf-8")


def test_the_configuration_is_what_later_chapters_count_on(model: Any, tokenizer: Any) -> None:
    config = model.config
    assert config.model_type == "llama"
    assert config.num_hidden_layers >= 6
    assert 1 <= config.num_key_value_heads < config.num_attention_heads
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert config.max_position_embeddings >= 1024
    assert config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert config.vocab_size == len(tokenizer)
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert special == (config.bos_token_id, config.eos_token_id, config.pad_token_id)
    assert special[1] == model.generation_config.eos_token_id


def test_the_loss_curve_ends_where_the_record_says_and_fell(scripts: Any) -> None:
    lines = [line.split(",") for line in (TINY / "loss_curve.csv").read_text("utf-8").splitlines()]
    facts = json.loads((TINY / "training.json").read_text("utf-8"))
    first, last = (dict(zip(lines[0], map(float, line), strict=True)) for line in (lines[1], lines[-1]))
    assert last["step"] == facts["steps"]
    for key in ("validation_loss_256", "validation_loss_1024"):
        assert last[key] == pytest.approx(facts[key], abs=1e-5)
        assert last[key] < 0.6 * first[key]


def test_the_recorded_validation_loss_is_reproduced(scripts: Any, model: Any, tokenizer: Any) -> None:
    _, train = scripts
    facts = json.loads((TINY / "training.json").read_text("utf-8"))
    for length, loss in train.evaluate(model, tokenizer, facts["seed"]).items():
        assert loss == pytest.approx(facts[f"validation_loss_{length}"], rel=0.02)
    model.eval()


def test_what_it_writes_is_made_of_the_words_of_its_world(scripts: Any, model: Any, tokenizer: Any) -> None:
    corpus, _ = scripts
    known = set(re.findall(r"\w+", " ".join(texts(corpus, 8000)).lower()))
    starts = ("", "Once upon a time", "One sunny morning, Mia", "Bruno was afraid of", "Luna and Zoé found a golden key")
    prompts = [corpus.BEGIN + start for start in starts] + [chat_prompt(tokenizer, "Tell me a story about Fern and Pip.")]
    written = answers(model, tokenizer, prompts, 90)
    words = re.findall(r"\w+", " ".join(start + text for start, text in zip([*starts, ""], written, strict=True)).lower())
    assert len(words) > 200
    assert sum(word in known for word in words) >= 0.95 * len(words)
    assert all(re.search(r"[.!?]", text) for text in written)


def test_most_small_sums_in_digits_are_right(scripts: Any, model: Any, tokenizer: Any) -> None:
    corpus, _ = scripts
    rng = Random("sums of the test")
    asked: list[tuple[str, str]] = []
    while len(asked) < 100:
        a, sign, b, result = corpus.draw_sum(rng)
        asked.append((f"What is {a} {sign} {b}?", f"{a} {sign} {b} is {result}."))
    written = answers(model, tokenizer, [chat_prompt(tokenizer, question) for question, _ in asked], 14)
    right = sum(text.strip() == answer for text, (_, answer) in zip(written, asked, strict=True))
    assert right >= 0.8 * len(asked)


def test_late_positions_are_no_worse_than_early_ones(scripts: Any, model: Any, tokenizer: Any) -> None:
    _, train = scripts
    batch = torch.tensor(list(islice(train.rows(tokenizer, 7, "validation", train.LONG), 8)))
    with torch.no_grad():
        losses = torch.cat([train.token_losses(model, part) for part in batch.split(4)])
    assert losses[:, 900:1000].mean() < 1.15 * losses[:, 150:250].mean()
