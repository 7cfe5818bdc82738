"""`sllm-mini simulate`: one trace on one cluster in simulated time, under one policy or beside each other under several."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from sllm_mini.cli import terminal
from sllm_mini.cli.bench_options import check_writable
from sllm_mini.cli.checkpoints import parse_nbytes
from sllm_mini.cli.simulate_inputs import Asked, asked_for, even_models, merged, missing_text, open_named, read_specs
from sllm_mini.cli.terminal import JsonOption
from sllm_mini.lab.units import nbytes_text, seconds_text, share_text

if TYPE_CHECKING:
    from rich.table import Table

    from sllm_mini.cluster.simulated import SimulationResult
    from sllm_mini.cluster.trace import Trace
    from sllm_mini.control.messages import ModelSpec, NodeSpec

_SAID_BY_MODELS = {"weights": "--weights", "model_devices": "--model-devices", "start_seconds": "--start-seconds", "min_instances": "--min-instances", "max_instances": "--max-instances"}
_SAID_BY_CLUSTER = {"nodes": "--nodes", "devices": "--devices", "memory": "--memory"}


class NamesPolicies(TyperCommand):
    """A command whose help ends with the policies that there are: looked up only then, as they take a tenth of a second to import."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        from sllm_mini.cluster.simulated.policies import AUTOSCALERS, KEEP_ALIVES, PLACEMENTS

        with formatter.section("Policies"):
            formatter.write_dl([("--placement", ", ".join(PLACEMENTS)), ("--keep-alive", ", ".join(KEEP_ALIVES)), ("--autoscaler", ", ".join(AUTOSCALERS))])
        super().format_epilog(ctx, formatter)


def simulate(
    context: typer.Context,
    traces: Annotated[list[str], typer.Argument(metavar="TRACE...", help="Files of traces, merged by time; or burst, diurnal, faas: those that travel with sllm_mini.")],
    nodes: Annotated[int, typer.Option("--nodes", min=1, metavar="N", help="Machines.")] = 4,
    devices: Annotated[int, typer.Option("--devices", min=0, metavar="N", help="Devices of each.")] = 4,
    placement: Annotated[list[str] | None, typer.Option("--placement", metavar="NAME", help="Where a request goes; repeatable. Default: serverlessllm.")] = None,
    keep_alive: Annotated[list[str] | None, typer.Option("--keep-alive", metavar="NAME", help="How long a model stays; repeatable. Default: fixed-10min.")] = None,
    autoscaler: Annotated[list[str] | None, typer.Option("--autoscaler", metavar="NAME", help="How many instances; repeatable. Default: per-request.")] = None,
    model_devices: Annotated[int | None, typer.Option("--model-devices", min=0, metavar="N", help="Devices that every model takes. Default: 1; 0 for functions (whose requests have no tokens), which need host memory only.")] = None,
    weights: Annotated[str | None, typer.Option("--weights", metavar="SIZE", help="Weights of every model. Default: 14GB; 100MB of a function.")] = None,
    memory: Annotated[str, typer.Option("--memory", metavar="SIZE", help="Host memory of a node that instances may hold.")] = "512GB",
    store_memory: Annotated[str, typer.Option("--store-memory", metavar="SIZE", help="Host memory of a node that its store caches models in; 0 for none.")] = "128GB",
    start_seconds: Annotated[float | None, typer.Option("--start-seconds", min=0, metavar="S", help="Of a cold start beside the weights: a fifth is the process, three fifths its libraries, a fifth the warm-up. Default: 5; 2.5 of a function.")] = None,
    min_instances: Annotated[int, typer.Option("--min-instances", min=0, metavar="N", help="Instances that each model always has.")] = 0,
    max_instances: Annotated[int, typer.Option("--max-instances", min=1, metavar="N", help="Instances that a model has at most.")] = 1_000_000,
    links: Annotated[Literal["node", "link", "shared"], typer.Option("--links", help="Loads queue per node, queue per link, or share each link.")] = "node",
    models_file: Annotated[Path | None, typer.Option("--models", metavar="FILE", help="A JSON list of models (the fields of ModelSpec) in place of equal ones.", exists=True, dir_okay=False)] = None,
    cluster_file: Annotated[Path | None, typer.Option("--cluster", metavar="FILE", help="A JSON list of nodes (the fields of NodeSpec) in place of equal ones.", exists=True, dir_okay=False)] = None,
    chrome_trace: Annotated[Path | None, typer.Option("--chrome-trace", metavar="FILE", help="Write what every instance did, for ui.perfetto.dev.", dir_okay=False)] = None,
    events: Annotated[Path | None, typer.Option("--events", metavar="FILE", help="Write every event and what the controller answered, a JSON line each, for `sllm-mini replay`.", dir_okay=False)] = None,
    flat: Annotated[bool, typer.Option("--flat", help="Keep sums only, so that memory does not grow with the trace; percentiles to half a percent.")] = False,
    json: JsonOption = False,
) -> None:
    """Run a trace on a simulated cluster, and compare policies.

    The controller is the one that runs live clusters. Policies that are named more than once are run in all combinations and compared. Figures of machines and models are assumed.
    """
    from sllm_mini.cluster.simulated import MisfitWarning, SimulationOptions, even_cluster, misfits, write_chrome_trace
    from sllm_mini.control.messages import ModelSpec, NodeSpec

    check_writable(chrome_trace, events)
    combinations = list(itertools.product(placement or ["serverlessllm"], keep_alive or ["fixed-10min"], autoscaler or ["per-request"]))
    if len(combinations) > 1 and (chrome_trace or events):
        raise typer.BadParameter("a file holds one run; name one policy of each kind", param_hint="--chrome-trace, --events")
    if flat and chrome_trace:
        raise typer.BadParameter("with --flat no spans are kept to draw", param_hint="--chrome-trace")
    if start_seconds is not None and not math.isfinite(start_seconds):
        raise typer.BadParameter(f"{start_seconds} is no time; give seconds", param_hint="--start-seconds")
    if min_instances > max_instances:
        raise typer.BadParameter(f"{min_instances} are more than the {max_instances} of --max-instances", param_hint="--min-instances")
    for file, option, said in ((models_file, "--models", _SAID_BY_MODELS), (cluster_file, "--cluster", _SAID_BY_CLUSTER)):
        if file is not None:
            _refuse_beside(context, option, said)
    weight_nbytes = None if weights is None else parse_nbytes(weights)
    options = SimulationOptions(links=links, store_dram_nbytes=0 if store_memory == "0" else parse_nbytes(store_memory), keep="summary" if flat else "everything" if chrome_trace else "requests")
    _check_policies(combinations)
    opened = [open_named(name) for name in traces]
    with terminal.stage_progress() as stage:
        stage("reading the trace")
        machines = read_specs(cluster_file, NodeSpec) if cluster_file else even_cluster(nodes, devices=devices, dram_nbytes=parse_nbytes(memory))
        asked = asked_for(opened)
        specs = read_specs(models_file, ModelSpec) if models_file else even_models(
            asked, nbytes=weight_nbytes, devices=model_devices, start_seconds=start_seconds, min_instances=min_instances, max_instances=max_instances
        )  # fmt: skip
        unheard = missing_text(asked, specs, models_file) if models_file else None
        warned = [*misfits(machines, specs), *([unheard] if unheard else [])]
        for sentence in warned:
            terminal.stderr_console().print(f"Warning: {sentence}", style="yellow", soft_wrap=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MisfitWarning)  # said above, once for all runs
            results = [_run(opened, machines, specs, names_of_three, options, events, asked.requests, stage) for names_of_three in combinations]
        if chrome_trace:
            stage("writing the trace of the run")
            write_chrome_trace(chrome_trace, results[0].spans)
    if json:
        terminal.emit_json(_document(traces, machines, specs, warned, results))
    else:
        _print(machines, specs, asked, results)


def _refuse_beside(context: typer.Context, option: str, said: Mapping[str, str]) -> None:
    """Raises BadParameter for options that were given and that the file of `option` says itself."""
    given = [name for parameter, name in said.items() if (source := context.get_parameter_source(parameter)) is not None and source.name == "COMMANDLINE"]
    if given:
        raise typer.BadParameter(f"the file says that itself; leave out {', '.join(given)}", param_hint=option)


def _check_policies(combinations: Sequence[tuple[str, str, str]]) -> None:
    """Raises SllmError for a name that no policy has, before anything runs."""
    from sllm_mini.cluster.simulated import make_policies
    from sllm_mini.control.estimate import Estimator

    for names in combinations:
        make_policies(*names, Estimator())


def _run(
    traces: list[Trace], machines: list[NodeSpec], specs: list[ModelSpec], names: tuple[str, str, str], options: Any, events: Path | None, count: int,
    stage: Callable[[str], None],
) -> SimulationResult:  # fmt: skip
    from sllm_mini.cluster.simulated import simulate
    from sllm_mini.cluster.trace.file import published_file
    from sllm_mini.control.replay import LogHeader

    words = ", ".join(names)
    stage(words)
    with ExitStack() as stack:
        log = stack.enter_context(published_file(events)).write if events else None
        if log is not None:
            log(LogHeader(placement=names[0], keep_alive=names[1], autoscaler=names[2]).to_line())
        return simulate(
            merged(traces), machines, specs, placement=names[0], keep_alive=names[1], autoscaler=names[2], options=options, log=log,
            on_progress=lambda done, _: stage(f"{words}: {done:,} of {terminal.count(count, 'request')}"),
        )  # fmt: skip


def _document(traces: list[str], machines: list[NodeSpec], specs: list[ModelSpec], warned: list[str], results: list[SimulationResult]) -> dict[str, Any]:
    import msgspec

    return {
        "kind": "sllm-mini simulate", "traces": traces, "nodes": [msgspec.to_builtins(node) for node in machines],
        "models": [msgspec.to_builtins(spec) for spec in specs], "warnings": warned, "runs": [result.to_dict() for result in results],
    }  # fmt: skip


def _print(machines: list[NodeSpec], specs: list[ModelSpec], asked: Asked, results: list[SimulationResult]) -> None:
    console = terminal.stdout_console()
    first = results[0]
    gpus = sum(node.devices for node in machines)
    console.print(
        f"{terminal.count(first.arrived, 'request')} for {terminal.count(len(specs), asked.noun)} on {terminal.count(len(machines), 'node')} with {terminal.count(gpus, 'device')}: {seconds_text(first.seconds)} simulated"
    )
    console.print()
    console.print(_table(results))
    if len(results) == 1:
        console.print()
        console.print(terminal.facts(_facts(first)))


def _table(results: list[SimulationResult]) -> Table:
    numbers = ("cold", "first token p50", "p99", "latency p99", "refused", "unanswered", "devices held", "of that idle", "idle host memory")
    made = terminal.table("placement", "keep-alive", "autoscaler", *numbers, numbers=numbers)
    for result in results:
        account = result.account
        held = account.total_gpu_seconds - account.free_gpu_seconds
        answered = result.answered > 0
        made.add_row(
            *(result.policies[role] for role in ("placement", "keep_alive", "autoscaler")),
            share_text(result.cold_fraction) if answered else "", seconds_text(result.first_token.p50) if answered else "",
            seconds_text(result.first_token.p99) if answered else "", seconds_text(result.latency.p99) if answered else "",
            f"{result.refused:,}", f"{result.unanswered:,}", share_text(held / account.total_gpu_seconds) if account.total_gpu_seconds else "",
            share_text(account.idle_gpu_seconds / held) if held else "", f"{nbytes_text(account.idle_mb_seconds * 1e6 / result.seconds) if result.seconds else ''}",
        )  # fmt: skip
    return made


def _facts(result: SimulationResult) -> dict[str, str]:
    document = result.to_dict()
    found = {
        "starts from": ", ".join(f"{warmth} {number:,}" for warmth, number in document["starts_by_warmth"].items()) or "none",
        "weights read from": ", ".join(f"{tier} {number:,}" for tier, number in document["loads_by_tier"].items()) or "nowhere",
        "migrations": f"{result.account.migrations:,}",
        "preemptions": f"{result.account.preemptions:,}",
        "events": f"{result.event_count:,}, {result.event_count / max(result.arrived, 1):.2f} a request",
        "took": f"{seconds_text(result.wall_seconds)} here, {result.arrived / result.wall_seconds:,.0f} requests/s",
    }
    return found
