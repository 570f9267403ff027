"""Every setting of the service. Built once at an entry point; everything below receives values."""

import os
from pathlib import Path
from typing import Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "DEPOT_"


class Settings(BaseSettings):
    """Frozen; a misspelt `DEPOT_…` variable stops the process instead of being ignored."""

    # What was given is left out of errors: they end up in logs, and it holds passwords.
    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", hide_input_in_errors=True)

    database_url: str = Field(description="Postgres, as a SQLAlchemy URL: postgresql+psycopg://…")
    redis_url: str = Field(
        default="redis://127.0.0.1:6379/0", description="Celery's broker. Hints only: losing it loses no job."
    )
    store_url: str = Field(description="Where bytes live: file:///a/directory or s3://bucket[/prefix]")
    s3_endpoint_url: str | None = Field(default=None, description="S3 endpoint as the service reaches it")
    s3_public_endpoint_url: str | None = Field(
        default=None, description="S3 endpoint as clients reach it; download links are signed for it"
    )
    s3_region: str = Field(default="us-east-1", description="S3 region used for signing")
    s3_access_key_id: SecretStr | None = Field(default=None, description="S3 access key")
    s3_secret_access_key: SecretStr | None = Field(default=None, description="S3 secret key")
    secret_key: SecretStr = Field(
        min_length=32,
        description="Pepper of API-key hashes, signs download links and cursors. ≥ 32 characters",
    )
    public_url: str = Field(default="http://127.0.0.1:8321", description="The API's address as clients reach it")
    work_dir: Path = Field(default=Path("work"), description="Scratch space of a worker, one folder per attempt")
    cache_dir: Path = Field(default=Path("cache"), description="Verified base models, kept between jobs")
    cache_bytes: int = Field(
        default=0, ge=0, description="Base models that no job uses are removed beyond this size, oldest first; 0: never"
    )
    queues: str = Field(default="default", description="Comma-separated queues this worker serves")
    slots: int = Field(default=1, ge=1, le=64, description="Jobs that one worker runs at a time")
    warm_bytes: int = Field(
        default=16 * 2**30,
        ge=0,
        description="What idle training processes of a worker may hold in memory together, base models included",
    )
    warm_seconds: float = Field(
        default=600.0, gt=0, description="How long a training process waits for another job on its base model"
    )
    heartbeat_seconds: float = Field(default=15.0, gt=0, description="How often a lease is extended")
    lease_seconds: float = Field(default=90.0, gt=0, description="Silence after which a worker counts as dead")
    reaper_seconds: float = Field(default=15.0, gt=0, description="How often expired leases are collected")
    poll_seconds: float = Field(default=5.0, gt=0, description="How often an idle slot asks Postgres for work")
    relay_seconds: float = Field(default=1.0, gt=0, description="How often unsent wake-ups are sent to Redis")
    checkpoint_seconds: float = Field(
        default=600.0, gt=0, description="How often a training job saves where it could go on from"
    )
    stall_seconds: float = Field(
        default=1800.0, gt=0, description="Silence after which a training process is ended; twice that before step 1"
    )
    detached_seconds: float = Field(
        default=1800.0, gt=0, description="How long a job goes on computing while Postgres does not answer"
    )
    max_infra_failures: int = Field(
        default=10, ge=0, description="Lost workers and outages a job survives before it fails"
    )
    deadline_seconds: int = Field(
        default=7 * 24 * 3600,
        ge=60,
        le=30 * 24 * 3600,
        description="How long a job may wait in the queue before it fails, unless it says otherwise",
    )
    gc_seconds: float = Field(default=3600.0, gt=0, description="How often bytes that nobody refers to are collected")
    gc_grace_seconds: float = Field(
        default=24 * 3600.0,
        gt=0,
        description="Age at which unreferenced bytes are condemned, and how long they then stay",
    )
    keep_checkpoints_seconds: float = Field(
        default=7 * 24 * 3600.0, gt=0, description="How long jobs that failed or were cancelled keep their checkpoints"
    )
    webhook_allow_lan: bool = Field(
        default=False, description="Lets tenants send webhooks to private addresses, any port, and plain http"
    )
    link_seconds: int = Field(default=900, ge=10, description="Lifetime of a signed download link")
    max_file_bytes: int = Field(default=512 * 2**20, gt=0, description="Largest training file")
    max_base_file_bytes: int = Field(default=64 * 2**30, gt=0, description="Largest single file of a base model")
    log_level: str = Field(default="INFO", description="Python log level")
    testing: bool = Field(default=False, description="Says that this is a test and may be broken on purpose")
    failpoints: str = Field(default="", description="Where a test breaks this process; see registry.failpoints")

    @model_validator(mode="after")
    def intervals_fit_together(self) -> Self:
        if self.heartbeat_seconds * 4 > self.lease_seconds:
            raise ValueError("DEPOT_LEASE_SECONDS must be at least 4 × DEPOT_HEARTBEAT_SECONDS")
        if self.reaper_seconds * 3 > self.lease_seconds:
            raise ValueError("DEPOT_LEASE_SECONDS must be at least 3 × DEPOT_REAPER_SECONDS")
        return self

    @model_validator(mode="after")
    def only_tests_break_things(self) -> Self:
        if self.failpoints and not self.testing:
            raise ValueError("DEPOT_FAILPOINTS is for tests only")
        return self

    @model_validator(mode="before")
    @classmethod
    def names_are_known(cls, data: object) -> object:
        # pydantic-settings forbids unknown names in files and arguments, but skips unknown variables.
        known = {f"{PREFIX}{name}".upper() for name in cls.model_fields}
        unknown = sorted(k for k in os.environ if k.upper().startswith(PREFIX) and k.upper() not in known)
        unknown = [name for name in unknown if name not in CLIENT_VARIABLES]
        if unknown:
            raise ValueError(f"unknown settings: {', '.join(unknown)}")
        return data


# Read by the `lora-depot` command and by tests, never by the service.
CLIENT_VARIABLES = frozenset({"DEPOT_HOME", "DEPOT_URL", "DEPOT_API_KEY", "DEPOT_TEST_RADOSGW"})
