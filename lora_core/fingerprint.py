"""What decides the bits of a training run, as a fingerprint to compare before going on from a checkpoint."""

import hashlib
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lora_core.checkpoint import Fingerprint
from lora_core.data import Example
from lora_core.inject import lora_layers
from lora_core.train import TrainConfig
from lora_core.trainable import trained_parameters

_LIBRARIES = ("torch", "transformers", "tokenizers", "numpy")
_CODE = ("batching", "data", "inject", "layers", "loss", "schedule", "state", "task", "train", "trainable")


def take_fingerprint(model: Any, examples: Sequence[Example], config: TrainConfig, *, base_digest: str) -> Fingerprint:
    """Of training `model` on `examples`, here and now. `base_digest` names the frozen weights."""
    layers = lora_layers(model)
    adapted = [(path, type(layer).__name__, layer.scaling, layer.lora_dropout) for path, layer in layers.items()]
    trained = [(name, *parameter.shape) for name, parameter in trained_parameters(model).items()]
    inputs = {
        "base_model": base_digest,
        "examples": _digest(
            part for e in examples for part in (e.input_ids, e.labels, len(e.labels).to_bytes(8, "big"))
        ),
        "lora": _digest([repr((adapted, trained)).encode()]),
        "training": _digest([repr(sorted(asdict(config).items())).encode()]),
    }
    environment = {name: version(name) for name in _LIBRARIES}
    environment |= {
        "python": platform.python_version(),
        "lora_core": _digest(Path(__file__).with_name(f"{name}.py").read_bytes() for name in _CODE)[:12],
        "device": _device_name(model.device),
        "threads": str(torch.get_num_threads()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "repeatable": "yes" if _is_repeatable(model.device) else "no",
    }
    return Fingerprint(inputs, environment)


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
