"""`sllm-mini bench serve`: a trace over HTTP, and what HTTP and the cluster add to a warm request."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sllm_mini.cli import terminal
from sllm_mini.cli.bench_options import RoundsOption, SaveOption, check_gpus, check_writable, deliver
from sllm_mini.cli.serve import KEY_VARIABLE
from sllm_mini.cli.simulate_inputs import open_named
from sllm_mini.cli.terminal import JsonOption
from sllm_mini.errors import UnsupportedError
from sllm_mini.lab.units import nbytes_text, seconds_text

if TYPE_CHECKING:
    from rich.table import Table


def serve(
    given: Annotated[list[str] | None, typer.Argument(metavar="[TRACE] [CHECKPOINT]...", help="A trace (a file, burst or diurnal) and what a server of its own is to serve; with --overhead one checkpoint at most. Default: the tiny trained model.")] = None,
    overhead: Annotated[bool, typer.Option("--overhead", help="What the platform adds to a warm request, beside an engine called directly.")] = False,
    rounds: RoundsOption = 30,
    tokens: Annotated[int, typer.Option("--tokens", min=2, metavar="N", help="Of a text, for --overhead; each way is also asked for one.")] = 32,
    threads: Annotated[int, typer.Option("--threads", min=1, metavar="N", help="Threads that each engine computes with, for --overhead.")] = 1,
    cuda: Annotated[bool, typer.Option("--cuda", help="On the first GPU, for --overhead.")] = False,
    server: Annotated[str | None, typer.Option("--server", metavar="URL", help=f"Play the trace on a server that runs, with the key in ${KEY_VARIABLE}, if any.")] = None,
    cluster: Annotated[str, typer.Option("--cluster", metavar="KIND:N", help="Else: nodes of the server that is started for it.")] = "local:2",
    requests: Annotated[int | None, typer.Option("--requests", min=1, metavar="N", help="The first so many of the trace alone.")] = None,
    speed: Annotated[float, typer.Option("--speed", min=0.001, metavar="X", help="How much faster than it says the trace comes.")] = 1.0,
    context: Annotated[int, typer.Option("--context", min=2, metavar="N", help="Longer requests are cut to so many tokens in all.")] = 128,
    json: JsonOption = False,
    save: SaveOption = None,
) -> None:
    """Play a trace on a server over HTTP, open loop; or measure what the platform adds to a warm request.

    With --overhead one warm model writes the same text by four ways (its engine called directly, the cluster, HTTP, HTTP as a stream), in shuffled rounds.
    """
    from sllm_mini.lab.models import tiny_checkpoint

    try:
        import sllm_mini.serving.server  # noqa: F401
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"the server needs {error.name}; install the extra with: pip install 'sllm_mini[serve]'") from error
    check_writable(save)
    named = given or []
    if overhead:
        if len(named) > 1 or server is not None:
            raise typer.BadParameter("it takes one checkpoint, and starts what it measures itself", param_hint="--overhead")
        from sllm_mini.checkpoint import open_checkpoint
        from sllm_mini.lab.servebench.overhead import Options as OverheadOptions
        from sllm_mini.lab.servebench.overhead import measure_overhead

        if cuda:
            check_gpus(1)
        checkpoint = open_checkpoint(named[0]) if named else tiny_checkpoint()
        with terminal.stage_progress() as stage:
            document = measure_overhead(checkpoint, OverheadOptions(rounds, tokens, threads=threads, cuda=cuda), on_stage=stage)
        return deliver(document, _print_overhead, json=json, save=save)
    if not named:
        raise typer.BadParameter("give a trace, such as burst; or --overhead", param_hint="TRACE")
    if server is not None and len(named) > 1:
        raise typer.BadParameter("a server that runs has models of its own; leave out the checkpoints", param_hint="--server")
    from sllm_mini.lab.servebench.replay import Options, measure_served, served

    trace, key = open_named(named[0]), os.environ.get(KEY_VARIABLE, "") if server is not None else ""
    with terminal.stage_progress() as stage, nullcontext(server) if server is not None else served(named[1:] or [os.fspath(tiny_checkpoint().path)], cluster) as url:
        document = measure_served(trace, url, Options(speed, requests, context), key=key, on_stage=stage)
    deliver(document, _print_served, json=json, save=save)


def _print_served(document: dict[str, Any]) -> None:
    console = terminal.stdout_console()
    late, everything = document["lateness_seconds"], document["results"][0]
    console.print(f"{terminal.count(document['requests'], 'request')} of {terminal.count(len(document['model']['names']), 'model')}, {document['method']['speed']:g} times as fast as the trace")
    console.print()
    numbers = ("answered", *(f"{words} {percent}" for words in ("first token", "between tokens", "end to end") for percent in ("p50", "p99")))
    made = terminal.table("began at", *numbers, numbers=numbers, title="Over HTTP")
    for row in document["results"]:
        values = [row[f"{figure}_seconds_{percent}"] for figure in ("first_token", "inter_token", "latency") for percent in ("p50", "p99")]
        made.add_row(row["name"], f"{row['answered']:,}", *("" if value is None else seconds_text(value) for value in values))
    console.print(made)
    console.print()
    facts = {
        "statuses": ", ".join(f"{status}: {number:,}" for status, number in document["statuses"].items()),
        "not answered": f"{document['requests'] - everything['answered']:,}, {document['refused']:,} of them refused",
        "arrivals late": f"p99 {seconds_text(late['p99'])}" + ("" if late["open_loop"] else ": too late for an open loop, so the trace was lighter than it says"),
    }
    console.print(terminal.facts(facts))


def _print_overhead(document: dict[str, Any]) -> None:
    console = terminal.stdout_console()
    model, method = document["model"], document["method"]
    console.print(f"{model['name']}: {nbytes_text(model['nbytes'])}, {terminal.count(method['threads'], 'thread')} each, {terminal.count(method['rounds'], 'round')}")
    console.print()
    limit = document["limits"]["added_seconds"]
    for rows, when in ((document["results"], f"one of {method['in_a_row']} in a row"), (document["rested"], "the first after a rest")):
        console.print(_table(rows, f"A warm request, {when}: for 1 token and for {method['tokens']}"))
        console.print()
        worst = max(rows, key=lambda row: float(row["added_seconds_median"]))
        words = "within" if worst["added_seconds_median"] <= limit else "more than"
        console.print(f"the platform adds {seconds_text(worst['added_seconds_median'])} at the median ({worst['name']}): {words} the {seconds_text(limit)} that it may")
        console.print()


def _table(rows: list[dict[str, Any]], title: str) -> Table:
    numbers = ("first token", "added", "middle half", "whole text", "added to it", "added a token")
    made = terminal.table("way", *numbers, numbers=numbers, title=title)
    for row in rows:
        alone = row["name"] == "direct"
        added = [seconds_text(row["added_first_seconds_median"]), f"{seconds_text(row['added_first_seconds_p25'])} – {seconds_text(row['added_first_seconds_p75'])}"]
        made.add_row(
            row["name"], seconds_text(row["first_seconds_median"]), *(["", ""] if alone else added), seconds_text(row["text_seconds_median"]),
            "" if alone else seconds_text(row["added_text_seconds_median"]), "" if alone or row["added_seconds_per_token"] is None else seconds_text(row["added_seconds_per_token"]),
        )  # fmt: skip
    return made
