"""`sllm-mini store`: the store of this machine, in the foreground until it is told to end (chapter 03)."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from sllm_mini.cli import store_client, terminal
from sllm_mini.cli.checkpoints import parse_nbytes
from sllm_mini.cli.store_client import AddressOption
from sllm_mini.cli.terminal import JsonOption
from sllm_mini.lab.units import nbytes_text

if TYPE_CHECKING:
    from sllm_mini.storage import Store, StoreServer

app = typer.Typer()

_Pages = Literal["auto", "hugetlb", "never"]
_POLICIES = ("gdsf", "lru", "lfu", "prefix")
_LOOK_SECONDS = 0.5
_PAGES: tuple[_Pages, ...] = get_args(_Pages)


def _budget(text: str) -> tuple[str, int]:
    name, equals, size = text.partition("=")
    if not (name and equals):
        raise typer.BadParameter(f'"{text}" is not a GPU and its budget; write for example cuda:0=20GiB')
    return name, parse_nbytes(size)


def _one_of(names: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise typer.BadParameter(f'"{text}" is none of {", ".join(names)}')
        return text

    return parse


@app.callback(invoke_without_command=True)
def store(
    context: typer.Context,
    dram: Annotated[int | None, typer.Option("--dram", parser=parse_nbytes, metavar="SIZE", help="Memory for models, for example 8GiB.")] = None,
    backed: Annotated[
        int | None,
        typer.Option("--backed", parser=parse_nbytes, metavar="SIZE", help="Of --dram, backed ahead of need while nothing loads.", show_default="none"),
    ] = None,
    disk: Annotated[
        int | None, typer.Option("--disk", parser=parse_nbytes, metavar="SIZE", help="Disk space for copies of remote models.", show_default="none")
    ] = None,
    device: Annotated[
        list[Any] | None, typer.Option("--device", parser=_budget, metavar="GPU=SIZE", help="Memory on a GPU, for example cuda:0=20GiB; repeatable.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--folder", metavar="FOLDER", help="Where copies of remote models lie.", file_okay=False, show_default="~/.cache/sllm-mini")
    ] = None,
    address: AddressOption = None,
    policy: Annotated[str, typer.Option("--policy", parser=_one_of(_POLICIES), metavar=f"[{'|'.join(_POLICIES)}]", help="What goes first when memory is short.")] = "gdsf",
    chunk: Annotated[
        int | None, typer.Option("--chunk", parser=parse_nbytes, metavar="SIZE", help="Memory is handed out in such pieces.", show_default="from the budget")
    ] = None,
    huge_pages: Annotated[
        Any, typer.Option("--huge-pages", parser=_one_of(_PAGES), metavar=f"[{'|'.join(_PAGES)}]", help="Which pages memory is made of.")
    ] = "auto",
    json: JsonOption = False,
) -> None:
    """Keep models in memory for other processes.

    Without a command it is the store, in the foreground, until Ctrl-C or SIGTERM ends it with exit code 0. Other processes attach to its models without a copy.

    Sizes are budgets. A command (register, prefetch, …) asks the store that runs at --address.
    """
    if context.invoked_subcommand is not None:
        _refuse_options_before(context, context.invoked_subcommand)
        return
    devices = dict(device or ())
    if len(devices) < len(device or ()):
        raise typer.BadParameter("a GPU was given two budgets; give it one")
    if not (dram or disk or devices):
        raise typer.BadParameter("a store needs a budget; write for example sllm-mini store --dram 8GiB")
    from sllm_mini.storage import Store, StoreServer
    from sllm_mini.storage.client import default_address

    _raise_descriptor_limit()
    place = address or default_address()
    try:
        opened = Store(
            folder or _default_folder(), dram_nbytes=dram or 0, backed_nbytes=backed or 0, disk_nbytes=disk or 0, device_nbytes=devices,
            policy=policy, chunk_nbytes=chunk, huge_pages=huge_pages,
        )  # fmt: skip
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    with opened, _end_signals() as told:
        server = StoreServer(opened, place)
        ended = threading.Event()
        threading.Thread(target=_close_when_told, args=(server, told, ended), name="sllm-store-end", daemon=True).start()
        try:
            _announce(opened, server.address, policy, json)
            while not ended.wait(_LOOK_SECONDS):
                continue  # a signal that comes just before a wait begins is handled only when that wait ends
        finally:
            opened.close()  # first: it ends loads, and with them whoever waits for one on a connection
            server.close()


def _refuse_options_before(context: typer.Context, command: str) -> None:
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"--{name.replace('_', '-')} stands before {command}; there it would be a new store's, write it after")


@contextmanager
def _end_signals() -> Iterator[queue.SimpleQueue[int]]:
    """A queue of the signals that end a store, instead of what else they do; the second one does that again.

    A signal that whoever started the store said to ignore (nohup, or a script's `&`) stays ignored.
    """
    told: queue.SimpleQueue[int] = queue.SimpleQueue()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def tell(number: int, _: object) -> None:
        restore()
        told.put(number)  # the one queue that a signal's handler may use

    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, tell)
    try:
        yield told
    finally:
        restore()


def _close_when_told(server: StoreServer, told: queue.SimpleQueue[int], ended: threading.Event) -> None:
    told.get()
    ended.set()
    server.close()


def _raise_descriptor_limit() -> None:
    """Each chunk of memory is a descriptor, and so is each client."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sllm-mini"


def _announce(opened: Store, address: str, policy: str, json: bool) -> None:
    from sllm_mini.device.cpu import available_nbytes

    places = opened.stats().places
    free = available_nbytes()
    for place in places:
        if place.place == "dram" and free and place.budget_nbytes > free:
            words = f"This machine has {nbytes_text(free)} free, less than the budget of {nbytes_text(place.budget_nbytes)}: loads will fail before it is spent."
            terminal.stderr_console().print(words, style="yellow", soft_wrap=True)
        on_disk = shutil.disk_usage(opened.folder).free
        if place.place == "disk" and place.budget_nbytes - place.used_nbytes > on_disk:
            words = f"The disk of {opened.folder} has {nbytes_text(on_disk)} free, less than the budget of {nbytes_text(place.budget_nbytes)}: copies will fail before it is spent."
            terminal.stderr_console().print(words, style="yellow", soft_wrap=True)
    if json:
        budgets = [{"place": place.place, "budget_nbytes": place.budget_nbytes} for place in places]
        terminal.emit_json({"address": address, "pid": os.getpid(), "folder": str(opened.folder), "policy": policy, "places": budgets})
        sys.stdout.flush()
        return
    console = terminal.stdout_console()
    console.print(f"The store listens on {address} until Ctrl-C.")
    console.print(terminal.facts({place.place: nbytes_text(place.budget_nbytes) for place in places}))
    console.print("  next: sllm-mini store register NAME SOURCE", style="dim")
    sys.stdout.flush()


for name, command in store_client.COMMANDS.items():
    app.command(name)(command)
