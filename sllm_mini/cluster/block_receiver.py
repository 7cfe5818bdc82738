"""The receiving half of one node's part in a plan: its blocks in order, then whatever is still missing. Part of `blocks`; chapter 10.

On one thread, beside another that reads what the plan has this node read from the model's own source. A block that does not come, or
not right, is asked of every other node, and at last read from that source too.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Protocol

from sllm_mini.cluster.block_messages import Answer, Ask, Lacking, Part, Skip, Step
from sllm_mini.errors import IntegrityError, SllmError, WireError
from sllm_mini.storage.incoming import Incoming
from sllm_mini.wire import BytesLike, Channel


@dataclass(slots=True)
class FetchReport:
    """What became of one node's part. Blocks: `planned` came as the plan says, `begged` from another peer or at the second try, `fell_back` from
    the model's source, `read` from there by the plan; `corrupt` were refused for their hashes. `whole_seconds`: until the image was whole."""

    planned: int = 0
    begged: int = 0
    fell_back: int = 0
    read: int = 0
    corrupt: int = 0
    sent: int = 0
    whole_seconds: float = 0.0
    seconds: float = 0.0


class Links(Protocol):
    """What is needed of a `BlockPeer`."""

    def connect(self, part: Part, node: int, *, scheduled: bool) -> Channel[Answer]: ...

    def patience(self, nbytes: int) -> float: ...


class Receiver:
    """See the module. Used once."""

    def __init__(self, peer: Links, part: Part, image: Incoming, report: FetchReport) -> None:
        self._peer, self._part, self._image, self._report = peer, part, image, report
        self._links: dict[int, Channel[Answer]] = {}
        self._lost: set[int] = set()
        self._unread: SllmError | OSError | None = None

    def run(self) -> None:
        receives = self._part.receives
        reading = threading.Thread(target=self._read, name="sllm-blocks-read", daemon=True)
        if self._part.reads:
            reading.start()
        try:
            for node in dict.fromkeys(step.peer for step in receives):
                self._link(node)  # at once, so that a sender sees a receiver that dies
            present = set(range(len(self._image.blocks))) - set(self._image.missing())
            asked = [False] * len(receives)
            for number, step in enumerate(receives):
                for ahead in (number, number + 1):  # the next is asked for before this one has come: no link waits for a message
                    if ahead < len(receives) and not asked[ahead]:
                        asked[ahead] = self._ask(receives[ahead], present)
                if step.block not in present and not (asked[number] and self._take(step)):
                    self._help(step.block, step.peer)
            if self._part.reads:
                reading.join()
                self._report.read = len(set(self._part.reads).difference(self._image.missing()))
            for block in self._image.missing():
                if self._part.whole or block in self._part.reads:
                    self._help(block, None)
        finally:
            for node in list(self._links):
                self._drop(node)

    def _read(self) -> None:
        """This node's own blocks from the source, beside what others send."""
        try:
            self._image.fall_back(self._part.reads)
        except (SllmError, OSError) as error:
            self._unread = error  # it counts where no other has the blocks either

    def _ask(self, step: Step, present: set[int]) -> bool:
        link = self._link(step.peer)
        if link is None:
            return False
        try:
            link.send(Skip(step.block) if step.block in present else Ask(step.block), timeout=self._peer.patience(0))
        except WireError:
            self._drop(step.peer)
            return False
        return True

    def _take(self, step: Step) -> bool:
        """Receives the block that was asked for; False if it did not come, or not right."""
        link = self._links.get(step.peer)
        if link is None or not self._receive(link, step):
            return False
        self._report.planned += 1
        return True

    def _receive(self, link: Channel[Answer], step: Step) -> bool:
        nbytes = self._image.blocks[step.block].nbytes

        def into(message: Answer, announced: int) -> BytesLike:
            if message.block != step.block or announced != nbytes:
                raise WireError(f"node {step.peer} sent block {message.block} of {announced:,} bytes instead of block {step.block} of {nbytes:,}")
            return whole

        try:
            with self._image.writing(step.block) as views:
                # A block across two chunks of memory is rare: it is put together and copied.
                whole = views[0] if len(views) == 1 else memoryview(bytearray(nbytes))
                if isinstance(link.receive(self._peer.patience(nbytes), into=into).message, Lacking):
                    raise _LackingError
                at = 0
                for view in views if len(views) > 1 else ():
                    view[:] = whole[at : at + len(view)]
                    at += len(view)
        except _LackingError:
            return False
        except IntegrityError:
            self._report.corrupt += 1
            return False
        except WireError:
            self._drop(step.peer)
            return False
        return True

    def _help(self, block: int, first: int | None) -> None:
        """Gets a block that did not come: from its sender at once, then from any peer, then from the model's source."""
        others = [node for node in range(len(self._part.peers)) if node not in (self._part.node, first)]
        for node in ([] if first is None else [first]) + others:
            if node in self._lost:
                continue
            try:
                with self._peer.connect(self._part, node, scheduled=False) as link:  # its own: on the other one a scheduled block may be on its way
                    link.send(Ask(block), timeout=self._peer.patience(0))
                    found = self._receive(link, Step(node, block))
            except WireError:
                self._lost.add(node)
                continue
            if found:
                self._report.begged += 1
                return
        if self._unread is not None:
            raise self._unread
        self._image.fall_back([block])
        self._report.fell_back += 1

    def _link(self, node: int) -> Channel[Answer] | None:
        if node not in self._links and node not in self._lost:
            try:
                self._links[node] = self._peer.connect(self._part, node, scheduled=True)
            except WireError:
                self._lost.add(node)
        return self._links.get(node)

    def _drop(self, node: int) -> None:
        link = self._links.pop(node, None)
        if link is not None:
            self._lost.add(node)
            link.close()


class _LackingError(Exception):
    """The peer has not got the block: `writing` is left with nothing landed."""
