"""A listening address with one thread per connection: what the store, the arbiter and a destination of moves are served on.

Explained in chapter 05.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import UnionType
from typing import Generic, TypeVar

from sllm_mini.errors import WireError
from sllm_mini.wire.channel import Channel
from sllm_mini.wire.listener import listen
from sllm_mini.wire.message import ChannelClosed, Message, WireTimeout

_ACCEPT_SECONDS = 0.5
_PAUSE_SECONDS = 0.1
M = TypeVar("M", bound=Message)


class Connections(Generic[M]):
    """Listens at `address` from the moment it is made, and runs `talk(channel)` for each who connects until `close`.

    A WireError that leaves `talk` ends its connection and nothing else: that the other side is gone, or speaks another
    protocol, is no error of this side. `address` and `key` are those of `listen`. Any thread may call `close`. Raises WireError if the address cannot be had.
    """

    def __init__(self, address: str | os.PathLike[str], message_type: type[M] | UnionType, talk: Callable[[Channel[M]], None], *, name: str, key: bytes | None = None) -> None:
        self._listener = listen(address, key=key)
        self._message_type = message_type
        self._talk = talk
        self._name = name
        self._lock = threading.Lock()
        self._closed = False
        self._channels: dict[threading.Thread, Channel[M]] = {}
        self._thread = threading.Thread(target=self._accept, name=f"{name}-accept", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """Where it listens: of `tcp://host:0`, with the port that it was given."""
        return self._listener.address

    def wait(self) -> None:
        """Returns once `close` was called, by whichever thread."""
        self._thread.join()

    def close(self) -> None:
        """Ends every connection and waits for their threads; a path goes."""
        with self._lock:
            self._closed = True
        self._listener.close()
        self._thread.join()
        while True:
            with self._lock:
                channels = dict(self._channels)
            if not channels:
                return
            for channel in channels.values():
                channel.close()
            for thread in channels:
                thread.join()

    def _accept(self) -> None:
        while True:
            try:
                sock = self._listener.accept(_ACCEPT_SECONDS)
            except WireTimeout:
                continue
            except ChannelClosed:
                return
            except WireError:  # no descriptor is left for it: some will be when another client goes
                time.sleep(_PAUSE_SECONDS)
                continue
            self._begin(Channel(sock, self._message_type, name=self._name))

    def _begin(self, channel: Channel[M]) -> None:
        thread = threading.Thread(target=self._run, args=(channel,), name=f"{self._name}-client", daemon=True)
        with self._lock:
            if not self._closed:
                try:
                    thread.start()
                    self._channels[thread] = channel
                    return
                except RuntimeError:  # the machine has no thread left; the client finds its connection closed
                    time.sleep(_PAUSE_SECONDS)
        channel.close()

    def _run(self, channel: Channel[M]) -> None:
        try:
            with channel, suppress(WireError):
                self._talk(channel)
        finally:
            with self._lock:
                del self._channels[threading.current_thread()]
