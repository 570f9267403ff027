"""Every table. Alembic imports this and nothing else."""

from registry.db import Base
from registry.models.adapter import Adapter, Alias, LineageEdge, Version, VersionFile
from registry.models.base_model import BaseModel, BaseModelFile
from registry.models.blob import Blob
from registry.models.checkpoint import Checkpoint, CheckpointFile
from registry.models.file import File
from registry.models.job import (
    Control,
    IdempotencyKey,
    Job,
    JobAttempt,
    JobEvent,
    JobTransition,
    Outbox,
    Worker,
    fence_seq,
)
from registry.models.merge import Merge, MergeFile
from registry.models.tenant import ApiKey, Tenant
from registry.models.webhook import WebhookDelivery, WebhookEndpoint

__all__ = [
    "Adapter",
    "Alias",
    "ApiKey",
    "Base",
    "BaseModel",
    "BaseModelFile",
    "Blob",
    "Checkpoint",
    "CheckpointFile",
    "Control",
    "File",
    "IdempotencyKey",
    "Job",
    "JobAttempt",
    "JobEvent",
    "JobTransition",
    "LineageEdge",
    "Merge",
    "MergeFile",
    "Outbox",
    "Tenant",
    "Version",
    "VersionFile",
    "WebhookDelivery",
    "WebhookEndpoint",
    "Worker",
    "fence_seq",
]
