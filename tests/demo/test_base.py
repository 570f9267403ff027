"""The base model of the demo, with a recipe that takes seconds."""

from pathlib import Path

import pytest

from demo.base import Recipe, make_base
from lora_core.model import load_base

TINY = Recipe(vocab_size=300, hidden_size=32, layers=1, heads=2, characters=20_000, steps=3, batch_size=2, window=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("demo") / "base", lambda _: None, TINY)


def test_the_base_is_one_that_the_service_accepts(folder: Path) -> None:
    model, tokenizer = load_base(folder)
    assert model.config.num_hidden_layers == 1
    assert tokenizer.decode(tokenizer("def naïve(): …")["input_ids"]) == "def naïve(): …"
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    assert "Hello" in tokenizer.apply_chat_template(chat, tokenize=False)


def test_the_same_recipe_is_made_once(folder: Path) -> None:
    weights = folder / "model.safetensors"
    before = weights.stat().st_mtime_ns
    said: list[str] = []
    make_base(folder, said.append, TINY)
    assert weights.stat().st_mtime_ns == before
    assert len(said) == 1


def test_the_same_recipe_gives_the_same_model(folder: Path, tmp_path: Path) -> None:
    again = make_base(tmp_path / "base", lambda _: None, TINY)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_what_an_interrupted_run_left_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()  # renamed into place, but the marker was not written
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "base.unfinished").mkdir()
    load_base(make_base(tmp_path / "base", lambda _: None, TINY))
    assert not (tmp_path / "base.unfinished").exists()


def test_another_recipe_replaces_the_model(folder: Path, tmp_path: Path) -> None:
    make_base(tmp_path / "base", lambda _: None, TINY)
    wider = Recipe(**{**vars(TINY), "hidden_size": 64})
    assert load_base(make_base(tmp_path / "base", lambda _: None, wider))[0].config.hidden_size == 64
