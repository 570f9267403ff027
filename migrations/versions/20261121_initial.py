"""initial

Revision ID: 0001
Revises:
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

JOBS_GUARD = """
CREATE FUNCTION jobs_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NEW.state IS DISTINCT FROM OLD.state THEN
    PERFORM 1 FROM job_transitions WHERE from_state = OLD.state AND to_state = NEW.state;
    IF NOT FOUND THEN
      RAISE EXCEPTION 'illegal job transition % -> %', OLD.state, NEW.state USING ERRCODE = '23514';
    END IF;
    INSERT INTO job_events (job_id, type, level, message, data, fence)
    VALUES (NEW.id, 'state', CASE WHEN NEW.state = 'failed' THEN 'error' ELSE 'info' END,
            'The job is ' || NEW.state || '.',
            jsonb_build_object('from', OLD.state, 'to', NEW.state, 'attempt', NEW.attempt), NEW.fence);
  ELSIF OLD.state IN ('succeeded', 'failed', 'cancelled') THEN
    RAISE EXCEPTION 'job % has ended and cannot change', OLD.id USING ERRCODE = '23514';
  END IF;
  IF NEW.fence IS DISTINCT FROM OLD.fence AND (NEW.fence IS NULL OR NEW.fence < OLD.fence) THEN
    RAISE EXCEPTION 'the fence of job % went backwards', OLD.id USING ERRCODE = '23514';
  END IF;
  IF (NEW.spec, NEW.request, NEW.tenant_id, NEW.kind) IS DISTINCT FROM (OLD.spec, OLD.request, OLD.tenant_id, OLD.kind)
  THEN
    RAISE EXCEPTION 'what job % is to do cannot change', OLD.id USING ERRCODE = '23514';
  END IF;
  RETURN NEW;
END $$
"""

# A version names the same bytes for ever: after its insert only `deleted_at` may be set, once.
VERSIONS_GUARD = """
CREATE FUNCTION versions_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF TG_OP = 'DELETE' OR OLD.deleted_at IS NOT NULL
     OR (to_jsonb(NEW) - 'deleted_at') IS DISTINCT FROM (to_jsonb(OLD) - 'deleted_at') THEN
    RAISE EXCEPTION 'version % is immutable', OLD.id USING ERRCODE = '23514';
  END IF;
  RETURN NEW;
END $$
"""

ADAPTERS_GUARD = """
CREATE FUNCTION adapters_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NEW.next_version < OLD.next_version OR NEW.base_model_id <> OLD.base_model_id OR NEW.name <> OLD.name THEN
    RAISE EXCEPTION 'adapter %: version numbers are never reused, name and base never change', OLD.id
      USING ERRCODE = '23514';
  END IF;
  RETURN NEW;
END $$
"""

GUARDS = {
    "jobs_guard": (JOBS_GUARD, "BEFORE UPDATE ON jobs"),
    "versions_guard": (VERSIONS_GUARD, "BEFORE UPDATE OR DELETE ON versions"),
    "adapters_guard": (ADAPTERS_GUARD, "BEFORE UPDATE ON adapters"),
}

TRANSITIONS = [
    ("queued", "running"),
    ("queued", "cancelled"),
    ("queued", "failed"),
    ("running", "queued"),
    ("running", "succeeded"),
    ("running", "failed"),
    ("running", "cancelling"),
    ("cancelling", "cancelled"),
]


def upgrade() -> None:
    op.execute(sa.schema.CreateSequence(sa.Sequence("fence_seq")))
    op.create_table(
        "base_models",
        sa.Column("id", sa.Uuid(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column("name", sa.String(), nullable=False, comment="what jobs name in `model`, e.g. Qwen/Qwen3-0.6B"),
        sa.Column(
            "source", sa.String(), nullable=False, comment="where it came from, for people: hub:org/name or upload"
        ),
        sa.Column("revision", sa.String(), nullable=True, comment="resolved commit of the source, never `main`"),
        sa.Column("architecture", sa.String(), nullable=False),
        sa.Column("dtype", sa.String(), nullable=False),
        sa.Column("parameters", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False, comment="SHA-256 of the sorted lines '<sha256>  <path>'"),
        sa.Column(
            "facts",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=False,
            comment="linear modules and their shapes, ties, context length",
        ),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.CheckConstraint("digest ~ '^[0-9a-f]{64}$'", name=op.f("ck_base_models_digest_is_hex")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_base_models")),
        sa.UniqueConstraint("name", name=op.f("uq_base_models_name")),
    )
    op.create_table(
        "control",
        sa.Column("id", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("reaper_tick", sa.DateTime(timezone=True), nullable=True),
        sa.Column("hold_until", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("id", name=op.f("ck_control_single_row")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_control")),
    )
    op.create_table(
        "job_transitions",
        sa.Column("from_state", sa.String(), nullable=False),
        sa.Column("to_state", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("from_state", "to_state", name=op.f("pk_job_transitions")),
    )
    op.create_table(
        "lineage",
        sa.Column("child_kind", sa.String(), nullable=False),
        sa.Column("child_id", sa.Uuid(), nullable=False),
        sa.Column("relation", sa.String(), nullable=False),
        sa.Column("parent_kind", sa.String(), nullable=False),
        sa.Column("parent_id", sa.Uuid(), nullable=False),
        sa.Column("parent_digest", sa.String(), nullable=True, comment="SHA-256 of the parent when the edge was made"),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.CheckConstraint(
            "relation IN ('trained_on', 'based_on', 'validated_on', 'merged_from')",
            name=op.f("ck_lineage_relation_known"),
        ),
        sa.PrimaryKeyConstraint(
            "child_kind", "child_id", "relation", "parent_kind", "parent_id", name=op.f("pk_lineage")
        ),
    )
    op.create_index("ix_lineage_parent", "lineage", ["parent_kind", "parent_id"], unique=False)
    op.create_table(
        "outbox",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("queue", sa.String(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("next_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.Column("attempts", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("sent_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_outbox")),
    )
    op.create_index(
        "ix_outbox_pending", "outbox", ["next_at"], unique=False, postgresql_where=sa.text("sent_at IS NULL")
    )
    op.create_table(
        "tenants",
        sa.Column("id", sa.Uuid(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("max_queued", sa.Integer(), server_default=sa.text("1000"), nullable=False),
        sa.Column("max_running", sa.Integer(), server_default=sa.text("64"), nullable=False),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.CheckConstraint("max_queued >= 0 AND max_running >= 0", name=op.f("ck_tenants_limits_not_negative")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tenants")),
        sa.UniqueConstraint("name", name=op.f("uq_tenants_name")),
    )
    op.create_table(
        "adapters",
        sa.Column("id", sa.Uuid(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("base_model_id", sa.Uuid(), nullable=False),
        sa.Column(
            "next_version",
            sa.Integer(),
            server_default=sa.text("1"),
            nullable=False,
            comment="never goes back: numbers are not reused",
        ),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.CheckConstraint("name ~ '^[a-z0-9][a-z0-9._-]{0,127}$'", name=op.f("ck_adapters_name_grammar")),
        sa.CheckConstraint("next_version >= 1", name=op.f("ck_adapters_versions_start_at_one")),
        sa.ForeignKeyConstraint(
            ["base_model_id"], ["base_models.id"], name=op.f("fk_adapters_base_model_id_base_models")
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_adapters_tenant_id_tenants")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_adapters")),
        sa.UniqueConstraint("tenant_id", "name", name=op.f("uq_adapters_tenant_id_name")),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Uuid(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("key_id", sa.String(), nullable=False, comment="the part of the key that is not secret"),
        sa.Column("secret_hmac", sa.String(), nullable=False, comment="HMAC-SHA256(pepper, secret), hex"),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("secret_hmac ~ '^[0-9a-f]{64}$'", name=op.f("ck_api_keys_secret_is_hashed")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_api_keys_tenant_id_tenants")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("key_id", name=op.f("uq_api_keys_key_id")),
    )
    op.create_table(
        "blobs",
        sa.Column("id", sa.Uuid(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=True, comment="null: bytes of the shared base-model catalogue"),
        sa.Column(
            "job_id",
            sa.Uuid(),
            nullable=True,
            comment="the job that wrote it; no foreign key: jobs refer to files, which refer to blobs",
        ),
        sa.Column("fence", sa.BigInteger(), nullable=True, comment="the writer's token, when a job wrote it"),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("state", sa.String(), server_default=sa.text("'intent'"), nullable=False),
        sa.Column(
            "refs",
            sa.Integer(),
            server_default=sa.text("0"),
            nullable=False,
            comment="changed by UPDATE in the transaction that adds or drops a reference",
        ),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("condemned_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("refs = 0 OR state = 'stored'", name=op.f("ck_blobs_only_stored_is_referenced")),
        sa.CheckConstraint("sha256 ~ '^[0-9a-f]{64}$'", name=op.f("ck_blobs_sha256_is_hex")),
        sa.CheckConstraint("state IN ('intent', 'stored', 'condemned', 'deleted')", name=op.f("ck_blobs_state_known")),
        sa.CheckConstraint("refs >= 0", name=op.f("ck_blobs_refs_not_negative")),
        sa.CheckConstraint("size >= 0", name=op.f("ck_blobs_size_not_negative")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_blobs_tenant_id_tenants")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_blobs")),
        sa.UniqueConstraint("key", name=op.f("uq_blobs_key")),
    )
    op.create_index(op.f("ix_blobs_sha256"), "blobs", ["sha256"], unique=False)
    op.create_index(
        "ix_blobs_unreferenced",
        "blobs",
        ["created_at"],
        unique=False,
        postgresql_where=sa.text("refs = 0 AND state <> 'deleted'"),
    )
    op.create_table(
        "base_model_files",
        sa.Column("base_model_id", sa.Uuid(), nullable=False),
        sa.Column("path", sa.String(), nullable=False),
        sa.Column("blob_id", sa.Uuid(), nullable=False),
        sa.ForeignKeyConstraint(
            ["base_model_id"], ["base_models.id"], name=op.f("fk_base_model_files_base_model_id_base_models")
        ),
        sa.ForeignKeyConstraint(["blob_id"], ["blobs.id"], name=op.f("fk_base_model_files_blob_id_blobs")),
        sa.PrimaryKeyConstraint("base_model_id", "path", name=op.f("pk_base_model_files")),
    )
    op.create_index(op.f("ix_base_model_files_blob_id"), "base_model_files", ["blob_id"], unique=False)
    op.create_table(
        "files",
        sa.Column("id", sa.Uuid(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("blob_id", sa.Uuid(), nullable=False),
        sa.Column("filename", sa.String(), nullable=False),
        sa.Column("purpose", sa.String(), nullable=False),
        sa.Column(
            "report",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=True,
            comment="what validation found: rows, format",
        ),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("purpose IN ('fine-tune', 'base-model')", name=op.f("ck_files_purpose_known")),
        sa.ForeignKeyConstraint(["blob_id"], ["blobs.id"], name=op.f("fk_files_blob_id_blobs")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_files_tenant_id_tenants")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_files")),
    )
    op.create_index("ix_files_listing", "files", ["tenant_id", "created_at", "id"], unique=False)
    op.create_table(
        "jobs",
        sa.Column("id", sa.Uuid(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column(
            "spec",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=False,
            comment="what to do; never changes after submit",
        ),
        sa.Column(
            "request",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=False,
            comment="the request as the client sent it, for the job object",
        ),
        sa.Column("adapter_id", sa.Uuid(), nullable=True, comment="where it publishes"),
        sa.Column("base_model_id", sa.Uuid(), nullable=False),
        sa.Column("training_file_id", sa.Uuid(), nullable=True),
        sa.Column("validation_file_id", sa.Uuid(), nullable=True),
        sa.Column("queue", sa.String(), server_default=sa.text("'default'"), nullable=False),
        sa.Column("priority", sa.SmallInteger(), server_default=sa.text("100"), nullable=False),
        sa.Column("state", sa.String(), server_default=sa.text("'queued'"), nullable=False),
        sa.Column("run_after", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.Column("attempt", sa.Integer(), server_default=sa.text("0"), nullable=False, comment="number of claims"),
        sa.Column("fence", sa.BigInteger(), nullable=True, comment="token of the current or last owner"),
        sa.Column("worker", sa.String(), nullable=True),
        sa.Column("lease_expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("heartbeat_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("progress", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("infra_failures", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("error_class", sa.String(), nullable=True),
        sa.Column("error_code", sa.String(), nullable=True),
        sa.Column("error_message", sa.String(), nullable=True),
        sa.Column("trained_tokens", sa.BigInteger(), nullable=True),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "(state IN ('running', 'cancelling')) = (lease_expires_at IS NOT NULL)",
            name=op.f("ck_jobs_lease_iff_owned"),
        ),
        sa.CheckConstraint(
            "(state IN ('succeeded', 'failed', 'cancelled')) = (finished_at IS NOT NULL)",
            name=op.f("ck_jobs_terminal_has_end"),
        ),
        sa.CheckConstraint(
            "NOT (state IN ('running', 'cancelling')) OR (fence IS NOT NULL AND worker IS NOT NULL)",
            name=op.f("ck_jobs_owned_has_fence"),
        ),
        sa.CheckConstraint("kind IN ('train', 'merge')", name=op.f("ck_jobs_kind_known")),
        sa.CheckConstraint(
            "state IN ('queued', 'running', 'cancelling', 'succeeded', 'failed', 'cancelled')",
            name=op.f("ck_jobs_state_known"),
        ),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapters.id"], name=op.f("fk_jobs_adapter_id_adapters")),
        sa.ForeignKeyConstraint(["base_model_id"], ["base_models.id"], name=op.f("fk_jobs_base_model_id_base_models")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_jobs_tenant_id_tenants")),
        sa.ForeignKeyConstraint(["training_file_id"], ["files.id"], name=op.f("fk_jobs_training_file_id_files")),
        sa.ForeignKeyConstraint(["validation_file_id"], ["files.id"], name=op.f("fk_jobs_validation_file_id_files")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
    )
    op.create_index(
        "ix_jobs_claim",
        "jobs",
        ["queue", "priority", "run_after", "id"],
        unique=False,
        postgresql_where=sa.text("state = 'queued'"),
    )
    op.create_index(
        "ix_jobs_lease",
        "jobs",
        ["lease_expires_at"],
        unique=False,
        postgresql_where=sa.text("state IN ('running', 'cancelling')"),
    )
    op.create_index("ix_jobs_listing", "jobs", ["tenant_id", "kind", "created_at", "id"], unique=False)
    op.create_index(op.f("ix_jobs_training_file_id"), "jobs", ["training_file_id"], unique=False)
    op.create_index(op.f("ix_jobs_validation_file_id"), "jobs", ["validation_file_id"], unique=False)
    op.create_table(
        "idempotency_keys",
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("scope", sa.String(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("request_sha256", sa.LargeBinary(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=True),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_idempotency_keys_job_id_jobs"), deferrable=True),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_idempotency_keys_tenant_id_tenants")),
        sa.PrimaryKeyConstraint("tenant_id", "scope", "key", name=op.f("pk_idempotency_keys")),
    )
    op.create_table(
        "job_events",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("type", sa.String(), nullable=False),
        sa.Column("level", sa.String(), server_default=sa.text("'info'"), nullable=False),
        sa.Column("message", sa.String(), nullable=False),
        sa.Column("data", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("fence", sa.BigInteger(), nullable=True),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.CheckConstraint("level IN ('info', 'warn', 'error')", name=op.f("ck_job_events_level_known")),
        sa.CheckConstraint("type IN ('message', 'metrics', 'state')", name=op.f("ck_job_events_type_known")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_events_job_id_jobs")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_job_events")),
    )
    op.create_index("ix_job_events_job", "job_events", ["job_id", "id"], unique=False)
    op.create_table(
        "versions",
        sa.Column("id", sa.Uuid(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("adapter_id", sa.Uuid(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column(
            "manifest",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=False,
            comment="files, base digest, dataset digest, training spec, library versions",
        ),
        sa.Column("digest", sa.String(), nullable=False, comment="SHA-256 of the canonical manifest"),
        sa.Column("metrics", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("digest ~ '^[0-9a-f]{64}$'", name=op.f("ck_versions_digest_is_hex")),
        sa.CheckConstraint("version >= 1", name=op.f("ck_versions_starts_at_one")),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapters.id"], name=op.f("fk_versions_adapter_id_adapters")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_versions_job_id_jobs")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_versions_tenant_id_tenants")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_versions")),
        sa.UniqueConstraint("adapter_id", "version", name=op.f("uq_versions_adapter_id_version")),
        sa.UniqueConstraint("job_id", name=op.f("uq_versions_job_id")),
    )
    op.create_table(
        "aliases",
        sa.Column("adapter_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("version_id", sa.Uuid(), nullable=False),
        sa.Column(
            "updated_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.CheckConstraint("name <> 'latest' AND name !~ '^v?[0-9]+$'", name=op.f("ck_aliases_not_reserved")),
        sa.CheckConstraint("name ~ '^[a-z][a-z0-9._-]{0,63}$'", name=op.f("ck_aliases_name_grammar")),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapters.id"], name=op.f("fk_aliases_adapter_id_adapters")),
        sa.ForeignKeyConstraint(["version_id"], ["versions.id"], name=op.f("fk_aliases_version_id_versions")),
        sa.PrimaryKeyConstraint("adapter_id", "name", name=op.f("pk_aliases")),
    )
    op.create_index(op.f("ix_aliases_version_id"), "aliases", ["version_id"], unique=False)
    op.create_table(
        "merges",
        sa.Column("id", sa.Uuid(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("version_id", sa.Uuid(), nullable=False),
        sa.Column("dtype", sa.String(), nullable=False, comment="`base` keeps the base model's dtype"),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column(
            "live",
            sa.Boolean(),
            server_default=sa.text("true"),
            nullable=False,
            comment="false once its job failed or was cancelled",
        ),
        sa.Column("digest", sa.String(), nullable=True),
        sa.Column(
            "report",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=True,
            comment="what changed and what rounding lost",
        ),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.CheckConstraint("digest IS NULL OR digest ~ '^[0-9a-f]{64}$'", name=op.f("ck_merges_digest_is_hex")),
        sa.CheckConstraint("dtype IN ('base', 'float32', 'bfloat16', 'float16')", name=op.f("ck_merges_dtype_known")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_merges_job_id_jobs")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_merges_tenant_id_tenants")),
        sa.ForeignKeyConstraint(["version_id"], ["versions.id"], name=op.f("fk_merges_version_id_versions")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_merges")),
        sa.UniqueConstraint("job_id", name=op.f("uq_merges_job_id")),
    )
    op.create_index(op.f("ix_merges_version_id"), "merges", ["version_id"], unique=False)
    op.create_index("uq_merges_live", "merges", ["version_id", "dtype"], unique=True, postgresql_where=sa.text("live"))
    op.create_table(
        "version_files",
        sa.Column("version_id", sa.Uuid(), nullable=False),
        sa.Column("path", sa.String(), nullable=False),
        sa.Column("blob_id", sa.Uuid(), nullable=False),
        sa.ForeignKeyConstraint(["blob_id"], ["blobs.id"], name=op.f("fk_version_files_blob_id_blobs")),
        sa.ForeignKeyConstraint(["version_id"], ["versions.id"], name=op.f("fk_version_files_version_id_versions")),
        sa.PrimaryKeyConstraint("version_id", "path", name=op.f("pk_version_files")),
    )
    op.create_index(op.f("ix_version_files_blob_id"), "version_files", ["blob_id"], unique=False)
    op.create_table(
        "merge_files",
        sa.Column("merge_id", sa.Uuid(), nullable=False),
        sa.Column("path", sa.String(), nullable=False),
        sa.Column("blob_id", sa.Uuid(), nullable=False),
        sa.ForeignKeyConstraint(["blob_id"], ["blobs.id"], name=op.f("fk_merge_files_blob_id_blobs")),
        sa.ForeignKeyConstraint(["merge_id"], ["merges.id"], name=op.f("fk_merge_files_merge_id_merges")),
        sa.PrimaryKeyConstraint("merge_id", "path", name=op.f("pk_merge_files")),
    )
    op.create_index(op.f("ix_merge_files_blob_id"), "merge_files", ["blob_id"], unique=False)
    for name, (function, when) in GUARDS.items():
        op.execute(function)
        op.execute(f"CREATE TRIGGER {name} {when} FOR EACH ROW EXECUTE FUNCTION {name}()")
    transitions = sa.table("job_transitions", sa.column("from_state"), sa.column("to_state"))
    op.bulk_insert(transitions, [{"from_state": a, "to_state": b} for a, b in TRANSITIONS])
    op.execute("INSERT INTO control DEFAULT VALUES")


def downgrade() -> None:
    op.drop_index(op.f("ix_merge_files_blob_id"), table_name="merge_files")
    op.drop_table("merge_files")
    op.drop_index(op.f("ix_version_files_blob_id"), table_name="version_files")
    op.drop_table("version_files")
    op.drop_index(op.f("ix_merges_version_id"), table_name="merges")
    op.drop_index("uq_merges_live", table_name="merges", postgresql_where=sa.text("live"))
    op.drop_table("merges")
    op.drop_index(op.f("ix_aliases_version_id"), table_name="aliases")
    op.drop_table("aliases")
    op.drop_table("versions")
    op.drop_index("ix_job_events_job", table_name="job_events")
    op.drop_table("job_events")
    op.drop_table("idempotency_keys")
    op.drop_index(op.f("ix_jobs_validation_file_id"), table_name="jobs")
    op.drop_index(op.f("ix_jobs_training_file_id"), table_name="jobs")
    op.drop_index("ix_jobs_listing", table_name="jobs")
    op.drop_index("ix_jobs_lease", table_name="jobs", postgresql_where=sa.text("state IN ('running', 'cancelling')"))
    op.drop_index("ix_jobs_claim", table_name="jobs", postgresql_where=sa.text("state = 'queued'"))
    op.drop_table("jobs")
    op.drop_index("ix_files_listing", table_name="files")
    op.drop_table("files")
    op.drop_index(op.f("ix_base_model_files_blob_id"), table_name="base_model_files")
    op.drop_table("base_model_files")
    op.drop_index(
        "ix_blobs_unreferenced", table_name="blobs", postgresql_where=sa.text("refs = 0 AND state <> 'deleted'")
    )
    op.drop_index(op.f("ix_blobs_sha256"), table_name="blobs")
    op.drop_table("blobs")
    op.drop_table("api_keys")
    op.drop_table("adapters")
    op.drop_table("tenants")
    op.drop_index("ix_outbox_pending", table_name="outbox", postgresql_where=sa.text("sent_at IS NULL"))
    op.drop_table("outbox")
    op.drop_index("ix_lineage_parent", table_name="lineage")
    op.drop_table("lineage")
    op.drop_table("job_transitions")
    op.drop_table("control")
    op.drop_table("base_models")
    op.execute(sa.schema.DropSequence(sa.Sequence("fence_seq")))
    for name in GUARDS:
        op.execute(f"DROP FUNCTION {name}()")
