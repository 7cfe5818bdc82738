"""A remote on this machine: an HTTP server of one folder that answers ranges, and what such ranges give at most.

The server is a process of its own on the loopback address; the kernel sends files straight from the page cache
(`sendfile`). The limit of a load from it is the same ranges read by plain threads, each on one connection and straight
into memory that is there already, with nothing checked and nothing kept. Shown in chapter 03. With a rate it stands for
a remote store: each folder of its address (`ORIGIN/model-03`) comes at so many bytes a second, however many read it, or
each connection gives so many, as object stores do.
"""

from __future__ import annotations

import http.client
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.parse import unquote

from sllm_mini.cluster.rate import TokenBucket
from sllm_mini.errors import RemoteError

_HOST = "127.0.0.1"
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")
_SLICE_NBYTES = 64 << 10


class Origin:
    """The server as a process; `url` is the folder's address, as is any other name in place of its last one. As a context manager
    it leaves no process behind. Raises RemoteError if it does not start."""

    def __init__(self, folder: Path, bytes_per_second: float | None = None, *, per_connection: bool = False) -> None:
        rate = [] if bytes_per_second is None else [repr(bytes_per_second), "connection" if per_connection else "folder"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import main; main()", str(folder.resolve()), *rate],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        said = self._process.stdout.readline() if self._process.stdout is not None else b""
        if not said.strip().isdigit():
            self.close()
            raise RemoteError("the HTTP server of this bench did not start; its standard error says why", path=folder)
        self.port = int(said)
        self.url = f"http://{_HOST}:{self.port}/model"

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, folder: Path, bytes_per_second: float | None, buckets: dict[str, TokenBucket] | None, *given: object) -> None:
        self._folder, self._bytes_per_second = folder, bytes_per_second
        self._buckets = {} if buckets is None else buckets  # a handler is one connection
        super().__init__(*given)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        path = self._folder / unquote(self.path).rpartition("/")[2]
        if not path.is_file():
            self._answer(404, 0)
            return
        total = path.stat().st_size
        asked = _RANGE.fullmatch(self.headers.get("Range", ""))
        start, end = (int(asked[1]), min(int(asked[2]) + 1, total)) if asked else (0, total)
        if asked and start >= total:
            self._answer(416, 0, f"bytes */{total}")
            return
        self._answer(206 if asked else 200, end - start, f"bytes {start}-{end - 1}/{total}" if asked else None)
        with path.open("rb") as file:
            if self._bytes_per_second is None:
                self.connection.sendfile(file, start, end - start)
                return
            bucket = self._buckets.setdefault(self.path.rpartition("/")[0], TokenBucket(self._bytes_per_second))
            for at in range(start, end, _SLICE_NBYTES):
                nbytes = min(_SLICE_NBYTES, end - at)
                bucket.take(nbytes)
                self.connection.sendfile(file, at, nbytes)

    def _answer(self, status: int, nbytes: int, content_range: str | None = None) -> None:
        self.send_response_only(status)
        self.send_header("Content-Length", str(nbytes))
        if content_range is not None:
            self.send_header("Content-Range", content_range)
        self.end_headers()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """A client that went away is nobody's error here."""


def serve(folder: Path, bytes_per_second: float | None = None, *, per_connection: bool = False) -> None:
    """Serves `folder`, says its port on standard output, and ends with its standard input."""
    server = _Server((_HOST, 0), partial(_Handler, folder, bytes_per_second, None if per_connection else dict[str, TokenBucket]()))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()
    server.shutdown()


def main() -> None:
    """What the process runs; its arguments are the folder and, where there is a rate, that and of what it is."""
    serve(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else None, per_connection=sys.argv[3:] == ["connection"])


def seconds_to_fetch(port: int, files: Sequence[tuple[str, int]], chunk_nbytes: int, threads: int) -> float:
    """Seconds until `files` (name, bytes), cut into ranges of `chunk_nbytes`, lie in populated memory, `threads` ranges
    under way at a time. Raises RemoteError for an answer that is no range, OSError."""
    from sllm_mini.device.cpu import HostMemory

    ranges = [(name, at, min(chunk_nbytes, nbytes - at)) for name, nbytes in files for at in range(0, nbytes, chunk_nbytes)]
    own, opened = threading.local(), []
    memory = HostMemory(chunk_nbytes * len(ranges), populate=True)

    def fetch(number: int) -> None:
        if not hasattr(own, "connection"):
            own.connection = http.client.HTTPConnection(_HOST, port, timeout=60)
            opened.append(own.connection)
        name, at, nbytes = ranges[number]
        own.connection.request("GET", f"/model/{name}", headers={"Range": f"bytes={at}-{at + nbytes - 1}"})
        response = own.connection.getresponse()
        view, done = memory.view[number * chunk_nbytes :][:nbytes], 0
        while response.status == 206 and done < nbytes and (count := response.readinto(view[done:])):
            done += count
        if done < nbytes:
            raise RemoteError(f"the server answered {response.status} with {done:,} of {nbytes:,} bytes", path=name, offset=at)

    try:
        with ThreadPoolExecutor(threads) as pool:
            start = time.perf_counter()
            for _ in pool.map(fetch, range(len(ranges))):
                pass
            return time.perf_counter() - start
    finally:
        for connection in opened:
            connection.close()
        memory.close()
