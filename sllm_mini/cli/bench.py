"""`sllm-mini bench`: puts the benches together, and `bench load`, every loader in one interleaved run beside the limits."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.text import Text

from sllm_mini.cli import (
    bench_cluster,
    bench_decode,
    bench_migrate,
    bench_multicast,
    bench_overlap,
    bench_serve,
    bench_simulate,
    bench_start,
    bench_tiers,
    bench_warmup,
    terminal,
)
from sllm_mini.cli.bench_options import (
    FolderOption,
    KeepOption,
    RoundsOption,
    SaveOption,
    check_writable,
    deliver,
    print_skipped,
)
from sllm_mini.cli.simulate import NamesPolicies
from sllm_mini.cli.terminal import DeviceOption, JsonOption
from sllm_mini.lab.units import nbytes_text, rate_text, seconds_text

if TYPE_CHECKING:
    from rich.table import Table

    from sllm_mini.lab.bench.entry import State

app = typer.Typer(help="Measure loaders against each other and this machine.", no_args_is_help=True)


class _State(StrEnum):
    COLD = "cold"
    WARM = "warm"


@app.callback()
def _bench() -> None:
    """Measure loaders against each other and this machine."""


@app.command("load")
def load(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help='A Hugging Face directory, a published shape, or "small" (10,000 small tensors); default: the largest shape that fits.'
        ),
    ] = None,
    device: DeviceOption = "cpu",
    rounds: RoundsOption = 5,
    state: Annotated[
        list[_State] | None, typer.Option("--state", help="Only this state of the page cache; may be given twice.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option("--only", metavar="NAME", help="Only loaders whose name begins so (upper and lower case differ), and our own; repeatable.")] = None,
    no_peers: Annotated[bool, typer.Option("--no-peers", help="Leave out other packages.")] = False,
    no_ladder: Annotated[bool, typer.Option("--no-ladder", help="Leave out the rungs below our loader.")] = False,
    memory: Annotated[
        Literal["backed", "fresh"],
        typer.Option("--memory", help="Memory that the host of a virtual machine has backed just before each load, or as it comes."),
    ] = "backed",
    folder: FolderOption = None,
    keep: KeepOption = False,
    json: JsonOption = False,
    save: SaveOption = None,
    picture: Annotated[Path | None, typer.Option("--picture", metavar="FILE", help="Draw bytes per second against the limits (PNG).", dir_okay=False)] = None,
) -> None:
    """Load one model with every loader there is, cold and warm, and say how each compares.

    A sample is a load and a sum over every byte, timed together. Loaders take turns in shuffled rounds, so that a noisy minute hurts all of them.
    """
    from sllm_mini.lab.bench import Options, described_roofline, entries, measure_load

    check_writable(save, picture)
    options = Options(rounds=rounds, states=_states(state), memory=memory, device=_checked(device))
    chosen = entries(options.device, ladder=not no_ladder, with_peers=not no_peers, only=only or ())
    with terminal.stage_progress() as stage:
        document = measure_load(model, options=options, loaders=chosen, folder=folder, keep=keep, on_stage=stage)
    deliver(document, _print, json=json, save=save, picture=picture, draw=lambda: described_roofline(document))


app.command("tiers")(bench_tiers.tiers)
app.command("overlap")(bench_overlap.overlap)
app.command("warmup")(bench_warmup.warmup)
app.command("decode")(bench_decode.decode)
app.command("migrate")(bench_migrate.migrate)
app.command("serve")(bench_serve.serve)
app.command("start")(bench_start.start)
app.command("multicast")(bench_multicast.multicast)
app.command("simulate")(bench_simulate.simulate)
app.command("cluster", cls=NamesPolicies)(bench_cluster.cluster)


def _states(asked: list[_State] | None) -> tuple[Literal["cold", "warm"], ...]:
    wanted = set(asked or _State)
    return tuple(one.value for one in _State if one in wanted)


def _checked(device: str) -> str:
    """The device's own name. Raises DeviceError for one that is not there, before anything is prepared."""
    from sllm_mini.device import get_device

    return get_device(device).name


def _print(document: dict[str, Any]) -> None:
    from sllm_mini.lab.bench.picture import share_note
    from sllm_mini.lab.bench.words import LIMIT_LABELS

    console = terminal.stdout_console()
    model, method = document["model"], document["method"]
    words = f"{model['name']}: {terminal.count(model['tensor_count'], 'tensor')}, {nbytes_text(model['nbytes'])} ({model['weights']})"
    console.print(f"{words}, to {method['device']}, {terminal.count(method['rounds'], 'round')}, memory {method['memory']}")
    found = {label: _limit(document, name) for name, label in LIMIT_LABELS.items() if f"{name}_bytes_per_second" in document["limits"]}
    if "resident_use_seconds_median" in document["limits"]:
        found["using every byte"] = f"{seconds_text(document['limits']['resident_use_seconds_median'])}, part of every sample"
    console.print()
    console.print(terminal.facts(found))
    for state in method["states"]:
        rows = [row for row in document["results"] if row["state"] == state]
        if rows:
            console.print()
            console.print(_table(rows, state, document["reference"]))
            if note := share_note(rows):
                console.print(note, style="dim")
    print_skipped(console, document)


def _limit(document: dict[str, Any], name: str) -> str:
    """The rate, the spread of its rounds and the setting; of the mapped file the rate, as its rounds are in the table."""
    rate = rate_text(document["limits"][f"{name}_bytes_per_second"])
    best = document["limit_settings"].get(name)
    if best is None:
        return rate
    spread = "one round" if len(best["samples"]) == 1 else f"{rate_text(best['bytes_per_second_min'])} – {rate_text(best['bytes_per_second_max'])}"
    tried = best["settings_tried"]
    return f"{rate} ({spread}), {best['setting']}" + (f", the best of {tried} settings" if tried > 1 else "")


def _table(rows: list[dict[str, Any]], state: State, reference: str) -> Table:
    from sllm_mini.lab.bench.picture import limit_noun, ratio_text, spread_text
    from sllm_mini.lab.bench.words import STATE_TITLES

    share = f"share of {limit_noun(rows) or 'the limit'}"
    numbers = ("seconds", "min – max", share, "against ours (min – max)")
    made = terminal.table("loader", *numbers, numbers=numbers, title=f"{STATE_TITLES[state].capitalize()} (ours is {reference})")
    for row in sorted(rows, key=lambda row: row["seconds_median"]):
        made.add_row(
            Text(row["name"], style="bold green" if row["kind"] == "ours" else "dim" if row["kind"] == "limit" else ""),
            seconds_text(row["seconds_median"]),
            spread_text(row),
            "" if row["ratio_to_limit"] is None else f"{row['ratio_to_limit']:.2f}",
            ratio_text(row),
        )
    return made
