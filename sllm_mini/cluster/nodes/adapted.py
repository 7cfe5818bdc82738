"""Models of a node that are an adapter of another one: their weights are the base's, under its name in the store.

Ten adapters of one base cost the store one base. What an adapter adds lies with the worker that has it applied (`Adapters`), which reads it from
its folder as it climbs to READY; of the store's memory nothing is written.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from sllm_mini.cluster.nodes import messages as node
from sllm_mini.cluster.nodes.worker_messages import Adapter
from sllm_mini.errors import StoreError
from sllm_mini.inference.adapter_files import adapted_digest, check_fits, open_adapter
from sllm_mini.storage import Store


@dataclass(frozen=True, slots=True)
class _Adapted:
    """`digest` names base and adapter together in every session."""

    base: str
    folder: str
    digest: str


class AdaptedModels:
    """Of one node. Safe from several threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._known: dict[str, _Adapted] = {}

    def register(self, order: node.Register, *, in_use: bool) -> None:
        """From now on the model is its base with the adapter in `order.source`. Raises StoreError where it is another one and `in_use`, or its
        base is not registered, ModelError for an adapter that does not fit, and what opening it raises."""
        files = open_adapter(order.source)
        check_fits(files, self._store.index(order.base))
        found = _Adapted(order.base, order.source, adapted_digest(self._store.digest(order.base), files.digest()))
        with self._lock:
            before = self._known.get(order.model)
            if in_use and before is not None and before.digest != found.digest:
                raise StoreError(f"{order.model} has instances with the adapter in {before.folder}; unload it first")
            self._known[order.model] = found

    def forget(self, model: str) -> None:
        """Nothing for a model that is none of these."""
        with self._lock:
            self._known.pop(model, None)

    def stored(self, model: str) -> str:
        """What the store calls it: by its base's name, where it has one."""
        found = self._known.get(model)
        return model if found is None else found.base

    def of(self, base: str) -> list[str]:
        """The models that are adapters of this one."""
        with self._lock:
            return [model for model, found in self._known.items() if found.base == base]

    def digest(self, model: str) -> str:
        """What names the weights of any model in every session. Raises StoreError for one that is not registered."""
        found = self._known.get(model)
        return self._store.digest(model) if found is None else found.digest

    def adapter(self, model: str) -> Adapter | None:
        """What a worker applies to the base's weights; None for a model without a base."""
        found = self._known.get(model)
        return None if found is None else Adapter(found.folder, self._store.digest(found.base))
