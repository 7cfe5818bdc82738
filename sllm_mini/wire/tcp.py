"""Channels between machines: `tcp://host:port`, where both ends prove that they know a key before a frame is read. Explained in chapter 08.

    caller     "SLLM call 1\\n", nonce          ->
               <-  "SLLM hear 1\\n", nonce                                 listener
    caller     HMAC("caller", both nonces)     ->
               <-  HMAC("listener", both nonces), or zeros: refused        listener

Each proof is HMAC-SHA256 over its maker's role and both nonces: one that was recorded, or sent back to its maker, proves nothing. The listener
proves nothing to a caller that has not (`multiprocessing.connection` challenges both ways too, one after the other). Each side reads exactly these bytes.

The connection is authenticated and not encrypted: who sees the network reads along, and who can change its packets, or is called in the
listener's place, can pass a handshake on and then take the connection over. Use it where the network is your own, or over a tunnel. Cost: two round trips a connection, and none after that.
"""

from __future__ import annotations

import hmac
import logging
import os
import select
import socket
import time
from contextlib import suppress

from sllm_mini.errors import WireError
from sllm_mini.wire.message import WireTimeout

SCHEME = "tcp://"
LOOPBACK = "127.0.0.1"
CONNECT_SECONDS = 30.0
"""How long `connect` tries where no timeout is given: what hears nobody may still be there."""
HANDSHAKE_SECONDS = 5.0
"""After which a listener drops a caller that has not proved the key."""
QUIET_SECONDS = 10.0
"""So long a listener says nothing more of callers that it refused: who knocks at every moment fills no log."""
MAX_CALLERS = 64
"""Callers that are heard at once; for one more, the oldest goes."""

_CALL, _HEAR = b"SLLM call 1\n", b"SLLM hear 1\n"
_NONCE_NBYTES = _PROOF_NBYTES = 32
_HELLO_NBYTES = len(_CALL) + _NONCE_NBYTES
_REFUSED = bytes(_PROOF_NBYTES)
_KEY_NBYTES = 16
_log = logging.getLogger(__name__)
_process_key: bytes | None = None


def set_key(key: bytes | None) -> None:
    """The key of this process and those forked from it, for every `tcp://` address that is given none of its own. Random bytes, such as
    `secrets.token_bytes(32)`; pass it on over a channel or a private file, never on a command line. Raises ValueError for a short one."""
    global _process_key
    _process_key = None if key is None else _checked_key(key)


def get_key() -> bytes:
    """What `set_key` was given. Raises WireError if that was nothing."""
    if _process_key is None:
        raise WireError("tcp:// needs a key that both ends know, and this process has none; give both the same one with sllm_mini.wire.set_key")
    return _process_key


def ensure_key() -> None:
    """Draws the key of a process that has none yet: of one that starts those it talks to."""
    if _process_key is None:
        set_key(os.urandom(32))


def is_tcp(address: str | os.PathLike[str]) -> bool:
    """Whether it is the address of a TCP listener; else it is a Unix socket's path."""
    return isinstance(address, str) and address.startswith(SCHEME)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `tcp://host:port`, an IPv6 host in brackets; no host is loopback. Raises WireError."""
    host, colon, port = address.removeprefix(SCHEME).rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not (colon and port.isascii() and port.isdigit() and int(port) < 1 << 16) or (":" in host and not bracketed) or set(host) & set("/@ "):
        raise WireError(f"{address!r} is no address; write tcp://host:port, and an IPv6 host in brackets")
    return host.strip("[]") if bracketed else host or LOOPBACK, int(port)


def join_address(host: str, port: int) -> str:
    """The address of a host and port."""
    return f"{SCHEME}[{host}]:{port}" if ":" in host else f"{SCHEME}{host}:{port}"


def bind_tcp(address: str, backlog: int) -> tuple[socket.socket, str]:
    """A listening socket, and its address with the port that it was given where 0 was asked for. Raises WireError."""
    host, port = split_address(address)
    sock = None
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # its predecessor's connections may not be forgotten yet
        sock.bind(place)
        sock.listen(backlog)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise WireError(f"{address}: nothing can listen there: {error.strerror}; choose an address of this machine and a free port, or port 0") from error
    return sock, join_address(host, sock.getsockname()[1])


def connect_tcp(address: str, key: bytes | None, timeout: float | None) -> socket.socket:
    """A connection whose other end has proved that it knows `key` (None: the process's). `timeout` covers all, except the look-up of a name;
    None is CONNECT_SECONDS. Raises WireError if nobody listens or the keys differ, WireTimeout."""
    key = get_key() if key is None else _checked_key(key)
    host, port = split_address(address)
    deadline = time.monotonic() + (CONNECT_SECONDS if timeout is None else timeout)
    sock = None
    try:
        sock = socket.create_connection((host, port), max(deadline - time.monotonic(), 1e-3))
        _tune(sock)
        _prove(sock, key, address, deadline)
    except OSError as error:
        if sock is not None:
            sock.close()
        if isinstance(error, TimeoutError):
            raise WireTimeout(f"{address}: nobody took the connection in time") from error
        raise WireError(f"{address}: no server answers there ({error.strerror}); start it or check the address") from error
    except BaseException:
        if sock is not None:
            sock.close()
        raise
    return sock


class Callers:
    """Those who have connected to a listening socket and not proved the key yet. Each is heard as its bytes come: none holds up another.

    For one thread at a time, except `fileno`. `close` closes them and not the listening socket."""

    def __init__(self, listening: socket.socket, address: str, key: bytes | None) -> None:
        """Raises WireError where there is no key."""
        self._key = get_key() if key is None else _checked_key(key)
        self._address = address
        self._callers: dict[int, _Caller] = {}
        self._quiet_until, self._unsaid = 0.0, 0
        self._epoll = select.epoll()
        self._epoll.register(listening, select.EPOLLIN)

    def fileno(self) -> int:
        """Readable when somebody connects or a caller says something; -1 once closed."""
        return -1 if self._epoll.closed else self._epoll.fileno()

    def add(self, sock: socket.socket) -> None:
        """Hears one more."""
        while len(self._callers) >= MAX_CALLERS:
            self._drop(next(iter(self._callers.values())))
        sock.setblocking(False)
        self._callers[sock.fileno()] = _Caller(sock)
        self._epoll.register(sock, select.EPOLLIN)

    def proven(self) -> socket.socket | None:
        """Reads what has come; the first caller that has proved the key by now. Those who have not, and have no more time, go."""
        for caller in list(self._callers.values()):
            try:
                whole = caller.hear(self._key)
                if not whole and time.monotonic() > caller.deadline:
                    raise WireError("it did not prove the key in time")
                if whole:
                    self._forget(caller)
                    with suppress(OSError):  # it may be gone again, and whoever accepts it finds out
                        _tune(caller.sock)
                    return caller.sock
            except WireError as error:
                self._say(caller, error)
                self._drop(caller)
            except OSError:  # it is gone
                self._drop(caller)
        return None

    def wait(self, deadline: float | None) -> bool:
        """Waits until there may be something to do. False if the deadline has passed."""
        now = time.monotonic()
        if deadline is not None and deadline <= now:
            return False
        ends = [caller.deadline for caller in self._callers.values()] + ([] if deadline is None else [deadline])
        self._epoll.poll(max(min(ends) - now, 0.0) + 1e-3 if ends else None)
        return True

    def close(self) -> None:
        for caller in list(self._callers.values()):
            self._drop(caller)
        self._epoll.close()

    def _say(self, caller: _Caller, error: WireError) -> None:
        """In the log, now and then."""
        now = time.monotonic()
        if now < self._quiet_until:
            self._unsaid += 1
            return
        more = f" (and {self._unsaid} others since the last one that was named)" if self._unsaid else ""
        _log.warning("%s: a caller from %s was refused: %s%s", self._address, caller.name, error, more)
        self._quiet_until, self._unsaid = now + QUIET_SECONDS, 0

    def _forget(self, caller: _Caller) -> None:
        del self._callers[caller.sock.fileno()]
        self._epoll.unregister(caller.sock)

    def _drop(self, caller: _Caller) -> None:
        self._forget(caller)
        caller.sock.close()


class _Caller:
    """One connection in its handshake, at the listener's end."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.deadline = time.monotonic() + HANDSHAKE_SECONDS
        self._nonce = os.urandom(_NONCE_NBYTES)
        self._hello = bytearray()
        self._proof = bytearray()
        try:
            self.name = str(sock.getpeername()[0])
        except OSError:
            self.name = "a host that is gone"

    def hear(self, key: bytes) -> bool:
        """Goes on with what has come; True once the key is proved. Raises WireError for what proves another, OSError if it is gone."""
        if len(self._hello) < _HELLO_NBYTES:
            if not self._read(self._hello, _HELLO_NBYTES):
                return False
            if not self._hello.startswith(_CALL):
                raise WireError("it speaks another protocol")
            self._send(_HEAR + self._nonce)
        if not self._read(self._proof, _PROOF_NBYTES):
            return False
        theirs = bytes(self._hello[len(_CALL) :])
        if not hmac.compare_digest(self._proof, _proof(key, b"caller", theirs, self._nonce)):
            self._send(_REFUSED)
            raise WireError("it knows another key; give both ends the same one")
        self._send(_proof(key, b"listener", theirs, self._nonce))
        return True

    def _read(self, into: bytearray, nbytes: int) -> bool:
        """Reads no byte past what is asked for: what follows is the channel's."""
        while len(into) < nbytes:
            try:
                some = self.sock.recv(nbytes - len(into))
            except BlockingIOError:
                return False
            if not some:
                raise ConnectionResetError
            into += some
        return True

    def _send(self, data: bytes) -> None:
        if self.sock.send(data) < len(data):  # a new connection has room for this; one made without is no loss
            raise ConnectionResetError


def _prove(sock: socket.socket, key: bytes, address: str, deadline: float) -> None:
    """The caller's side of the handshake."""
    nonce = os.urandom(_NONCE_NBYTES)
    sock.sendall(_CALL + nonce)
    hello = _read_exactly(sock, _HELLO_NBYTES, address, deadline)
    if not hello.startswith(_HEAR):
        raise WireError(f"{address}: what listens there speaks another protocol; check the address")
    theirs = hello[len(_HEAR) :]
    sock.sendall(_proof(key, b"caller", nonce, theirs))
    answer = _read_exactly(sock, _PROOF_NBYTES, address, deadline)
    if not hmac.compare_digest(answer, _proof(key, b"listener", nonce, theirs)):
        raise WireError(f"{address}: the server knows another key, and was sent nothing; give both ends the same one")


def _read_exactly(sock: socket.socket, nbytes: int, address: str, deadline: float) -> bytes:
    read = bytearray()
    while len(read) < nbytes:
        sock.settimeout(max(deadline - time.monotonic(), 1e-3))
        some = sock.recv(nbytes - len(read))
        if not some:
            raise WireError(f"{address}: the server ended the connection before it had proved the key; check the address, or try again")
        read += some
    return bytes(read)


def _proof(key: bytes, role: bytes, caller_nonce: bytes, listener_nonce: bytes) -> bytes:
    return hmac.digest(key, b"sllm_mini.wire.tcp " + role + b"\0" + caller_nonce + listener_nonce, "sha256")


def _tune(sock: socket.socket) -> None:
    """Small messages leave at once, and a machine that vanished without a word is noticed in half a minute."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4)):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def _checked_key(key: bytes) -> bytes:
    if len(key) < _KEY_NBYTES:
        raise ValueError(f"a key of {len(key)} bytes can be guessed; give {_KEY_NBYTES} random ones or more, such as secrets.token_bytes(32)")
    return bytes(key)
