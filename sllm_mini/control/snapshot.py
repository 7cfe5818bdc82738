"""The state of a cluster as plain data, and back: to print it, to compare two, to save a controller and go on elsewhere.

What points at an instance or a request says its id, in the order in which it is walked over. Costs some ten microseconds
for each of them. Pure. Taught in chapter 08.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from msgspec import convert, to_builtins

from sllm_mini.control.messages import ModelSpec, NodeSpec
from sllm_mini.control.state import InstanceState, ModelState, NodeState, RequestState
from sllm_mini.types import Tier, Warmth


def snapshot(
    nodes: Mapping[str, NodeState],
    models: Mapping[str, ModelState],
    instances: Mapping[int, InstanceState],
    requests: Mapping[int, RequestState],
) -> dict[str, Any]:
    return {
        "nodes": {name: _plain(node) for name, node in nodes.items()},
        "models": {name: _plain(model) for name, model in models.items()},
        "instances": [_plain(instance) for instance in instances.values()],
        "requests": [to_builtins(request) for request in requests.values()],
    }


def _plain(state: NodeState | ModelState | InstanceState) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for field in fields(state):
        value = getattr(state, field.name)
        if isinstance(value, deque):
            value = [request.id for request in value]
        elif isinstance(value, dict) and field.name not in ("cached", "cached_on"):
            value = list(value)
        row[field.name] = to_builtins(value)
    return row


def restored(
    data: dict[str, Any], cached_on: dict[str, dict[str, Tier]]
) -> tuple[dict[str, NodeState], dict[str, ModelState], dict[int, InstanceState], dict[int, RequestState]]:
    """What `snapshot` was given. The tables of `cached_on` are shared with the models. Raises msgspec.ValidationError for
    what is no snapshot."""
    requests = {row["id"]: convert(row, RequestState) for row in data["requests"]}
    instances: dict[int, InstanceState] = {}
    for row in data["instances"]:
        row = dict(row)
        for name in ("requests", "incoming"):
            row[name] = {id: requests[id] for id in row[name]}
        for name in ("warmth", "target", "then", "climbed_from"):
            row[name] = Warmth(row[name])
        tier = row["reached_from"]
        row |= {"spec": convert(row["spec"], ModelSpec), "devices": tuple(row["devices"]), "links": tuple(row["links"]), "reached_from": None if tier is None else Tier(tier)}
        instances[row["id"]] = InstanceState(**row)
    nodes: dict[str, NodeState] = {}
    for name, row in data["nodes"].items():
        cached = {model: Tier(tier) for model, tier in row["cached"].items()}
        here = {id: instances[id] for id in row["instances"]}
        nodes[name] = NodeState(**{**row, "spec": convert(row["spec"], NodeSpec), "cached": cached, "instances": here, "loading": dict.fromkeys(row["loading"])})
    models: dict[str, ModelState] = {}
    for name, row in data["models"].items():
        row = dict(row)
        for group in ("open", "starting", "instances", "asleep"):
            row[group] = {id: instances[id] for id in row[group]}
        row |= {"spec": convert(row["spec"], ModelSpec), "queue": deque(requests[id] for id in row["queue"]), "cached_on": cached_on[name]}
        models[name] = ModelState(**row)
    return nodes, models, instances, requests
