"""`sllm-mini deploy`, `delete`, `ps`, `unload`, `pin`: what runs on a server that was started with `serve`, and how it is changed (chapter 11)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sllm_mini.cli import terminal
from sllm_mini.cli.serve import KEY_VARIABLE, read_keys
from sllm_mini.cli.terminal import JsonOption
from sllm_mini.lab.units import nbytes_text, seconds_text

if TYPE_CHECKING:
    from sllm_mini.serving.client import AdminClient

_SERVER_VARIABLE = "SLLM_MINI_SERVER"
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Of a model.", show_default=False)]
ServerOption = Annotated[str | None, typer.Option("--server", metavar="URL", help="Where it answers.", show_default=f"${_SERVER_VARIABLE}, else http://127.0.0.1:8000")]
KeyOption = Annotated[
    Path | None,
    typer.Option("--api-key-file", metavar="FILE", exists=True, dir_okay=False, help="A file whose first line is the server's key.", show_default=f"${KEY_VARIABLE}"),
]
TierOption = Annotated[str | None, typer.Option("--tier", metavar="TIER", help='Where nodes keep its weights whatever else is evicted: "dram", "disk" or "none".')]


def deploy(
    name: NameArgument,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A checkpoint's folder below one of the server's, or an address; left out, it stays.", show_default=False)] = "",
    base: Annotated[str | None, typer.Option("--base", metavar="NAME", help="A deployed model of which this is an adapter, and whose weights it shares.")] = None,
    adapter: Annotated[str | None, typer.Option("--adapter", metavar="DIR", help="The LoRA adapter's folder, below one of the server's, in place of SOURCE.")] = None,
    min_instances: Annotated[int | None, typer.Option("--min", metavar="N", min=0, max=1024, help="Instances that always stay.")] = None,
    max_instances: Annotated[int | None, typer.Option("--max", metavar="N", min=1, max=1_000_000, help="Instances at most.")] = None,
    concurrency: Annotated[int | None, typer.Option("--concurrency", metavar="N", min=1, max=4096, help="Requests that run at once in one instance.")] = None,
    devices: Annotated[int | None, typer.Option("--devices", metavar="N", min=1, max=1024, help="That an instance takes.")] = None,
    keep_alive: Annotated[str | None, typer.Option("--keep-alive", metavar="TIME", help='How long it stays when idle: "5m", 0, -1 (for good) or "policy" (the server\'s).')] = None,
    tier: TierOption = None,
    load: Annotated[bool, typer.Option("--load", help="Start an instance, and return when it is ready.")] = False,
    server: ServerOption = None,
    api_key_file: KeyOption = None,
    json: JsonOption = False,
) -> None:
    """Deploy a model on a running server, or change it.

    Returns when every node knows it; it starts with its first request. What is not given stays as it is.
    """
    with _client(server, api_key_file) as client:
        found = client.deploy(
            name, source=_source(source), base=base, adapter=_source(adapter or ""), min_instances=min_instances, max_instances=max_instances, concurrency=concurrency, devices=devices, tier=tier, keep_alive=keep_alive,
        )  # fmt: skip
        if load:
            found = client.load(name)
    place = f"{found['source']} on {found['base']}" if found["base"] else found["source"]
    _done(found, f"{name} is deployed: {nbytes_text(found['nbytes'])} from {place}, {_state(found)}", json)


def delete(name: NameArgument, server: ServerOption = None, api_key_file: KeyOption = None, json: JsonOption = False) -> None:
    """Delete a model from a running server.

    It takes no more requests; those that it has are answered.
    """
    with _client(server, api_key_file) as client:
        found = client.delete(name)
    _done(found, f"{name} is deleted", json)


def unload(name: NameArgument, server: ServerOption = None, api_key_file: KeyOption = None, json: JsonOption = False) -> None:
    """End a model's idle instances.

    Those that are pinned stay. It starts again when asked for. Its weights stay where stores have them.
    """
    with _client(server, api_key_file) as client:
        found = client.unload(name)
    _done(found, f"{name} is {_state(found)}", json)


def pin(
    name: NameArgument,
    min_instances: Annotated[int | None, typer.Option("--min", metavar="N", min=0, max=1024, help="Instances that always stay.", show_default="1, without --tier")] = None,
    tier: TierOption = None,
    server: ServerOption = None,
    api_key_file: KeyOption = None,
    json: JsonOption = False,
) -> None:
    """Keep instances of a model, or its weights.

    Taken back with --min 0 and --tier none. This is about a server's model; `sllm-mini store pin` about one of a store.
    """
    with _client(server, api_key_file) as client:
        found = client.pin(name, min_instances=min_instances, tier=tier)
    kept = f"{terminal.count(found['min_instances'], 'instance')} of {name} always stay{'s' if found['min_instances'] == 1 else ''}"
    _done(found, kept + (f", its weights in {found['tier']}" if found["tier"] else ""), json)


def ps(server: ServerOption = None, api_key_file: KeyOption = None, json: JsonOption = False) -> None:
    """Show what runs on a server, and how warm it is.

    Wakes no model, and lets none stay longer.
    """
    with _client(server, api_key_file) as client:
        found = client.ps()
    if json:
        terminal.emit_json(found)
        return
    console = terminal.stdout_console()
    numbers = ("size", "requests", "ends in", "private")
    made = terminal.table("model", "size", "state", "node", "requests", "ends in", "private", "weights in", numbers=numbers)
    for model in found["models"]:
        cached = ", ".join(f"{node} {tier}" for node, tier in model["cached"].items()) or "–"
        cells = [_instance(each) for each in found["instances"] if each["model"] == model["name"]] or [("cold", "–", "–", "–", "–")]
        for number, each in enumerate(cells):
            named = f"{model['name']} on {model['base']}" if model["base"] else model["name"]
            made.add_row(*((named, nbytes_text(model["nbytes"])) if not number else ("", "")), *each, "" if number else cached)
    console.print(made if found["models"] else "No model is deployed; deploy one with: sllm-mini deploy NAME SOURCE")
    console.print()
    made = terminal.table("node", "state", "devices", "memory for models", "disk for models", numbers=("devices",))
    for node in found["nodes"]:
        store = node["store"]
        places = ["–", "–"] if store is None else [_used(store, place) for place in ("dram", "disk")]
        made.add_row(node["name"], "alive" if node["alive"] else f"gone: {node['reason']}", str(node["devices"]), *places)
    console.print(made)


def _client(server: str | None, api_key_file: Path | None) -> AdminClient:
    from sllm_mini.serving.client import DEFAULT_URL, AdminClient

    keys = read_keys(api_key_file)
    return AdminClient(server or os.environ.get(_SERVER_VARIABLE) or DEFAULT_URL, keys[0] if keys else "")


def _source(given: str) -> str | None:
    """A folder that is seen from here is meant by its whole path; anything else is for the server to understand."""
    return os.path.abspath(given) if given and os.path.isdir(given) else given or None


def _instance(found: dict[str, Any]) -> tuple[str, ...]:
    climbing = f" → {found['climbing_to']}" if found["climbing_to"] else ""
    ends = found["ends_in_seconds"]
    private = nbytes_text(found["private_nbytes"]) if found["private_nbytes"] else "–"
    return found["warmth"] + climbing, found["node"], str(found["requests"]), "–" if ends is None else seconds_text(ends), private


def _state(model: dict[str, Any]) -> str:
    return "cold" if not model["instances"] else f"{model['state']}, with {terminal.count(model['instances'], 'instance')}"


def _used(store: dict[str, Any], place: str) -> str:
    budget = store[f"{place}_budget_nbytes"]
    return f"{nbytes_text(store[f'{place}_used_nbytes'])} of {nbytes_text(budget)}" if budget else "–"


def _done(document: dict[str, Any], words: str, json: bool) -> None:
    if json:
        terminal.emit_json(document)
    else:
        terminal.stdout_console().print(words)
