"""What all routes of one server share: the cluster, and what a restart may lose. Chapter 11."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

from starlette.requests import Request

from sllm_mini.cluster.api import Cluster
from sllm_mini.serving.buckets import Buckets
from sllm_mini.serving.chat_template import Templates
from sllm_mini.serving.metrics import Meter
from sllm_mini.serving.options import Limits, ServeOptions
from sllm_mini.serving.texts import ModelText, Texts

T = TypeVar("T")
_THREADS = 4


class State:
    """Of one `make_app`; `close` it after its loop has ended."""

    def __init__(self, cluster: Cluster, options: ServeOptions) -> None:
        self.cluster, self.options, self.created = cluster, options, int(time.time())
        self.texts, self.templates = Texts(cluster), Templates(options.limits)
        self.meter = Meter(cluster)
        self.tokens = Buckets(options.limits.tokens_per_minute, time.monotonic) if options.limits.tokens_per_minute else None
        self.reading: dict[str, asyncio.Future[ModelText]] = {}
        """Models whose texts are being read."""
        self.changing: set[str] = set()
        """Models that are being deployed or changed."""
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="sllm-serving")
        self._reading = ThreadPoolExecutor(_THREADS, thread_name_prefix="sllm-reading")
        self._managing = ThreadPoolExecutor(_THREADS, thread_name_prefix="sllm-managing")

    @property
    def limits(self) -> Limits:
        return self.options.limits

    async def aside(self, work: Callable[[], T]) -> T:
        """What would block the loop: in one of a few threads."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def read(self, name: str) -> ModelText:
        """`Texts.read`, which may wait for an address that does not answer: apart from what other models wait for."""
        return await asyncio.get_running_loop().run_in_executor(self._reading, self.texts.read, name)

    async def managed(self, work: Callable[[], T]) -> T:
        """What may take long, such as a deployment: apart from what requests wait for."""
        return await asyncio.get_running_loop().run_in_executor(self._managing, work)

    def close(self) -> None:
        self._managing.shutdown(wait=True, cancel_futures=True)
        for pool in (self._reading, self._pool):
            pool.shutdown(wait=True, cancel_futures=True)


def state_of(http: Request) -> State:
    return cast(State, http.app.state.sllm)
