"""What a job can ask of its adapter: made by the trainer's own code, let through the gate, merged by its recipe."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_core.merge import merge
from lora_core.recipe import Recipe
from registry.jobs.spec import TrainSpec
from tests.tiny import make_base, make_rows, write_jsonl
from tests.worker.depot import BASE_NAME
from worker.merge_recipe import RECIPE_FILE
from worker.publish import check_trained
from worker.reporter import Reporter
from worker.task import TrainTask
from worker.train_child import train_adapter

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
QV = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, base_dir: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        "llama": base_dir,
        "tied": make_base(folder / "tied", tie=True),
        "gpt2": make_base(folder / "gpt2", "gpt2"),
        "phi3": make_base(folder / "phi3", "phi3"),
        "mixtral": make_base(folder / "mixtral", "mixtral"),
        "qwen2_moe": make_base(folder / "qwen2_moe", "qwen2_moe"),
    }


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(torch.arange(3, 40).unsqueeze(0)).logits


@pytest.mark.parametrize(
    ("base", "lora"),
    [
        ("llama", {"target_modules": "paper", "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3.0}}),
        ("llama", {"exclude_modules": ["mlp.gate_proj"], "layers_to_transform": [1], "lora_dropout": 0.1}),
        ("llama", {"target_modules": QV, "modules_to_save": ["lm_head", "layers.1.mlp"], "use_rslora": True}),
        ("llama", {"target_modules": QV, "use_dora": True, "init_lora_weights": "gaussian"}),
        ("llama", {"target_modules": QV, "init_lora_weights": "pissa"}),
        ("llama", {"target_modules": QV, "init_lora_weights": "olora", "use_rslora": True}),
        ("tied", {"target_modules": QV, "trainable_token_indices": [40, 41]}),
        ("tied", {"target_modules": ["embed_tokens", "v_proj"]}),
        ("gpt2", {"target_modules": "paper", "bias": "all"}),
        ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "bias": "lora_only"}),
        ("phi3", {"target_modules": "paper", "use_rslora": True}),
        ("llama", {"r": 5, "adalora": {"init_r": 5, "target_r": 2, "tfinal": 1}, "lora_dropout": 0.1}),
        ("gpt2", {"target_modules": ["c_attn"], "r": 3, "adalora": {"init_r": 3, "target_r": 1}}),
        ("mixtral", {"target_modules": [], "target_parameters": EXPERTS, "init_lora_weights": "gaussian"}),
        ("mixtral", {"target_modules": QV, "target_parameters": EXPERTS[:1], "use_rslora": True}),
        ("qwen2_moe", {"target_parameters": EXPERTS, "rank_pattern": {"layers.1.mlp.experts.down_proj": 2}}),
    ],
)
def test_the_adapter_passes_the_gate_and_its_recipe_gives_the_model_that_others_load(
    bases: dict[str, Path], base: str, lora: dict[str, Any], tmp_path: Path
) -> None:
    settings = {"n_epochs": 2, "batch_size": 4, "max_length": 64, "learning_rate": 1e-2, "loraplus_lr_ratio": 2.0}
    spec = TrainSpec.model_validate({"lora": {"r": 4, **lora}, **settings})
    task = TrainTask(
        base_dir=bases[base],
        base_digest="0" * 64,
        base_model=BASE_NAME,
        revision=None,
        training_file=write_jsonl(tmp_path / "train.jsonl", make_rows(8)),
        validation_file=None,
        spec=spec,
        resume_from=None,
        checkpoint_seconds=3600.0,
        threads=1,
    )
    train_adapter(task, tmp_path, Reporter(os.open(tmp_path / "said", os.O_WRONLY | os.O_CREAT)))
    out = tmp_path / "out"
    check_trained(out, SimpleNamespace(spec=spec, base=SimpleNamespace(name=BASE_NAME)))  # type: ignore[arg-type]
    recipe = Recipe.from_json((out / RECIPE_FILE).read_bytes())
    merge(bases[base], out, tmp_path / "merged", recipe=recipe)

    plain = AutoModelForCausalLM.from_pretrained(bases[base])
    before = logits(plain)
    adapted = logits(PeftModel.from_pretrained(plain, out))
    assert not torch.allclose(before, adapted, atol=1e-3)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), adapted, atol=3e-5, rtol=1e-5)
