"""What is wrong with a simulation's arguments, told before it runs: things of another kind, names given twice, models that fit nowhere.

Taught in chapter 08. Pure; costs a microsecond for each node and model, and a tenth for each request as it passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import inf
from typing import Any, TypeVar

from sllm_mini.cluster.simulated.parts import SimulationError
from sllm_mini.cluster.trace.request import MAX_TOKENS, TraceRequest
from sllm_mini.control.messages import AnyEvent, ModelDeployed, ModelSpec, NodeJoined, NodeSpec
from sllm_mini.control.state import held_nbytes
from sllm_mini.types import Warmth

_Spec = TypeVar("_Spec", ModelSpec, NodeSpec)
_Thing = TypeVar("_Thing")
_NAMED = 3
"""So many models are named in one sentence."""


class MisfitWarning(UserWarning):
    """A model that fits no node, which every request for it is going to find out."""


def listed(given: Iterable[_Spec], kind: type[_Spec], what: str) -> list[_Spec]:
    """The specs as a list. Raises SimulationError for another thing, and for a name that two of them have."""
    specs = list(_each(given, f"{what}s", kind.__name__))
    names: set[str] = set()
    for number, spec in enumerate(specs, 1):
        if type(spec) is not kind:
            raise SimulationError(f"{what} {number} is {spec!r:.60}; give a {kind.__name__}")
        if spec.name in names:
            raise SimulationError(f"two {what}s are named {spec.name!r}; give each a name of its own")
        names.add(spec.name)
    return specs


def scheduled(events: Iterable[tuple[float, AnyEvent]]) -> list[tuple[float, AnyEvent]]:
    """The events as a list. Raises SimulationError for one that has no time."""
    found = list(_each(events, "events", "pairs of a second and an event"))
    for each in found:
        if type(each) is not tuple or len(each) != 2 or not isinstance(each[0], int | float) or not 0 <= each[0] < inf:
            raise SimulationError(f"among the events is {each!r:.80}; give pairs of a second, 0 or later, and an event")
    return found


def passing(trace: Iterable[TraceRequest]) -> Iterator[TraceRequest]:
    """The same requests, each looked at as it passes. Raises SimulationError at the first that cannot be."""
    for number, request in enumerate(_each(trace, "requests", "TraceRequest")):
        if type(request) is not TraceRequest:
            raise SimulationError(f"request {number} of the trace is {request!r:.60}; give a TraceRequest")
        if not (0 <= request.arrival_seconds < inf and 0 <= request.input_tokens <= MAX_TOKENS and 0 <= request.output_tokens <= MAX_TOKENS):
            raise SimulationError(f"request {number} of the trace is {request!r:.160}; give seconds and tokens of 0 or more")
        if request.duration_seconds is not None and not 0 <= request.duration_seconds < inf:
            raise SimulationError(f"request {number} of the trace runs for {request.duration_seconds} s; give 0 or more, or leave it out")
        yield request


def _each(given: Iterable[_Thing], what: str, kind: str) -> Iterator[_Thing]:
    if not isinstance(given, Iterable):
        raise SimulationError(f"the {what} are {given!r:.60}; give a list of {kind}")
    return iter(given)


def misfits(nodes: Sequence[NodeSpec], models: Sequence[ModelSpec]) -> list[str]:
    """A sentence for each size of model that no node is large enough for, were it empty: what it needs and what the largest
    node has. An instance takes its devices and, from process to readiness, host memory of one node."""
    if not nodes:
        return ["there is no node, so no model can start; give at least one"]
    rooms = {(node.devices, node.dram_nbytes) for node in nodes}
    needs: dict[tuple[int, int], list[str]] = {}
    for model in models:
        devices, nbytes = model.devices, held_nbytes(model, Warmth.READY)
        if not any(devices <= room and nbytes <= memory for room, memory in rooms):
            needs.setdefault((devices, nbytes), []).append(model.name)
    largest = max(nodes, key=lambda node: (node.devices, node.dram_nbytes))
    return [
        f"{_named(names)} {_amounts(*need)} on one node, and the largest, {largest.name}, has {_have(largest)}; give a larger node or a smaller model"
        for need, names in needs.items()
    ]


def deployments(nodes: Sequence[NodeSpec], models: Sequence[ModelSpec], events: Iterable[tuple[float, Any]]) -> tuple[list[NodeSpec], list[ModelSpec]]:
    """All nodes and models that there ever are, those that come by an event too."""
    later = [event for _, event in events]
    return [*nodes, *(event.node for event in later if isinstance(event, NodeJoined))], [*models, *(event.model for event in later if isinstance(event, ModelDeployed))]


def _named(names: list[str]) -> str:
    if len(names) == 1:
        return f"the model {names[0]} needs"
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"the models {', '.join(names[:_NAMED])}{more} need"


def _amounts(devices: int, nbytes: int) -> str:
    memory = f"{nbytes:,} bytes of host memory"
    return f"{devices} device{'' if devices == 1 else 's'} and {memory}" if devices else memory


def _have(node: NodeSpec) -> str:
    return f"{node.devices} and {node.dram_nbytes:,}"
