"""Nodes that send each other a model's blocks by a plan of `control.multicast`, whichever it is: one `BlockPeer` a node.

No barrier keeps the ticks: each node works through its own transfers in their order, and a block moves when its receiver has come to
it and its sender both has come to it and holds it. Every wait is for an earlier tick, so nobody waits in a circle. A plan is a wish and the
hashes are the truth: where a peer is gone, slow or wrong, the receiver asks the others for that block and at last
reads it from the model's own source. Rebuilt from λScale (arXiv 2502.09922) over sockets. Costs the bytes once over each link,
a small message a block, and no copy. Taught in chapter 10.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from weakref import WeakSet

from sllm_mini.cluster.block_board import Board
from sllm_mini.cluster.block_messages import Answer, Ask, Hello, Lacking, Part, Request, Sent, Step
from sllm_mini.cluster.block_receiver import FetchReport, Receiver
from sllm_mini.cluster.rate import TokenBucket
from sllm_mini.errors import SllmError, StoreError, WireError
from sllm_mini.storage.incoming import BlockSource, Incoming
from sllm_mini.wire import Channel, Connections, connect


class BlockPeer:
    """A node's end of every plan that it has a part in. It listens at `address` (a path) until `close`.

    `bytes_per_second` limits what goes out and, apart from it, what comes in; None does not. Whoever does nothing for
    `patience_seconds` when it is waited for counts as gone. Safe from several threads; several plans may run at once, and share the rate.
    """

    def __init__(self, address: str, *, bytes_per_second: float | None = None, patience_seconds: float = 10.0) -> None:
        self._patience = patience_seconds
        self._out, self._in = (None if bytes_per_second is None else TokenBucket(bytes_per_second) for _ in range(2))
        # A block at that rate takes its time, and the other end has a rate too.
        self._seconds_a_byte = 0.0 if bytes_per_second is None else 4 / bytes_per_second
        self._lock = threading.Lock()
        self._boards: dict[str, Board] = {}
        self._links: WeakSet[Channel[Answer]] = WeakSet()
        self._closed = False
        self._connections: Connections[Request] = Connections(address, Request, self._serve, name="blocks")
        self.address = self._connections.address

    def run(self, part: Part, image: BlockSource) -> FetchReport:
        """Carries out a part: returns when the image is whole (or has what was asked for) and all is sent that somebody waited for. An `Incoming` is left open.

        Raises StoreError for an image in other blocks, and what the model's source raises where that was needed and failed; the image has
        ended with that error then."""
        known = len(image.blocks)
        if any(step.block >= known or step.peer >= len(part.peers) for step in (*part.sends, *part.receives)) or max(part.reads, default=0) >= known:
            raise StoreError(f"plan {part.plan} names a block or a node that there is not, of {known} blocks; make the plan for this model's blocks")
        started = time.monotonic()
        report = FetchReport()
        steps = list(part.sends)
        with self._board(part.plan) as board, ExitStack() as ending:
            with board.changed:
                board.image = image
                board.changed.notify_all()
            senders = [threading.Thread(target=self._send_all, args=(part, board, image, steps, report), name="sllm-blocks", daemon=True) for _ in range(part.width)]
            for thread in senders:
                thread.start()
                ending.callback(thread.join)
            if isinstance(image, Incoming):
                try:
                    Receiver(self, part, image, report).run()
                except BaseException as error:
                    image.end(error)  # who waits here to send a block of it is told
                    raise
                report.whole_seconds = time.monotonic() - started
        report.seconds = time.monotonic() - started
        return report

    def close(self) -> None:
        """Ends every connection; parts that run notice it as peers that are gone."""
        with self._lock:
            self._closed = True
            links, boards = list(self._links), list(self._boards.values())
        for link in links:
            link.close()
        for board in boards:
            with board.changed:
                board.ended = True
                board.changed.notify_all()
        self._connections.close()

    @contextmanager
    def _board(self, plan: str) -> Iterator[Board]:
        """The plan's board while a part of it runs here; made by whoever comes first, an ask or the part."""
        with self._lock:
            board = self._boards.setdefault(plan, Board())
        try:
            yield board
        finally:
            with self._lock:
                if self._boards.get(plan) is board:
                    del self._boards[plan]
            with board.changed:
                board.image = None
                waiting = [(block, channel) for (_, block), channel in board.asked.items() if channel is not None]
                board.asked.clear()
            for block, channel in waiting:
                with suppress(WireError):
                    channel.send(Lacking(block), timeout=self._patience)

    def connect(self, part: Part, node: int, *, scheduled: bool) -> Channel[Answer]:
        """A connection to a peer of the plan, see `Hello`. Raises WireError."""
        channel: Channel[Answer] = Channel(connect(part.peers[node], timeout=self._patience), Answer, name=f"node {node}")
        with self._lock:
            self._links.add(channel)
            if self._closed:
                channel.close()
        channel.pace(received=None if self._in is None else self._in.take)
        channel.send(Hello(part.plan, part.node, scheduled), timeout=self._patience)
        return channel

    def patience(self, nbytes: int) -> float:
        """How long a transfer may take, its sender's own waits included."""
        return self._patience + nbytes * self._seconds_a_byte

    def _send_all(self, part: Part, board: Board, image: BlockSource, steps: list[Step], report: FetchReport) -> None:
        """One of `part.width` threads that work through the steps, in order to each receiver."""
        while (step := board.next(steps)) is not None:
            sent = False
            try:
                channel = board.turn(step, self._patience)
                sent = channel is not None and self._send(channel, image, step.block, self._patience)
            finally:
                with board.changed:
                    report.sent += sent
                    board.busy.discard(step.peer)
                    board.changed.notify_all()

    def _send(self, channel: Channel[Request], image: BlockSource | None, block: int, patience: float) -> bool:
        """Answers one ask; True if the block went out. That a receiver is gone is its own talk's to notice."""
        with suppress(WireError), ExitStack() as reading:
            try:
                if image is None or block >= len(image.blocks) or not image.wait_block(block, patience):
                    raise StoreError(f"block {block} is not here")
                views = reading.enter_context(image.reading(block))
            except (SllmError, OSError):
                channel.send(Lacking(block), timeout=self._patience)
                return False
            channel.send(Sent(block), payload=views, timeout=self.patience(image.blocks[block].nbytes))
            return True
        return False

    def _serve(self, channel: Channel[Request]) -> None:
        """One receiver's connection, to its end."""
        channel.pace(sent=None if self._out is None else self._out.take)
        hello = channel.receive(self._patience).message
        if not isinstance(hello, Hello):
            return
        with self._lock:
            board = self._boards.setdefault(hello.plan, Board())
        with board.changed:
            board.channels.add(channel)
        try:
            while True:
                message = channel.receive().message
                if isinstance(message, Hello):
                    return
                key = hello.node, message.block
                with board.changed:
                    waits = hello.scheduled and key not in board.passed
                    board.gone.discard(hello.node)
                    if waits:
                        board.asked[key] = channel if isinstance(message, Ask) else None
                        board.changed.notify_all()
                if not waits and isinstance(message, Ask):
                    self._send(channel, board.image, message.block, 0.0)
        finally:
            with board.changed:
                board.channels.discard(channel)
                if hello.scheduled:
                    board.gone.add(hello.node)
                    board.asked = {key: asker for key, asker in board.asked.items() if asker is not channel}
                    board.changed.notify_all()
                unused = board.image is None and not board.channels
            with self._lock:
                if unused and self._boards.get(hello.plan) is board:
                    del self._boards[hello.plan]
