"""`Server`: a cluster behind HTTP, in a thread of this process or in the foreground until it is told to end. Imports uvicorn. Chapter 11."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType, TracebackType
from typing import Self, cast

import uvicorn

from sllm_mini.cluster.api import Cluster
from sllm_mini.errors import SllmError
from sllm_mini.serving.app import make_app
from sllm_mini.serving.connections import Connection
from sllm_mini.serving.options import OptionsError, ServeOptions

log = logging.getLogger("sllm_mini.serving")
_BACKLOG = 2048
_START_SECONDS = 30.0


class _Uvicorn(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to whoever runs it: `Server.run`, or nobody where it is in a thread."""
        yield


class Server:
    """Listens from the beginning, so that `url` is known; answers from `start` or `run` on. Open requests have `drain_seconds` at the end, then they
    are cancelled. The cluster stays its owner's, to be closed afterwards. Raises OptionsError where it cannot listen there."""

    def __init__(self, cluster: Cluster, options: ServeOptions | None = None) -> None:
        self.options = options or ServeOptions()
        self._socket = _listen(self.options.host, self.options.port)
        self.gate, self._state = make_app(cluster, self.options)
        self._cluster = cluster
        config = uvicorn.Config(
            self.gate, http=cast("type[asyncio.Protocol]", partial(Connection, limits=self.options.limits)), loop="auto", ws="none", lifespan="off", log_config=None, access_log=False, server_header=False, backlog=_BACKLOG,
            timeout_keep_alive=30, timeout_graceful_shutdown=max(1, round(self.options.drain_seconds)),
        )  # fmt: skip
        self._uvicorn = _Uvicorn(config)
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def start(self) -> None:
        """In a thread of its own; returns when it answers. Raises SllmError where it does not."""
        self._thread = threading.Thread(target=self._serve, name="sllm-http", daemon=True)
        self._thread.start()
        for _ in range(int(_START_SECONDS / 0.01)):
            if self._uvicorn.started or not self._thread.is_alive():
                break
            self._thread.join(0.01)
        if not self._uvicorn.started:
            raise SllmError("the HTTP server did not start; its log says why")

    def run(self) -> None:
        """On the main thread, until SIGTERM, SIGINT or SIGHUP; a second one does what it does elsewhere. Then closes itself."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.getsignal(number) for number in numbers}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def told(number: int, frame: FrameType | None) -> None:
            restore()
            self._uvicorn.should_exit = True

        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, told)
        try:
            self._serve()
        finally:
            restore()
            self.close()

    def read_ahead(self) -> threading.Thread:
        """Reads the tokenizers of what is deployed in a thread, which is returned, so that the first request need not wait for that."""
        thread = threading.Thread(target=self._read_all, name="sllm-read-ahead", daemon=True)
        thread.start()
        return thread

    def close(self) -> None:
        """Ends it as SIGTERM does. Safe to call twice."""
        self._uvicorn.should_exit = True
        if self._thread is not None:
            self._thread.join()
        self._socket.close()
        self._state.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _serve(self) -> None:
        self._uvicorn.run(sockets=[self._socket])

    def _read_all(self) -> None:
        for deployment in self._cluster.models():
            try:
                self._state.texts.read(deployment.spec.name)
            except (SllmError, OSError) as error:  # whoever asks for the model is told as well
                log.warning("%s could not be read ahead: %s", deployment.spec.name, error)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OptionsError(f"there is no address {host} to listen on ({error})") from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise OptionsError(f"port {port} of {host} cannot be listened on ({error.strerror}); give another port") from error
    return listening
