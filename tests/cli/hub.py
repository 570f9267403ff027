"""The few addresses of the Hugging Face Hub that fetching a model needs, over a folder."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "org/model"


@dataclass
class Hub:
    """`asked`: every path that was asked for, `METHOD path`."""

    url: str
    asked: list[str] = field(default_factory=list)


@contextmanager
def serve_hub(folder: Path) -> Iterator[Hub]:
    """The repository org/model with the files of `folder`; its branch main is at COMMIT."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            path = self.path.partition("?")[0]
            if path in (f"/api/models/{REPO}", *(f"/api/models/{REPO}/revision/{r}" for r in ("main", COMMIT))):
                self._json({"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": f.name} for f in folder.iterdir()]})
            elif path == f"/api/models/{REPO}/tree/{COMMIT}":
                self._json([_entry(file) for file in sorted(folder.iterdir())])
            elif path.startswith(f"/{REPO}/resolve/{COMMIT}/") and (folder / path.rsplit("/", 1)[1]).is_file():
                self._bytes((folder / path.rsplit("/", 1)[1]).read_bytes())
            else:
                self._bytes(b"", status=404, headers={"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET

        def _json(self, value: Any) -> None:
            self._bytes(json.dumps(value).encode(), headers={"Content-Type": "application/json"})

        def _bytes(self, data: bytes, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            etag = hashlib.sha256(data).hexdigest()
            for name, value in {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server.RequestHandlerClass = Handler
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _entry(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    return {"type": "file", "path": file.name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
