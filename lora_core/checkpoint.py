"""A checkpoint on disk: `checkpoint.json` says of what run it is, `checkpoint.safetensors` holds the numbers.

Needs no torch. Equal states of equal runs give equal bytes; nothing in the folder can run code.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_core import strict_json
from lora_core.errors import BadCheckpoint, CheckpointMismatch

DOCUMENT_FILE = "checkpoint.json"
TENSORS_FILE = "checkpoint.safetensors"
CHECKPOINT_FILES = (DOCUMENT_FILE, TENSORS_FILE)
FORMAT = 2
MAX_DOCUMENT_BYTES = 64 * 2**10


@dataclass(frozen=True)
class Fingerprint:
    """What decides the bits of a run. `inputs` make it this run and no other; `environment` is where it computes."""

    inputs: Mapping[str, str]
    environment: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class CheckpointDocument:
    """How a run stood after `step` optimizer steps, and which bytes hold the rest of it."""

    step: int
    trained_tokens: int
    train_loss: float | None
    eval_loss: float | None
    fingerprint: Fingerprint
    tensors_sha256: str
    tensors_size: int
    best_eval_loss: float | None = None
    evaluations_since_best: int = 0
    tokens_per_batch: int | None = None


def differences(saved: Fingerprint, current: Fingerprint) -> list[str]:
    """What of the environment changed, one phrase each; none means that the run goes on with the same bits.

    CheckpointMismatch if an input changed: it would be another run.
    """
    if other := sorted({name for name, _ in saved.inputs.items() ^ current.inputs.items()}):
        raise CheckpointMismatch(f"the checkpoint is of another run: it differs in {', '.join(other)}", inputs=other)
    names = sorted(saved.environment.keys() | current.environment.keys())
    pairs = [(name, saved.environment.get(name), current.environment.get(name)) for name in names]
    changed = [f"{name} {old} → {new}" for name, old, new in pairs if old != new]
    if not changed and current.environment.get("repeatable") != "yes":
        changed = ["computing on this device does not repeat bit for bit"]
    return changed


def encode_document(document: CheckpointDocument) -> bytes:
    """The bytes of `checkpoint.json`."""
    body = {"format": FORMAT, **asdict(document)}
    return json.dumps(body, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"


def read_document(directory: Path) -> CheckpointDocument:
    """`checkpoint.json` of the folder; BadCheckpoint unless every field is there and is what it must be."""
    path = directory / DOCUMENT_FILE
    try:
        if path.stat().st_size > MAX_DOCUMENT_BYTES:
            raise BadCheckpoint(f"{DOCUMENT_FILE} is larger than {MAX_DOCUMENT_BYTES} bytes")
        body = strict_json.loads(path.read_bytes())
    except OSError as error:
        raise BadCheckpoint(f"{DOCUMENT_FILE} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BadCheckpoint(f"{DOCUMENT_FILE} is {error}") from None
    return _parse(body)


def _parse(body: Any) -> CheckpointDocument:
    names = {"format", *CheckpointDocument.__dataclass_fields__}
    if not isinstance(body, dict) or body.keys() != names:
        raise BadCheckpoint(f"{DOCUMENT_FILE} must have exactly the fields {', '.join(sorted(names))}")
    if body.pop("format") != FORMAT:
        raise BadCheckpoint(f"{DOCUMENT_FILE} is of another format than {FORMAT}")
    for name in ("step", "trained_tokens", "tensors_size", "evaluations_since_best", "tokens_per_batch"):
        if name == "tokens_per_batch" and body[name] is None:
            continue
        if type(body[name]) is not int or body[name] < 0:
            raise BadCheckpoint(f"{name} in {DOCUMENT_FILE} is not a count")
    for name in ("train_loss", "eval_loss", "best_eval_loss"):
        if body[name] is not None and not (isinstance(body[name], float) and math.isfinite(body[name])):
            raise BadCheckpoint(f"{name} in {DOCUMENT_FILE} is not a number")
    if not isinstance(body["tensors_sha256"], str):
        raise BadCheckpoint(f"tensors_sha256 in {DOCUMENT_FILE} is not a digest")
    return CheckpointDocument(**{**body, "fingerprint": _fingerprint(body["fingerprint"])})


def _fingerprint(body: Any) -> Fingerprint:
    if not isinstance(body, dict) or body.keys() != {"inputs", "environment"}:
        raise BadCheckpoint(f"fingerprint in {DOCUMENT_FILE} must have inputs and environment")
    for part in body.values():
        if not isinstance(part, dict) or not all(isinstance(value, str) for value in part.values()):
            raise BadCheckpoint(f"fingerprint in {DOCUMENT_FILE} must map names to strings")
    return Fingerprint(**body)
