"""The merge recipe of a trained adapter: made by the child, believed only if it fits."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from lora_core.adapter import save_adapter
from lora_core.config import LoraConfig
from lora_core.errors import KeyMismatch
from lora_core.inject import inject
from lora_core.plan import plan_merge
from lora_core.recipe import Recipe
from tests.lora_core.test_keymap import DOWN, GATE_UP, make_moe
from worker.errors import JobFailed
from worker.merge_recipe import RECIPE_FILE, read_recipe
from worker.recipe_child import write_recipe


@pytest.fixture
def out(adapter_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter_dir, tmp_path / "out"))


def test_the_recipe_merges_like_one_made_from_headers(base_dir: Path, out: Path) -> None:
    assert write_recipe(base_dir, out)
    text = read_recipe(out)
    assert text is not None
    assert Recipe.from_json(text.encode()) == plan_merge(base_dir, out).recipe


def test_no_recipe_is_no_failure(out: Path) -> None:
    assert read_recipe(out) is None


def test_a_base_that_transformers_does_not_know_is_planned_by_names(base_dir: Path, out: Path, tmp_path: Path) -> None:
    strange = Path(shutil.copytree(base_dir, tmp_path / "strange"))
    config = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps(config | {"model_type": "not_in_transformers"}))
    assert write_recipe(strange, out)
    assert read_recipe(out)


def test_experts_that_lie_one_by_one_are_merged_by_their_recipe(tmp_path: Path) -> None:
    base, adapter = make_moe(tmp_path / "base", "mixtral"), tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=(), target_parameters=(GATE_UP, DOWN))
    inject(model, config, seed=0)
    save_adapter(model, config, adapter)
    with pytest.raises(KeyMismatch):
        plan_merge(base, adapter)
    assert write_recipe(base, adapter)
    text = read_recipe(adapter)
    assert text is not None
    merged = Recipe.from_json(text.encode()).tensors
    assert len(merged) == 2 * 3 * 3  # layers, experts, matrices of an expert


def test_an_adapter_that_does_not_fit_has_none(base_dir: Path, out: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(base_dir, tmp_path / "other"))
    weights = (
        (other / "model.safetensors").read_bytes().replace(b"layers.1.self_attn.q_proj", b"layers.1.self_attn.x_proj")
    )
    (other / "model.safetensors").write_bytes(weights)
    assert not write_recipe(other, out)
    assert not (out / RECIPE_FILE).exists()


def drop_a_tensor(path: Path) -> None:
    document = json.loads(path.read_bytes())
    document["tensors"].popitem()
    path.write_text(json.dumps(document))


def make_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/hostname")


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [drop_a_tensor, make_link, make_folder, lambda path: path.write_text("{}")])
def test_what_does_not_fit_the_adapter_is_refused(base_dir: Path, out: Path, damage) -> None:
    write_recipe(base_dir, out)
    damage(out / RECIPE_FILE)
    with pytest.raises(JobFailed) as caught:
        read_recipe(out)
    assert (caught.value.error_class, caught.value.code) == ("bug", "invalid_output")
