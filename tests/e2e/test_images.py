"""Each image installs what its code imports: here everything is installed, so a missing requirement would not show."""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from registry.settings import Settings
from tests.e2e.compose import ROOT, dockerfile, service
from tests.e2e.stack import clean_environment

COPIED = {line.split()[0] for line in dockerfile("base")["COPY"] if "." not in line.split()[0]}
# The modules that an image's processes start from, and the folders it uses without importing all of them at once.
ENTRIES = {"api": ["api.main", "api.admin"], "worker": ["worker.app", "worker.child", "worker.train_child"]}
FOLDERS = {"api": ["api", "migrations"], "worker": ["worker", "lora_core"]}


@pytest.mark.parametrize("image", ["api", "worker"])
def test_an_image_installs_what_its_code_imports(image: str) -> None:
    pip = " ".join(dockerfile(image)["RUN"])
    assert f"'.[{image}]'" in pip
    installed = requirements("lora-depot", image)
    missing = {
        f"{file.relative_to(ROOT)} imports {name}"
        for file in loaded_files(image)
        for name in imports(ast.parse(file.read_text()))
        if not distributions(name) & installed
    }
    assert missing == set()


@pytest.mark.parametrize("image", ["api", "worker"])
def test_an_image_works_in_a_folder_that_its_user_may_write(image: str) -> None:
    stage = dockerfile(image)
    folders = dict(pair.split("=") for line in stage["ENV"] for pair in line.split())
    # Nothing of /app, where it starts, belongs to that user.
    assert f"chown {stage['USER'][0]} {Path(folders['DEPOT_WORK_DIR']).parent}" in stage["RUN"][0]


def test_every_setting_that_the_example_names_reaches_the_containers() -> None:
    names = set(re.findall(r"^(?:# )?(DEPOT_\w+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert names == {f"DEPOT_{field.upper()}" for field in Settings.model_fields}
    own = {pair.split("=")[0] for line in dockerfile("worker")["ENV"] for pair in line.split()}
    given = service("worker", dict.fromkeys((*names, *dot_env_secrets()), "7"))["environment"]
    assert names - own <= given.keys()
    assert given["DEPOT_LINK_SECONDS"] == "7"


def dot_env_secrets() -> list[str]:
    """The names that .env.example leaves empty."""
    return re.findall(r"^(\w+)=$", (ROOT / ".env.example").read_text(), re.MULTILINE)


def requirements(name: str, *extras: str) -> set[str]:
    """Every distribution that installing `name[extras]` brings, by its normal name."""
    seen: set[tuple[str, str]] = set()
    todo = [(name, extra) for extra in ("", *extras)]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        for wanted in map(Requirement, importlib.metadata.requires(current[0]) or []):
            needed = wanted.marker is None or wanted.marker.evaluate({"extra": current[1]})
            if needed and is_installed(wanted.name):
                todo += [(canonicalize_name(wanted.name), extra) for extra in ("", *wanted.extras)]
    return {name for name, _ in seen}


def is_installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.distribution(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def loaded_files(image: str) -> set[Path]:
    """Our own files that the image's processes load, and all of its own folders."""
    code = f"import sys, json, {', '.join(ENTRIES[image])}\n"
    code += "print(json.dumps([getattr(m, '__file__', None) for m in list(sys.modules.values())]))"
    env = clean_environment(
        PYTHONPATH=str(ROOT), DEPOT_DATABASE_URL="postgresql://", DEPOT_STORE_URL="file:///x", DEPOT_SECRET_KEY="0" * 32
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    files = {Path(name) for name in json.loads(done.stdout) if name}
    ours = {file for file in files if file.is_relative_to(ROOT) and not file.is_relative_to(sys.prefix)}
    assert {file.relative_to(ROOT).parts[0] for file in ours} <= COPIED
    return ours.union(*((ROOT / folder).rglob("*.py") for folder in FOLDERS[image]))


def imports(node: ast.AST) -> Iterator[str]:
    """Top names of the third-party modules that `node` imports, now or later, and cannot do without."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.Try) and any(h.type and ast.unparse(h.type) == "ImportError" for h in node.handlers):
        return
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
    for name in (name.partition(".")[0] for name in names):
        if name not in sys.stdlib_module_names | COPIED:
            yield name
    for child in ast.iter_child_nodes(node):
        yield from imports(child)


@cache
def providers() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


def distributions(module: str) -> set[str]:
    return {canonicalize_name(name) for name in providers().get(module, [])}
