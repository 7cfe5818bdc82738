"""`sllm-mini bench simulate`: requests per second of the simulator on one core, against a bare SimPy queue."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sllm_mini.cli import terminal
from sllm_mini.cli.bench_options import RoundsOption, SaveOption, check_writable, deliver, print_skipped
from sllm_mini.cli.terminal import JsonOption
from sllm_mini.lab.units import nbytes_text, seconds_text, share_text

if TYPE_CHECKING:
    from rich.table import Table


def simulate(
    rounds: RoundsOption = 3,
    requests: Annotated[int, typer.Option("--requests", min=100, metavar="N", help="Requests in each run.")] = 20_000,
    warm_up: Annotated[int, typer.Option("--warm-up", min=0, metavar="N", help="Requests before those, which are not timed: the first find everything cold.")] = 16_384,
    nodes: Annotated[tuple[int, int], typer.Option("--nodes", metavar="SMALL LARGE", help="Nodes of the two clusters; each has ten models a node.")] = (8, 1000),
    json: JsonOption = False,
    save: SaveOption = None,
) -> None:
    """Simulate clusters and a bare queue in turn, every event through the controller, and say how fast each is.

    Also: how the time of an event grows with the nodes, memory with the trace, and what each policy costs.
    """
    from sllm_mini.lab.simulating import Options, measure_simulating

    check_writable(save)
    if min(nodes) < 1:
        raise typer.BadParameter("a cluster has at least one node", param_hint="--nodes")
    options = Options(rounds=rounds, requests=requests, warm_up=warm_up, nodes=nodes)
    with terminal.stage_progress() as stage:
        document = measure_simulating(options=options, on_stage=stage)
    deliver(document, _print, json=json, save=save)


def _print(document: dict[str, Any]) -> None:
    console = terminal.stdout_console()
    method = document["method"]
    console.print(f"{terminal.count(method['requests'], 'request')} a run, {terminal.count(method['rounds'], 'round')}, one core")
    for made in (_speeds(document), _growth(document), _policies(document)):
        console.print()
        console.print(made)
    console.print()
    few, many = document["memory"]
    console.print(f"memory at most: {nbytes_text(few['peak_nbytes'])} in {few['requests']:,} requests, {nbytes_text(many['peak_nbytes'])} in {many['requests']:,}")
    print_skipped(console, document)


def _speeds(document: dict[str, Any]) -> Table:
    numbers = ("requests/s", "against SimPy", "min – max", "events/request", "an event", "cold")
    made = terminal.table("what", *numbers, numbers=numbers, title="Speed")
    for row in document["results"]:
        ratio = row.get("ratio_to_reference_median")
        ours = "events_per_request" in row
        made.add_row(
            row["name"], f"{row['requests_per_second_median']:,.0f}", "" if ratio is None else f"{ratio:.2f}",
            "" if ratio is None else f"{row['ratio_to_reference_min']:.2f} – {row['ratio_to_reference_max']:.2f}",
            f"{row['events_per_request']:.2f}" if ours else "", seconds_text(row["seconds_per_event_median"]) if ours else "",
            share_text(row["cold_fraction"]) if ours else "",
        )  # fmt: skip
    return made


def _growth(document: dict[str, Any]) -> Table:
    numbers = ("an event", "against the smallest", "min – max", "the logarithm's", "cold")
    made = terminal.table("what", *numbers, numbers=numbers, title="Growth")
    for row in document["growth"]:
        made.add_row(
            row["name"], seconds_text(row["seconds_per_event_median"]), f"{row['ratio_to_smallest_median']:.2f}",
            f"{row['ratio_to_smallest_min']:.2f} – {row['ratio_to_smallest_max']:.2f}", "" if row["log_ratio"] is None else f"{row['log_ratio']:.2f}",
            share_text(row["cold_fraction"]),
        )  # fmt: skip
    return made


def _policies(document: dict[str, Any]) -> Table:
    numbers = ("events/request", "an event", "starts/request", "cold")
    made = terminal.table("policy", *numbers, numbers=numbers, title="Policies")
    for row in document["policies"]:
        made.add_row(row["name"], f"{row['events_per_request']:.2f}", seconds_text(row["seconds_per_event"]), f"{row['starts_per_request']:.2f}", share_text(row["cold_fraction"]))
    return made
