"""What a merge did, as its child processes measured it: read with distrust, kept in the merge's report."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from lora_core.faithful import Comparison
from lora_core.merge_report import FileReport, MergeReport
from worker.errors import JobFailed

CERTIFICATE_FILE = "certificate.json"
CANARY_FILE = "canary.json"
_MAX_BYTES = 64 * 2**20
_Name = Annotated[str, Field(max_length=512)]
_Natural = Annotated[int, Field(ge=0, lt=2**63)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Tensor(_Part):
    name: _Name
    relative_delta: FiniteFloat
    rounding_loss: FiniteFloat
    cosine: FiniteFloat
    changed_share: FiniteFloat
    measured_share: FiniteFloat


class _File(_Part):
    path: _Name
    size: _Natural
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Certificate(_Part):
    tensors: list[_Tensor]
    untied: bool
    files: list[_File]


class _Prompt(_Part):
    name: _Name
    tokens: _Natural
    kl_mean: FiniteFloat
    kl_max: FiniteFloat
    max_logit_difference: FiniteFloat
    top1_agreement: FiniteFloat


class Canary(_Part):
    """The comparison of merged model and adapter, or the reason why there was none."""

    run: bool
    reason: Annotated[str, Field(max_length=2000)] | None = None
    kl: FiniteFloat | None = None
    rounding_kl: FiniteFloat | None = None
    effect_kl: FiniteFloat | None = None
    losses: Annotated[dict[Annotated[str, Field(max_length=64)], FiniteFloat], Field(max_length=16)] = {}
    prompts: Annotated[list[_Prompt], Field(max_length=64)] = []

    @classmethod
    def of(cls, found: Comparison) -> "Canary":
        """What was measured."""
        prompts = [_Prompt(**asdict(prompt)) for prompt in found.prompts]
        return cls(
            run=True,
            kl=found.kl,
            rounding_kl=found.rounding_kl,
            effect_kl=found.effect_kl,
            losses=dict(found.losses),
            prompts=prompts,
        )


P = TypeVar("P", bound=_Part)


def write_certificate(workspace: Path, report: MergeReport, config_changes: Mapping[str, Any]) -> None:
    """Leave it for the supervisor. `untied`: input and output layer no longer share their numbers."""
    untied = config_changes.get("tie_word_embeddings") is False
    tensors = [_Tensor(**asdict(tensor)) for tensor in report.tensors]
    files = [_File(**asdict(file)) for file in report.files]
    certificate = _Certificate(tensors=tensors, untied=untied, files=files)
    (workspace / CERTIFICATE_FILE).write_text(certificate.model_dump_json())


def read_certificate(workspace: Path) -> tuple[dict[str, Any], list[FileReport]]:
    """For the report, and what the files in `out/` are said to be; JobFailed if it is not there or not of its form.

    Every key of the adapter was matched: a merge with others does not get so far."""
    certificate = _read(workspace / CERTIFICATE_FILE, _Certificate, "certificate")
    files = [FileReport(file.path, file.size, file.sha256) for file in certificate.files]
    return {**certificate.model_dump(exclude={"files"}), "unmatched_keys": 0}, files


def write_canary(workspace: Path, canary: Canary) -> None:
    """Leave it for the supervisor."""
    (workspace / CANARY_FILE).write_text(canary.model_dump_json())


def read_canary(workspace: Path) -> Canary:
    """JobFailed if it is not there or not of its form."""
    return _read(workspace / CANARY_FILE, Canary, "comparison")


def _read(path: Path, form: type[P], what: str) -> P:
    if path.is_symlink() or not path.is_file() or path.stat().st_size > _MAX_BYTES:
        raise JobFailed("bug", "invalid_output", f"The merge left no {what}.")
    try:
        return form.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise JobFailed("bug", "invalid_output", f"The merge left a {what} that cannot be read.") from error
