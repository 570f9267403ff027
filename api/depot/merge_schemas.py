"""Merged checkpoints on the wire, stored or computed while they are read."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from api.depot.schemas import DIGEST
from api.schemas import Body, StoredObject, shown
from lora_core.merge_options import MAX_SCALE, MAX_SHARD_SIZE, MIN_SHARD_SIZE, Start

_SHA256 = DIGEST.removeprefix("sha256:")
MERGE = {
    "object": "merge",
    "id": "merge-2a4c6e8f0b1d3f5a7c9e0b2d4f6a8c0e",
    "adapter": "support-bot",
    "version": 7,
    "dtype": "base",
    "scale": 1.0,
    "shard_size": None,
    "start": "original",
    "aliases": ["production"],
    "status": "succeeded",
    "progress": {"tensors": 311, "of": 311},
    "error": None,
    "digest": DIGEST,
    "report": {
        "base_digest": DIGEST,
        "merged_tensors": 1,
        "copied_tensors": 310,
        "tensors": [
            {
                "name": "model.layers.0.self_attn.q_proj.weight",
                "relative_delta": 0.0124,
                "rounding_loss": 0.0931,
                "cosine": 0.9957,
                "changed_share": 0.871,
                "measured_share": 0.0078,
            }
        ],
        "untied": False,
        "unmatched_keys": 0,
        "tokenizer": {"tokenizer.json": _SHA256},
        "canary": {
            "run": True,
            "reason": None,
            "kl": 1.6e-6,
            "rounding_kl": 2.9e-6,
            "effect_kl": 0.037,
            "losses": {"base": 3.121, "adapter_on_original": 2.874, "merged_original": 2.874},
            "prompts": [
                {
                    "name": "question_1",
                    "tokens": 18,
                    "kl_mean": 1.9e-6,
                    "kl_max": 8.3e-6,
                    "max_logit_difference": 0.021,
                    "top1_agreement": 1.0,
                }
            ],
        },
    },
    "files": [{"path": "model.safetensors", "bytes": 1192000000, "sha256": _SHA256}],
    "created_at": 1790000200,
    "finished_at": 1790000230,
}
RECIPE = {
    "format": 1,
    "tensors": {
        "model.layers.0.self_attn.q_proj.weight": {
            "base": "model.layers.0.self_attn.q_proj.weight",
            "dtype": "BF16",
            "shape": [2048, 1024],
            "columns": 1024,
            "terms": [
                {
                    "lora_A": "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
                    "lora_B": "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
                    "scaling": 2.0,
                }
            ],
        }
    },
    "config_changes": {},
}
MERGED = {
    "object": "merged",
    "adapter": "support-bot",
    "version": 7,
    "dtype": "base",
    "scale": 1.0,
    "shard_size": None,
    "start": "original",
    "base_digest": DIGEST,
    "files": [
        {
            "path": "model.safetensors",
            "bytes": 1192000000,
            "etag": f'"m{_SHA256}"',
            "sha256": _SHA256,
        }
    ],
}


class MergeError(BaseModel):
    code: str
    message: str


class MergeObject(BaseModel):
    """A merged checkpoint, W + ΔW, and the job that makes it."""

    model_config = shown(MERGE)

    object: Literal["merge"] = "merge"
    id: str
    adapter: str
    version: int
    dtype: Literal["base", "float32", "bfloat16", "float16"]
    scale: float
    shard_size: int | None
    start: Start
    aliases: list[str] = Field(description="Point at the version from the moment on in which the merge is stored")
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    progress: dict[str, Any] | None
    error: MergeError | None
    digest: str | None
    report: dict[str, Any] | None
    files: list[StoredObject]
    created_at: int
    finished_at: int | None


class MergedFile(BaseModel):
    """One file of a merged checkpoint. `sha256` is known once a merge with these options was stored."""

    path: str
    bytes: int
    etag: str
    sha256: str | None


class MergedObject(BaseModel):
    """A merged checkpoint as it would be stored; its files are computed while they are read."""

    model_config = shown(MERGED)

    object: Literal["merged"] = "merged"
    adapter: str
    version: int
    dtype: Literal["base", "float32", "bfloat16", "float16"]
    scale: float
    shard_size: int | None
    start: Start
    base_digest: str
    files: list[MergedFile]


class MergeIn(Body):
    dtype: Literal["base", "float32", "bfloat16", "float16"] = Field(
        default="base", description="Of the merged weights; `base` keeps the base model's own"
    )
    scale: float = Field(
        default=1.0, ge=-MAX_SCALE, le=MAX_SCALE, description="What the change is multiplied by; 1 is what was trained"
    )
    shard_size: int | None = Field(
        default=None,
        ge=MIN_SHARD_SIZE,
        le=MAX_SHARD_SIZE,
        description="Bytes of tensors per file; without it the shards are those of the base",
    )
    start: Start = Field(
        default="original",
        description="`nf4` adds the change to what 4-bit numbers leave of linear layers, which QLoRA trained on",
    )
    alias: str | None = Field(
        default=None, description="Of the adapter; points at this version once the merge is stored"
    )
