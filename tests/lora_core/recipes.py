"""A recipe carried out in memory, the simplest way: what any executor must agree with."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_core.gate import WEIGHTS_FILE
from lora_core.keymap import Keymap
from lora_core.plan import MergePlan, Start, plan_merge
from lora_core.recipe import Recipe, TensorRecipe
from lora_core.shards import ByteReader
from lora_core.updates import AdapterReader, load_update


def carry_out(
    base: Path, adapter: Path, *, keymap: Keymap | None = None, start: Start = "original", rows: int = 7
) -> tuple[MergePlan, dict[str, np.ndarray]]:
    """Every tensor of the merged checkpoint as float64, computed `rows` rows at a time from a recipe out of JSON."""
    plan = plan_merge(base, adapter, keymap=keymap, start=start)
    recipe = Recipe.from_json(plan.recipe.to_json())
    assert recipe == plan.recipe
    merged = {name: tensor.double().numpy() for name, tensor in read_weights(base).items()}
    before = dict(merged)
    with ByteReader(adapter / WEIGHTS_FILE) as file:
        reader = AdapterReader(plan.adapter_header, file.read)
        for name, tensor in recipe.tensors.items():
            merged[name] = _compute(tensor, before, reader, rows)
    return plan, merged


def merge_to(base: Path, adapter: Path, out: Path, **options: Any) -> Path:
    """The merged checkpoint in float32, in one file."""
    plan, merged = carry_out(base, adapter, **options)
    out.mkdir()
    save_file({name: torch.from_numpy(values).float() for name, values in merged.items()}, out / "model.safetensors")
    config = json.loads((base / "config.json").read_text()) | dict(plan.recipe.config_changes)
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    if (base / "generation_config.json").is_file():
        shutil.copy(base / "generation_config.json", out)
    return out


def read_weights(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }


def randomize(adapter: Path, *, scale: float = 0.2, seed: int = 0) -> Path:
    """Seeded normal numbers for what is learned; copies of the base stay, magnitudes and new rows stay near theirs."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in sorted(load_file(adapter / WEIGHTS_FILE).items()):
        noise = torch.randn(tensor.shape, generator=generator) * scale
        if ".base_layer.weight" in name:
            tensors[name] = tensor
        elif "lora_A" in name or "lora_B" in name or "embedding" in name or "lora_E" in name:
            tensors[name] = noise
        else:
            tensors[name] = tensor + noise * tensor.abs().mean().clamp(min=0.1)
    save_file(tensors, adapter / WEIGHTS_FILE, metadata={"format": "pt"})
    return adapter


def logits_of(base: Path, **options: Any) -> torch.Tensor:
    """What transformers says, with nothing missing and nothing left over in the checkpoint."""
    model, info = AutoModelForCausalLM.from_pretrained(base, output_loading_info=True, **options)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        return model.eval()(TOKENS).logits.float()


TOKENS = torch.arange(3, 40)[None]


def _compute(tensor: TensorRecipe, base: dict[str, np.ndarray], reader: AdapterReader, rows: int) -> np.ndarray:
    shape = -1, tensor.columns
    source = base[tensor.base].reshape(shape) if tensor.base else np.full(tensor.shape, np.nan).reshape(shape)
    values, update = source.copy(), load_update(tensor, reader)
    update.prepare(lambda begin, end: source[begin:end].copy())
    for begin in range(0, len(values), rows):
        update.apply(values[begin : begin + rows], begin)
    if update.squared_norm is not None:
        assert np.isclose(update.squared_norm, ((values - source) ** 2).sum(), rtol=1e-9)
    return values.reshape(tensor.shape)
