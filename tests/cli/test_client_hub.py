"""`base add --from hub:…` against a small Hub; in processes of their own, as the address is read at import."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.hub import COMMIT, serve_hub
from tests.tiny import make_base

FIND = (
    "import json, sys\n"
    "from cli.base_source import find_base\n"
    "from cli.errors import CommandError\n"
    "try: found = find_base(sys.argv[1], lambda _: None)\n"
    "except CommandError as error: sys.exit(f'{error.message} ({error.code})')\n"
    "folder = next(iter(found.files.values())).parent\n"
    "print(json.dumps([sorted(found.files), str(folder), found.source, found.revision]))"
)
Find = Callable[[str, str], subprocess.CompletedProcess[str]]


@pytest.fixture
def find(tmp_path: Path) -> Find:
    """What `find_base` says of an origin, with a Hub at this address."""

    def call(origin: str, endpoint: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf")}
        return subprocess.run([sys.executable, "-c", FIND, origin], env=env, capture_output=True, text=True)

    return call


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a sharded model, and beside it what is no part of one."""
    folder = make_base(tmp_path_factory.mktemp("hub") / "model", shards=3)
    (folder / "README.md").write_text("about")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    shutil.copy(next(folder.glob("model-*.safetensors")), folder / "consolidated.safetensors")
    return folder


def test_a_hub_model_is_fetched_at_the_commit_its_branch_names(find: Find, repo: Path) -> None:
    with serve_hub(repo) as hub:
        done = find("hub:org/model@main", hub.url)
    assert done.returncode == 0, done.stderr
    names, folder, source, revision = json.loads(done.stdout)
    assert (source, revision) == ("hub:org/model", COMMIT)
    assert "config.json" in names and sum(name.endswith(".safetensors") for name in names) > 1
    assert all((Path(folder) / name).read_bytes() == (repo / name).read_bytes() for name in names)


def test_nothing_but_the_model_is_fetched(find: Find, repo: Path) -> None:
    with serve_hub(repo) as hub:
        assert find("hub:org/model", hub.url).returncode == 0
    fetched = {path.rsplit("/", 1)[1] for path in hub.asked if path.startswith("GET /org/model/resolve/")}
    assert "tokenizer.json" in fetched
    assert not fetched & {"README.md", "pytorch_model.bin", "consolidated.safetensors"}


@pytest.mark.parametrize("origin", ["hub:org/other", "hub:org/model@nope"])
def test_what_the_hub_does_not_have_is_a_sentence(find: Find, repo: Path, origin: str) -> None:
    with serve_hub(repo) as hub:
        done = find(origin, hub.url)
    assert done.returncode == 1
    assert "The Hub has no repository" in done.stderr and "Traceback" not in done.stderr


def test_a_name_that_is_none_is_a_sentence(find: Find) -> None:
    assert "hub:org/name" in find("hub:not a name", "http://127.0.0.1:9").stderr


def test_a_hub_that_does_not_answer_is_a_sentence(find: Find) -> None:
    done = find("hub:org/model", "http://127.0.0.1:9")
    assert "The Hub does not answer" in done.stderr and "Traceback" not in done.stderr
