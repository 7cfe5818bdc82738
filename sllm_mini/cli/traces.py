"""`sllm-mini trace` and `sllm-mini replay`: published traces into one format, what is in one, and a log of events played again."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sllm_mini.cli import terminal
from sllm_mini.cli.terminal import JsonOption
from sllm_mini.errors import SllmError
from sllm_mini.lab.units import seconds_text, share_text

if TYPE_CHECKING:
    from sllm_mini.cluster.trace import Spread, TraceStatistics

app = typer.Typer(help="Import published traces, and look into one.", no_args_is_help=True, rich_markup_mode=None)
_MOST_MODELS = 10
_ONLY_FOR = {"model": "Azure LLM inference trace 2023", "failures": "BurstGPT", "seed": "Azure Functions trace 2019"}
"""Which published trace an option says something of."""


@app.command("import")
def import_(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="As published, plain or .gz: Azure Functions 2019 (invocations per minute of one day) or 2021, Azure LLM inference 2023, BurstGPT. Told apart by the first line.", exists=True, dir_okay=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The trace: a name that ends in .csv, .jsonl, .csv.gz or .jsonl.gz.", dir_okay=False)],
    model: Annotated[str, typer.Option("--model", metavar="NAME", help="Azure LLM 2023: what to call the one model.")] = "model",
    failures: Annotated[bool, typer.Option("--failures", help="BurstGPT: with the requests that failed.")] = False,
    durations: Annotated[Path | None, typer.Option("--durations", metavar="FILE", help="Azure Functions 2019: that day's file of how long functions ran.", exists=True, dir_okay=False)] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Azure Functions 2019: draws the instants within each minute.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    json: JsonOption = False,
) -> None:
    """Write a published trace in the format that simulations and live runs read."""
    from sllm_mini.cluster.trace import import_trace, write_trace

    try:
        trace = import_trace(file, model=model, failures=failures, durations=durations, seed=seed)
    except ValueError as error:  # an option that this file has no use for, or that cannot be
        raise typer.BadParameter(str(error)) from error
    for option, source in _ONLY_FOR.items():
        given = context.get_parameter_source(option)
        if given is not None and given.name == "COMMANDLINE" and not trace.label.source.startswith(source):
            raise typer.BadParameter(f"it says something of the {source} alone, and {file} is none; leave it out", param_hint=f"--{option}")
    with terminal.stage_progress() as stage:
        stage(f"reading {trace.label.source}")
        requests = write_trace(out, trace, overwrite=overwrite)
    if json:
        terminal.emit_json({"kind": "sllm-mini trace import", "path": str(out), "source": trace.label.source, "requests": requests})
    else:
        terminal.stdout_console().print(f"{out}: {terminal.count(requests, 'request')} of {trace.label.source}", soft_wrap=True)


@app.command("show")
def show(
    trace: Annotated[str, typer.Argument(metavar="TRACE", help="A file of sllm-mini; or burst, diurnal, faas.")],
    json: JsonOption = False,
) -> None:
    """Say what is in a trace: how many requests, how bursty, how long, for whom."""
    import msgspec

    from sllm_mini.cli.simulate_inputs import open_named
    from sllm_mini.cluster.trace import describe

    opened = open_named(trace)
    with terminal.stage_progress() as stage:
        stage("reading the trace")
        found = describe(opened)
    if json:
        terminal.emit_json({"kind": "sllm-mini trace show", **asdict(found), "label": msgspec.to_builtins(found.label)})
    else:
        _print(found)


def _print(found: TraceStatistics) -> None:
    console = terminal.stdout_console()
    rows = {
        "name": found.label.name, "source": found.label.source, "kind": found.label.kind,
        "requests": f"{found.requests:,} in {seconds_text(found.seconds)}" + ("" if found.requests_per_second is None else f", {found.requests_per_second:.3g} a second"),
        "CV of gaps": "" if found.interarrival_cv is None else f"{found.interarrival_cv:.2f}; {terminal.count(found.gaps_over_60_seconds, 'gap')} over a minute",
        "input tokens": _tokens(found.input_tokens), "output tokens": _tokens(found.output_tokens),
        "mean duration": "" if found.mean_duration_seconds is None else seconds_text(found.mean_duration_seconds),
    }  # fmt: skip
    console.print(terminal.facts({name: text for name, text in rows.items() if text}))
    console.print()
    numbers = ("requests", "share", "CV of gaps")
    made = terminal.table("model", *numbers, numbers=numbers)
    for name, own in list(found.models.items())[:_MOST_MODELS]:
        made.add_row(name, f"{own.requests:,}", share_text(own.share), "" if own.interarrival_cv is None else f"{own.interarrival_cv:.2f}")
    console.print(made)
    if len(found.models) > _MOST_MODELS:
        console.print(f"and {len(found.models) - _MOST_MODELS:,} more")


def _tokens(spread: Spread | None) -> str:
    return "" if spread is None or not spread.maximum else f"mean {spread.mean:,.1f}, median {spread.median:,.1f}, at most {spread.maximum:,}"


def replay(
    log: Annotated[Path, typer.Argument(metavar="LOG", help="What `sllm-mini simulate --events` wrote.", exists=True, dir_okay=False)],
    json: JsonOption = False,
) -> None:
    """Check that a controller answers a log as it was recorded.

    The log's first line names its policies and options.
    """
    from sllm_mini.cluster.simulated import make_policies
    from sllm_mini.control.controller import Controller
    from sllm_mini.control.estimate import Estimator
    from sllm_mini.control.replay import log_header
    from sllm_mini.control.replay import replay as play

    with log.open("rb") as lines, terminal.stage_progress() as stage:
        header = log_header(lines.readline())
        if header is None:
            raise SllmError(f"{log}: its first line names no policies; record it with `sllm-mini simulate --events`, or replay it in Python with sllm_mini.control.replay")
        estimator = Estimator()
        policies = make_policies(header.placement, header.keep_alive, header.autoscaler, estimator)
        options: dict[str, Any] = {"max_failures": header.max_failures, "retry_seconds": header.retry_seconds}
        try:
            controller = Controller(policies.placement, policies.keep_alive, policies.autoscaler, estimator, **options)
        except ValueError as error:
            raise SllmError(f"{log}: its first line has options that cannot be ({error}); record the log again") from error
        lines.seek(0)
        stage(f"replaying under {', '.join(policies.names.values())}")
        count = play(lines, controller)
    if json:
        seconds = controller.now if count else 0.0
        terminal.emit_json({"kind": "sllm-mini replay", "path": str(log), "policies": dict(policies.names), **options, "events": count, "seconds": seconds, "same": True})
    else:
        terminal.stdout_console().print(f"{terminal.count(count, 'event')} gave the recorded actions under {', '.join(policies.names.values())}")
