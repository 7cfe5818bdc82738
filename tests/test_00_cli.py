"""The command line: every command for people and for programs, every error one sentence, every exit code kept."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from command_line import Ended, Run
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

import sllm_mini
from sllm_mini.cli import bars, checkpoints, inspection, machine, main, models, terminal, tour
from sllm_mini.errors import IntegrityError, ResourceError, SllmError
from sllm_mini.lab.anatomy import ColdStart
from sllm_mini.loading import probe
from sllm_mini.types import Span, Warmth

COMMANDS = ("tour", "doctor", "make-model", "convert", "export", "inspect", "verify", "load", "generate", "serve", "deploy", "delete", "ps", "unload", "pin", "simulate", "record", "compare", "bench")


def spawn(*args: str | Path, **options: Any) -> subprocess.Popen[str]:
    """Starts a command in a process of its own."""
    command = [sys.executable, "-m", "sllm_mini.cli.main", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 40 kB with a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("hf") / "tiny"
    vocabulary = {"<s>": 0, "</s>": 1} | {c: i + 2 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, bos_token_id=0, eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(hugging_face: Path) -> Path:
    from sllm_mini.checkpoint import convert_checkpoint

    return convert_checkpoint(hugging_face, hugging_face.parent / "checkpoint").path


def copied(checkpoint: Path, into: Path) -> Path:
    into.mkdir()
    for file in checkpoint.iterdir():
        (into / file.name).write_bytes(file.read_bytes())
    return into


def damaged(checkpoint: Path, into: Path) -> Path:
    """A copy of a checkpoint with one bit flipped in the middle of its data."""
    copied(checkpoint, into)
    data = bytearray((into / "data-00000.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (into / "data-00000.bin").write_bytes(data)
    return into


# --- the whole ---


def test_without_arguments_it_helps(run: Run) -> None:
    bare, asked = run(), run("--help")
    assert bare.code == asked.code == 0 and bare.out == asked.out
    assert all(f"\n  {command} " in bare.out for command in COMMANDS)
    assert "Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted" in " ".join(bare.out.split())
    assert "..." not in bare.out.partition("Commands:")[2], "a one-line help is too long for 80 columns"


@pytest.mark.parametrize("command", [*(command for command in COMMANDS if command != "bench"), "bench load"])
def test_every_command_explains_itself(command: str) -> None:
    shown = CliRunner().invoke(main.app, [*command.split(), "-h"], env={"COLUMNS": "80"})
    assert shown.exit_code == 0 and f"Usage: root {command}" in shown.output.replace("sllm-mini", "root")
    options = shown.output.partition("Options:")[2]
    assert "--json" in options and "-h, --help" in options
    assert max(map(len, shown.output.splitlines())) <= 80


def test_the_version(run: Run) -> None:
    assert run("--version").out == f"sllm-mini {sllm_mini.__version__}\n"


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom sllm_mini.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as ended:\n    assert ended.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'cupy', 'matplotlib', 'msgspec'} & set(sys.modules)\n"
        "sys.exit(f'--help imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_names_of_shapes_in_the_help_are_those_there_are() -> None:
    from sllm_mini.checkpoint.shapes import SHAPES

    assert tuple(SHAPES) == checkpoints.SHAPE_NAMES


@pytest.mark.parametrize(
    "args",
    [
        ("nonsense",),
        ("inspect",),
        ("inspect", "a", "b"),
        ("inspect", "a", "--nonsense"),
        ("convert", "a", "b", "--partition-size", "many"),
        ("convert", "a", "b", "--partition-size", "0"),
        ("convert", "a", "b", "--threads", "0"),
        ("load", "a", "--repeat", "0"),
        ("generate", "a"),
        ("generate", "a", "--prompt", "x", "--temperature", "-1"),
        ("generate", "a", "--prompt", "x", "--top-p", "2"),
        ("generate", "a", "--prompt", "x", "--temperature", "nan"),
        ("generate", "a", "--prompt", "x", "--max-new-tokens", "0"),
        ("generate", "a", "--prompt", "not ids", "--ids"),
        ("generate", "a", "--prompt", "x", "--seed", "-1"),
    ],
)
def test_wrong_usage_is_2(run: Run, args: Sequence[str]) -> None:
    ended = run(*args)
    assert ended.code == 2 and ended.out == "" and "Traceback" not in ended.err
    assert "Error" in ended.err


# --- errors ---

ERRORS: dict[str, tuple[tuple[str, ...], str]] = {
    "inspect what is not there": (("inspect", "{tmp}/nothing"), "{tmp}/nothing: there is no such directory"),
    "inspect a file": (("inspect", "{tmp}/file"), "{tmp}/file"),
    "inspect a model": (("inspect", "{hf}"), "sllm-mini convert"),
    "inspect garbage": (("inspect", "{tmp}/garbage"), "{tmp}/garbage/index.json: "),
    "verify damage": (("verify", "{tmp}/damaged"), "damaged/data-00000.bin at byte "),
    "load damage": (("load", "{tmp}/damaged"), "damaged/data-00000.bin at byte "),
    "generate from damage": (("generate", "{tmp}/damaged", "--prompt", "a"), "damaged/data-00000.bin at byte "),
    "generate from nothing": (("generate", "{tmp}/nothing", "--prompt", "a"), "no such directory"),
    "a prompt too long": (("generate", "{ck}", "--prompt", "a", "--max-new-tokens", "9999"), "128"),
    "a device nobody knows": (("load", "{ck}", "--device", "tpu"), "'tpu'"),
    "convert what is not there": (("convert", "{tmp}/nothing", "{tmp}/out"), "{tmp}/nothing: "),
    "convert what is no model": (("convert", "{tmp}/empty", "{tmp}/out"), "{tmp}/empty: "),
    "convert onto what is there": (("convert", "{hf}", "{tmp}/empty"), "{tmp}/empty: it exists already"),
    "convert to where nothing can be": (("convert", "{hf}", "/proc/nowhere/out"), "/proc/nowhere"),
    "export onto what is there": (("export", "{ck}", "{tmp}/empty"), "{tmp}/empty: it exists already"),
    "export what is not there": (("export", "{tmp}/nothing", "{tmp}/out"), "no such directory"),
    "make what nobody published": (("make-model", "gpt9", "{tmp}/out"), "gpt2, opt-125m"),
    "make an unknown dtype": (("make-model", "gpt2", "{tmp}/out", "--dtype", "int7"), "'int7'"),
    "make onto what is there": (("make-model", "gpt2", "{tmp}/empty"), "{tmp}/empty: it exists already"),
    "look at what is not there": (("doctor", "{tmp}/nothing"), "{tmp}/nothing: no file can be made there"),
    "look at a file": (("doctor", "{tmp}/file"), "{tmp}/file: no file can be made there"),
    "look at where nothing can be": (("doctor", "/proc"), "/proc: no file can be made there"),
    "tour an unknown model": (("tour", "--model", "gpt9"), "gpt2, opt-125m"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_is_one_sentence_and_1(
    run: Run, case: str, tmp_path: Path, hugging_face: Path, checkpoint: Path
) -> None:
    (tmp_path / "file").write_text("not a directory")
    (tmp_path / "empty").mkdir()
    (tmp_path / "garbage").mkdir()
    (tmp_path / "garbage" / "index.json").write_text('{"magic": 3')
    damaged(checkpoint, tmp_path / "damaged")
    before = sorted(tmp_path.rglob("*"))
    names = {"tmp": tmp_path, "hf": hugging_face, "ck": checkpoint}
    args = [arg.format(**names) for arg in ERRORS[case][0]]
    expected = ERRORS[case][1].format(**names)

    plain = run(*args)
    assert plain.code == 1 and plain.out == ""
    assert plain.err.startswith("Error: ") and plain.err.count("\n") == 1 and expected in plain.err

    asked = run(*args, "--json")
    assert asked.code == 1 and asked.out == "" and asked.err.count("\n") == 1
    assert f"Error: {asked.error['message']}\n" == plain.err
    assert set(asked.error) == {"type", "message", "path", "offset"}
    assert sorted(tmp_path.rglob("*")) == before, "a failed command left something behind"


def test_the_json_of_an_error_names_file_and_byte(run: Run, tmp_path: Path, checkpoint: Path) -> None:
    broken = damaged(checkpoint, tmp_path / "damaged")
    error = run("verify", broken, "--json").error
    assert (error["type"], error["path"], error["offset"]) == ("IntegrityError", str(broken / "data-00000.bin"), 0)
    error = run("inspect", tmp_path / "nothing", "--json").error
    assert (error["type"], error["offset"]) == ("CheckpointError", None)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (SllmError("two\nlines   of text"), "two lines of text"),
        (IntegrityError("it is short", path="x", offset=1234), "x at byte 1,234: it is short"),
        (PermissionError(13, "Permission denied", "/root/x"), "/root/x: Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("odd"), "odd"),
        (OSError(), "OSError"),
    ],
)
def test_the_sentence_of_an_error(run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("sllm_mini.checkpoint.open_checkpoint", fail)
    ended = run("inspect", "x")
    assert (ended.code, ended.err) == (1, f"Error: {sentence}\n")


def test_a_ctrl_c_is_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sllm_mini.checkpoint.open_checkpoint", interrupt)
    assert run("inspect", "x") == Ended(130, "", "Interrupted.\n")
    assert run("inspect", "x", "--json") == Ended(130, "", "Interrupted.\n")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("sllm_mini.checkpoint.open_checkpoint", bug)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        main.main(["inspect", "x"])


def test_a_real_ctrl_c_ends_doctor_and_leaves_nothing(tmp_path: Path) -> None:
    process = spawn("doctor", tmp_path, "--json")
    until = time.monotonic() + 60
    while not any("sllm-mini-probe" in name for name in open_files(process.pid)):
        assert process.poll() is None and time.monotonic() < until, "it never began to measure"
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "Interrupted.\n")
    assert list(tmp_path.iterdir()) == []


def open_files(pid: int) -> list[str]:
    """What the file descriptors of a process point to; those that close meanwhile are left out."""
    found = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(os.readlink(fd))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("form", ["--tensors", "--json"])
def test_a_reader_that_leaves_ends_it_quietly(checkpoint: Path, form: str) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "sllm_mini.cli.main", "inspect", str(checkpoint), form]
    with os.fdopen(write, "wb") as stdout:
        # Buffered, as in most shells: the last bytes leave when the command is over.
        surroundings = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, env=surroundings, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_terminal_that_knows_only_ascii_is_no_reason_to_fail(checkpoint: Path) -> None:
    process = spawn(
        "inspect", checkpoint, "--tensors", env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    )
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "") and "\\xd7" in out


# --- make, convert, export, verify ---


def test_convert_for_people(run: Run, hugging_face: Path, tmp_path: Path) -> None:
    ended = run("convert", hugging_face, tmp_path / "out")
    assert ended.code == 0 and ended.err == ""
    assert (
        f"Converted {hugging_face} to {tmp_path / 'out'}\n  20 tensors, " in ended.out and "in 1 partition" in ended.out
    )
    assert f"next: sllm-mini load {tmp_path / 'out'}" in ended.out


def test_convert_for_programs_with_all_its_options(run: Run, hugging_face: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    ended = run(
        "convert", hugging_face, tmp_path / "out", "--overwrite", "--partition-size", "8KiB", "--threads", "1", "--json"
    )
    assert ended.code == 0 and ended.err == ""
    found = ended.document
    files = sorted(file for file in os.listdir(tmp_path / "out") if file.startswith("data-"))
    assert found["partitions"] == len(files) > 1 and found["tensors"] == 20 and found["seconds"] > 0
    assert found["nbytes"] == sum((tmp_path / "out" / file).stat().st_size for file in files)
    assert "tokenizer.json" in found["companions"] and found["path"] == str(tmp_path / "out")


def test_export_gives_back_the_same_tensors(run: Run, hugging_face: Path, checkpoint: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    assert run("export", checkpoint, tmp_path / "plain").out.startswith(
        f"Exported {checkpoint} to {tmp_path / 'plain'}: "
    )
    found = run("export", checkpoint, tmp_path / "plain", "--shard-size", "10kB", "--overwrite", "--json").document
    assert len(found["files"]) > 1 and found["nbytes"] > 0
    before = load_file(hugging_face / "model.safetensors")
    after = {name: tensor for file in found["files"] for name, tensor in load_file(tmp_path / "plain" / file).items()}
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_verify(run: Run, checkpoint: Path) -> None:
    ended = run("verify", checkpoint)
    assert ended.code == 0 and ended.out.startswith(f"{checkpoint} is intact: ") and ended.err == ""
    found = run("verify", checkpoint, "--threads", "1", "--json").document
    assert found["ok"] is True and found["nbytes"] > 0 and found["files"] == len(os.listdir(checkpoint)) - 1


def test_make_model(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def record(name: str, path: Path, **options: Any) -> Path:
        asked.update(options, name=name)
        path.mkdir()
        (path / "model.safetensors").write_bytes(bytes(1500))
        return path

    monkeypatch.setattr("sllm_mini.checkpoint.random_model.make_model", record)
    ended = run("make-model", "gpt2", tmp_path / "a", "--seed", "7", "--dtype", "float16", "--overwrite")
    assert ended.code == 0 and ended.out.startswith(
        f"Made {tmp_path / 'a'}: gpt2 with random weights, 1.50 kB in 1 file"
    )
    assert (asked["name"], asked["seed"], asked["dtype"], asked["overwrite"]) == ("gpt2", 7, "float16", True)
    found = run("make-model", "gpt2", tmp_path / "b", "--json").document
    assert (found["nbytes"], found["files"], asked["seed"], asked["dtype"]) == (1500, ["model.safetensors"], 0, None)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1", 1),
        ("1048576", 1 << 20),
        ("4GiB", 4 << 30),
        ("1.5 MiB", 3 << 19),
        ("500MB", 500_000_000),
        ("2k", 2000),
        ("7b", 7),
    ],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert checkpoints.parse_nbytes(text) == nbytes


# --- inspect ---


def test_inspect_for_people(run: Run, checkpoint: Path) -> None:
    ended = run("inspect", checkpoint, "--tensors")
    assert ended.code == 0 and ended.err == ""
    lines = [" ".join(line.split()) for line in ended.out.splitlines()]
    assert f"checkpoint {checkpoint} (format v1)" in lines
    assert "tensors 20 (float32 × 20)" in lines
    assert "model.layers.0 … 1 2 × 9 2 × 10.4 kB" in [line.replace("9.34 kB", "10.4 kB") for line in lines]
    assert any(line.startswith("model.embed_tokens.weight float32 258 × 16 0 0 ") for line in lines)
    assert lines.index("embedding 1 16.5 kB") < next(i for i, line in enumerate(lines) if line.startswith("head "))
    assert "model.norm.weight" not in run("inspect", checkpoint).out


def test_inspect_for_programs(run: Run, checkpoint: Path) -> None:
    short, full = (
        run("inspect", checkpoint, "--json").document,
        run("inspect", checkpoint, "--tensors", "--json").document,
    )
    assert "tensors" not in short and {**full, "tensors": None} == {**short, "tensors": None}
    assert full["tensor_count"] == len(full["tensors"]) == 20 and full["dtypes"] == {"float32": 20}
    assert [layer["name"] for layer in full["layers"]] == ["embedding", "model.layers.0", "model.layers.1", "head"]
    assert sum(layer["nbytes"] for layer in full["layers"]) == sum(tensor["nbytes"] for tensor in full["tensors"])
    assert full["nbytes"] == sum(partition["nbytes"] for partition in full["partitions"])


def test_inspect_tells_what_is_stored_once(run: Run, tmp_path: Path) -> None:
    import torch

    weight = torch.zeros(4, 8)
    tensors = {
        "embed.weight": weight,
        "head.weight": weight,
        "odd.scalar": torch.tensor(True),
        "odd.none": torch.empty(0, 3),
    }
    sllm_mini.save_checkpoint(tensors, tmp_path / "ties")
    ended = run("inspect", tmp_path / "ties", "--tensors")
    assert "stored once  embed.weight = head.weight" in ended.out and "scalar" in ended.out
    found = run("inspect", tmp_path / "ties", "--json").document
    assert found["shared"] == [["embed.weight", "head.weight"]]
    assert sum(layer["nbytes"] for layer in found["layers"]) == 4 * 8 * 4 + 1


def test_a_pipe_gets_whole_lines(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    deep = tmp_path / ("long" * 40) / "checkpoint [bold] :smile:"
    deep.parent.mkdir()
    deep.symlink_to(checkpoint)
    assert f"checkpoint  {deep} (format v1)" in run("inspect", deep).out


# --- load and generate ---


def test_load_for_people(run: Run, checkpoint: Path) -> None:
    ended = run("load", checkpoint, "--repeat", "2")
    assert ended.code == 0 and ended.err == ""
    head, *runs = ended.out.splitlines()
    assert head.startswith(f"Loaded {checkpoint} to cpu: 20 tensors, ") and head.endswith(", verified")
    assert len(runs) == 2 and all("/s), " in line for line in runs)


def test_load_for_programs(run: Run, checkpoint: Path) -> None:
    found = run("load", checkpoint, "--repeat", "2", "--no-verify", "--json").document
    assert found["verified"] is False and found["tensor_count"] == 20 and len(found["runs"]) == 2
    for one in found["runs"]:
        assert one["direct_nbytes"] + one["buffered_nbytes"] + one["mapped_nbytes"] == found["nbytes"]
        assert one["seconds"] > 0 and one["bytes_per_second"] == pytest.approx(found["nbytes"] / one["seconds"])


def test_a_cold_load_reads_the_disk(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    # A copy, because the kernel keeps what somebody maps, and other tests may map the checkpoint they share.
    (one,) = run("load", copied(checkpoint, tmp_path / "copy"), "--cold", "--json").document["runs"]
    if probe.measure_machine(tmp_path).directory_is_in_memory:
        pytest.skip("this directory lives in memory, so there is no disk to read")
    assert one["mapped_nbytes"] == 0


def test_generate_streams_the_text_and_tells_its_times_apart(run: Run, checkpoint: Path) -> None:
    engine = sllm_mini.Engine.load(checkpoint)
    expected = engine.complete("once upon", max_new_tokens=9)
    ended = run("generate", checkpoint, "--prompt", "once upon", "--max-new-tokens", "9")
    assert ended.code == 0 and ended.out == expected.text + "\n"
    assert (
        ended.err.startswith(f"{len(expected.token_ids)} tokens; first token ")
        and "TTFT" in ended.err
        and "tokens/s" in ended.err
    )

    found = run("generate", checkpoint, "-p", "once upon", "-n", "9", "--json").document
    assert (found["text"], tuple(found["token_ids"]), found["finish"]) == (
        expected.text,
        expected.token_ids,
        expected.finish,
    )
    assert found["prompt_tokens"] == len(engine.encode("once upon"))
    parts = found["process_to_imports_seconds"] + found["load_seconds"] + found["ttft_seconds"]
    assert found["process_to_first_token_seconds"] == pytest.approx(parts)
    assert found["decode_tokens_per_second"] > 0


def test_generate_takes_ids_and_gives_ids(run: Run, checkpoint: Path) -> None:
    expected = sllm_mini.Engine.load(checkpoint).complete([5, 6, 7], max_new_tokens=4).token_ids
    ended = run("generate", checkpoint, "--ids", "--prompt", "5, 6 7", "-n", "4")
    assert tuple(map(int, ended.out.split())) == expected


def test_generate_reads_its_prompt_from_stdin_and_samples_by_its_seed(
    run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    def said(seed: int) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO("once upon"))
        return run(
            "generate",
            checkpoint,
            "--prompt",
            "-",
            "-n",
            "20",
            "--temperature",
            "1.5",
            "--top-k",
            "50",
            "--seed",
            str(seed),
        ).out

    assert said(1) == said(1) != said(2)


def test_the_age_of_this_process() -> None:
    first = models._process_age_seconds()
    time.sleep(0.05)
    assert 0 < first < models._process_age_seconds() < 24 * 3600


# --- doctor ---


def limits() -> probe.Limits:
    samples = (
        probe.Measurement("disk_direct_read", "16 MiB × 1 thread", 100 << 20, (0.2, 0.1, 0.3)),
        probe.Measurement("disk_direct_read", "16 MiB × 4 threads", 100 << 20, (0.1,)),
        probe.Measurement("first_touch", "4 KiB pages", 100 << 20, (0.4,)),
        probe.Measurement("first_touch", "huge pages", 100 << 20, (0.1,)),
    )
    return probe.Limits(samples, (probe.Skipped("cached_read", "a reason"),))


def test_doctor_for_people(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(probe, "measure_limits", lambda *_, **__: limits())
    ended = run("doctor", tmp_path)
    assert ended.code == 0 and ended.err == ""
    lines = [" ".join(line.split()) for line in ended.out.splitlines()]
    assert "disk, direct read 16 MiB × 1 thread 524 MB/s 350 MB – 1.05 GB" in lines
    assert "16 MiB × 4 threads 1.05 GB/s one sample" in lines
    assert "not measured: cached_read: a reason" in lines
    assert any(
        line.startswith("A model of 1.2 billion 16-bit weights (2.50 GB) needs at least 2.38 s from this disk.")
        for line in lines
    )
    assert "Fresh memory is ready 4.0 times faster in huge pages than in 4 KiB pages." in lines


def test_doctor_names_the_gpu(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from sllm_mini.device.fake import RecordingRuntime

    gpu, asked = RecordingRuntime().device(), []

    def measure(directory: Path, **options: Any) -> probe.Limits:
        asked.append(options["device"])
        return limits()

    monkeypatch.setattr(machine, "_gpu", lambda: (gpu, ""))
    monkeypatch.setattr(probe, "measure_limits", measure)
    found = run("doctor", tmp_path, "--json").document
    assert found["machine"]["gpu"]["name"] == "cuda:0" and found["machine"]["gpu"]["total_nbytes"] > 0
    assert [s["name"] for s in found["skipped"]] == ["cached_read"] and asked == [gpu]
    model = found["machine"]["gpu"]["model"]
    assert f"{model}, " in run("doctor", tmp_path).out


def test_doctor_for_programs_measures_in_earnest(tmp_path: Path) -> None:
    process = spawn("doctor", tmp_path, "--quick", "--json")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "") and list(tmp_path.iterdir()) == []
    found = json.loads(out)
    assert set(found) == {"machine", "limits", "results", "skipped"}
    assert found["machine"]["directory"] == os.path.realpath(tmp_path) and "gpu" in found["machine"]
    assert {"cached_read_bytes_per_second", "memory_copy_bytes_per_second", "first_touch_bytes_per_second"} <= set(
        found["limits"]
    )
    for result in found["results"]:
        assert result["seconds_min"] <= result["seconds_median"] <= result["seconds_max"]
        assert result["bytes_per_second_median"] == pytest.approx(result["nbytes"] / result["seconds_median"])
        assert found["limits"][f"{result['name']}_bytes_per_second"] >= result["bytes_per_second_median"]
    assert all(skipped["reason"] for skipped in found["skipped"])


# --- terminals ---


def test_a_load_shows_its_progress_while_it_waits(run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_POLL_SECONDS", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    ended = run("load", checkpoint, "--json")
    assert ended.code == 0 and ended.document["tensor_count"] == 20 and "Loading checkpoint" in ended.err


def test_progress_is_shown_on_a_terminal_only(checkpoint: Path) -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as terminal_end:
        command = [sys.executable, "-m", "sllm_mini.cli.main", "verify", str(checkpoint), "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, check=False, timeout=60)
        os.close(theirs)
        seen = b""
        try:
            while part := terminal_end.read(65536):
                seen += part
        except OSError:  # how Linux says that nobody holds the other end any more
            pass
    assert done.returncode == 0 and json.loads(done.stdout)["ok"]
    assert b"Verifying checkpoint" in seen


def test_binary_sizes() -> None:
    assert [terminal.binary_text(n) for n in (65536, 2 << 20, 3 << 30, 1000, 1025)] == [
        "64 KiB",
        "2 MiB",
        "3 GiB",
        "1,000 bytes",
        "1,025 bytes",
    ]


@given(st.lists(st.text(st.sampled_from("abc é…"), max_size=12), max_size=12), st.integers(1, 20))
def test_a_wrapping_writer_keeps_every_word_and_the_width(pieces: list[str], width: int) -> None:
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        write = terminal.wrapping_writer(width)
        for piece in pieces:
            write(piece)
        write("\n")
    words = "".join(pieces).split()
    assert out.getvalue().split() == words
    longest = max(map(len, words), default=0)
    assert all(len(line.rstrip()) <= max(width, longest) for line in out.getvalue().splitlines())


# --- bars and the tour ---


@given(st.floats(0, 10), st.floats(0, 10), st.floats(0.001, 10), st.integers(1, 60))
def test_a_bar_is_never_invisible_and_never_too_wide(start: float, seconds: float, more: float, width: int) -> None:
    total = start + seconds + more
    drawn = bars.bar(start, start + seconds, total, width)
    assert drawn.strip() and len(drawn) <= width
    assert len(drawn) - len(drawn.lstrip()) <= start / total * width


def test_a_bar_is_as_long_as_its_share() -> None:
    assert bars.bar(0, 1, 2, 10) == "█" * 5
    assert bars.bar(1, 2, 2, 10) == " " * 5 + "█" * 5
    assert bars.bar(0, 1, 80, 10) == "▏"
    assert bars.bar(0, 0.55, 1, 10) == "█████▌"


SPANS = (
    Span("interpreter", 0.0, 0.1, warmth=Warmth.PROCESS),
    Span("import torch", 0.1, 2.1, warmth=Warmth.RUNTIME),
    Span("bytes", 2.1, 2.5, "loader", 1000, Warmth.DEVICE),
    Span("skeleton", 2.1, 2.4, warmth=Warmth.RUNTIME),
    Span("wait for bytes", 2.4, 2.5, warmth=Warmth.DEVICE),
    Span("hand over", 2.5, 2.50001, warmth=Warmth.READY),
    Span("first token", 2.5, 3.0, warmth=Warmth.READY),
    Span("decode", 3.0, 3.2, warmth=Warmth.READY),
)


def drawn(renderable: Any, width: int) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(renderable)
    return [line.rstrip() for line in captured.get().splitlines()]


@pytest.mark.parametrize("width", [80, 100])
def test_a_timeline_shows_each_step_whole(width: int) -> None:
    lines = drawn(bars.timeline(SPANS, 3.0, width), width)
    assert [line.split("  ")[0] for line in lines] == [
        "interpreter",
        "import torch",
        "bytes",
        "skeleton",
        "wait for bytes",
        "first token",
    ]
    assert not any("…" in line for line in lines) and max(map(len, lines)) <= width
    assert lines[2].endswith("the weights come from the disk ‖") and lines[4].endswith(
        "until the last of them is there"
    )
    assert ("66.7 %" in lines[1]) == (width == 100)


def test_the_costs_of_the_ladder_add_up_to_the_whole() -> None:
    lines = drawn(bars.ladder(SPANS, 3.0), 80)
    assert [line.split()[0] for line in lines[1:]] == [rung.name.lower() for rung in Warmth]
    assert [line.split("  ")[-1].strip() for line in lines[2:]] == ["100 ms", "2.30 s", "0 s", "100 ms", "500 ms"]


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch, hugging_face: Path) -> None:
    """The tiny model of these tests in the place of the one that is shipped, and little to say."""
    monkeypatch.setattr(tour, "resource", lambda name: hugging_face)
    monkeypatch.setattr(tour, "_NEW_TOKENS", 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.usefixtures("shipped")
def test_a_tour_for_programs_is_measured(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ended = run("tour", "--json")
    assert ended.code == 0 and list(tmp_path.iterdir()) == []
    found = ended.document
    assert set(found) == {"device", "checkpoint", "cold_start", "warm"}
    assert found["checkpoint"]["tensor_count"] == 20
    assert (
        found["cold_start"]["coverage"] > 0.9
        and found["cold_start"]["first_token_seconds"] > found["warm"]["ttft_seconds"] > 0
    )
    assert {"interpreter", "import torch", "bytes", "first token"} <= {
        span["name"] for span in found["cold_start"]["spans"]
    }


@pytest.mark.usefixtures("shipped")
def test_a_tour_for_people(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hugging_face: Path) -> None:
    recorded = ColdStart(SPANS, 3.0, "text", (1, 2), tour.PROMPT, 3, "cpu", 1, 1000, 0.0, {})
    measured: list[str] = []

    def measure(path: Path, **_: Any) -> ColdStart:
        measured.append(path.name)
        return recorded

    monkeypatch.setattr("sllm_mini.lab.anatomy.measure_cold_start", measure)
    monkeypatch.setattr(
        "sllm_mini.checkpoint.random_model.make_model", lambda name, path, **_: copied(hugging_face, path)
    )
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    ended = run("tour", "--model", "opt-125m", "--pause")  # stdin is no terminal, so nothing waits
    assert ended.code == 0 and measured == ["tiny", "larger"] and list(tmp_path.iterdir()) == []
    titles = [line for line in ended.out.splitlines() if line[:2] in {f"{n}." for n in range(1, 10)}]
    assert titles == [
        "1. A model at rest is a few files",
        "2. The same weights, written for loading",
        "3. A cold start",
        "4. It writes",
        "5. Cold beside warm",
        "6. A larger model: opt-125m",
        "7. What to read next",
    ]
    assert "\nOnce upon a" in ended.out and "account for 100.0 %" in " ".join(ended.out.split())
    # Not what the random model says (it knows no spaces), nor commands, which must not be broken.
    prose = ended.out.partition("4. It writes")[0] + ended.out.partition("5. Cold")[2].partition("7. What")[0]
    assert max(len(line.rstrip()) for line in prose.splitlines()) <= 80


def test_a_tour_without_the_shipped_model_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Path:
        raise ResourceError(f"{name} is not part of this installation")

    monkeypatch.setattr(tour, "resource", absent)
    assert run("tour") == Ended(1, "", "Error: data/models/tiny is not part of this installation\n")


def test_a_pause_waits_for_enter_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []

    def wait(words: str) -> str:
        waited.append(words)
        return ""

    monkeypatch.setattr("builtins.input", wait)
    for is_terminal, pause, waits in ((False, True, 0), (True, False, 0), (True, True, 1)):
        waited.clear()
        monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"isatty": lambda self, answer=is_terminal: answer})())
        guide = tour._Guide(Console(quiet=True), pause)
        guide.step("one")
        guide.step("two")
        assert len(waited) == waits


def test_layers_that_look_alike_are_one_line(checkpoint: Path) -> None:
    runs = inspection._runs(sllm_mini.open_checkpoint(checkpoint).index)
    assert [(r.first, r.last, r.layers) for r in runs] == [
        ("embedding", "embedding", 1),
        ("model.layers.0", "model.layers.1", 2),
        ("head", "head", 1),
    ]


def test_every_figure_has_words_for_it() -> None:
    assert {m.name for m in limits().measurements} <= set(machine._NAMES) and set(machine._BOUNDS) <= set(
        machine._NAMES
    )
