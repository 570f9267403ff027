"""All that a training run is between two optimizer steps: taken out of it, kept on disk, put back bit for bit."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_core.checkpoint import (
    DOCUMENT_FILE,
    TENSORS_FILE,
    CheckpointDocument,
    Fingerprint,
    encode_document,
    read_document,
)
from lora_core.errors import BadCheckpoint, BadHeader, CheckpointMismatch
from lora_core.header import BASE_HEADER_BYTES, encode_header, header_length, parse_header
from lora_core.inject import adapter_layers
from lora_core.shards import HashingWriter, staged_directory
from lora_core.trainable import trained_parameters

_DTYPES = {"F32": torch.float32, "U8": torch.uint8}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_RNG = ("rng.cpu", "rng.cuda")


@dataclass(frozen=True)
class TrainState:
    """A run after `step` optimizer steps; `tensors` lie in main memory and share nothing with the run.

    Per trained parameter `lora.<name>`, its moments `exp_avg.…` and `exp_avg_sq.…`, and `updates.…`, AdamW's count;
    `layer.<path>.…`, what variants of LoRA go on with;
    `rng.cpu` and, on CUDA, `rng.cuda`. The order of the data needs no state: it follows from seed, epoch and step.
    `tokens_per_batch` is the limit in force, None for the configured one.
    """

    step: int
    trained_tokens: int
    train_loss: float | None
    eval_loss: float | None
    tensors: Mapping[str, Tensor]
    best_eval_loss: float | None = None
    evaluations_since_best: int = 0
    tokens_per_batch: int | None = None


def capture_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The `tensors` of a TrainState, after at least one optimizer step."""
    found: dict[str, Tensor] = {}
    for name, factor in trained_parameters(model).items():
        kept = optimizer.state[factor]
        found[f"lora.{name}"] = factor
        found[f"exp_avg.{name}"] = kept["exp_avg"]
        found[f"exp_avg_sq.{name}"] = kept["exp_avg_sq"]
        found[f"updates.{name}"] = kept["step"].reshape(1)
    found |= _layer_state(model)
    found |= rng_state(_device(model))
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in found.items()}


@torch.no_grad()
def restore_tensors(tensors: Mapping[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put back what `capture_tensors` took. CheckpointMismatch unless the names and shapes are those of `model`."""
    factors = trained_parameters(model)
    wanted = {f"{kind}.{name}": f.shape for name, f in factors.items() for kind in ("lora", "exp_avg", "exp_avg_sq")}
    wanted |= {f"updates.{name}": torch.Size([1]) for name in factors}
    wanted |= {name: tensor.shape for name, tensor in _layer_state(model).items()}
    given = {name: tensor.shape for name, tensor in tensors.items() if name not in _RNG}
    if wanted != given or "rng.cpu" not in tensors:
        name = next(iter(sorted(wanted.items() ^ given.items())), ("rng.cpu",))[0]
        raise CheckpointMismatch(f"the checkpoint does not fit what the model trains: {name} differs")
    for name, factor in factors.items():
        factor.copy_(tensors[f"lora.{name}"])
        optimizer.state[factor] = {
            "step": tensors[f"updates.{name}"][0].clone(),
            # into fresh memory of the usual alignment, as AdamW itself makes it
            "exp_avg": torch.zeros_like(factor).copy_(tensors[f"exp_avg.{name}"]),
            "exp_avg_sq": torch.zeros_like(factor).copy_(tensors[f"exp_avg_sq.{name}"]),
        }
    for name, tensor in _layer_state(model).items():
        tensor.copy_(tensors[name])
    set_rng_state(tensors, _device(model))


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The generators that a step on `device` draws from."""
    found = {"rng.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["rng.cuda"] = torch.cuda.get_rng_state(device)
    return found


def set_rng_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Back to where they were."""
    torch.set_rng_state(state["rng.cpu"])
    if device.type == "cuda" and "rng.cuda" in state:
        torch.cuda.set_rng_state(state["rng.cuda"], device)


def save_checkpoint(directory: Path, state: TrainState, fingerprint: Fingerprint) -> None:
    """Write `directory`, which appears whole and durable or not at all. Equal states give equal bytes."""
    infos = [(name, _NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in state.tensors.items()]
    head, header = encode_header(infos, {"format": "pt"})
    with staged_directory(directory) as stage:
        with HashingWriter(stage / TENSORS_FILE) as file:
            file.write(head)
            for info in header.tensors:
                file.write(state.tensors[info.name].contiguous().numpy())
        document = CheckpointDocument(
            step=state.step,
            trained_tokens=state.trained_tokens,
            train_loss=state.train_loss,
            eval_loss=state.eval_loss,
            best_eval_loss=state.best_eval_loss,
            evaluations_since_best=state.evaluations_since_best,
            tokens_per_batch=state.tokens_per_batch,
            fingerprint=fingerprint,
            tensors_sha256=file.sha256,
            tensors_size=file.size,
        )
        with HashingWriter(stage / DOCUMENT_FILE) as text:
            text.write(encode_document(document))


def load_checkpoint(directory: Path) -> tuple[TrainState, Fingerprint]:
    """What `save_checkpoint` wrote, every byte of it compared with its digest; BadCheckpoint otherwise."""
    document = read_document(directory)
    try:
        content = bytearray((directory / TENSORS_FILE).read_bytes())
    except OSError as error:
        raise BadCheckpoint(f"{TENSORS_FILE} cannot be read: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != document.tensors_sha256 or len(content) != document.tensors_size:
        raise BadCheckpoint(f"{TENSORS_FILE} is damaged: its bytes are not those that {DOCUMENT_FILE} names")
    state = TrainState(
        step=document.step,
        trained_tokens=document.trained_tokens,
        train_loss=document.train_loss,
        eval_loss=document.eval_loss,
        tensors=_tensors(content),
        best_eval_loss=document.best_eval_loss,
        evaluations_since_best=document.evaluations_since_best,
        tokens_per_batch=document.tokens_per_batch,
    )
    return state, document.fingerprint


def _tensors(content: bytearray) -> dict[str, Tensor]:
    try:
        length = 8 + header_length(bytes(content[:8]), max_bytes=BASE_HEADER_BYTES)
        header = parse_header(bytes(content[:length]), file_bytes=len(content))
    except BadHeader as error:
        raise BadCheckpoint(f"{TENSORS_FILE}: {error.message}") from error
    found = {}
    for info in header.tensors:
        dtype = _DTYPES.get(info.dtype)
        if dtype is None or info.begin == info.end:
            raise BadCheckpoint(f"{info.name} is not a tensor of a checkpoint")
        piece = torch.frombuffer(
            content, dtype=torch.uint8, offset=header.data_start + info.begin, count=info.end - info.begin
        )
        found[info.name] = piece.clone().view(dtype).reshape(info.shape)
    return found


def _layer_state(model: nn.Module) -> dict[str, Tensor]:
    layers = adapter_layers(model).items()
    return {f"layer.{path}.{name}": value for path, layer in layers for name, value in layer.training_state().items()}


def _device(model: nn.Module) -> torch.device:
    return next(iter(trained_parameters(model).values())).device
