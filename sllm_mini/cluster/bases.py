"""Models that are an adapter of another one: what that asks of whoever deploys and deletes, the same in every cluster."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sllm_mini.cluster.api import Deployment
from sllm_mini.errors import InUseError, ModelError


def check_deploy(deployment: Deployment, known: Mapping[str, Deployment]) -> None:
    """Raises ModelError for an adapter that is an address or has a tier, and where its base is not among the `known`, or is an adapter
    itself, InUseError where its name is of a model of the other kind."""
    name, base = deployment.spec.name, known.get(deployment.base)
    before = known.get(name)
    if deployment.base == name:
        raise ModelError(f"{name} cannot be its own base; give the adapter another name")
    if deployment.base and "://" in deployment.source:
        raise ModelError(f"the adapter of {name} is an address; give a folder that every node sees")
    if deployment.base and deployment.tier is not None:
        raise ModelError(f"{name} is an adapter, whose weights in stores are those of {deployment.base}; give that the tier")
    if before is not None and bool(before.base) != bool(deployment.base):
        what = f"an adapter of {before.base}" if before.base else "a model of its own"
        raise InUseError(f"{name} is deployed as {what}; delete that first, or choose another name")
    if deployment.base and base is None:
        raise ModelError(f"there is no model {deployment.base} that could be the base of {name}; deploy that first")
    if base is not None and base.base:
        raise ModelError(f"{deployment.base} is an adapter itself; give its base {base.base} as the base of {name}")


def check_no_adapters(model: str, deployments: Iterable[Deployment], what: str) -> None:
    """Raises InUseError where some of them are adapters of that model, which must stay as it is then."""
    names = sorted(each.spec.name for each in deployments if each.base == model)
    if names:
        raise InUseError(f"{model} {what}: it is the base of {', '.join(names)}; delete {'those' if len(names) > 1 else 'that'} first")


def text_source(deployment: Deployment, known: Mapping[str, Deployment]) -> str:
    """Where its tokenizer and its configuration lie: with its base, where it has one."""
    base = known.get(deployment.base)
    return deployment.source if base is None else base.source
