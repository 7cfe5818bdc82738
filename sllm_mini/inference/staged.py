"""One model, its layers in several places: an engine that serves before any node holds the model whole. Explained in chapter 10.

A `StageServer` runs a `Piece`, a range of the layers, and its texts' keys and values stay there. The `StagedEngine` has the last range, samples, and is otherwise an engine like any other: its requests leave it
by `migrate(…, mode="tokens")` once a node is whole. Several engines over the same stages are a `Pipeline`: while the texts of
one are at one stage, those of another are at the next (λScale, arXiv 2502.09922; GPipe's micro-batches).
Costs, for each pass and stage, one message with the hidden states to it and one back: the engine is the hub, so that states cross its
link twice where a chain of stages would take them once, and it knows which stage has failed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import chain, count
from typing import TYPE_CHECKING, Any

from sllm_mini.errors import ModelError, StageError, WireError
from sllm_mini.inference.engine import Engine
from sllm_mini.inference.pieces import Piece, PieceLeft
from sllm_mini.inference.requests import Generation
from sllm_mini.inference.runner import Runner
from sllm_mini.inference.stage_messages import CACHES, PASS_TOKENS, Answer, Failed, Open, Opened, Order, Pass, Passed
from sllm_mini.wire import Channel, Connections, Message, connect

if TYPE_CHECKING:
    import torch

    from sllm_mini.inference.kv import SlotCache
    from sllm_mini.inference.stage_slots import NamedSlots


class StageRunner(Runner):
    """A runner of one piece: what its passes give is hidden states, unless it has the last layers. Threads as for `Runner`."""

    def __init__(self, piece: Piece) -> None:
        super().__init__(piece.model)
        self.piece = piece
        self.hidden_size = int(self.config.hidden_size)
        self._cache_proven = True  # by its own last layer instead, in each pass

    def _forward(self, token_ids: torch.Tensor, cache: Any, positions: torch.Tensor, length: int, mask: Any, ends: torch.Tensor | None = None) -> torch.Tensor:
        try:
            found = super()._forward(token_ids, cache, positions, length, mask, ends)
        except PieceLeft as left:
            found = left.output[0] if isinstance(left.output, tuple) else left.output
            if found.dtype != self.dtype or found.shape[-1] != self.hidden_size:
                raise self._refuse("its layers pass on more than hidden states of its own width and dtype") from None
        if cache.get_seq_length(self.piece.stop - 1) != length:
            raise self._refuse("it does not keep its keys and values in the cache it is given")
        return found

    def carry_out(self, order: Pass, cache: NamedSlots, hidden: torch.Tensor | None) -> torch.Tensor:
        """One pass as it was ordered: the hidden states after the last layer here."""
        import torch

        cache.arrange(order.names, order.lengths)
        ids = torch.tensor(order.token_ids, device=self.device) if order.kind != "prefill" else None
        with self.piece.given(hidden):
            if ids is None:
                return self.prefill(cache, order.row, order.token_ids)
            return self.extend(cache, order.row, ids) if order.kind == "extend" else self.decode(cache, ids)


class StageServer:
    """Serves one piece, which is not the last, at `address` to several engines; their passes take turns. A connection's keys and values end with it.
    `before_pass` is called before each. Any thread may `close`. Raises WireError if the address cannot be had."""

    def __init__(self, piece: Piece, address: str | os.PathLike[str], *, before_pass: Callable[[], object] | None = None) -> None:
        if piece.last:
            raise ModelError("the last layers of a model are the engine's own stage; give them to StagedEngine")
        self.piece = piece
        self._before_pass = before_pass or (lambda: None)
        self._connections: Connections[Order] = Connections(address, Order, self._talk, name=f"stage of layers {piece.start} to {piece.stop}")
        self.address = self._connections.address

    def close(self) -> None:
        self._connections.close()

    def _talk(self, channel: Channel[Order]) -> None:
        from sllm_mini.inference.stage_slots import NamedSlots

        runner = StageRunner(self.piece)
        caches = [NamedSlots(runner.windows) for _ in range(CACHES)]
        while True:
            with channel.receive(into=lambda order, nbytes: bytearray(_expected(order, runner, nbytes))) as received:
                order = received.message
                answer: Answer
                payload: memoryview | None = None
                try:
                    if isinstance(order, Pass):
                        self._before_pass()
                        hidden = runner.carry_out(order, caches[order.cache], _tensor(received.payload, runner, order))
                        answer, payload = Passed(), _bytes(hidden)
                    elif order.model == self.piece.name:
                        answer = Opened(self.piece.start, self.piece.stop)
                    else:
                        answer = Failed(f"these are layers of model {self.piece.name!r} and not of {order.model!r}")
                except Exception as error:  # noqa: BLE001 - the engine is told, and raises it where the text is read
                    answer = Failed(f"{type(error).__name__}: {error}"[:2000])
            channel.send(answer, payload=payload)


def _expected(order: Message, runner: StageRunner, nbytes: int) -> int:
    """The bytes of the hidden states that come with a pass, checked before there is memory for them."""
    tokens = sum(map(len, order.token_ids)) if isinstance(order, Pass) and runner.piece.start else 0
    if tokens > PASS_TOKENS or nbytes != tokens * runner.hidden_size * runner.dtype.itemsize:
        raise WireError(f"a pass of {tokens:,} tokens came with {nbytes:,} bytes of hidden states; use one model and one sllm_mini on both sides")
    return nbytes


def _tensor(payload: memoryview | None, runner: StageRunner, order: Pass) -> torch.Tensor | None:
    import torch

    if payload is None:
        if runner.piece.start:
            raise ModelError("the hidden states of the stage before are missing")
        return None
    rows = len(order.token_ids) if order.kind == "decode" else 1
    return torch.frombuffer(payload, dtype=runner.dtype).view(rows, -1, runner.hidden_size).to(runner.device)


def _bytes(hidden: torch.Tensor) -> memoryview:
    import torch

    array: Any = hidden.detach().cpu().contiguous().view(torch.uint8).numpy()
    return memoryview(array).cast("B")


class _Stage:
    """The engine's connection to one stage. One thread at a time. Raises StageError, which names the stage, once it is gone."""

    def __init__(self, number: int, address: str | os.PathLike[str], model: str, patience_seconds: float) -> None:
        self.name, self._patience = f"stage {number} ({os.fspath(address)})", patience_seconds
        try:
            self.channel: Channel[Answer] = Channel(connect(address, timeout=patience_seconds), Answer, name=self.name)
        except WireError as error:
            raise StageError(f"{self.name} cannot be reached: {error}; start the request again elsewhere", stage=number) from error
        self.number = number
        try:
            opened = self._ask(Open(model), None, 0)[0]
            if not isinstance(opened, Opened):
                raise StageError(f"{self.name} answered {type(opened).__name__} to its opening; use one sllm_mini everywhere", stage=number)
            self.start, self.stop = opened.start, opened.stop
        except BaseException:
            self.channel.close()
            raise

    def run(self, order: Pass, payload: memoryview | None, nbytes: int) -> memoryview:
        """The hidden states after this stage."""
        _, found = self._ask(order, payload, nbytes)
        if found is None:
            raise StageError(f"{self.name} answered without hidden states; use one sllm_mini everywhere", stage=self.number)
        return found

    def _ask(self, order: Order, payload: memoryview | None, nbytes: int) -> tuple[Answer, memoryview | None]:
        def into(_: Message, announced: int) -> bytearray:
            if announced != nbytes:
                raise WireError(f"{announced:,} bytes of hidden states were announced and {nbytes:,} are due")
            return bytearray(nbytes)

        try:
            self.channel.send(order, payload=payload, timeout=self._patience)
            received = self.channel.receive(self._patience, into=into)
        except WireError as error:
            self.channel.close()  # a late answer would be taken for that of another pass
            raise StageError(f"{self.name} is gone: {error}; start the request again elsewhere", stage=self.number) from error
        if isinstance(received.message, Failed):
            raise ModelError(f"{self.name} could not run a pass: {received.message.reason}")
        return received.message, received.payload


class _StagedRunner(StageRunner):
    """The last piece, and the way to it through the others."""

    def __init__(self, piece: Piece, stages: Sequence[_Stage]) -> None:
        super().__init__(piece)
        self.stages = stages
        self._numbers = count()
        ends = [0, *(stage.stop for stage in stages)]
        if not piece.last or [stage.start for stage in stages] != ends[:-1] or piece.start != ends[-1]:
            ranges = ", ".join(f"{start} to {stop}" for start, stop in [*((stage.start, stage.stop) for stage in stages), (piece.start, piece.stop)])
            raise ModelError(f"layers {ranges} do not make a model; give every layer to one stage, in order, the last ones to the engine")

    def new_slots(self) -> SlotCache:
        from sllm_mini.inference.stage_slots import NamedSlots

        return NamedSlots(self.windows, next(self._numbers) % CACHES)

    def extend(self, cache: SlotCache, row: int, token_ids: torch.Tensor) -> torch.Tensor:
        for part in token_ids.split(PASS_TOKENS, 1):  # so that a message is bounded
            with self.piece.given(self._before(cache, "extend", row, part.tolist())):
                logits = super().extend(cache, row, part)
        return logits

    def decode(self, cache: SlotCache, token_ids: torch.Tensor) -> torch.Tensor:
        with self.piece.given(self._before(cache, "decode", 0, token_ids.tolist())):
            return super().decode(cache, token_ids)

    def prefill(self, cache: SlotCache, row: int, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        with self.piece.given(self._before(cache, "prefill", row, prompts)):
            return super().prefill(cache, row, prompts)

    def _before(self, cache: Any, kind: Any, row: int, token_ids: Sequence[Sequence[int]]) -> torch.Tensor | None:
        """The hidden states that come to the last piece."""
        order = Pass(cache.number, tuple(cache.names), tuple(cache.lengths), kind, row, tuple(map(tuple, token_ids)))
        nbytes = sum(1 for _ in chain.from_iterable(token_ids)) * self.hidden_size * self.dtype.itemsize
        payload: memoryview | None = None
        for stage in self.stages:
            payload = stage.run(order, payload, nbytes)
        return _tensor(payload, self, order)

    def _trial(self) -> bool:
        try:
            return super()._trial()
        except StageError:
            raise
        except ModelError:
            return False  # a stage took no such mask


class StagedEngine(Engine):
    """An engine that has the last layers, and reaches those before at the `addresses` of its stages, in order. Of a stage that dies or is silent for
    `patience_seconds` every request ends with a StageError that names it. Keys and values lie with the stages, so requests come and go as tokens
    (`migrate(…, mode="tokens")`). Otherwise as `Engine`. Raises StageError for a stage that cannot be reached, ModelError for ranges with a gap."""

    def __init__(
        self,
        piece: Piece,
        addresses: Sequence[str | os.PathLike[str]],
        tokenizer: Any | None = None,
        *,
        max_batch: int = 8,
        patience_seconds: float = 30.0,
    ) -> None:
        self.stages: list[_Stage] = []
        try:
            for number, address in enumerate(addresses):
                self.stages.append(_Stage(number, address, piece.name, patience_seconds))
            super().__init__(_StagedRunner(piece, self.stages), tokenizer, max_batch=max_batch, name=piece.name)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the connections; requests that still run end with a StageError at their next step."""
        for stage in self.stages:
            stage.channel.close()

    def _learn(self) -> None:
        """There is nothing to learn of keys and values that lie elsewhere."""

    @property
    def kv_nbytes_per_token(self) -> int:
        raise self._spread()

    def read_kv(self, request_id: str, start: int, stop: int) -> torch.Tensor:
        raise self._spread()

    def write_kv(self, request_id: str, start: int, data: torch.Tensor) -> None:
        raise self._spread()

    def _spread(self) -> ModelError:
        return ModelError('the keys and values of a staged engine lie at its stages and do not move; use mode="tokens"')


class Pipeline:
    """Several staged engines over the same stages: with as many as there are stages, all of them can work at once. Requests go to the engine
    that has fewest; each engine is stepped by those who read from it. Safe from several threads."""

    def __init__(self, engines: Sequence[StagedEngine]) -> None:
        if not engines:
            raise ValueError("a pipeline has at least one engine")
        self.engines = tuple(engines)

    def generate(self, prompt: str | Sequence[int], **options: Any) -> Generation:
        """As `Engine.generate`."""
        return min(self.engines, key=lambda engine: len(engine.requests)).generate(prompt, **options)

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
