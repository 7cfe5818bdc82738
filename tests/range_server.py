"""A small HTTP server of one folder that understands ranges, and misbehaves when told to. Also a program:
`python range_server.py FOLDER PORT` serves until it is killed."""

from __future__ import annotations

import re
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Asked:
    """One request: bytes `[start, end)` of a file, what was sent of them, and under which headers."""

    file: str
    start: int
    end: int
    headers: dict[str, str]
    sent: int = 0


@dataclass
class RangeServer:
    """`with RangeServer(folder) as server: server.url`. The fields are its faults; lists are used up, one item a request
    for a data file."""

    folder: Path
    port: int = 0
    cut_after: list[int] = field(default_factory=list)
    """Body bytes after which the connection is cut."""
    statuses: list[int] = field(default_factory=list)
    """Answers instead of the file (0: none)."""
    flip: list[bool] = field(default_factory=list)
    """Whether to flip the first byte of the body."""
    before: list[Any] = field(default_factory=list)
    """Called before the answer."""
    ignore_ranges: bool = False
    shift: tuple[int, int] = (0, 0)
    """Added to the start and the end that Content-Range names."""
    redirect: str = ""
    """The address of the server that has the files."""
    headers: dict[str, str] = field(default_factory=dict)
    claim_nbytes: dict[str, int] = field(default_factory=dict)
    """Sizes to claim of files, by name."""
    api: dict[str, bytes] = field(default_factory=dict)
    """JSON answers by path."""
    asked: list[Asked] = field(default_factory=list)
    bugs: list[str] = field(default_factory=list)

    def __enter__(self) -> RangeServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        server = self
        self._connections: set[socket.socket] = set()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def setup(self) -> None:
                server._connections.add(self.request)
                super().setup()

            def finish(self) -> None:
                server._connections.discard(self.request)
                try:
                    super().finish()
                except OSError:
                    return  # the connection was cut

            def do_GET(self) -> None:
                try:
                    server._answer(self)
                except OSError:
                    self.close_connection = True

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                return None

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_: object) -> None:
                error = sys.exc_info()[1]
                if not isinstance(error, OSError):  # the connection was cut
                    server.bugs.append(repr(error))

        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, name="range-server")
        self._thread.start()

    def stop(self) -> None:
        """Ends it as a kill would: every connection is cut."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        for connection in list(self._connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # it ended by itself
        end = time.monotonic() + 5
        while self._connections and time.monotonic() < end:
            time.sleep(0.005)
        assert not self.bugs, self.bugs

    def sent_nbytes(self, suffix: str = ".bin") -> int:
        """Body bytes sent of the files whose names end so."""
        return sum(asked.sent for asked in self.asked if asked.file.endswith(suffix))

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(handler.path).path)
        name = path.rpartition("/")[2]
        if path in self.api:
            self._send(handler, 200, {"Content-Type": "application/json", "Content-Length": str(len(self.api[path]))}, self.api[path])
            return
        if self.redirect:
            self.asked.append(Asked(name, 0, 0, dict(handler.headers)))
            self._send(handler, 302, {"Location": f"{self.redirect}{handler.path}", "Content-Length": "0"}, b"")
            return
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
        data = name.endswith(".bin") and found is not None and found.groups() != ("0", "0")
        if data and self.before:
            self.before.pop(0)()
        status = self.statuses.pop(0) if data and self.statuses else 0
        file = self.folder / path.lstrip("/")
        if not file.is_file() and not status:
            status = 404
        if status:
            self._send(handler, status, {"Content-Length": "2"}, b"no")
            return
        total = self.claim_nbytes.get(name, file.stat().st_size)
        start, end = (int(found[1]), min(int(found[2]) + 1, total)) if found and not self.ignore_ranges else (0, total)
        if found and start >= total and not self.ignore_ranges:
            self._send(handler, 416, {"Content-Range": f"bytes */{total}", "Content-Length": "0"}, b"")
            return
        asked = Asked(name, start, end, dict(handler.headers))
        self.asked.append(asked)
        with open(file, "rb") as opened:
            opened.seek(start)
            body = bytearray(opened.read(end - start))
        if data and self.flip and self.flip.pop(0):
            body[0] ^= 1
        said = {"Content-Length": str(end - start), **self.headers}
        if found and not self.ignore_ranges:
            said["Content-Range"] = f"bytes {start + self.shift[0]}-{end - 1 + self.shift[1]}/{total}"
        cut = self.cut_after.pop(0) if data and self.cut_after else len(body)
        asked.sent = min(cut, len(body))
        self._send(handler, 206 if "Content-Range" in said else 200, said, bytes(body[:cut]))
        if cut < len(body):
            handler.close_connection = True

    def _send(self, handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes) -> None:
        handler.send_response_only(status)
        for key, value in headers.items():
            handler.send_header(key, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)


if __name__ == "__main__":
    RangeServer(Path(sys.argv[1]), int(sys.argv[2])).start()
