"""The service's own objects: base models, adapters, versions, aliases, merges."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from api.schemas import STORED, Body, StoredObject, shown

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
    "expert_parameters": [],
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


class BaseModelObject(BaseModel):
    """A frozen base. `linear_modules` are the names that `target_modules` may use, `expert_parameters` those for
    `target_parameters`."""

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
    expert_parameters: list[str]
    files: list[StoredObject]
    created_at: int


class AliasIn(Body):
    version: int


class BaseModelIn(Body):
    """`files`: name in the model → id of an upload with purpose `base-model`."""

    name: str
    source: str = Field(default="upload", description="Where it came from, for people to read")
    revision: str | None = Field(default=None, description="Commit of the source: 40 or 64 hex digits")
    files: dict[str, str]
