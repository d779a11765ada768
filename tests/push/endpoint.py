"""An endpoint of ours on loopback that answers as a test says, and keeps what it got."""
from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Got(NamedTuple):
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def ids(self) -> list[int]:
        """The record ids it carries."""
        messages = self.json.get("data", [self.json])
        return [message["record"]["id"] for message in messages]


Answer = Callable[[Got, BaseHTTPRequestHandler], None]


def status(code: int, **headers: str) -> Answer:
    def answer(got: Got, handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


class Endpoint:
    def __init__(self, answer: Answer = status(204)) -> None:  # noqa: B008
        self.got: list[Got] = []
        self.answer = answer
        self.closing = threading.Event()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                size = int(self.headers["content-length"])
                body = self.rfile.read(size)
                if len(body) < size:
                    return  # its sender was killed in the middle of it
                got = Got(self.path, {k.lower(): v for k, v in self.headers.items()}, body)
                endpoint.got.append(got)
                endpoint.answer(got, self)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_: Any) -> None:
                pass  # a client that went away is what some tests are about

        self.server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    @property
    def ids(self) -> list[int]:
        return [number for got in list(self.got) for number in got.ids]

    def hang(self, got: Got, handler: BaseHTTPRequestHandler) -> None:
        self.closing.wait(60)
        handler.close_connection = True

    def drip(self, got: Got, handler: BaseHTTPRequestHandler) -> None:
        """Bytes of a header that never ends, each well within the timeout."""
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while not self.closing.wait(0.1):
            handler.wfile.write(b"x")
            handler.wfile.flush()

    def break_off(self, got: Got, handler: BaseHTTPRequestHandler) -> None:
        """A status line and headers, then the connection is reset in the middle of the body."""
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf")
        handler.wfile.flush()
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        handler.close_connection = True

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
