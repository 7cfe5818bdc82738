"""`sllm-mini serve`: folders with checkpoints as models of an OpenAI-compatible server, in the foreground until it is told to end
(chapter 11)."""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sllm_mini.cli import terminal
from sllm_mini.cli.bench_options import check_gpus
from sllm_mini.cli.checkpoints import parse_nbytes
from sllm_mini.cli.terminal import JsonOption
from sllm_mini.errors import SllmError, UnsupportedError

if TYPE_CHECKING:
    from sllm_mini.cluster.api import Cluster, Deployment
    from sllm_mini.cluster.live.options import ControlOptions
    from sllm_mini.serving.folder import ServerFolder
    from sllm_mini.serving.options import ServeOptions

KEY_VARIABLE = "SLLM_MINI_API_KEY"
_DESCRIPTORS = 1 << 16
_SILENT_SECONDS = 15.0
"""For so long a node goes on without a word of the server, whose interpreter may be busy importing what tokenizers need."""


def serve(
    directories: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME=]DIR…", help="A checkpoint, served under its folder's name or the one before it; with --state none is needed.", show_default=False)
    ] = None,
    cluster: Annotated[str, typer.Option("--cluster", metavar="KIND[:NODES]", help="Where models run: local (processes), inprocess (threads) or ray.")] = "local:1",
    devices: Annotated[int | None, typer.Option("--devices", metavar="N", min=1, help="Of each node; an instance takes one.", show_default="2; with --cuda the GPUs that there are")] = None,
    store_dram: Annotated[int, typer.Option("--store-dram", parser=parse_nbytes, metavar="SIZE", help="Memory of each node for models.")] = "4GiB",  # type: ignore[assignment]
    concurrency: Annotated[int, typer.Option("--concurrency", metavar="N", min=1, help="Requests that run at once in one instance.")] = 4,
    threads: Annotated[int, typer.Option("--threads", metavar="N", min=1, help="Of an instance on a CPU.")] = 1,
    cuda: Annotated[bool, typer.Option("--cuda", help="Devices are GPUs.")] = False,
    placement: Annotated[str, typer.Option("--placement", metavar="NAME", help="Where a model starts.")] = "serverlessllm",
    keep_alive: Annotated[str, typer.Option("--keep-alive", metavar="TIME", help='How long an idle model stays: "5m", 0, -1 (for good), or a policy.')] = "10m",
    autoscaler: Annotated[str, typer.Option("--autoscaler", metavar="NAME", help="How many instances of a model there are.")] = "per-request",
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help=f"Where to listen; other than on this machine it takes {KEY_VARIABLE}.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="PORT", min=0, max=65535, help="0: one that is free.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option("--api-key-file", metavar="FILE", exists=True, dir_okay=False, help="Keys, one a line, one of which each request must have.", show_default=f"${KEY_VARIABLE}"),
    ] = None,
    drain: Annotated[float, typer.Option("--drain", metavar="SECONDS", min=1, help="What open requests have when it is told to end.")] = 30.0,
    models_root: Annotated[
        list[Path] | None,
        typer.Option("--models-root", metavar="DIR", exists=True, file_okay=False, help="Models may be deployed from folders below it.", show_default="where each DIR is"),
    ] = None,
    allow_remote: Annotated[bool, typer.Option("--allow-remote", help="Models may be deployed from addresses, which this server then asks.")] = False,
    state: Annotated[
        Path | None, typer.Option("--state", metavar="DIR", file_okay=False, help="What is deployed is kept there, and comes back with the next server that is given it.", show_default="none")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what was deployed with that state.")] = False,
    revive: Annotated[int, typer.Option("--revive", metavar="N", min=0, help="A node that is lost is started again, until that was in vain N times in a row.")] = 10,
    requests_per_minute: Annotated[int, typer.Option("--requests-per-minute", metavar="N", min=0, help="That are taken of each key; 0: any number.")] = 0,
    tokens_per_minute: Annotated[int, typer.Option("--tokens-per-minute", metavar="N", min=0, help="Of prompts and answers, likewise.")] = 0,
    json: JsonOption = False,
) -> None:
    """Serve models to OpenAI clients, each started when asked for.

    It runs in the foreground until Ctrl-C or SIGTERM, which let open requests end, and then ends with exit code 0. A model starts with its first request, or an empty prompt.
    """
    try:
        from sllm_mini.serving.options import Limits, ServeOptions
        from sllm_mini.serving.server import Server
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"the server needs {error.name}; install the extra with: pip install 'sllm_mini[serve]'") from error
    from sllm_mini.cluster.live.options import LiveOptions, NodeOptions
    from sllm_mini.cluster.opening import open_cluster
    from sllm_mini.cluster.simulated.run import even_cluster
    from sllm_mini.serving.folder import ServerFolder

    limits = Limits(requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute)
    options = ServeOptions(host=host, port=port, api_keys=read_keys(api_key_file), drain_seconds=drain, allow_remote=allow_remote, limits=limits)
    if not directories and state is None:
        raise typer.BadParameter("there is nothing to serve; give a folder with a checkpoint, or the --state of a server", param_hint="DIR")
    deployments = _deployments(directories or [], concurrency)
    roots = tuple(map(os.fspath, models_root)) if models_root else tuple(dict.fromkeys(os.path.dirname(each.source) for each in deployments))
    options = replace(options, model_roots=roots)
    kind, _, count = cluster.partition(":")
    if kind not in ("local", "inprocess", "ray") or not (count or "1").isdecimal() or int(count or 1) < 1:
        raise typer.BadParameter(f'"{cluster}" is no cluster to serve from; write local:2, inprocess:1 or ray:2', param_hint="--cluster")
    nodes = even_cluster(int(count or 1), devices=_devices(devices, cuda=cuda, kind=kind), dram_nbytes=store_dram)
    control = _control(placement, keep_alive, autoscaler)
    control.controller()  # a name that no policy has is told before anything starts
    importing = threading.Thread(target=importlib.import_module, args=("transformers.models.auto.tokenization_auto",), name="sllm-import", daemon=True)
    importing.start()  # beside the nodes, which import more
    _raise_descriptors()
    with ExitStack() as stack:
        place = state or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sllm-serve-", ignore_cleanup_errors=True)))
        folder = stack.enter_context(ServerFolder(place))
        resumed, before = folder.prepare({"placement": placement, "keep_alive": keep_alive, "autoscaler": autoscaler}, given=[each.spec.name for each in deployments], fresh=fresh)
        node = NodeOptions(store_dram_nbytes=store_dram, threads=threads, cuda=cuda, silent_seconds=_SILENT_SECONDS)
        live = LiveOptions(node=node, overlap=True, revive=revive)
        opened = stack.enter_context(open_cluster(kind, folder=folder.path, nodes=nodes, control=control, options=live, resume="models" if resumed else False))
        _serve(Server, opened, options, folder, [*([] if resumed else before), *_new(deployments, before)], importing, json)


def _devices(given: int | None, *, cuda: bool, kind: str) -> int:
    """Of each node; raises DeviceError where they should be GPUs of this machine and are not there. Ray's nodes are elsewhere."""
    if not cuda or kind == "ray":
        return given or (1 if cuda else 2)
    from sllm_mini.device.cuda import gpu_count

    devices = given or max(1, gpu_count())
    check_gpus(devices)
    return devices


def _new(given: Sequence[Deployment], before: Sequence[Deployment]) -> list[Deployment]:
    """Those of the command line that are not known. What was known is as it was last; from another folder it is that of the command line."""
    from msgspec import structs

    known = {each.spec.name: each for each in before}
    found = []
    for each in given:
        old = known.get(each.spec.name)
        if old is None:
            found.append(each)
        elif old.source != each.source:
            found.append(replace(old, source=each.source, base="", spec=structs.replace(old.spec, nbytes=each.spec.nbytes)))
    return found


def _raise_descriptors() -> None:
    """Each client needs one."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _serve(
    server_type: Any, cluster: Cluster, options: ServeOptions, folder: ServerFolder, deployments: Sequence[Deployment], importing: threading.Thread, json: bool
) -> None:  # fmt: skip
    server = server_type(cluster, options)
    try:
        for each in deployments:
            cluster.deploy(each)
        folder.announce(server.url)
        importing.join()  # whoever is told that it is up need not wait for imports
        server.read_ahead()
        _announce(server.url, [each.spec.name for each in cluster.models()], bool(options.api_keys), json)
    except BaseException:
        server.close()
        raise
    server.run()


def _announce(url: str, models: list[str], keyed: bool, json: bool) -> None:
    if json:
        terminal.emit_json({"url": url, "pid": os.getpid(), "models": models})
    else:
        console = terminal.stdout_console()
        console.print(f"Models are served at {url}/v1 until Ctrl-C{', to who has a key' if keyed else ', to this machine alone'}.")
        console.print(terminal.facts({"models": ", ".join(models) or "none yet; deploy one with: sllm-mini deploy"}))
        if models:
            console.print(f"  next: curl {url}/v1/completions -H 'content-type: application/json' -d '{{\"model\": \"{models[0]}\", \"prompt\": \"Once upon a time\"}}'", style="dim")
    sys.stdout.flush()


def _deployments(directories: Sequence[str], concurrency: int) -> list[Deployment]:
    """Raises CheckpointError for a folder that has no checkpoint, SllmError for a name that two have."""
    from sllm_mini.checkpoint import open_checkpoint
    from sllm_mini.cluster.api import Deployment
    from sllm_mini.control.messages import ModelSpec

    found: dict[str, Deployment] = {}
    for given in directories:
        name, equals, place = given.partition("=")
        folder = Path(place if equals else given).resolve()
        name = name if equals else folder.name.removesuffix(".sllm")
        if name in found:
            raise SllmError(f"two folders would be the model {name}; give one of them a name: NAME={folder}")
        found[name] = Deployment(ModelSpec(name=name, nbytes=open_checkpoint(folder).nbytes, concurrency=concurrency), os.fspath(folder))
    return list(found.values())


def _control(placement: str, keep_alive: str, autoscaler: str) -> ControlOptions:
    from sllm_mini.cluster.live.options import ControlOptions
    from sllm_mini.control.keepalive import POLICIES, FixedKeepAlive
    from sllm_mini.serving.common_protocol import duration

    if keep_alive in POLICIES:
        return ControlOptions(placement, keep_alive, autoscaler)
    try:
        seconds = duration(keep_alive)
    except ValueError:
        raise typer.BadParameter(f'"{keep_alive}" is no time and no policy; write for example 5m, 0, -1 or {", ".join(POLICIES)}', param_hint="--keep-alive") from None
    if seconds is None or seconds < 0:
        return ControlOptions(placement, "forever", autoscaler)
    return ControlOptions(placement, lambda _: FixedKeepAlive(seconds), autoscaler)


def read_keys(file: Path | None) -> tuple[str, ...]:
    """Never an argument: those are seen by every user of the machine."""
    text = file.read_text() if file is not None else os.environ.get(KEY_VARIABLE, "")
    keys = tuple(filter(None, (line.strip() for line in text.splitlines())))
    if file is not None and not keys:
        raise SllmError(f"{file} has no API key in it, and without one everybody on this machine would be served; write one a line, or leave the option out")
    return keys
