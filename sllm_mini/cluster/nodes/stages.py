"""Inside a worker: the layers that it serves to other nodes before any node has the model whole, and the pipeline's last stage. Chapter 10.

λScale's execution pipelines (arXiv 2502.09922). A stage serves as long as its worker has the model. The last is an engine like any other; once
the model is whole here its requests go on in the worker's own engine, from their last token: to their readers nothing happens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING

from sllm_mini.cluster.instance import Instance
from sllm_mini.cluster.nodes.worker_messages import Last
from sllm_mini.errors import LoadCancelled, ModelError, StageError
from sllm_mini.inference.workers.service import EngineService

if TYPE_CHECKING:
    from sllm_mini.inference.pieces import Piece
    from sllm_mini.inference.staged import StagedEngine, StageServer


class Stages:
    """What one worker has of pipelines. `turn` is held while its rungs change, and while `join`, `follow` and `close` are called; `on_error` gets
    what ends a service. Safe from several threads."""

    def __init__(self, turn: threading.Lock, on_error: Callable[[BaseException], object]) -> None:
        self._turn, self._on_error = turn, on_error
        self._lock = threading.Lock()
        self._servers: list[StageServer] = []
        self._prepared: dict[tuple[int, int], Future[Piece]] = {}
        """Last stages on their way, made while the others are."""

    def serve(self, instance: Instance, start: int, stop: int, address: str, holds: Callable[[], bool]) -> str:
        """Serves layers once their bytes are there; returns where. `holds` says whether the worker has the model still. Without an address they are
        kept for `join`. Raises what `Instance.piece` and `StageServer` raise, ModelError where it has not."""
        from sllm_mini.inference.staged import StageServer

        if not address:
            self._prepare(instance, start, stop)
            return ""
        server = StageServer(instance.piece(start, stop), address)
        with self._lock:
            if holds():
                self._servers.append(server)
                return server.address
        server.close()
        raise ModelError(f"layers {start} to {stop} of {instance.model} were let go while they arrived; climb again")

    def _prepare(self, instance: Instance, start: int, stop: int) -> None:
        found: Future[Piece] = Future()
        with self._lock:
            self._prepared[start, stop] = found
        try:
            found.set_result(instance.piece(start, stop))
        except BaseException as error:
            found.set_exception(error)
            raise

    def join(self, instance: Instance, last: Last, max_batch: int) -> StagedEngine:
        """The engine of a pipeline whose last stage is here; the caller's to close. Raises what `Instance.piece` raises, ModelError for a stage that
        is gone."""
        from sllm_mini.inference import load_tokenizer
        from sllm_mini.inference.staged import StagedEngine

        with self._lock:
            prepared = self._prepared.pop((last.start, last.stop), None)
        piece = instance.piece(last.start, last.stop) if prepared is None else prepared.result()
        try:
            return StagedEngine(piece, last.addresses, load_tokenizer(piece.checkpoint), max_batch=max_batch)
        except StageError as error:
            raise ModelError(str(error)) from error  # which, unlike it, can be told to another process

    def follow(self, instance: Instance, staged: StagedEngine, service: EngineService, max_batch: int, serves: Callable[[], bool]) -> None:
        """From now on, on a thread of its own: once the instance has its last byte the service goes on with the instance's own engine, if
        it `serves` still."""

        def run() -> None:
            try:
                instance.wait()
                with self._turn:
                    if serves():
                        service.go_on_with(instance.make_ready(max_batch=max_batch))
            except LoadCancelled:
                return  # the worker lets go of the model
            except BaseException as error:  # noqa: BLE001 - it is told to whoever made the worker
                if serves():
                    self._on_error(error)
            finally:
                staged.close()

        threading.Thread(target=run, name="sllm-joint", daemon=True).start()

    def close(self) -> None:
        """Serves no layers any more: the pipelines that they are in end."""
        with self._lock:
            servers, self._servers = self._servers, []
            self._prepared.clear()
        for server in servers:
            server.close()
