"""What a merge did to each tensor, as its child process measured it: read with distrust, kept in the merge's report."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from lora_core.merge import TensorReport
from worker.errors import JobFailed

CERTIFICATE_FILE = "certificate.json"
_MAX_BYTES = 64 * 2**20


class _Tensor(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Annotated[str, Field(max_length=512)]
    relative_delta: FiniteFloat
    rounding_loss: FiniteFloat
    cosine: FiniteFloat
    changed_share: FiniteFloat


class _Certificate(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    tensors: list[_Tensor]
    untied: bool


def write_certificate(workspace: Path, tensors: Iterable[TensorReport], config_changes: Mapping[str, Any]) -> None:
    """Leave it for the supervisor. `untied`: input and output layer no longer share their numbers."""
    untied = config_changes.get("tie_word_embeddings") is False
    certificate = _Certificate(tensors=[_Tensor(**asdict(tensor)) for tensor in tensors], untied=untied)
    (workspace / CERTIFICATE_FILE).write_text(certificate.model_dump_json())


def read_certificate(workspace: Path) -> dict[str, Any]:
    """For the report; JobFailed if it is not there or not of its form. Every key of the adapter was matched: a merge
    with others does not get so far."""
    path = workspace / CERTIFICATE_FILE
    if path.is_symlink() or not path.is_file() or path.stat().st_size > _MAX_BYTES:
        raise JobFailed("bug", "invalid_output", "The merge left no certificate.")
    try:
        certificate = _Certificate.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise JobFailed("bug", "invalid_output", "The merge left a certificate that cannot be read.") from error
    return {**certificate.model_dump(), "unmatched_keys": 0}
