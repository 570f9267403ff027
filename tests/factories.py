"""Rows for tests: plain functions, valid by default, any column overridable."""

import hashlib
import itertools
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy.orm import Session

from registry.models import Adapter, BaseModel, BaseModelFile, Blob, File, Job, Tenant, Version, VersionFile, fence_seq

_count = itertools.count(1)


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _add(session: Session, row: Any) -> Any:
    session.add(row)
    session.flush()
    return row


def make_tenant(session: Session, **over: Any) -> Tenant:
    return _add(session, Tenant(**{"name": f"tenant-{next(_count)}", **over}))


def make_blob(session: Session, **over: Any) -> Blob:
    sha256 = over.get("sha256") or digest_of(str(next(_count)))
    values = {"sha256": sha256, "size": 3, "key": f"blobs/{sha256}/{uuid.uuid4().hex}", "state": "stored", **over}
    return _add(session, Blob(**values))


def make_file(session: Session, tenant: Tenant, **over: Any) -> File:
    blob = over.pop("blob", None) or make_blob(session, tenant_id=tenant.id, refs=1)
    values = {"tenant_id": tenant.id, "blob_id": blob.id, "filename": "rows.jsonl", "purpose": "fine-tune", **over}
    return _add(session, File(**values))


def make_base_model(session: Session, **over: Any) -> BaseModel:
    """A catalogue entry with two layers of q, k, v, o projections and one file (whose bytes do not exist)."""
    modules = {
        f"model.layers.{layer}.self_attn.{name}_proj": [32, 32] for layer in range(2) for name in ("q", "k", "v", "o")
    }
    values = {
        "name": f"base-{next(_count)}",
        "source": "upload",
        "architecture": "llama",
        "dtype": "float32",
        "parameters": 8192,
        "digest": digest_of(f"base-{next(_count)}"),
        "facts": {"linear_modules": modules, "tied": False, "context_length": 128, "vocab_size": 64},
        **over,
    }
    base = _add(session, BaseModel(**values))
    blob = make_blob(session, refs=1)
    _add(session, BaseModelFile(base_model_id=base.id, path="model.safetensors", blob_id=blob.id))
    return base


def make_adapter(session: Session, tenant: Tenant, base: BaseModel | None = None, **over: Any) -> Adapter:
    base = base or make_base_model(session)
    values = {"tenant_id": tenant.id, "name": f"adapter-{next(_count)}", "base_model_id": base.id, **over}
    return _add(session, Adapter(**values))


def make_job(session: Session, adapter: Adapter, *, state: str = "queued", kind: str = "train", **over: Any) -> Job:
    """A job in `state`, inserted directly: no submit, no claim."""
    owned, ended = state in ("running", "cancelling"), state in ("succeeded", "failed", "cancelled")
    now = datetime.now(UTC)
    values: dict[str, Any] = {
        "tenant_id": adapter.tenant_id,
        "kind": kind,
        "state": state,
        "adapter_id": adapter.id,
        "base_model_id": adapter.base_model_id,
        "spec": {},
        "request": {},
        "fence": session.scalar(fence_seq) if state != "queued" else None,
        "worker": "worker-1" if owned else None,
        "attempt": 0 if state == "queued" else 1,
        "lease_expires_at": now + timedelta(minutes=5) if owned else None,
        "finished_at": now if ended else None,
        **over,
    }
    return _add(session, Job(**values))


def make_version(session: Session, adapter: Adapter, **over: Any) -> Version:
    """The next version of `adapter`, published by a job that succeeded, with the two files of an adapter."""
    job = over.pop("job", None) or make_job(session, adapter, state="succeeded")
    number = adapter.next_version
    values = {
        "tenant_id": adapter.tenant_id,
        "adapter_id": adapter.id,
        "version": number,
        "job_id": job.id,
        "fence": job.fence or 1,
        "manifest": {"files": []},
        "digest": digest_of(f"{adapter.name}@{number}"),
        **over,
    }
    version = _add(session, Version(**values))
    adapter.next_version = number + 1
    for path in ("adapter_config.json", "adapter_model.safetensors"):
        blob = make_blob(session, tenant_id=adapter.tenant_id, refs=1)
        session.add(VersionFile(version_id=version.id, path=path, blob_id=blob.id))
    session.flush()
    return version
