"""`sllm-mini bench cluster`: a trace on a live cluster, and whether the simulator says what that does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sllm_mini.cli import terminal
from sllm_mini.cli.bench_options import FolderOption, SaveOption, check_writable, deliver
from sllm_mini.cli.checkpoints import parse_nbytes
from sllm_mini.cli.simulate_inputs import open_named
from sllm_mini.cli.terminal import JsonOption
from sllm_mini.lab.units import nbytes_text, rate_text, seconds_text, share_text

if TYPE_CHECKING:
    from rich.table import Table

_SECONDS = re.compile(r"(\d+(?:\.\d+)?)(ms|s)?")
_TOTALS = {
    "answered": "answered", "refused": "refused", "starts": "cold starts", "first_token_seconds_mean": "first token, mean", "first_token_seconds_p50": "first token p50",
    "first_token_seconds_p90": "first token p90", "first_token_seconds_p99": "first token p99", "latency_seconds_p50": "end to end p50", "latency_seconds_p90": "end to end p90",
    "latency_seconds_p99": "end to end p99", "migrations": "migrations", "gpu_seconds_held": "device-seconds held", "gpu_seconds_idle": "of those idle",
}  # fmt: skip


def cluster(
    trace: Annotated[str | None, typer.Argument(metavar="[TRACE]", help="A file of a trace; or burst, diurnal: those that travel with sllm_mini.")] = None,
    where: Annotated[str, typer.Option("--cluster", metavar="KIND:N", help="Nodes as processes of this machine (local) or threads (inprocess), and how many.")] = "local:2",
    models: Annotated[int, typer.Option("--models", min=1, metavar="N", help="Models; those of the trace are dealt out to them.")] = 6,
    devices: Annotated[int, typer.Option("--devices", min=1, metavar="N", help="Devices of each node, played by its cores.")] = 2,
    stored: Annotated[int, typer.Option("--stored", min=1, metavar="N", help="Models that a node's memory has room for, those that serve among them.")] = 3,
    placement: Annotated[str, typer.Option("--placement", metavar="NAME", help="Where a request goes.")] = "serverlessllm",
    keep_alive: Annotated[str, typer.Option("--keep-alive", metavar="NAME", help="How long a model stays.")] = "fixed-10min",
    autoscaler: Annotated[str, typer.Option("--autoscaler", metavar="NAME", help="How many instances.")] = "per-request",
    requests: Annotated[int | None, typer.Option("--requests", min=1, metavar="N", help="The first so many of the trace alone.")] = None,
    speed: Annotated[float, typer.Option("--speed", min=0.001, metavar="X", help="How much faster than it says the trace comes.")] = 1.0,
    pace: Annotated[str, typer.Option("--pace", metavar="TIME", help="Pause after each step of an engine, such as 20ms.")] = "20ms",
    remote_rate: Annotated[str, typer.Option("--remote-rate", metavar="RATE", help="What the remote store gives of one model, such as 20MB/s.")] = "20MB/s",
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Learn on one trace, predict another, play that, and compare; some 25 minutes.")] = False,
    learned: Annotated[Path | None, typer.Option("--learned", metavar="FILE", help="With --calibrate: what was learned; read where it exists, else written.", dir_okay=False)] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, metavar="N", help="With --calibrate: how often the second trace is played.")] = 3,
    save_log: Annotated[Path | None, typer.Option("--save-log", metavar="FILE", help="Write the event log, for `sllm-mini replay`.", dir_okay=False)] = None,
    folder: FolderOption = None,
    json: JsonOption = False,
    save: SaveOption = None,
) -> None:
    """Play a trace on a live cluster of tiny models, open loop, and set the simulator beside it.

    The controller's log is replayed at the end and must give the same actions. Two cores cannot be four devices: steps are paced and the remote store is slow, so that waiting is sleep.
    """
    from sllm_mini.lab.livebench import Calibration, Options, measure_calibration, measure_cluster

    check_writable(save, save_log, learned)
    if calibrate == (trace is not None):
        raise typer.BadParameter("give a trace, or --calibrate, which makes its own", param_hint="TRACE")
    if not calibrate and learned is not None:
        raise typer.BadParameter("it is for --calibrate", param_hint="--learned")
    if calibrate and save_log is not None:
        raise typer.BadParameter("a calibration has several logs; play a trace to save one", param_hint="--save-log")
    options = Options(
        cluster=where, devices=devices, models=models, stored=stored, placement=placement, keep_alive=keep_alive, autoscaler=autoscaler, speed=speed,
        pace_seconds=_seconds(pace), remote_bytes_per_second=float(parse_nbytes(remote_rate.removesuffix("/s"))),
    )  # fmt: skip
    options.control().controller()  # a name that no policy has is told before nodes are started
    with terminal.stage_progress() as stage:
        if trace is None:
            document = measure_calibration(options, Calibration(repeats=repeats), learned=learned, folder=folder, on_stage=stage)
        else:
            document = measure_cluster(open_named(trace), options, most=requests, folder=folder, log=save_log, on_stage=stage)
    deliver(document, _print_calibration if calibrate else _print, json=json, save=save)


def _seconds(text: str) -> float:
    found = _SECONDS.fullmatch(text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is no time; write for example 20ms or 0.02s", param_hint="--pace")
    return float(found[1]) * (1e-3 if found[2] == "ms" else 1.0)


def _print(document: dict[str, Any]) -> None:
    console = terminal.stdout_console()
    method, late = document["method"], document["lateness_seconds"]
    console.print(
        f"{method['cluster']} with {terminal.count(method['devices'], 'device')} each, {terminal.count(method['models'], 'model')}, steps paced by {seconds_text(method['pace_seconds'])}, remote store {rate_text(method['remote_bytes_per_second'])} a model"
    )
    console.print()
    live, simulated = (row["totals"] for row in document["results"])
    console.print(_beside(live, simulated))
    console.print()
    gaps, agreed = document["results"][0]["inter_token_seconds"], document["agreement"]
    console.print(
        terminal.facts(
            {
                "between tokens": ", ".join(f"{name} {seconds_text(gaps[name])}" for name in ("p50", "p90", "p99")),
                "weights read from": ", ".join(f"{tier} {number:,}" for tier, number in document["results"][0]["loads_by_tier"].items()) or "nowhere",
                "zygotes": ", ".join(f"{node} {nbytes_text(nbytes)}" for node, nbytes in document["zygote_nbytes"].items() if nbytes) or "none",
                "arrivals late": f"p99 {seconds_text(late['p99'])}" + ("" if late["open_loop"] else ": too late for an open loop, so the trace was lighter than it says"),
                "log": f"replayed {document['replayed_events']:,} events: same actions",
                "decided alike": f"{agreed['actions_alike']:,} of {agreed['actions_live']:,} actions until the first that differs; {share_text(agreed['same_start'])} of requests waited for the same kind of start",
            }
        )
    )
    console.print()
    console.print(_rungs(document))


def _beside(live: dict[str, Any], simulated: dict[str, Any]) -> Table:
    made = terminal.table("", "live", "simulated", "simulated over live", numbers=("live", "simulated", "simulated over live"), title="One trace")
    for key, words in _TOTALS.items():
        mine, other = live[key], simulated[key]
        said = [("" if value is None else seconds_text(value) if "seconds" in key else f"{value:,}") for value in (mine, other)]
        made.add_row(words, *said, f"{other / mine:.2f}" if mine and other is not None else "")
    return made


def _rungs(document: dict[str, Any]) -> Table:
    numbers = ("climbs", "median", "longest", "private", "proportional")
    made = terminal.table("rung", *numbers, numbers=numbers, title="Rungs, as the workers measured them")
    for row in document["rungs"]:
        made.add_row(
            row["name"], f"{row['count']:,}", seconds_text(row["seconds_median"]), seconds_text(row["seconds_max"]), nbytes_text(row["private_nbytes_median"]),
            nbytes_text(row["proportional_nbytes_median"]),
        )  # fmt: skip
    return made


def _print_calibration(document: dict[str, Any]) -> None:
    console = terminal.stdout_console()
    learned = document["learned"]
    console.print(f"learned from {terminal.count(learned['cold_starts'], 'cold start')} of {terminal.count(learned['requests'], 'request')}")
    console.print()
    numbers = ("first token, live", "simulated", "simulated over live", "95 % interval", "cold starts, live", "simulated", "decided alike")
    made = terminal.table("run", *numbers, numbers=numbers, title="A trace that was predicted, then played")
    expected = document["simulated"]
    for number, run in enumerate(document["results"], 1):
        interval = run["first_token_mean_ratio_interval"]
        made.add_row(
            str(number), seconds_text(run["live"]["first_token_seconds_mean"]), seconds_text(expected["first_token_seconds_mean"]), f"{run['first_token_mean_ratio']:.3f}",
            "" if interval is None else "{:.2f} – {:.2f}".format(*interval), f"{run['live']['starts']:,}", f"{expected['starts']:,}", share_text(run["agreement"]["same_start"]),
        )  # fmt: skip
    console.print(made)
    for what, words in (("first_token_seconds_mean", "mean time to first token"), ("cold_starts", "cold starts")):
        console.print(f"{words}, simulated over live, all runs: {document[what]['ratio']:.3f}")
    console.print()
    console.print(prediction_table(document))


def prediction_table(document: dict[str, Any]) -> Table:
    """What the estimator said of each kind of start, and what it took."""
    numbers = ("how many", "predicted", "observed", "error, median", "p90")
    made = terminal.table("what", *numbers, numbers=numbers, title="Predicted against observed")
    for row in document["predictions"]:
        made.add_row(
            row["name"], f"{row['count']:,}", seconds_text(row["predicted_seconds_mean"]), seconds_text(row["observed_seconds_mean"]), share_text(row["error_median"]), share_text(row["error_p90"])
        )
    return made
