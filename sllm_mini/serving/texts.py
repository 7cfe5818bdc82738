"""What the server knows of a model's text: its tokenizer and how long its context is, read from its folder when the first request comes.
Chapter 11."""

from __future__ import annotations

import json
import logging
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sllm_mini.cluster.api import Cluster, Deployment
from sllm_mini.cluster.bases import text_source
from sllm_mini.errors import ModelError, SllmError
from sllm_mini.inference.context import context_limit
from sllm_mini.inference.text import detokenize, load_tokenizer, tokenize
from sllm_mini.serving.errors import ApiError, unknown_model
from sllm_mini.serving.logprobs import TokenNames
from sllm_mini.storage.remote import open_remote

log = logging.getLogger("sllm_mini.serving")
SHORT_NCHARS = 2048
"""A text of so many characters is encoded in well under a millisecond; longer ones are no matter for the event loop."""
_AGAIN_SECONDS = 5.0
"""So long after an address could not be read it is not asked again."""


@dataclass(frozen=True, slots=True)
class ModelText:
    """Of one deployment. What its folder does not tell is None. Safe from several threads."""

    deployment: Deployment
    tokenizer: Any | None
    context_tokens: int | None
    vocabulary: int | None
    names: TokenNames = field(default_factory=lambda: TokenNames(None))
    why: str = ""
    """Why there is no tokenizer, where there should be one."""

    @property
    def name(self) -> str:
        return self.deployment.spec.name

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of a text; with `special` also those that the model's texts begin with. Raises ApiError(400) without a tokenizer."""
        return tokenize(self._known(), text, special=special)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Raises ApiError(400) without a tokenizer."""
        return detokenize(self._known(), token_ids)

    def _known(self) -> Any:
        if self.tokenizer is None:
            why = f" ({self.why})" if self.why else ""
            raise ApiError(400, "unsupported_model", f"{self.name} has no tokenizer that can be read here{why}; give the prompt as token ids", param="model")
        return self.tokenizer


class Texts:
    """Of all models of a cluster. Safe from several threads; reading one makes those wait that want the same."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._known: dict[str, ModelText] = {}
        self._failed: dict[str, tuple[Deployment, float, SllmError]] = {}
        """Until when it is not tried again."""

    def find(self, name: str) -> ModelText | None:
        """What was read already, None where `read` is to be called: that takes its time. Raises ApiError(404), and what `read` raised a moment ago."""
        deployment = self._deployment(name)
        failed = self._failed.get(name)
        if failed is not None and failed[0] is deployment and time.monotonic() < failed[1]:
            raise failed[2]
        known = self._known.get(name)
        return known if known is not None and known.deployment is deployment else None

    def read(self, name: str) -> ModelText:
        """The first time it reads the folder, or what lies beside the weights at an address, and imports transformers. Raises ApiError(404), and
        what opening a remote checkpoint raises. Files that make no tokenizer are none."""
        deployment = self._deployment(name)
        source = text_source(deployment, {each.spec.name: each for each in self._cluster.models()})
        with self._locks[name]:
            found = self.find(name)  # another thread has, or has tried in vain
            if found is None:
                try:
                    found = self._known[name] = _read(deployment, source)
                except SllmError as error:
                    self._failed[name] = deployment, time.monotonic() + _AGAIN_SECONDS, error
                    raise
        return found

    def _deployment(self, name: str) -> Deployment:
        found = next((each for each in self._cluster.models() if each.spec.name == name), None)
        if found is None:
            for known in (self._known, self._failed, self._locks):
                known.pop(name, None)
            raise unknown_model(name)
        return found


def _read(deployment: Deployment, source: str) -> ModelText:
    if "://" not in source:
        return _read_folder(deployment, Path(source))
    with tempfile.TemporaryDirectory(prefix="sllm-mini-") as made:
        folder = Path(made, "checkpoint")
        open_remote(source, folder).close()  # what lies beside the weights
        return _read_folder(deployment, folder)


def _read_folder(deployment: Deployment, folder: Path) -> ModelText:
    tokenizer, why = None, ""
    try:
        tokenizer = load_tokenizer(folder)
    except ModelError as error:
        why = str(error)
        log.warning("%s can be asked for by token ids only: %s", deployment.spec.name, error)
    config = _config(folder / "config.json")
    inner = config.get("text_config")
    figures = {**config, **inner} if isinstance(inner, dict) else config
    return ModelText(deployment, tokenizer, context_limit(figures), _whole(figures.get("vocab_size")), TokenNames(tokenizer), why)


def _config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        log.warning("%s is no JSON (%s), so the length of a context is not known; convert the model again", path, error)
        return {}
    return found if isinstance(found, dict) else {}


def _whole(value: object) -> int | None:
    return value if type(value) is int and value > 0 else None
