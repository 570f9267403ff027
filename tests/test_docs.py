"""Documentation that cannot rot: what the code knows, the documents name."""

import ast
import re
from functools import cache
from pathlib import Path

import api.refusals  # noqa: F401 - its errors count too
from registry import errors
from registry.settings import PREFIX, Settings

ROOT = Path(__file__).parent.parent


def all_errors(family: type[errors.DepotError] = errors.DepotError) -> set[type[errors.DepotError]]:
    found = {family}
    for child in family.__subclasses__():
        found |= all_errors(child)
    return found


def test_every_setting_is_in_the_example_file() -> None:
    example = (ROOT / ".env.example").read_text()
    named = set(re.findall(rf"^#? ?({PREFIX}[A-Z0-9_]+)=", example, flags=re.MULTILINE))
    assert named == {f"{PREFIX}{name}".upper() for name in Settings.model_fields}


def test_every_setting_is_in_the_operations_guide() -> None:
    guide = (ROOT / "docs" / "operations.md").read_text()
    missing = [name for name in Settings.model_fields if f"`{PREFIX}{name}`".upper() not in guide.upper()]
    assert missing == []


def test_every_error_code_is_in_the_api_guide() -> None:
    guide = (ROOT / "docs" / "api.md").read_text()
    missing = sorted(error.code for error in all_errors() if f"`{error.code}`" not in guide)
    assert missing == []


def test_every_error_says_what_happened_and_has_a_code_of_its_own() -> None:
    codes = [error.code for error in all_errors()]
    assert len(codes) == len(set(codes))
    for error in all_errors():
        assert re.fullmatch(r"[a-z][a-z0-9_]+", error.code)
        assert error().message.endswith("."), error


def test_readme_opens_with_its_two_commands() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "make demo" in readme[:1500]
    assert "make test" in readme[:1500]
    assert "api" in readme


def test_every_make_target_that_documents_name_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for name in ("README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", ".github/workflows/ci.yml", ".ci/run"):
        named = set(re.findall(r"(?:^|`|: )make ([a-z-]+)", (ROOT / name).read_text(), flags=re.MULTILINE))
        assert named <= targets, (name, named - targets)


def test_every_folder_is_on_the_map() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text()
    folders = [p.name for p in ROOT.iterdir() if p.is_dir() and (p / "__init__.py").exists()]
    assert [name for name in folders if f"{name}/" not in page] == []


@cache
def names_in(path: str) -> set[str]:
    """The names of all test functions and methods in a file; none if it is not there."""
    file = ROOT / path
    tree = ast.parse(file.read_text()) if file.is_file() else ast.Module([], [])
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def named_tests(page: str) -> list[tuple[str, str]]:
    return re.findall(r"`([\w/]+\.py)::(\w+)`", (ROOT / page).read_text())


def test_every_test_that_documents_name_exists() -> None:
    pages = ("docs/guarantees.md", "ARCHITECTURE.md", "tests/faults/README.md")
    named = [pair for page in pages for pair in named_tests(page)]
    assert [f"{path}::{name}" for path, name in named if name not in names_in(path)] == []


def test_every_guarantee_and_every_invariant_has_a_test() -> None:
    for page, heading in (("docs/guarantees.md", "## What is promised"), ("ARCHITECTURE.md", "## Invariants")):
        section = (ROOT / page).read_text().split(heading)[1].split("\n## ")[0]
        rows = re.findall(r"^\| \d+ \|.*$", section, flags=re.MULTILINE)
        assert len(rows) > 9
        assert [row for row in rows if not re.search(r"`[\w/]+\.py::\w+`", row)] == []
