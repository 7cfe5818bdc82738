"""`sllm-mini store register`, `prefetch`, `list` …: the commands that ask a store which runs already (chapter 03)."""

from __future__ import annotations

import json as json_format
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sllm_mini.cli import terminal
from sllm_mini.cli.terminal import JsonOption
from sllm_mini.errors import StoreError, WireError
from sllm_mini.lab.units import nbytes_text, seconds_text

if TYPE_CHECKING:
    from sllm_mini.storage import StoreClient
    from sllm_mini.wire import Message

AddressOption = Annotated[
    str | None,
    typer.Option("--address", metavar="SOCKET", help="Where the store listens.", show_default="$SLLM_MINI_STORE, else one for each user"),
]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The name that a model was registered under.")]
PlaceArgument = Annotated[str, typer.Argument(metavar="PLACE", help='"disk", "dram", or a GPU: "cuda:0".')]


def running_store(address: str | None) -> StoreClient:
    """The store at an address. Raises StoreError, saying how to start one, if none answers there."""
    from sllm_mini.storage.client import CONNECT_SECONDS, StoreClient
    from sllm_mini.wire import connect

    client = StoreClient(address)
    try:
        connect(client.address, timeout=CONNECT_SECONDS).close()
    except WireError as error:
        if isinstance(error.__cause__, FileNotFoundError | ConnectionRefusedError):
            option = f" --address {address}" if address else ""
            raise StoreError(f"no store answers at {client.address}; start one with: sllm-mini store --dram 8GiB{option}") from error
        raise StoreError(f"no store answers: {error}") from error
    return client


def _plain(message: Message) -> dict[str, Any]:
    """A message as JSON, without the tags that tell its kind on the socket."""
    import msgspec

    def untagged(value: Any) -> Any:
        if isinstance(value, list):
            return [untagged(item) for item in value]
        return {key: untagged(item) for key, item in value.items() if key != "type"} if isinstance(value, dict) else value

    found: dict[str, Any] = untagged(msgspec.to_builtins(message))
    return found


def _done(document: dict[str, Any], words: str, json: bool) -> None:
    if json:
        terminal.emit_json(document)
    else:
        terminal.stdout_console().print(words)


def register(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name of your choice.")],
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A checkpoint directory, or its address (https://…, s3://…, hf://…).")],
    address: AddressOption = None,
    json: JsonOption = False,
) -> None:
    """Make a checkpoint known under a name.

    Reads its index and no weights. The same name again replaces it, unless it is in use.
    """
    found = running_store(address).register(name, source)
    words = f"Registered {found.name}: {terminal.count(found.layers, 'layer')}, {nbytes_text(found.nbytes)}, from {found.source}"
    _done(_plain(found), words, json)


def forget(name: NameArgument, address: AddressOption = None, json: JsonOption = False) -> None:
    """Evict a model everywhere and drop its name."""
    running_store(address).forget(name)
    _done({"name": name}, f"Forgot {name}", json)


def prefetch(
    name: NameArgument,
    to: Annotated[str, typer.Option("--to", metavar="PLACE", help='"disk", "dram", or a GPU: "cuda:0".')] = "dram",
    address: AddressOption = None,
    json: JsonOption = False,
) -> None:
    """Bring a model to a place, and return when it is there."""
    client = running_store(address)
    started = time.perf_counter()
    with terminal.byte_progress(f"Bringing {name} to {to}") as progress:
        client.prefetch(name, to, on_progress=progress)
    seconds = time.perf_counter() - started
    words = f"{name} is in {to}, {seconds_text(seconds)}"
    if to == "disk" and any(model.name == name and "://" not in model.source for model in client.models()):
        words = f"{name} is a local folder: nothing had to be copied to the disk"
    _done({"name": name, "place": to, "seconds": seconds}, words, json)


def pin(name: NameArgument, place: PlaceArgument, address: AddressOption = None, json: JsonOption = False) -> None:
    """Keep a model from being evicted from a place.

    Brings nothing there: see prefetch.
    """
    running_store(address).pin(name, place)
    _done({"name": name, "place": place, "pinned": True}, f"{name} is pinned in {place}", json)


def unpin(name: NameArgument, place: PlaceArgument, address: AddressOption = None, json: JsonOption = False) -> None:
    """Let a model be evicted from a place again."""
    running_store(address).pin(name, place, False)
    _done({"name": name, "place": place, "pinned": False}, f"{name} may be evicted from {place} again", json)


def evict(name: NameArgument, place: PlaceArgument, address: AddressOption = None, json: JsonOption = False) -> None:
    """Give back what a place holds of a model.

    Refused while a process is attached to it, or it is pinned or loading there.
    """
    nbytes = running_store(address).evict(name, place)
    _done({"name": name, "place": place, "nbytes": nbytes}, f"Evicted {nbytes_text(nbytes)} of {name} from {place}", json)


def list_models(address: AddressOption = None, json: JsonOption = False) -> None:
    """List the models, and what each place holds of them."""
    models = running_store(address).models()
    if json:
        terminal.emit_json({"models": [_plain(model) for model in models]})
        return
    made = terminal.table("name", "size", "uses", "held in", "source", numbers=("size", "uses"))
    for model in models:
        held = []
        for found in model.places:
            states = [f"{found.leases} in use"] * bool(found.leases) + ["pinned"] * found.pinned + ["loading"] * found.loading
            held.append(f"{found.place} {nbytes_text(found.nbytes)}" + (f" ({', '.join(states)})" if states else ""))
        made.add_row(model.name, nbytes_text(model.nbytes), f"{model.uses:,}", "; ".join(held) or "–", model.source)
    terminal.stdout_console().print(made if models else "No model is registered.")


def stats(address: AddressOption = None, json: JsonOption = False) -> None:
    """Show budgets, use, and what happened since the store began.

    Used is what models occupy, ready what is backed for the next load. The kernel's count is what the system says that the place holds.

    An attachment counts where its bytes were found: elsewhere if the store had no room and the process loaded the model itself.
    """
    figures = running_store(address).stats()
    if json:
        terminal.emit_json(_plain(figures))
        return
    console = terminal.stdout_console()
    numbers = ("budget", "used", "ready", "kernel's count")
    made = terminal.table("place", *numbers, numbers=numbers)
    for place in figures.places:
        sizes = (place.budget_nbytes, place.used_nbytes, place.ready_nbytes, place.kernel_nbytes)
        made.add_row(place.place, *("–" if nbytes is None else nbytes_text(nbytes) for nbytes in sizes))
    console.print(made)
    for place in figures.places:
        if place.trouble:
            console.print(f"Less of {place.place} is ready than was asked for: {place.trouble}", style="yellow")
    rows = {"loaded elsewhere, no room" if place == "elsewhere" else f"attached from {place}": f"{times:,}" for place, times in figures.attached.items()}
    rows |= {f"moved {way.replace('->', ' → ')}": nbytes_text(nbytes) for way, nbytes in figures.moved_nbytes.items()}
    rows |= {f"evicted from {place}": nbytes_text(nbytes) for place, nbytes in figures.evicted_nbytes.items()}
    if rows:
        console.print()
        console.print(terminal.facts(rows))


def watch(address: AddressOption = None, json: JsonOption = False) -> None:
    """Print a line for each load and eviction, until Ctrl-C.

    With --json each line is a JSON document of its own.
    """
    for event in running_store(address).events():
        line = f"{event.what} {event.name} {event.place} {nbytes_text(event.nbytes)}" + (f": {event.reason}" if event.reason else "")
        sys.stdout.write((json_format.dumps(_plain(event), ensure_ascii=False) if json else line) + "\n")
        sys.stdout.flush()


COMMANDS: dict[str, Callable[..., None]] = {
    "register": register, "forget": forget, "prefetch": prefetch, "pin": pin, "unpin": unpin,
    "evict": evict, "list": list_models, "stats": stats, "watch": watch,
}  # fmt: skip
