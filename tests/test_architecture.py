"""Who may import whom. Every contract is also broken on purpose, to see that it would be noticed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("api", "worker", "registry", "lora_core", "cli", "demo")
LINT = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]

BREAKS = [
    ("edges -> registry -> lora_core", "api/_broken.py", "import worker.app"),
    ("edges -> registry -> lora_core", "registry/_broken.py", "import api.main"),
    ("edges -> registry -> lora_core", "lora_core/_broken.py", "import registry.db"),
    ("no torch reachable from api, registry or cli", "registry/_broken.py", "import torch"),
    ("no torch reachable from api, registry or cli", "api/_broken.py", "import lora_core.layers"),
    ("lora_core is a library", "lora_core/_broken.py", "import sqlalchemy"),
    ("HTTP stops at api, Celery at worker", "worker/_broken.py", "import fastapi"),
    ("the client talks HTTP only", "cli/_broken.py", "import sqlalchemy"),
]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(LINT, cwd=folder, capture_output=True, text=True, env={"PYTHONPATH": str(folder)})


def test_import_contracts_hold() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copy")
    for room in ROOMS:
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


@pytest.mark.parametrize(("contract", "file", "line"), BREAKS)
def test_breaking_a_contract_is_noticed(copy: Path, contract: str, file: str, line: str) -> None:
    broken = copy / file
    broken.write_text(f"{line}\n")
    try:
        done = lint(copy)
    finally:
        broken.unlink()
    assert done.returncode != 0
    assert f"{contract} BROKEN" in done.stdout


@pytest.mark.parametrize("module", ["api.main", "cli.main", "worker.app", "registry.models", "lora_core.merge"])
def test_starts_without_torch(module: str) -> None:
    # In a fresh process: import-linter does not see what a parent package's __init__ imports.
    code = f"import sys; import {module}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    env = {"DEPOT_DATABASE_URL": "postgresql+psycopg://x@/x", "DEPOT_STORE_URL": "file:///tmp/x", "PATH": ""}
    env |= {"DEPOT_SECRET_KEY": "0" * 32, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_api_needs_neither_broker_nor_worker() -> None:
    code = "import sys, api.main; print(sorted({'celery', 'redis', 'kombu', 'worker'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_a_command_that_talks_to_nobody_loads_no_http_client() -> None:
    code = "import sys, cli.main; print(sorted({'httpx', 'numpy'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr
