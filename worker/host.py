"""What every slot of one worker shares. Values only: settings end at `worker.app`."""

from collections.abc import Sequence
from dataclasses import dataclass

from registry.db import SessionFactory
from registry.storage import ObjectStore
from worker.base_cache import BaseCache
from worker.supervisor import Patience
from worker.warm import WarmPool
from worker.workspace import WorkDir


@dataclass(frozen=True, kw_only=True)
class Host:
    """`beats` are sessions of their own engine: a heartbeat never waits for a connection that a slot holds."""

    name: str
    sessions: SessionFactory
    beats: SessionFactory
    store: ObjectStore
    work: WorkDir
    cache: BaseCache
    warm: WarmPool
    lease_seconds: float
    heartbeat_seconds: float
    max_infra_failures: int
    checkpoint_seconds: float
    threads: int
    patience: Patience
    child_argv: Sequence[str]
