"""`sllm-mini bench multicast`: how long until n nodes hold a model, by plan, at the same speed of their links; and with `--serve`, until they serve it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sllm_mini.cli import terminal
from sllm_mini.cli.bench_options import FolderOption, RoundsOption, SaveOption, check_writable, deliver
from sllm_mini.cli.checkpoints import parse_nbytes
from sllm_mini.cli.terminal import JsonOption
from sllm_mini.lab.units import nbytes_text, rate_text, seconds_text

if TYPE_CHECKING:
    from rich.table import Table


_LOWEST = 1e6
Links = Literal["bucket", "netns"]


def multicast(
    rounds: RoundsOption = 3,
    nodes: Annotated[
        str | None, typer.Option("--nodes", metavar="N,N,…", help="How many nodes hold the model in the end, its source among them: 2,4,8; with --serve 4, half of which are sources.")
    ] = None,
    blocks: Annotated[int, typer.Option("--blocks", min=1, max=4096, metavar="N", help="Blocks of 2 MiB that the model has.")] = 16,
    rate: Annotated[str | None, typer.Option("--rate", metavar="RATE", help="Speed of each node's link, each way: 40MB/s; with --serve 20MB/s.")] = None,
    links: Annotated[Links, typer.Option("--links", help="What limits the rate: token buckets on loopback, or network namespaces with the kernel's.")] = "bucket",
    serve: Annotated[bool, typer.Option("--serve", help="Measure the first token instead: of nodes that serve together what arrives, and of waiting for a whole copy.")] = False,
    folder: FolderOption = None,
    json: JsonOption = False,
    save: SaveOption = None,
) -> None:
    """Spread a model over node processes: by binomial pipeline, 2-way, chain and tree, and with everyone reading the store.

    Plans take turns in shuffled rounds; each is measured in block times of the idle link. Every block is checked against its hash.
    With --serve, nodes of a live cluster take a burst of requests while the model comes to them.
    """
    check_writable(save)
    if serve:
        _serve(rounds, _counts(nodes or "4"), blocks, _rate(rate or "20MB/s"), links, folder, json, save)
        return
    from sllm_mini.lab.multicast_bench import Options, measure_multicast

    options = Options(rounds=rounds, nodes=_counts(nodes or "2,4,8"), blocks=blocks, bytes_per_second=_rate(rate or "40MB/s"), links=links)
    with terminal.stage_progress() as stage:
        document = measure_multicast(options, folder=folder, on_stage=stage)
    deliver(document, _print, json=json, save=save)


def _serve(rounds: int, nodes: tuple[int, ...], blocks: int, rate: float, links: Links, folder: Path | None, json: bool, save: Path | None) -> None:
    from sllm_mini.lab.joint_start import Options, measure_joint_start

    if links != "bucket":
        raise typer.BadParameter("nodes that serve share this machine's loopback; give bucket", param_hint="--links")
    try:
        options = Options(rounds=rounds, nodes=nodes, blocks=blocks, bytes_per_second=rate)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--nodes" if "nodes" in str(error) else "--blocks") from error
    with terminal.stage_progress() as stage:
        document = measure_joint_start(options, folder=folder, on_stage=stage)
    deliver(document, _print_joint, json=json, save=save)


def _print_joint(document: dict[str, Any]) -> None:
    model, method = document["model"], document["method"]
    terminal.stdout_console().print(
        f"{terminal.count(model['blocks'], 'block')} of {nbytes_text(model['block_nbytes'])} in {terminal.count(model['layers'], 'layer')}, links of "
        f"{rate_text(method['bytes_per_second'])} ({method['links']} over {method['transport']}), {terminal.count(method['rounds'], 'round')}; all texts are the same"
    )
    numbers = ("nodes", "have it", "stages", "together", "floor", "whole copy", "floor", "ratio", "min – max", "by ticks")
    made = terminal.table("burst", *numbers, numbers=numbers, title="Seconds until the first token of a burst")
    for row in document["results"]:
        made.add_row(
            terminal.count(row["nodes"] - row["sources"], "request"), str(row["nodes"]), str(row["sources"]), str(row["stages"]), seconds_text(row["joint_first_median"]), seconds_text(row["joint_floor"]),
            seconds_text(row["whole_first_median"]), seconds_text(row["whole_floor"]), f"{row['ratio_median']:.2f}", f"{row['ratio_min']:.2f} – {row['ratio_max']:.2f}", f"{row['floor_ratio']:.2f}",
        )  # fmt: skip
    terminal.stdout_console().print(made)


def _counts(text: str) -> tuple[int, ...]:
    try:
        found = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        found = ()
    if not found or not all(2 <= count <= 64 for count in found):
        raise typer.BadParameter(f"{text!r} are no numbers of nodes; give whole numbers from 2 to 64, such as 2,4,8", param_hint="--nodes")
    return found


def _rate(text: str) -> float:
    found = float(parse_nbytes(text.removesuffix("/s")))
    if found < _LOWEST:
        raise typer.BadParameter(f"{text!r} would take minutes; give at least {rate_text(_LOWEST)}", param_hint="--rate")
    return found


def _print(document: dict[str, Any]) -> None:
    console = terminal.stdout_console()
    model, method = document["model"], document["method"]
    used = method["bytes_per_second_used"]
    console.print(
        f"{terminal.count(model['blocks'], 'block')} of {nbytes_text(model['block_nbytes'])}, links of {rate_text(used)} "
        f"({method['links']} over {method['transport']}), {terminal.count(method['rounds'], 'round')}"
    )
    if used < method["bytes_per_second"]:
        console.print(f"the rate was lowered from {rate_text(method['bytes_per_second'])}: so many links at once would have measured this machine's cores")
    console.print(_table(document))


def _table(document: dict[str, Any]) -> Table:
    numbers = ("nodes", "whole after", "block times", "ticks", "over b + ⌈log₂ n⌉ − 1", "min – max", "at the link's rate", "against the store")
    made = terminal.table("plan", *numbers, numbers=numbers, title="Seconds until every node holds the model")
    for row in document["results"]:
        made.add_row(
            row["plan"], str(row["nodes"]), seconds_text(row["seconds_median"]), f"{row['block_times_median']:.1f}", str(row["ticks"]),
            f"{row['over_bound_median']:.2f}", f"{row['over_bound_min']:.2f} – {row['over_bound_max']:.2f}", f"{row['over_link_median']:.2f}", f"{row['ratio_to_reference_median']:.2f}",
        )  # fmt: skip
    return made
