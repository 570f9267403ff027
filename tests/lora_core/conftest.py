from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.tiny import make_base


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny float32 Llama in one file; tests must not write to it."""
    return make_base(tmp_path_factory.mktemp("llama") / "base")
