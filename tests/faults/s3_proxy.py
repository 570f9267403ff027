"""A server in front of an S3 server that understands enough HTTP to break one request and leave the next alone."""

import http.client
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import urlsplit

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
INTERNAL = b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Answer:
    """`body` is sent under `length`, which may be a lie."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    length: int | None = None


Forward = Callable[[Request], Answer]
Fault = Callable[[Request, Forward], Answer | None]  # None: the connection ends without an answer


@dataclass
class Rule:
    """Does `fault` to `times` requests of `method` whose path and query match `pattern`, after `skip` of them."""

    method: str
    pattern: str
    fault: Fault
    times: int
    skip: int
    done: int = 0


def status(code: int, body: bytes = b"") -> Fault:
    return lambda _request, _forward: Answer(code, {"Content-Type": "application/xml"}, body)


def lose_answer(request: Request, forward: Forward) -> None:
    """Done, and nobody hears of it."""
    forward(request)


def hang(seconds: float) -> Fault:
    def fault(request: Request, forward: Forward) -> Answer:
        time.sleep(seconds)
        return forward(request)

    return fault


def flip_request_bit(request: Request, forward: Forward) -> Answer:
    body = bytearray(request.body)
    if body:
        body[len(body) // 2] ^= 1
    return forward(Request(request.method, request.path, request.headers, bytes(body)))


def flip_answer_bit(request: Request, forward: Forward) -> Answer:
    answer = forward(request)
    body = bytearray(answer.body)
    body[len(body) // 2] ^= 1
    return Answer(answer.status, answer.headers, bytes(body))


def truncate_answer(request: Request, forward: Forward) -> Answer:
    """Half of the body under the length of the whole."""
    answer = forward(request)
    return Answer(answer.status, answer.headers, answer.body[: len(answer.body) // 2], len(answer.body))


def error_with_200(_request: Request, _forward: Forward) -> Answer:
    return Answer(200, {"Content-Type": "application/xml"}, INTERNAL)


@dataclass
class S3Proxy:
    """`break_(method, pattern, fault)` until `heal`. `seen` has every request as `METHOD path?query`."""

    upstream: str
    rules: list[Rule] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        handler = type("BoundHandler", (_Handler,), {"proxy": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.05,), name="s3-proxy", daemon=True).start()

    @property
    def port(self) -> int:
        return self.server.server_address[1]

    def break_(self, method: str, pattern: str, fault: Fault, *, times: int = 1, skip: int = 0) -> Rule:
        rule = Rule(method, pattern, fault, times, skip)
        with self.lock:
            self.rules.append(rule)
        return rule

    def heal(self) -> None:
        with self.lock:
            self.rules.clear()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self.lock:
            self.seen.append(f"{method} {path}")
            for rule in self.rules:
                if rule.method == method and re.search(rule.pattern, path):
                    rule.done += 1
                    if rule.skip < rule.done <= rule.skip + rule.times:
                        return rule.fault
        return None

    def forward(self, request: Request) -> Answer:
        url = urlsplit(self.upstream)
        connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=60)
        try:
            connection.request(request.method, request.path, request.body or None, dict(request.headers))
            response = connection.getresponse()
            body = response.read()
            length = int(response.headers.get("Content-Length", 0)) if request.method == "HEAD" else None
            return Answer(response.status, dict(response.headers.items()), body, length)
        finally:
            connection.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: ClassVar[S3Proxy]

    def log_message(self, *_: object) -> None:
        pass

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
        request = Request(self.command, self.path, headers, body)
        fault = self.proxy.fault_for(self.command, self.path)
        try:
            answer = fault(request, self.proxy.forward) if fault else self.proxy.forward(request)
        except OSError:  # the real server is away
            answer = None
        if answer is None:
            self.close_connection = True
            return
        length = len(answer.body) if answer.length is None else answer.length
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(answer.body)
        if self.command != "HEAD" and length != len(answer.body):
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_request
