"""Servers of its own, because tests here stop, flush and starve them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command

from cli.embedded.postgres import start_postgres
from cli.embedded.valkey import start_valkey
from tests.conftest import ROOT, alembic_config
from tests.faults.site import Servers, Site, Wires, make_toy_base, open_site, open_wires
from tests.faults.zygote import Zygote
from tests.registry.storage.conftest import S3Server, make_bucket, rclone

__all__ = ["rclone"]

SETTINGS = {"max_connections": "200", "fsync": "off", "full_page_writes": "off"}


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory, rclone: S3Server, zygote: Zygote) -> Iterator[Servers]:
    home = tmp_path_factory.mktemp("faults")
    postgres = start_postgres(home / "pg", home / "run", home / "pg.log", settings=SETTINGS)
    found = Servers(postgres, start_valkey(home / "valkey", home / "run", home / "valkey.log"), rclone, zygote)
    try:
        command.upgrade(alembic_config(postgres.url), "head")
        yield found
    finally:
        found.postgres.stop()
        found.valkey.stop()


@pytest.fixture(scope="session")
def fault_bucket(rclone: S3Server) -> str:
    return make_bucket(rclone.client())


@pytest.fixture(scope="session")
def toy_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy_base(tmp_path_factory.mktemp("toy") / "base")


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    zygote = Zygote(ROOT, tmp_path_factory.mktemp("zygote") / "log")
    yield zygote
    zygote.close()


@pytest.fixture
def wires(servers: Servers) -> Iterator[Wires]:
    with open_wires(servers) as wires:
        yield wires


@pytest.fixture
def site(servers: Servers, wires: Wires, tmp_path: Path, fault_bucket: str, toy_base: Path) -> Iterator[Site]:
    with open_site(servers, wires, tmp_path / "site", fault_bucket, toy_base) as site:
        yield site
