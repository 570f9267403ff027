"""The service's own objects: base models, adapters, versions, aliases, merges."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from api.schemas import STORED, Body, StoredObject, shown
from lora_core.merge_options import MAX_SCALE, MAX_SHARD_SIZE, MIN_SHARD_SIZE, Start

DIGEST = "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
_SHA256 = DIGEST.removeprefix("sha256:")
LORA = {"r": 16, "lora_alpha": 32.0, "lora_dropout": 0.0, "target_modules": "all-linear", "use_rslora": False}
EDGES = [
    {"relation": "based_on", "kind": "base_model", "id": "Qwen/Qwen3-0.6B", "digest": DIGEST},
    {
        "relation": "trained_on",
        "kind": "file",
        "id": "file-6b1f0c2d9a7e4f53b8d21c0a9e4f7d13",
        "digest": DIGEST,
    },
]
ADAPTER = {
    "object": "adapter",
    "name": "support-bot",
    "base_model": "Qwen/Qwen3-0.6B",
    "latest_version": 7,
    "aliases": {"production": 5},
    "created_at": 1790000000,
}
VERSION = {
    "object": "adapter.version",
    "adapter": "support-bot",
    "version": 7,
    "ref": "support-bot@7",
    "aliases": ["production"],
    "base_model": "Qwen/Qwen3-0.6B",
    "digest": DIGEST,
    "job_id": "ftjob-0f5c3a1e8d7b4c62a9f01b2c3d4e5f60",
    "checkpoint": None,
    "metrics": {"train_loss": 1.21},
    "lora": LORA,
    "lineage": EDGES,
    "files": [STORED],
    "created_at": 1790000104,
}
ALIAS = {"object": "adapter.alias", "adapter": "support-bot", "alias": "production", "version": 7}
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
BASE_MODEL = {
    "object": "base_model",
    "name": "Qwen/Qwen3-0.6B",
    "source": "hub:Qwen/Qwen3-0.6B",
    "revision": "c1899de289a04d12100db370d81485cdf75e47ca",
    "architecture": "qwen3",
    "dtype": "bfloat16",
    "parameters": 596049920,
    "digest": DIGEST,
    "linear_modules": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    "files": [{"path": "model.safetensors", "bytes": 1192000000, "sha256": _SHA256}],
    "created_at": 1790000000,
}
BASE_MODEL_CREATE = {
    "name": "Qwen/Qwen3-0.6B",
    "source": "hub:Qwen/Qwen3-0.6B",
    "revision": "c1899de289a04d12100db370d81485cdf75e47ca",
    "files": {
        "config.json": "file-6b1f0c2d9a7e4f53b8d21c0a9e4f7d13",
        "model.safetensors": "file-7c2f0c2d9a7e4f53b8d21c0a9e4f7d14",
    },
}


class LineageObject(BaseModel):
    """One thing this was made from, and its digest at the time."""

    relation: str
    kind: str
    id: str
    digest: str | None


class AdapterObject(BaseModel):
    model_config = shown(ADAPTER)

    object: Literal["adapter"] = "adapter"
    name: str
    base_model: str
    latest_version: int | None
    aliases: dict[str, int]
    created_at: int


class VersionObject(BaseModel):
    """What one job published, or a `checkpoint` of it that was published. The number names these bytes for ever."""

    model_config = shown(VERSION)

    object: Literal["adapter.version"] = "adapter.version"
    adapter: str
    version: int
    ref: str
    aliases: list[str]
    base_model: str
    digest: str
    job_id: str
    checkpoint: str | None
    metrics: dict[str, Any] | None
    lora: dict[str, Any]
    lineage: list[LineageObject]
    files: list[StoredObject]
    created_at: int


class VersionDeleted(BaseModel):
    model_config = shown({"object": "adapter.version", "ref": "support-bot@7", "deleted": True})

    object: Literal["adapter.version"] = "adapter.version"
    ref: str
    deleted: Literal[True] = True


class AliasObject(BaseModel):
    model_config = shown(ALIAS)

    object: Literal["adapter.alias"] = "adapter.alias"
    adapter: str
    alias: str
    version: int


class AliasDeleted(BaseModel):
    model_config = shown({"object": "adapter.alias", "adapter": "support-bot", "alias": "production", "deleted": True})

    object: Literal["adapter.alias"] = "adapter.alias"
    adapter: str
    alias: str
    deleted: Literal[True] = True


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


class BaseModelObject(BaseModel):
    """A frozen base. `linear_modules` are the names that `target_modules` may use."""

    model_config = shown(BASE_MODEL)

    object: Literal["base_model"] = "base_model"
    name: str
    source: str
    revision: str | None
    architecture: str
    dtype: str
    parameters: int
    digest: str
    linear_modules: list[str]
    files: list[StoredObject]
    created_at: int


class AliasIn(Body):
    version: int


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


class BaseModelIn(Body):
    """`files`: name in the model → id of an upload with purpose `base-model`."""

    name: str
    source: str = Field(default="upload", description="Where it came from, for people to read")
    revision: str | None = Field(default=None, description="Commit of the source: 40 or 64 hex digits")
    files: dict[str, str]
