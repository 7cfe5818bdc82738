"""One node of `bench multicast`: a process with a store and a `BlockPeer`, which its parent tells what to hold and what to carry out.

Run by `Fleet` as `python -m sllm_mini.lab.multicast_node`, over a socket that it inherits. Without torch it is up in some tenths of a
second. Shown in chapter 10.
"""

from __future__ import annotations

import secrets
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Annotated

from msgspec import Meta

from sllm_mini.cluster.block_messages import Part
from sllm_mini.cluster.blocks import BlockPeer
from sllm_mini.cluster.netns import Links
from sllm_mini.errors import ResourceError, SllmError, StoreError
from sllm_mini.storage.holdings import DRAM, Lease
from sllm_mini.storage.incoming import HeldBlocks
from sllm_mini.storage.store import Store
from sllm_mini.wire import Channel, ChannelClosed, Message, set_key

_Text = Annotated[str, Meta(max_length=8192)]
_PATIENCE = 300.0


class Begin(Message, frozen=True):
    """The first order; `key` is what nodes prove to each other (`wire.tcp`). Answered by `Ready`."""

    folder: _Text
    address: _Text
    key: Annotated[bytes, Meta(max_length=1024)]
    dram_nbytes: int
    bytes_per_second: float | None
    patience_seconds: float


class Hold(Message, frozen=True):
    """Have this model whole in memory, from `source`. Answered by `Ready`."""

    model: _Text
    source: _Text


class Know(Message, frozen=True):
    """Know this model, and hold nothing of it. Answered by `Ready`."""

    model: _Text
    source: _Text


class Spread(Message, frozen=True):
    """Carry out this node's part of a plan. Answered by `Spreaded` or `Failed`."""

    model: _Text
    part: Part


class Ready(Message, frozen=True):
    """Done; `address` is where its peers reach it."""

    address: _Text


class Spreaded(Message, frozen=True):
    """How it went (see `FetchReport`): `whole_at` on the clock that all processes share, `cpu_seconds` of this one meanwhile."""

    planned: int
    begged: int
    fell_back: int
    read: int
    corrupt: int
    sent: int
    whole_seconds: float
    seconds: float
    whole_at: float
    cpu_seconds: float


class Failed(Message, frozen=True):
    reason: _Text


Order = Begin | Hold | Know | Spread
Answer = Ready | Spreaded | Failed


class Fleet:
    """So many node processes, ended with the block of code, that reach each other over TCP: on loopback, with `bytes_per_second` as a token bucket at
    each (see `BlockPeer`), or over `links`, which has a node of every number. Raises ResourceError for a node that does not come up."""

    def __init__(self, count: int, folder: Path, *, bytes_per_second: float | None, dram_nbytes: int, patience_seconds: float = 10.0, links: Links | None = None) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.channels: list[Channel[Answer]] = []
        key = secrets.token_bytes(32)
        try:
            for number in range(count):
                self._start([] if links is None else links.command(str(number)))
            for number in range(count):
                place = folder / f"n{number}"
                place.mkdir(parents=True, exist_ok=True)
                self.give(number, Begin(str(place), f"tcp://{'127.0.0.1' if links is None else links.host(str(number))}:0", key, dram_nbytes, bytes_per_second, patience_seconds))
            self.addresses = [self._ready(number) for number in range(count)]
        except BaseException:
            self.close()
            raise

    def _start(self, inside: list[str]) -> None:
        here, there = socket.socketpair()
        with there:
            self.processes.append(subprocess.Popen([*inside, sys.executable, "-m", "sllm_mini.lab.multicast_node", str(there.fileno())], pass_fds=(there.fileno(),)))
        self.channels.append(Channel(here, Answer, name=f"node {len(self.channels)}"))

    def give(self, node: int, order: Order) -> None:
        """Says it to a node, which answers later (`answer`). Raises WireError if it is gone."""
        self.channels[node].send(order, timeout=_PATIENCE)

    def answer(self, node: int) -> Answer:
        """A node's next answer. Raises WireError if it is gone."""
        return self.channels[node].receive(_PATIENCE).message

    def _ready(self, node: int) -> str:
        answer = self.answer(node)
        if not isinstance(answer, Ready):
            raise ResourceError(f"node {node} did not do as it was told: {answer}")
        return answer.address

    def prepare(self, model: str, source: Path, nodes: int, holders: int) -> None:
        """Of the first `nodes`, the first `holders` have the model whole, the others nothing of it."""
        for node in range(nodes):
            self.give(node, (Hold if node < holders else Know)(model, str(source)))
        for node in range(nodes):
            self._ready(node)

    def close(self) -> None:
        for channel in self.channels:
            channel.close()
        for process in self.processes:
            try:
                process.wait(5.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def main(fd: int) -> None:
    """Does as it is told until its parent is gone."""
    orders: Channel[Order] = Channel(socket.socket(fileno=fd), Order, name="parent of the node")
    with ExitStack() as stack, orders, suppress(ChannelClosed):
        begin = orders.receive().message
        if not isinstance(begin, Begin):
            raise StoreError("a node's first order says where it works; send Begin first")
        set_key(begin.key)
        store = stack.enter_context(Store(begin.folder, dram_nbytes=begin.dram_nbytes, chunk_nbytes=2 << 20))
        peer = BlockPeer(begin.address, bytes_per_second=begin.bytes_per_second, patience_seconds=begin.patience_seconds)
        stack.callback(peer.close)
        orders.send(Ready(peer.address))
        while True:
            order = orders.receive().message
            try:
                orders.send(_carry_out(order, store, peer))
            except SllmError as error:
                orders.send(Failed(str(error)[:8000]))


def _carry_out(order: Order, store: Store, peer: BlockPeer) -> Answer:
    match order:
        case Hold():
            store.register(order.model, order.source)
            store.prefetch(order.model)
        case Know():
            store.register(order.model, order.source)
            store.evict(order.model, DRAM)
        case Spread():
            return _spread(order, store, peer)
    return Ready(peer.address)


def _spread(order: Spread, store: Store, peer: BlockPeer) -> Spreaded:
    cpu = time.process_time()
    if order.part.receives:
        with store.receive(order.model, order.part.block_nbytes) as image:
            report = peer.run(order.part, image)
    else:
        lease = store.lend(order.model, DRAM)
        if not isinstance(lease, Lease):
            raise StoreError(f"{order.model} is not in memory here ({lease.reason}); hold it first")
        with lease:
            report = peer.run(order.part, HeldBlocks(lease, order.part.block_nbytes))
    whole_at = time.monotonic() - (report.seconds - report.whole_seconds)
    return Spreaded(**asdict(report), whole_at=whole_at, cpu_seconds=time.process_time() - cpu)


if __name__ == "__main__":
    main(int(sys.argv[1]))
