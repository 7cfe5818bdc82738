"""How long a block takes from one process to another on this machine: what a tick of a scale-out plan would cost over such a link.

A child process receives blocks through a Unix socket, each into its place in memory, and answers each with one byte. That stands for one link
between two nodes, with its fixed cost (a message, an answer) and its speed; it is no network: the kernel copies the bytes twice, on
cores and memory that both ends share. Many such links at once would only measure the memory, so one is measured, and plans are
computed from it. Shown in chapter 10. Costs the bytes twice in memory, and some seconds for 256 MB.
"""

from __future__ import annotations

import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_HEADER = 8
_PINGS = 200


@dataclass(frozen=True, slots=True)
class LocalLink:
    """Seconds from the send of a block to the answer, by the block's bytes: of several rounds the median. `fixed_seconds` is
    what a block of one byte takes, `bytes_per_second` the speed of the largest without that."""

    seconds: Mapping[int, float]
    fixed_seconds: float

    @property
    def bytes_per_second(self) -> float:
        largest = max(self.seconds)
        return largest / max(self.seconds[largest] - self.fixed_seconds, 1e-9)


def measure_link(nbytes: int, block_counts: Sequence[int], *, rounds: int = 3) -> LocalLink:
    """Sends `nbytes` bytes in so many blocks, for each count in turn, `rounds` times after one that does not count.

    Blocks are different bytes and land in different places, as those of a model do, so that no cache holds them all. Raises ValueError
    unless each count divides `nbytes`; ConnectionError where the other process ends early.
    """
    if not block_counts or rounds < 1 or any(count < 1 or nbytes % count or nbytes < count for count in block_counts):
        raise ValueError(f"{nbytes} bytes cannot be measured in {list(block_counts)} blocks and {rounds} rounds; give counts that divide the bytes, and a round or more")
    here, there = socket.socketpair()
    with here:
        with there:
            command = [sys.executable, "-m", "sllm_mini.lab.local_link", str(there.fileno()), str(nbytes)]
            child = subprocess.Popen(command, pass_fds=(there.fileno(),))
        try:
            whole = memoryview(bytearray(b"\x01") * nbytes)
            taken: dict[int, list[float]] = {nbytes // count: [] for count in block_counts}
            pings = []
            for _ in range(rounds + 1):
                pings.append(_send(here, whole[:_PINGS], 1))
                for size, found in taken.items():
                    found.append(_send(here, whole, size))
        finally:
            here.close()
            child.wait()
    return LocalLink({size: statistics.median(found[1:]) for size, found in taken.items()}, statistics.median(pings[1:]))


def _send(channel: socket.socket, data: memoryview, size: int) -> float:
    """All of `data`, a block of `size` after the other's answer; seconds a block."""
    started = time.perf_counter()
    for at in range(0, len(data), size):
        channel.sendall(at.to_bytes(_HEADER, "little") + size.to_bytes(_HEADER, "little"))
        channel.sendall(data[at : at + size])
        if not channel.recv(1):
            raise ConnectionResetError("the process at the other end of the link is gone; measure again")
    return (time.perf_counter() - started) * size / len(data)


def _receive(channel: socket.socket, most: int) -> None:
    """The child: takes each block to its place, until the other end closes."""
    kept = memoryview(bytearray(b"\x01") * most)
    header = bytearray(2 * _HEADER)
    while channel.recv_into(header, len(header), socket.MSG_WAITALL) == len(header):
        at, left = (int.from_bytes(header[place : place + _HEADER], "little") for place in (0, _HEADER))
        while left:
            came = channel.recv_into(kept[at : at + left])
            if not came:
                return
            at, left = at + came, left - came
        channel.sendall(b".")


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as end:
        _receive(end, int(sys.argv[2]))
