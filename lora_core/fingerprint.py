"""What decides the bits of a training run, as a fingerprint to compare before going on from a checkpoint."""

import hashlib
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_core import distributed
from lora_core.checkpoint import Fingerprint
from lora_core.inject import adapter_layers
from lora_core.qlora import NF4Weight
from lora_core.task import Task, default_task
from lora_core.train_config import TrainConfig
from lora_core.trainable import trained_parameters

_LIBRARIES = ("torch", "transformers", "tokenizers", "numpy")
_CODE = (
    *(
        "attention",
        "batching",
        "data",
        "distributed",
        "evaluation",
        "fused",
        "fusing",
        "inject",
        "layer",
        "layers",
        "loss",
        "mode",
        "optimizer",
        "output_loss",
    ),
    *("packing", "schedule", "state", "task", "train", "train_config", "trainable"),
    *("adalora", "allocator", "convolutions", "dora", "embeddings", "experts", "nf4", "principal", "qlora"),
    *("query_value", "sharding", "whole"),
    *("classification", "dpo", "seq2seq"),
)


def take_fingerprint(
    model: Any, examples: Sequence[Any], config: TrainConfig, *, base_digest: str, task: Task | None = None
) -> Fingerprint:
    """Of training `model` on `examples`, here and now. `base_digest` names the frozen weights."""
    task = task or default_task(model)
    layers = adapter_layers(model).items()
    adapted = [(path, type(layer).__name__, layer.settings()) for path, layer in layers]
    quantised = sorted(name for name, parameter in model.named_parameters() if isinstance(parameter, NF4Weight))
    trained = [(name, *parameter.shape) for name, parameter in trained_parameters(model).items()]
    inputs = {
        "base_model": base_digest,
        "examples": _digest(part for example in examples for part in _parts(example)),
        "lora": _digest([repr((adapted, trained, quantised)).encode()]),
        "training": _digest([repr((_settings(asdict(config)), type(task).__name__, _settings(vars(task)))).encode()]),
    }
    environment = {name: version(name) for name in _LIBRARIES}
    environment |= {
        "python": platform.python_version(),
        "lora_core": _digest(Path(__file__).with_name(f"{name}.py").read_bytes() for name in _CODE)[:12],
        "device": _device_name(model.device),
        "threads": str(torch.get_num_threads()),
        "processes": str(distributed.world_size()),
        "sharding": "full" if distributed.is_sharded(model) else "none",
        "dtype": str(model.dtype).removeprefix("torch."),
        "repeatable": "yes" if _is_repeatable(model.device) else "no",
    }
    return Fingerprint(inputs, environment)


def _parts(example: Any) -> Iterator[Any]:
    """All that an example holds; of every array its length too."""
    for item in fields(example):
        value = getattr(example, item.name)
        if is_dataclass(value):
            yield from _parts(value)
        elif isinstance(value, np.ndarray):
            yield value
            yield len(value).to_bytes(8, "big")
        else:
            yield repr(value).encode()


def _settings(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return sorted(values.items())


def _digest(parts: Iterable[Any]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def _is_repeatable(device: torch.device) -> bool:
    if device.type == "cpu":
        return True
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    # Libraries choose their kernels by the model, not only by the instruction set.
    return f"{_cpu_model()} {torch.backends.cpu.get_cpu_capability()}"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # macOS
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
