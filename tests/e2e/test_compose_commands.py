"""What docker-compose.yml and Dockerfile would run, run here without an engine: the same words, the same settings.

Only addresses differ: Postgres and Valkey are those of the tests, and rclone stands in for SeaweedFS. Clients know
the store as `localhost`, the service as 127.0.0.1, so that a link that is signed for the wrong one is refused."""

import hashlib
import json
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
import torch
from sqlalchemy import Engine, text
from sqlalchemy.engine import make_url

from cli.embedded.stack import answers, production_commands
from tests.cli.depot import wait_for
from tests.e2e.compose import ROOT, command, dockerfile, dot_env, health_check, service
from tests.e2e.stack import SCRIPTS, User, clean_environment
from tests.ports import free_port
from tests.registry.storage.conftest import S3Server
from tests.tiny import make_base, make_rows, write_jsonl

BASE = "tiny/llama"
CREATE_KEY = "python -m api.admin create-key --name me"


@dataclass
class Host:
    """What docker compose would do: run the services' commands with the services' environments."""

    folder: Path
    variables: Mapping[str, str]  # of .env
    addresses: Mapping[str, str]  # in place of the containers' names
    port: int

    def start(self, name: str, argv: list[str]) -> subprocess.Popen[bytes]:
        with self.log(name).open("ab") as log:
            return subprocess.Popen(argv, cwd=ROOT, env=self.environment(name), stdout=log, stderr=log)

    def runs(self, name: str, argv: list[str]) -> str:
        """What a command that ends printed; it ended well."""
        env = self.environment(name)
        done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def environment(self, name: str) -> dict[str, str]:
        """The service's own environment, then that of its image: nothing of the shell but where programs are."""
        given = service(name, self.variables)["environment"]
        assert self.addresses.keys() <= given.keys()
        image = dict(pair.split("=") for line in dockerfile(name).get("ENV", []) for pair in line.split())
        inside = {name: str(self.folder / path.lstrip("/")) for name, path in image.items()}
        threads = {"OMP_NUM_THREADS": "1"}
        return {
            "PATH": f"{SCRIPTS}:/usr/bin:/bin",
            "HOME": str(self.folder),
            **threads,
            **inside,
            **given,
            **self.addresses,
        }

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def on_port(self, argv: list[str]) -> list[str]:
        assert sum(word.count("8000") for word in argv) == 1
        return [word.replace("8000", str(self.port)) for word in argv]


@pytest.fixture(scope="module")
def empty_database(database_url: str, engine: Engine) -> Iterator[str]:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("CREATE DATABASE composed"))
    yield make_url(database_url).set(database="composed").render_as_string(hide_password=False)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("DROP DATABASE composed WITH (FORCE)"))


@pytest.fixture(scope="module")
def host(empty_database: str, valkey_url: str, rclone: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Host:
    port = free_port()
    variables = dot_env(
        POSTGRES_PASSWORD=secrets.token_hex(32),
        VALKEY_PASSWORD=secrets.token_hex(32),
        S3_ACCESS_KEY_ID=rclone.access_key_id,
        S3_SECRET_ACCESS_KEY=rclone.secret_access_key,
        DEPOT_SECRET_KEY=secrets.token_hex(32),
        DEPOT_S3_PUBLIC_ENDPOINT_URL=rclone.endpoint_url.replace("127.0.0.1", "localhost"),
        DEPOT_PUBLIC_URL=f"http://127.0.0.1:{port}",
    )
    addresses = {
        "DEPOT_DATABASE_URL": empty_database,
        "DEPOT_REDIS_URL": valkey_url,
        "DEPOT_S3_ENDPOINT_URL": rclone.endpoint_url,
    }
    bucket = service("seaweedfs", variables)["environment"]["S3_BUCKET"]
    rclone.client().create_bucket(Bucket=bucket)
    return Host(tmp_path_factory.mktemp("compose"), variables, addresses, port)


@pytest.fixture(scope="module")
def api(host: Host) -> Iterator[subprocess.Popen[bytes]]:
    host.runs("migrate", service("migrate", host.variables)["command"])
    process = host.start("api", host.on_port(command("api")))
    url = f"http://127.0.0.1:{host.port}/readyz"
    wait_for(lambda: process.poll() is not None or answers(url) == 200, "the API is ready or ended")
    assert process.poll() is None, host.log("api").read_text()
    yield process
    process.terminate()
    process.wait(90)
    log = host.log("api").read_text()
    assert "Application shutdown complete" in log
    assert "Traceback" not in log


@pytest.fixture(scope="module")
def worker(host: Host, api: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    process = host.start("worker", command("worker"))
    yield process
    assert process.poll() is None, host.log("worker").read_text()
    process.terminate()
    assert process.wait(90) == 0
    assert "Traceback" not in host.log("worker").read_text()


@pytest.fixture(scope="module")
def user(host: Host, api: subprocess.Popen[bytes]) -> User:
    key = host.runs("api", CREATE_KEY.split()).strip()
    folder = host.folder / "user"
    torch.set_num_threads(1)
    make_base(folder / "base")
    write_jsonl(folder / "rows.jsonl", make_rows(8))
    env = clean_environment(
        DEPOT_URL=host.variables["DEPOT_PUBLIC_URL"], DEPOT_API_KEY=key, DEPOT_HOME=str(folder / "none")
    )
    return User(folder, env)


def test_a_job_becomes_a_version_and_a_merge_behind_links_for_the_public_endpoint(
    host: Host, user: User, worker: subprocess.Popen[bytes]
) -> None:
    user.types("base", "add", BASE, "--from", "base")
    said = user.types(
        *("jobs", "submit", "--watch", "--model", BASE, "--data", "rows.jsonl", "--adapter", "bot", "--r", "2"),
        *("--max-steps", "3", "--max-length", "128"),
    )
    assert "Published bot@1." in said
    with httpx.Client(
        base_url=f"{host.variables['DEPOT_PUBLIC_URL']}/v1",
        headers={"Authorization": f"Bearer {user.env['DEPOT_API_KEY']}"},
        trust_env=False,
        timeout=120,
    ) as http:
        version = http.get("/adapters/bot/versions/1").json()
        assert {file["path"] for file in version["files"]} >= {"adapter_config.json", "adapter_model.safetensors"}
        follow(host, http, "/adapters/bot/versions/1", version["files"])
        merge = http.post("/adapters/bot/versions/1/merges", json={}).json()
        while merge["status"] in {"queued", "running"}:
            time.sleep(0.2)
            merge = http.get(f"/merges/{merge['id']}").json()
        assert merge["status"] == "succeeded", merge
        follow(host, http, f"/merges/{merge['id']}", merge["files"])
    user.types("download", "bot@1", "--merged", "--out", "merged")
    assert json.loads((user.folder / "merged" / "config.json").read_text())["model_type"] == "llama"


def follow(host: Host, http: httpx.Client, path: str, files: list[dict]) -> None:
    """Every file is behind a redirect to the public endpoint, whose link needs no other credential."""
    assert files
    for file in files:
        answer = http.get(f"{path}/files/{file['path']}", follow_redirects=False)
        assert answer.status_code == 302, answer.text
        link = answer.headers["location"]
        public = urlsplit(host.variables["DEPOT_S3_PUBLIC_ENDPOINT_URL"])
        assert urlsplit(link)[:2] == public[:2]
        data = httpx.get(link, trust_env=False, timeout=120).raise_for_status().content
        assert hashlib.sha256(data).hexdigest() == file["sha256"] == answer.headers["x-depot-sha256"]
        assert len(data) == file["bytes"]
        elsewhere = link.replace(public.netloc, urlsplit(host.addresses["DEPOT_S3_ENDPOINT_URL"]).netloc)
        assert httpx.get(elsewhere, trust_env=False, timeout=120).status_code == 403


def test_the_health_check_of_the_image_tells_life_from_death(host: Host, api: subprocess.Popen[bytes]) -> None:
    argv = host.on_port(health_check("api"))
    host.runs("api", argv)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        dead = [word.replace(str(host.port), str(closed.getsockname()[1])) for word in argv]
        done = subprocess.run(dead, env=host.environment("api"), capture_output=True)
    assert done.returncode != 0


def libraries(process: psutil.Process) -> set[str]:
    return {Path(file.path).name for file in process.memory_maps()}


def test_the_api_process_has_not_loaded_torch(api: subprocess.Popen[bytes]) -> None:
    torch_here = {name for name in libraries(psutil.Process()) if name.startswith("libtorch")}
    assert torch_here, "this process has loaded it, and that can be seen"
    assert libraries(psutil.Process(api.pid)) & torch_here == set()


def test_the_embedded_stack_runs_the_same_commands(host: Host) -> None:
    embedded = production_commands(8000)
    assert list(embedded.worker[2:]) == command("worker")
    migrate = [word for word in embedded.migrate[2:] if word not in ("-c", str(ROOT / "alembic.ini"))]
    assert migrate == service("migrate", host.variables)["command"]
    words = [word.replace("0.0.0.0", "127.0.0.1") for word in command("api")]
    assert list(embedded.api[2:]) == words


def test_the_first_steps_in_the_compose_file_make_a_key_that_works(user: User) -> None:
    assert f"docker compose exec api {CREATE_KEY}" in (ROOT / "docker-compose.yml").read_text()
    assert user.types("base", "list")
