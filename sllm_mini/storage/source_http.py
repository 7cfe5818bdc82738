"""Ranges of files that have an HTTP address, by urllib3 on the threads that wait for them.

`fsspec` does all the work of its asynchronous file systems on one thread, and so on at most one core: 0.8 to 1.1 GB/s
from a server on the same 2-core machine, with 8 or 16 ranges of 4 or 16 MiB under way, its thread always busy. urllib3
moved 1.8 to 2.4 GB/s there. It takes more than one core only where the kernel copies, which is most of it. Costs one copy
of each byte beside the kernel's. Taught in chapter 03.
"""

from __future__ import annotations

import re
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from sllm_mini.errors import RemoteError
from sllm_mini.storage.source import Differs, Interrupted, RemoteOptions, reason_of, refusal, shown, unreached

if TYPE_CHECKING:
    import urllib3

_PIECE_NBYTES = 1 << 20
_PORTS = {"http": 80, "https": 443}
_AGAIN = frozenset((408, 425, 429, 500, 502, 503, 504))
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class HttpSource:
    """Files that have an HTTP address, read by ranges on the caller's thread. `address` names a file's, afresh for each
    request, since a signed one ends. Redirects are followed, credentials of our own only to the same host."""

    def __init__(self, url: str, address: Callable[[str], str], headers: Mapping[str, str], options: RemoteOptions) -> None:
        import urllib3

        self.url = shown(url)
        self._address = address
        self._headers = {**headers, "Accept-Encoding": "identity"}
        self._lock = threading.Lock()
        self._options = options
        self._reached = False
        self._pools: dict[str | None, urllib3.PoolManager] = {}
        self._timeout = urllib3.Timeout(options.timeout_seconds)
        self._retries = urllib3.Retry(total=5, connect=0, read=0, status=0, other=0, redirect=5)

    def nbytes(self, file: str, *, ranged: bool = False) -> int:
        response = self._get(file, 0, 1)
        try:
            if response.status == 206 and (found := _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))) and found[3] != "*":
                return int(found[3])
            if response.status == 416 and response.headers.get("Content-Range") == "bytes */0":
                return 0
            if response.status == 200 and ranged:
                raise RemoteError("the server does not answer byte ranges; serve it from one that does, as nginx and object stores do", path=f"{self.url}/{file}")
            length = response.headers.get("Content-Length", "")
            if response.status == 200 and length.isascii() and length.isdigit():
                return int(length)
            self._refuse(file, response, None)
            raise RemoteError("the server does not say how large it is; serve it from one that does", path=f"{self.url}/{file}")
        finally:
            if response.status == 206 and response.length_remaining == 1:
                response.drain_conn()
            _give_back(response)

    def stream(self, file: str, offset: int, view: memoryview, total_nbytes: int) -> Iterator[int]:
        import urllib3

        response = self._get(file, offset, len(view))
        at = 0
        try:
            expected = self._check(file, response, offset, len(view), total_nbytes)
            while at < expected:
                try:
                    piece = response.read(min(_PIECE_NBYTES, expected - at), decode_content=False)
                except (urllib3.exceptions.HTTPError, OSError) as error:
                    raise Interrupted(reason_of(error)) from None
                if not piece:
                    raise Interrupted("the connection ended early")
                view[at : at + len(piece)] = piece
                at += len(piece)
                yield len(piece)
        finally:
            _give_back(response)

    def close(self) -> None:
        with self._lock:
            for pool in self._pools.values():
                pool.clear()

    def _get(self, file: str, offset: int, nbytes: int) -> urllib3.BaseHTTPResponse:
        import urllib3

        try:
            url = self._address(file)
        except Exception as error:  # noqa: BLE001 - each file system has its own
            raise Interrupted(f"no address for it: {type(error).__name__}") from None
        headers = {**self._headers, "Range": f"bytes={offset}-{offset + nbytes - 1}"}
        try:
            response = self._pool(url).request("GET", url, headers=headers, preload_content=False, decode_content=False, timeout=self._timeout, retries=self._retries)
            self._reached = True
            return response
        except (urllib3.exceptions.HTTPError, OSError) as error:
            cause: object = error.reason if isinstance(error, urllib3.exceptions.MaxRetryError) else error
            if isinstance(cause, urllib3.exceptions.LocationValueError):
                raise refusal(f"{self.url} is not an address; write for example https://HOST/FOLDER", f"{self.url}/{file}") from None
            if isinstance(cause, (urllib3.exceptions.SSLError, urllib3.exceptions.ResponseError)):
                raise RemoteError(f"it cannot be asked for: {reason_of(cause)}", path=f"{self.url}/{file}") from None
            if isinstance(cause, urllib3.exceptions.NewConnectionError) and not self._reached and (found := unreached(cause, _server(error, url))) is not None:
                raise found from None
            raise Interrupted(reason_of(cause)) from None

    def _check(self, file: str, response: urllib3.BaseHTTPResponse, offset: int, nbytes: int, total_nbytes: int) -> int:
        """How many bytes of the range this answer brings; raises if they are not its first ones."""
        place = f"{self.url}/{file}"
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise RemoteError(f"the server sends it as {response.headers['Content-Encoding'][:40]!r}; serve the bytes as they are", path=place, offset=offset)
        if response.status == 200:
            if (offset, nbytes) == (0, total_nbytes):
                if response.headers.get("Content-Length", str(nbytes)) != str(nbytes):
                    raise Differs(f"it has {response.headers['Content-Length'][:20]} bytes instead of {total_nbytes:,}")
                return nbytes
            raise RemoteError("the server ignores ranges and would send the whole file; serve it from one that supports them", path=place, offset=offset)
        self._refuse(file, response, offset)
        said = response.headers.get("Content-Range", "")
        found = _CONTENT_RANGE.fullmatch(said)
        if found is None or int(found[1]) != offset or not offset <= int(found[2]) < offset + nbytes:
            raise RemoteError(f"the server answers {said[:80]!r} where bytes {offset}-{offset + nbytes - 1} were asked for; it cannot be read from there", path=place, offset=offset)
        if found[3] not in ("*", str(total_nbytes)):
            raise Differs(f"it has {int(found[3]):,} bytes instead of {total_nbytes:,}")
        return int(found[2]) + 1 - offset

    def _refuse(self, file: str, response: urllib3.BaseHTTPResponse, offset: int | None) -> None:
        status = response.status
        if status in (200, 206):
            return
        if status in (404, 410):
            raise Differs("there is no such file on the server")
        if status == 416:
            raise Differs("it ends before this byte")
        if status in _AGAIN:
            raise Interrupted(f"the server answers {status}")
        hint = "; check the credentials" if status in (401, 403, 407) else ""
        raise RemoteError(f"the server refuses it with status {status}{hint}", path=f"{self.url}/{file}", offset=offset)

    def _pool(self, url: str) -> urllib3.PoolManager:
        import urllib3

        from sllm_mini.storage.interruptible import POOLS

        parts = urlsplit(url)
        proxy = None if urllib.request.proxy_bypass(parts.hostname or "") else urllib.request.getproxies().get(parts.scheme)
        with self._lock:
            if proxy not in self._pools:
                size = self._options.connections
                self._pools[proxy] = urllib3.PoolManager(maxsize=size) if proxy is None else urllib3.ProxyManager(proxy, maxsize=size)
                self._pools[proxy].pool_classes_by_scheme = POOLS
            return self._pools[proxy]


def _server(error: Exception, url: str) -> str:
    """The server that a request failed at, which a redirect may have named."""
    pool = getattr(error, "pool", None)
    if pool is None:
        return shown(url)
    host = f"[{pool.host}]" if ":" in pool.host else pool.host
    return f"{pool.scheme}://{host}" + ("" if pool.port in (None, _PORTS[pool.scheme]) else f":{pool.port}")


def _give_back(response: urllib3.BaseHTTPResponse) -> None:
    """The connection goes to the pool, closed unless it has nothing more to say: the rest may be the whole file."""
    if response.length_remaining != 0:
        response.close()
    response.release_conn()
