"""Stand-ins for api and worker, so that the supervisor is tested with a real Postgres and Valkey and nothing else.

`python -m tests.cli.toys up HOME [PORT] [raced]` is `lora-depot up` with these commands; `raced`: between the choice
of the port and the start of the API another depot opens it."""

import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psycopg

from cli.embedded.stack import Commands
from cli.up import up


def toy_commands(port: int) -> Commands:
    toy = (sys.executable, "-m", "tests.cli.toys")
    return Commands(
        migrate=(*toy, "migrate"),
        create_key=(*toy, "create_key"),
        api=(*toy, "api", str(port)),
        worker=(*toy, "worker"),
    )


class OtherDepot(BaseHTTPRequestHandler):
    """Ready, and glad to see any key."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()


def raced_commands(port: int) -> Commands:
    if threading.active_count() == 1:
        server = ThreadingHTTPServer(("127.0.0.1", port), OtherDepot)
        threading.Thread(target=server.serve_forever, daemon=True).start()
    return toy_commands(port)


def connect() -> psycopg.Connection:
    return psycopg.connect(os.environ["DEPOT_DATABASE_URL"].replace("+psycopg", ""), autocommit=True)


def migrate() -> None:
    if Path(os.environ["DEPOT_WORK_DIR"], "schema-too-new").exists():
        sys.stderr.write("the schema is newer than this release\n")
        sys.exit(3)
    with connect() as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS starts (id serial PRIMARY KEY)")
        connection.execute("CREATE TABLE IF NOT EXISTS keys (key text PRIMARY KEY)")
        connection.execute("INSERT INTO starts DEFAULT VALUES")


def create_key() -> None:
    with connect() as connection:
        key = f"ld_{os.urandom(4).hex()}"
        connection.execute("INSERT INTO keys VALUES (%s)", [key])
    sys.stdout.write(f"{key}\n")


class Api(BaseHTTPRequestHandler):
    mark: tuple[str, str]

    def do_GET(self) -> None:
        status = 200 if self.path == "/readyz" or self.is_known() else 401
        self.send_response(status)
        self.send_header(*self.mark)
        self.end_headers()

    def is_known(self) -> bool:
        key = self.headers["Authorization"].removeprefix("Bearer ")
        with connect() as connection:
            return connection.execute("SELECT 1 FROM keys WHERE key = %s", [key]).fetchone() is not None


def api(port: str, flag: str, header: str) -> None:
    assert flag == "--header"
    name, _, value = header.partition(":")
    Api.mark = (name, value)
    ThreadingHTTPServer(("127.0.0.1", int(port)), Api).serve_forever()


def worker() -> None:
    def drain(number: int, frame: object) -> None:
        Path(os.environ["DEPOT_WORK_DIR"], "drained").touch()
        sys.exit(0)

    signal.signal(signal.SIGTERM, drain)
    Path(os.environ["DEPOT_WORK_DIR"], str(os.getpid())).touch()
    while True:
        time.sleep(60)


if __name__ == "__main__":
    verb, *arguments = sys.argv[1:]
    if verb == "up":
        home, *words = arguments
        port = next((int(word) for word in words if word.isdigit()), None)
        sys.exit(up(Path(home), port=port, commands=raced_commands if "raced" in words else toy_commands))
    {"migrate": migrate, "create_key": create_key, "api": api, "worker": worker}[verb](*arguments)
