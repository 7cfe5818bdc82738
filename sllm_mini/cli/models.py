"""`sllm-mini load` and `generate`: the commands that bring a checkpoint to memory and to its first token."""

from __future__ import annotations

import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sllm_mini.cli import terminal
from sllm_mini.cli.store_client import AddressOption, running_store
from sllm_mini.cli.terminal import DeviceOption, JsonOption
from sllm_mini.lab.units import nbytes_text, rate_text, seconds_text

if TYPE_CHECKING:
    from sllm_mini.checkpoint import Checkpoint
    from sllm_mini.inference import Engine
    from sllm_mini.loading import LoadHandle
    from sllm_mini.storage import Attachment, StoreClient

_POLL_SECONDS = 0.1

CheckpointArgument = Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint directory, or with --store a model's name.")]
StoreOption = Annotated[bool, typer.Option("--store", help="Attach to it in the store that runs on this machine.")]


def load(
    checkpoint: CheckpointArgument,
    device: DeviceOption = "cpu",
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not hash the bytes as they arrive.")] = False,
    repeat: Annotated[int, typer.Option("--repeat", min=1, max=100, metavar="N", help="Load it N times, one after another.")] = 1,
    cold: Annotated[bool, typer.Option("--cold", help="Ask the kernel to forget the files before each load, so that the disk is read.")] = False,
    store: StoreOption = False,
    address: AddressOption = None,
    json: JsonOption = False,
) -> None:
    """Load a checkpoint and time it.

    Says how long it took and where the bytes came from: the disk, the page cache, or the store.

    The time runs from the call to the last byte in place, without the start of Python and its imports.
    """
    _check_store(store, address)
    if store:
        if cold or no_verify:
            raise typer.BadParameter("a store keeps what it has read and checked; use --store without --cold and --no-verify")
        _attach(running_store(address), str(checkpoint), device, repeat, json)
        return
    from sllm_mini.checkpoint import open_checkpoint

    opened = open_checkpoint(checkpoint)
    import torch  # noqa: F401 - its import is not part of a load

    runs = [_load_once(opened, device, verify=not no_verify, cold=cold) for _ in range(repeat)]
    index = opened.index
    if json:
        terminal.emit_json(
            {
                "path": str(checkpoint),
                "device": device,
                "verified": not no_verify,
                "nbytes": index.total_nbytes,
                "tensor_count": len(index.tensors),
                "runs": runs,
            }
        )
        return
    console = terminal.stdout_console()
    checked = "not verified" if no_verify else "verified"
    console.print(
        f"Loaded {checkpoint} to {device}: {terminal.count(len(index.tensors), 'tensor')}, {nbytes_text(index.total_nbytes)}, {checked}"
    )
    for run in runs:
        console.print(f"  {seconds_text(run['seconds'])} ({rate_text(run['bytes_per_second'])}), {_origin(run)}")
        if run["fallback"]:
            console.print(f"  direct reads were given up: {run['fallback']}", style="yellow")


def _check_store(store: bool, address: str | None) -> None:
    if address is not None and not store:
        raise typer.BadParameter("--address names a store; use it with --store")


def _attach(client: StoreClient, name: str, device: str, repeat: int, json: bool) -> None:
    """Attaches to a model `repeat` times, letting go of it each time, and says how long that took."""
    import torch  # noqa: F401 - its import is not part of it

    runs: list[dict[str, Any]] = []
    nbytes = tensor_count = 0
    for _ in range(repeat):
        started = time.perf_counter()
        with client.attach(name, device) as attached:
            attach_seconds = time.perf_counter() - started
            if attached.reason not in {run["reason"] for run in runs}:
                _tell_reason(attached)
            _wait(attached, name)
            seconds = time.perf_counter() - started
            nbytes, tensor_count = attached.checkpoint.nbytes, len(attached.checkpoint.index.tensors)
            runs.append({"seconds": seconds, "attach_seconds": attach_seconds, "tier": attached.tier.name.lower(), "reason": attached.reason or None})
    if json:
        terminal.emit_json({"name": name, "device": device, "nbytes": nbytes, "tensor_count": tensor_count, "runs": runs})
        return
    console = terminal.stdout_console()
    console.print(f"Attached {name} to {device}: {terminal.count(tensor_count, 'tensor')}, {nbytes_text(nbytes)}")
    for run in runs:
        if run["reason"]:
            console.print(f"  {seconds_text(run['seconds'])}, loaded by this process", style="yellow")
        else:
            console.print(f"  tensors after {seconds_text(run['attach_seconds'])}, every byte after {seconds_text(run['seconds'])}, in the store's {run['tier']}")


def _tell_reason(attached: Attachment) -> None:
    """Says at once, on stderr, why a store does not lend a model, since loading it may take long."""
    if attached.reason:
        terminal.stderr_console().print(f"This process loads it by itself: {attached.reason}", style="yellow", soft_wrap=True)


def _load_once(checkpoint: Checkpoint, device: str, *, verify: bool, cold: bool) -> dict[str, Any]:
    from sllm_mini.loading import start_load

    if cold:
        _forget(checkpoint)
    started = time.perf_counter()
    with start_load(checkpoint, device, verify=verify) as handle:
        _wait(handle, checkpoint.path.name)
        seconds = max(time.perf_counter() - started, 1e-9)
        report = handle.report
    return {
        "seconds": seconds,
        "bytes_per_second": checkpoint.nbytes / seconds,
        "direct_nbytes": report.direct_nbytes,
        "buffered_nbytes": report.buffered_nbytes,
        "mapped_nbytes": report.mapped_nbytes,
        "fallback": report.fallback,
    }


def _forget(checkpoint: Checkpoint) -> None:
    """Drops the data files from the page cache."""
    from sllm_mini.loading.residency import drop_cached

    for number in range(len(checkpoint.index.partitions)):
        fd = checkpoint.open_partition(number)
        try:
            drop_cached(fd)
        finally:
            os.close(fd)


def _wait(handle: LoadHandle | Attachment, name: str) -> None:
    if not sys.stderr.isatty():
        handle.wait()
        return
    with terminal.byte_progress(f"Loading {name}") as show:
        while True:
            try:
                handle.wait(_POLL_SECONDS)
                return
            except TimeoutError:
                show(handle.progress)


def _origin(run: dict[str, Any]) -> str:
    """Where the bytes of a load came from, in words."""
    ways = (
        ("direct_nbytes", "read from disk"),
        ("buffered_nbytes", "copied through the page cache"),
        ("mapped_nbytes", "mapped from the page cache"),
    )
    return ", ".join(f"{nbytes_text(run[key])} {words}" for key, words in ways if run[key]) or "nothing to read"


def generate(
    checkpoint: CheckpointArgument,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", metavar="TEXT", help='What the text begins with; "-" reads it from stdin.')
    ],
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, metavar="N", help="Stop after so many tokens.")
    ] = 128,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature", min=0.0, metavar="T", help="0 takes the likeliest token, 1 draws as the model says."
        ),
    ] = 0.0,
    top_k: Annotated[
        int, typer.Option("--top-k", min=0, metavar="K", help="Draw among the K likeliest tokens; 0 among all.")
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option("--top-p", metavar="P", help="Draw among the likeliest tokens that add up to P; 1 among all."),
    ] = 1.0,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=2**64 - 1, metavar="N", help="The same seed draws the same tokens.")
    ] = 0,
    device: DeviceOption = "cpu",
    ids: Annotated[bool, typer.Option("--ids", help="The prompt and the answer are token ids, separated by spaces.")] = False,
    store: StoreOption = False,
    address: AddressOption = None,
    json: JsonOption = False,
) -> None:
    """Start a model and let it write.

    The text goes to stdout; the time to the first token (TTFT) and the speed after it go to stderr.
    """
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    request = _prompt(sys.stdin.read() if prompt == "-" else prompt, ids)
    _check_store(store, address)
    from sllm_mini.checkpoint import open_checkpoint
    from sllm_mini.inference import Engine, SamplingOptions

    try:
        sampling = SamplingOptions(**options)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    # A wrong path or name is told before the slow imports; a store reads the bytes meanwhile.
    attached = running_store(address).attach(str(checkpoint), device) if store else None
    if attached is not None:
        _tell_reason(attached)
    opened = open_checkpoint(checkpoint) if attached is None else attached.checkpoint
    console = terminal.stderr_console()
    with console.status("importing torch and transformers, then loading") if console.is_terminal else nullcontext():
        _import_what_is_needed(opened.path)
        imported = time.perf_counter()
        imports_seconds = _process_age_seconds()
        engine = Engine.load(opened, device) if attached is None else _engine(attached)
        load_seconds = time.perf_counter() - imported
    with engine.generate(request, max_new_tokens=max_new_tokens, sampling=sampling) as generation:
        texts: list[str] = []
        for piece in generation:
            if json:
                texts.append(piece.text)
            else:
                sys.stdout.write(f"{piece.token_id} " if ids else piece.text)
                sys.stdout.flush()
        new_ids = generation.token_ids[generation.prompt_length :]
        timings, finish, prompt_length = generation.timings, generation.finish, generation.prompt_length
    speed = timings.decode_steps / timings.decode_seconds if timings.decode_seconds else None
    if json:
        terminal.emit_json(
            {
                "text": "".join(texts),
                "token_ids": new_ids,
                "prompt_tokens": prompt_length,
                "finish": finish,
                "process_to_imports_seconds": imports_seconds,
                "load_seconds": load_seconds,
                "ttft_seconds": timings.first_token_seconds,
                "process_to_first_token_seconds": imports_seconds + load_seconds + timings.first_token_seconds,
                "decode_tokens_per_second": speed,
            }
        )
        return
    sys.stdout.write("\n")
    sys.stdout.flush()
    start = f"first token {seconds_text(imports_seconds + load_seconds + timings.first_token_seconds)} after the process began"
    parts = f"imports {seconds_text(imports_seconds)}, load {seconds_text(load_seconds)}, TTFT {seconds_text(timings.first_token_seconds)}"
    then = f"; then {speed:.3g} tokens/s" if speed else ""
    terminal.stderr_console().print(f"{terminal.count(len(new_ids), 'token')}; {start} ({parts}){then}", style="dim")


def _engine(attached: Attachment) -> Engine:
    """An engine on a store's memory; layers that the store still loads are waited for one by one."""
    from sllm_mini.inference import Engine, load_tokenizer, stream_model

    tokenizer = load_tokenizer(attached.checkpoint)
    return Engine(stream_model(attached).model, tokenizer)


def _prompt(text: str, ids: bool) -> str | list[int]:
    if not ids:
        return text
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise typer.BadParameter(
            f'"{text[:60]}" is not a list of token ids; write for example --ids --prompt "1 17 42"'
        ) from None


def _import_what_is_needed(checkpoint: Path) -> None:
    """The imports that a first load would do, done apart so that they can be told apart."""
    import torch  # noqa: F401

    from sllm_mini.lab.coldstart import import_model_class

    import_model_class(checkpoint)


def _process_age_seconds() -> float:
    """Seconds since the kernel started this process, to a hundredth: field 22 of /proc/self/stat counts clock ticks
    from boot (proc(5)); the fields before it may hold spaces, but only inside the last parenthesis."""
    fields = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return max(time.clock_gettime(time.CLOCK_BOOTTIME) - started, 0.0)
