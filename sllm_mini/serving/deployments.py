"""What /admin reads and answers: how a model is to be deployed, and how it is. And where its weights may come from. Chapter 11."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from msgspec.structs import replace
from pydantic import ConfigDict, Field

from sllm_mini.checkpoint import open_checkpoint
from sllm_mini.cluster.api import Cluster, Deployment, Metrics, NodeReport, RequestReport
from sllm_mini.control.messages import ModelSpec, SpecError
from sllm_mini.inference.adapter_files import open_adapter
from sllm_mini.serving.answers import timing
from sllm_mini.serving.common_protocol import Timing, Wire, duration
from sllm_mini.serving.errors import ApiError, invalid
from sllm_mini.serving.options import MODEL_NAME, ServeOptions
from sllm_mini.storage.source import redacted
from sllm_mini.types import Tier, Warmth

_SCHEMES = ("http", "https", "s3", "hf")
_CONCURRENCY = 4
WarmthName = Literal["cold", "process", "runtime", "dram", "device", "ready"]
TierName = Literal["remote", "disk", "dram", "device"]
Whole = Annotated[int, Field(ge=0, le=1024)]


class AdminRequest(Wire):
    """A body that is refused where it has a field that is not known: a misspelt one must not be lost."""

    model_config = ConfigDict(extra="forbid")


class DeployRequest(AdminRequest):
    """What is left out stays as it is; of a new model `source` must be there, or `base` and `adapter`. `source` is a folder with a checkpoint,
    below one of those that the server was given, or an address where it allows them; `adapter` one with a LoRA adapter of the deployed model
    `base`, whose weights it shares. `tier`: each node keeps the weights there whatever it evicts. `keep_alive`: for
    how long an idle instance stays (seconds, "5m", 0, -1 for good), or "policy": as the server has it."""

    source: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    base: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    adapter: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    min_instances: Whole | None = None
    max_instances: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    concurrency: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Requests that run at once in one instance."""
    devices: Annotated[int, Field(ge=1, le=1024)] | None = None
    """That an instance takes."""
    tier: Literal["none", "disk", "dram"] | None = None
    keep_alive: float | str | None = None


class LoadRequest(AdminRequest):
    """How warm an instance is to be, and for how long it stays when idle from now on."""

    warmth: Literal["dram", "device", "ready"] = "ready"
    keep_alive: float | str | None = None


class UnloadRequest(AdminRequest):
    """Nothing is to be said."""


class PinRequest(AdminRequest):
    """Without a field it is one instance that always stays; 0 lets the last one go."""

    min_instances: Whole | None = None
    tier: Literal["none", "disk", "dram"] | None = None


class InstanceStatus(Wire):
    instance: int
    node: str
    model: str | None
    warmth: WarmthName
    climbing_to: WarmthName | None
    requests: int
    private_nbytes: int
    """What its end would give back; 0 where that was not measured."""
    ends_in_seconds: float | None
    """If it stays idle; null: not by itself."""


class ModelStatus(Wire):
    name: str
    source: str
    base: str | None
    """The model whose weights it shares, where `source` is an adapter of that."""
    nbytes: int
    """Of its weights, with those that it shares."""
    devices: int
    concurrency: int
    min_instances: int
    max_instances: int
    tier: TierName | None
    keep_alive: float | None
    """As it was deployed; -1: for good, null: as the server's policy says."""
    state: WarmthName
    """Of its warmest instance."""
    instances: int
    cached: dict[str, TierName]
    """The fastest tier of each node's store that has all of its weights."""


class StoreStatus(Wire):
    dram_used_nbytes: int
    dram_budget_nbytes: int
    disk_used_nbytes: int
    disk_budget_nbytes: int
    shared_nbytes: int


class NodeStatus(Wire):
    name: str
    alive: bool
    incarnation: int
    """How often a node of this name has joined."""
    devices: int
    reason: str
    """Why it is not alive."""
    returns_in_seconds: float | None
    """Until it is started again; 0: it is coming up, null: nobody does that."""
    store: StoreStatus | None


class RequestCounts(Wire):
    """Since the cluster was opened, but for the first two, which are of now."""

    running: int
    waiting: int
    answered: int
    failed: int
    """All that are over and were not answered."""
    turned_away: int
    cold_starts: dict[WarmthName, int]
    """Answered requests that waited for a start, by its rung."""
    migrations: int


class Status(Wire):
    """What runs. Reading it wakes nothing."""

    requests: RequestCounts
    models: list[ModelStatus]
    instances: list[InstanceStatus]
    nodes: list[NodeStatus]


class Deleted(Wire):
    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True


class RequestStatus(Timing):
    """A request so far. Seconds that it has not come to are null."""

    model: str
    outcome: Literal["answered", "cancelled", "refused", "failed"] | None
    reason: str
    """Why it was not answered."""
    input_tokens: int
    output_tokens: int


def deployment_of(name: str, request: DeployRequest, known: Mapping[str, Deployment], options: ServeOptions) -> Deployment:
    """Where `known` models are deployed. Reads the checkpoint's index. Raises ApiError, and what opening the source raises."""
    before = known.get(name)
    if re.fullmatch(MODEL_NAME, name) is None:
        raise invalid(f"{name!a:.80} is not a name for a model; use at most 128 letters, digits, '.', '_' and '-'", "name")
    source, base, nbytes = _weights(request, before, known, options)
    spec = before.spec if before is not None else ModelSpec(name=name, nbytes=0, concurrency=_CONCURRENCY)
    given = {field: value for field in ("min_instances", "max_instances", "concurrency", "devices") if (value := getattr(request, field)) is not None}
    try:
        spec = replace(spec, nbytes=nbytes, **given)
        return Deployment(spec, source, _tier(request.tier, before), _keep_alive(request.keep_alive, before), base)
    except (SpecError, OverflowError) as error:
        raise invalid(str(error)) from None


def confined(given: str, roots: Sequence[str], *, allow_remote: bool) -> str:
    """The one place where a text of a client's becomes a path. It must lie below one of `roots` once all links are followed; whether there is
    something elsewhere is not told. Raises ApiError(400)."""
    scheme, separator, _ = given.partition("://")
    if separator or "::" in given or given[:5].lower() == "file:":
        if scheme not in _SCHEMES or "::" in given or not given.isprintable():
            raise invalid(f"source is an address that is not read here; give a folder, or one that begins with {', '.join(f'{each}://' for each in _SCHEMES)}", "source")
        if not allow_remote:
            raise invalid("source is an address, and this server was started without --allow-remote; give a folder", "source")
        return given
    return _below(given, roots, "source")


def _below(given: str, roots: Sequence[str], field: str) -> str:
    if given.isprintable() and ".." not in given.split("/") and len(os.fsencode(given)) < 4096:
        for root in map(os.path.realpath, roots):
            found = os.path.realpath(os.path.join(root, given))
            if found.startswith(os.path.join(root, "")) and os.path.isdir(found):
                return found
    raise invalid(f"{field} {given!a:.120} is no folder below those that models may come from; they are named by --models-root when the server is started", field)


def status_of(cluster: Cluster) -> Status:
    """Asks the cluster, and no model."""
    nodes, models, metrics, now = cluster.nodes(), cluster.models(), cluster.metrics(), cluster.now
    instances = [
        InstanceStatus(
            instance=each.instance, node=node.name, model=each.model, warmth=_warmth(each.warmth), climbing_to=None if each.climbing_to is None else _warmth(each.climbing_to),
            requests=each.requests, private_nbytes=each.private_nbytes, ends_in_seconds=None if each.ends_at is None else max(0.0, round(each.ends_at - now, 3)),
        )
        for node in nodes for each in node.instances
    ]  # fmt: skip
    return Status(requests=_counts(metrics), models=[_model(each, nodes) for each in models], instances=instances, nodes=[_node(each, now) for each in nodes])


def request_status(report: RequestReport) -> RequestStatus:
    return RequestStatus(
        **timing(report).model_dump(), model=report.model, outcome=report.outcome, reason=report.reason, input_tokens=report.input_tokens, output_tokens=report.output_tokens,
    )  # fmt: skip


def check_room(deployment: Deployment, nodes: Sequence[NodeReport]) -> None:
    """Raises ApiError(507) where no store could keep it in its tier. A folder is on the disk as it is."""
    tier, nbytes = deployment.tier, deployment.spec.nbytes
    if tier is None or (tier is Tier.DISK and "://" not in deployment.source):
        return
    budgets = [node.store.dram_budget_nbytes if tier is Tier.DRAM else node.store.disk_budget_nbytes for node in nodes if node.store is not None]
    if budgets and max(budgets) < nbytes:
        raise ApiError(507, "out_of_space", f"the weights have {nbytes:,} bytes, and no node's store has more than {max(budgets):,} in {tier.name.lower()}", param="tier")


def _weights(request: DeployRequest, before: Deployment | None, known: Mapping[str, Deployment], options: ServeOptions) -> tuple[str, str, int]:
    """Where a model's weights come from, its base or "", and how many bytes they are, those of the base included."""
    named = request.base is not None or request.adapter is not None
    if request.source is not None and named:
        raise invalid("a model has a source, or a base and an adapter; give one of the two", "source")
    if named or (before is not None and before.base and request.source is None):
        return _adapted(request, before, known, options)
    if request.source is None and before is None:
        raise invalid("source is missing; a model that is not deployed yet needs one", "source")
    source = confined(request.source, options.model_roots, allow_remote=options.allow_remote) if request.source is not None else before.source  # type: ignore[union-attr]
    return source, "", _nbytes(source)


def _adapted(request: DeployRequest, before: Deployment | None, known: Mapping[str, Deployment], options: ServeOptions) -> tuple[str, str, int]:
    old = before if before is not None and before.base else None
    name = request.base or (old.base if old is not None else "")
    if not name or (request.adapter is None and old is None):
        raise invalid("an adapter that is not deployed yet needs a base, the name of a deployed model, and an adapter, a folder", "adapter" if name else "base")
    if name not in known:
        raise invalid(f"there is no model {name!a:.80} that could be the base; deploy that first", "base")
    source = _below(request.adapter, options.model_roots, "adapter") if request.adapter is not None else old.source  # type: ignore[union-attr]
    return source, name, known[name].spec.nbytes + open_adapter(source).nbytes


def _nbytes(source: str) -> int:
    if "://" not in source:
        return open_checkpoint(source).nbytes
    from sllm_mini.storage.remote import open_remote

    with tempfile.TemporaryDirectory(prefix="sllm-index-") as folder, open_remote(source, os.path.join(folder, "checkpoint")) as checkpoint:
        return checkpoint.nbytes


def _tier(given: str | None, before: Deployment | None) -> Tier | None:
    if given is None:
        return None if before is None else before.tier
    return None if given == "none" else Tier[given.upper()]


def _keep_alive(given: float | str | None, before: Deployment | None) -> float | None:
    if given is None:
        return None if before is None else before.keep_alive
    try:
        return None if given == "policy" else duration(given)
    except ValueError as error:
        raise invalid(str(error), "keep_alive") from None


def _counts(metrics: Metrics) -> RequestCounts:
    answered = metrics.outcomes.get("answered", 0)
    cold = {_warmth(rung): count for rung, count in metrics.cold_requests.items() if rung < Warmth.READY}
    return RequestCounts(
        running=metrics.running, waiting=metrics.waiting, answered=answered, failed=sum(metrics.outcomes.values()) - answered, turned_away=metrics.turned_away, cold_starts=cold,
        migrations=metrics.migrations,
    )  # fmt: skip


def _model(deployment: Deployment, nodes: Sequence[NodeReport]) -> ModelStatus:
    spec, name = deployment.spec, deployment.spec.name
    warmths = [each.warmth for node in nodes for each in node.instances if each.model == name]
    return ModelStatus(
        name=name, source=redacted(deployment.source), base=deployment.base or None, nbytes=spec.nbytes, devices=spec.devices, concurrency=spec.concurrency, min_instances=spec.min_instances,
        max_instances=spec.max_instances, tier=None if deployment.tier is None else _place(deployment.tier), keep_alive=deployment.keep_alive,
        state=_warmth(max(warmths, default=Warmth.COLD)), instances=len(warmths),
        cached={node.name: _place(node.cached[name]) for node in nodes if node.alive and name in node.cached},
    )  # fmt: skip


def _node(node: NodeReport, now: float) -> NodeStatus:
    store = node.store
    found = None if store is None else StoreStatus(**{field: getattr(store, field) for field in StoreStatus.model_fields})
    returns = None if node.returns_at is None else max(0.0, round(node.returns_at - now, 3))
    return NodeStatus(
        name=node.name, alive=node.alive, incarnation=node.incarnation, devices=node.spec.devices, reason=node.reason, returns_in_seconds=returns, store=found,
    )  # fmt: skip


def _warmth(warmth: Warmth) -> Any:
    return warmth.name.lower()


def _place(tier: Tier) -> Any:
    return tier.name.lower()
