"""The adapter of one training run: what it is made of, what it learns, and how others read it. Needs torch."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_core.adalora_config import AdaLoraConfig
from lora_core.adapter import has_learned, save_adapter
from lora_core.allocator import RankAllocator
from lora_core.config import LoraConfig
from lora_core.dpo import DPO
from lora_core.errors import BadConfig
from lora_core.gate import CONFIG_FILE, WEIGHTS_FILE
from lora_core.portable import to_plain_lora
from lora_core.task import Task, default_task
from lora_core.train import TrainConfig
from registry.jobs.spec import TrainSpec
from worker.recipe_child import write_recipe
from worker.task import TrainTask


class TrainedAdapter:
    """What `config` put into `model`. `goal` and `after_step` are what the training loop has to be given."""

    def __init__(self, model: Any, config: LoraConfig, task: TrainTask) -> None:
        self._model, self._config, self._base_dir = model, config, task.base_dir
        self.goal = goal_of(task.spec, model)
        self.after_step: Callable[[int], None] | None = None
        if isinstance(config, AdaLoraConfig):
            allocator = RankAllocator(model, config)
            self.goal, self.after_step = allocator.task(self.goal), allocator.after_step

    def save(self, folder: Path) -> bool:
        """Write the adapter as it is now, and its merge recipe beside it; whether it has one. Of AdaLoRA the plain LoRA
        that it amounts to, and nothing before anything was learned."""
        if not isinstance(self._config, AdaLoraConfig):
            save_adapter(self._model, self._config, folder)
        elif has_learned(self._model):
            self._save_plain(folder)
        else:
            return False
        return write_recipe(self._base_dir, folder)

    def _save_plain(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)  # of a checkpoint, which is there already
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".adalora-") as scratch:
            save_adapter(self._model, self._config, Path(scratch, "ranked"))
            to_plain_lora(Path(scratch, "ranked"), Path(scratch, "plain"))
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                Path(scratch, "plain", name).rename(folder / name)

    def require_change(self) -> None:
        """BadConfig if training changed nothing: such an adapter is the base model under another name."""
        if not has_learned(self._model):
            raise BadConfig("training changed nothing: use a higher learning_rate, more steps or less warmup")


def adapter_config(task: TrainTask, *, rows: int) -> LoraConfig:
    """What goes into adapter_config.json: the base by its name in the catalogue, never by a path."""
    config = task.spec.lora.config(total_steps=task.spec.total_steps(rows))
    return replace(config, base_model_name_or_path=task.base_model, revision=task.revision)


def goal_of(spec: TrainSpec, model: Any) -> Task:
    """What the run learns."""
    return DPO(spec.beta) if spec.method == "dpo" else default_task(model, packing=spec.packing)


def train_config(spec: TrainSpec) -> TrainConfig:
    return TrainConfig(
        n_epochs=spec.n_epochs,
        batch_size=spec.batch_size,
        max_steps=spec.max_steps,
        learning_rate=spec.learning_rate,
        loraplus_lr_ratio=spec.loraplus_lr_ratio,
        lr_scheduler_type=spec.lr_scheduler_type,
        warmup_ratio=spec.warmup_ratio,
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        seed=spec.seed,
        eval_steps=spec.eval_steps,
        early_stopping_patience=spec.early_stopping_patience,
        tokens_per_batch=spec.tokens_per_batch,
        packing=spec.packing,
        activation_checkpointing=spec.activation_checkpointing,
    )
