"""`sllm-mini simulate`: one trace on one cluster in simulated time, under one policy or beside each other under several."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sllm_mini.cli import terminal
from sllm_mini.cli.bench_options import check_writable
from sllm_mini.cli.checkpoints import parse_nbytes
from sllm_mini.cli.terminal import JsonOption
from sllm_mini.errors import FormatError
from sllm_mini.lab.units import nbytes_text, seconds_text, share_text

if TYPE_CHECKING:
    from rich.table import Table

    from sllm_mini.cluster.simulated import SimulationResult
    from sllm_mini.cluster.trace import Trace, TraceRequest
    from sllm_mini.control.messages import ModelSpec, NodeSpec


def simulate(
    traces: Annotated[list[str], typer.Argument(metavar="TRACE...", help="Files of traces, merged by time; or burst, diurnal, faas: those that travel with sllm_mini.")],
    nodes: Annotated[int, typer.Option("--nodes", min=1, metavar="N", help="Machines.")] = 4,
    devices: Annotated[int, typer.Option("--devices", min=0, metavar="N", help="Devices of each.")] = 4,
    placement: Annotated[list[str] | None, typer.Option("--placement", metavar="NAME", help="Where a request goes; repeatable. Default: serverlessllm.")] = None,
    keep_alive: Annotated[list[str] | None, typer.Option("--keep-alive", metavar="NAME", help="How long a model stays; repeatable. Default: fixed-10min.")] = None,
    autoscaler: Annotated[list[str] | None, typer.Option("--autoscaler", metavar="NAME", help="How many instances; repeatable. Default: per-request.")] = None,
    model_devices: Annotated[int, typer.Option("--model-devices", min=0, metavar="N", help="Devices that every model takes; 0 for functions, which need memory only.")] = 1,
    weights: Annotated[str, typer.Option("--weights", metavar="SIZE", help="Weights of every model, such as 14GB.")] = "14GB",
    memory: Annotated[str, typer.Option("--memory", metavar="SIZE", help="Memory of a node that instances may hold.")] = "512GB",
    store_memory: Annotated[str, typer.Option("--store-memory", metavar="SIZE", help="Memory of a node that its store caches models in; 0 for none.")] = "128GB",
    start_seconds: Annotated[float, typer.Option("--start-seconds", min=0, metavar="S", help="Of a cold start beside the weights: a fifth is the process, three fifths its libraries, a fifth the warm-up.")] = 5.0,
    min_instances: Annotated[int, typer.Option("--min-instances", min=0, metavar="N", help="Instances that each model always has.")] = 0,
    max_instances: Annotated[int, typer.Option("--max-instances", min=1, metavar="N", help="Instances that a model has at most.")] = 1_000_000,
    links: Annotated[Literal["node", "link", "shared"], typer.Option("--links", help="Loads queue per node, queue per link, or share each link.")] = "node",
    models_file: Annotated[Path | None, typer.Option("--models", metavar="FILE", help="A JSON list of models (the fields of ModelSpec) in place of equal ones.", exists=True, dir_okay=False)] = None,
    cluster_file: Annotated[Path | None, typer.Option("--cluster", metavar="FILE", help="A JSON list of nodes (the fields of NodeSpec) in place of equal ones.", exists=True, dir_okay=False)] = None,
    chrome_trace: Annotated[Path | None, typer.Option("--chrome-trace", metavar="FILE", help="Write what every instance did, for ui.perfetto.dev.", dir_okay=False)] = None,
    events: Annotated[Path | None, typer.Option("--events", metavar="FILE", help="Write every event and what the controller answered, a JSON line each.", dir_okay=False)] = None,
    flat: Annotated[bool, typer.Option("--flat", help="Keep sums only, so that memory does not grow with the trace; percentiles to half a percent.")] = False,
    json: JsonOption = False,
) -> None:
    """Run a trace on a simulated cluster, and compare policies.

    The controller is the one that runs live clusters. Policies that are named more than once are run in all combinations and compared. Figures of machines and models are assumed.
    """
    from sllm_mini.cluster.simulated import SimulationOptions

    check_writable(chrome_trace, events)
    combinations = list(itertools.product(placement or ["serverlessllm"], keep_alive or ["fixed-10min"], autoscaler or ["per-request"]))
    if len(combinations) > 1 and (chrome_trace or events):
        raise typer.BadParameter("a file holds one run; name one policy of each kind", param_hint="--chrome-trace, --events")
    if flat and chrome_trace:
        raise typer.BadParameter("with --flat no spans are kept to draw", param_hint="--chrome-trace")
    opened = [_open(name) for name in traces]
    with terminal.stage_progress() as stage:
        stage("reading the trace")
        names, count = _models_of(opened)
        specs = _read_list(models_file, "model") if models_file else _even_models(names, parse_nbytes(weights), model_devices, start_seconds, min_instances, max_instances)
        machines = _read_list(cluster_file, "node") if cluster_file else _even_nodes(nodes, devices, parse_nbytes(memory))
        keep: Literal["everything", "requests", "summary"] = "summary" if flat else "everything" if chrome_trace else "requests"
        options = SimulationOptions(links=links, store_dram_nbytes=0 if store_memory == "0" else parse_nbytes(store_memory), keep=keep)
        results = [_run(opened, machines, specs, names_of_three, options, events, count, stage) for names_of_three in combinations]
        if chrome_trace:
            from sllm_mini.cluster.simulated import write_chrome_trace

            stage("writing the trace of the run")
            write_chrome_trace(chrome_trace, results[0].spans)
    if json:
        terminal.emit_json(_document(traces, machines, specs, results))
    else:
        _print(machines, specs, results)


def _open(name: str) -> Trace:
    from sllm_mini.cluster.trace import open_trace, shipped_trace
    from sllm_mini.cluster.trace.shipped import SHIPPED

    return shipped_trace(name) if name in SHIPPED and not Path(name).exists() else open_trace(name)


def _merged(traces: list[Trace]) -> Iterator[TraceRequest]:
    return iter(traces[0]) if len(traces) == 1 else heapq.merge(*traces, key=lambda request: request.arrival_seconds)


def _models_of(traces: list[Trace]) -> tuple[list[str], int]:
    """The models in order of their first request, and how many requests there are."""
    names: dict[str, None] = {}
    count = 0
    for request in _merged(traces):
        names[request.model] = None
        count += 1
    return list(names), count


def _even_models(names: list[str], nbytes: int, devices: int, start_seconds: float, fewest: int, most: int) -> list[ModelSpec]:
    from sllm_mini.control.messages import ModelSpec

    return [
        ModelSpec(
            name=name, nbytes=nbytes, devices=devices, min_instances=fewest, max_instances=most, process_nbytes=10**8, runtime_nbytes=10**9, process_seconds=0.2 * start_seconds,
            runtime_seconds=0.6 * start_seconds, ready_seconds=0.2 * start_seconds, prefill_seconds_per_token=2e-4, decode_seconds_per_token=0.02,
        )
        for name in names
    ]  # fmt: skip


def _even_nodes(nodes: int, devices: int, memory_nbytes: int) -> list[NodeSpec]:
    from sllm_mini.cluster.simulated import even_cluster

    return even_cluster(nodes, devices=devices, dram_nbytes=memory_nbytes)


def _read_list(path: Path, what: Literal["model", "node"]) -> list[Any]:
    """Raises FormatError for anything else than a list of them."""
    import msgspec

    from sllm_mini.control.messages import ModelSpec, NodeSpec

    kind: Any = ModelSpec if what == "model" else NodeSpec
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[kind])
    except msgspec.DecodeError as error:
        raise FormatError(f"it is no JSON list of {what}s ({error}); give an object for each with the fields of {kind.__name__}", path=path) from error


def _run(
    traces: list[Trace], machines: list[NodeSpec], specs: list[ModelSpec], names: tuple[str, str, str], options: Any, events: Path | None, count: int,
    stage: Callable[[str], None],
) -> SimulationResult:  # fmt: skip
    from sllm_mini.cluster.simulated import simulate

    words = ", ".join(names)
    stage(words)
    with ExitStack() as stack:
        log = stack.enter_context(events.open("wb")).write if events else None
        return simulate(
            _merged(traces), machines, specs, placement=names[0], keep_alive=names[1], autoscaler=names[2], options=options, log=log,
            on_progress=lambda done, _: stage(f"{words}: {done:,} of {terminal.count(count, 'request')}"),
        )  # fmt: skip


def _document(traces: list[str], machines: list[NodeSpec], specs: list[ModelSpec], results: list[SimulationResult]) -> dict[str, Any]:
    import msgspec

    return {
        "kind": "sllm-mini simulate", "traces": traces, "nodes": [msgspec.to_builtins(node) for node in machines],
        "models": [msgspec.to_builtins(spec) for spec in specs], "runs": [result.to_dict() for result in results],
    }  # fmt: skip


def _print(machines: list[NodeSpec], specs: list[ModelSpec], results: list[SimulationResult]) -> None:
    console = terminal.stdout_console()
    first = results[0]
    gpus = sum(node.devices for node in machines)
    console.print(
        f"{terminal.count(first.arrived, 'request')} for {terminal.count(len(specs), 'model')} on {terminal.count(len(machines), 'node')} with {terminal.count(gpus, 'device')}: {seconds_text(first.seconds)} simulated"
    )
    console.print()
    console.print(_table(results))
    if len(results) == 1:
        console.print()
        console.print(terminal.facts(_facts(first)))


def _table(results: list[SimulationResult]) -> Table:
    numbers = ("cold", "first token p50", "p99", "latency p99", "refused", "unanswered", "devices held", "of that idle", "idle memory")
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
