"""Merged checkpoints: asked for once per version and options, made by a merge job, kept as files."""

import uuid

from sqlalchemy import Select, select
from sqlalchemy.orm import Session, selectinload

from registry.adapters import check_alias_name, lock_version, point_alias
from registry.errors import ArtifactNotFound, MergeNotFound, MergeNotReady
from registry.jobs.moves import lock_job
from registry.jobs.placement import DEFAULT_PLACEMENT, Placement
from registry.jobs.spec import MergeOptions
from registry.jobs.states import TERMINAL, JobState
from registry.jobs.submit import submit_merge
from registry.models import Merge, MergeFile, Version


def request_merge(
    session: Session,
    *,
    version: Version,
    options: MergeOptions,
    alias: str | None = None,
    placement: Placement = DEFAULT_PLACEMENT,
) -> tuple[Merge, bool]:
    """The merge of a version with these options, and whether this call made it.

    A merge that failed or was cancelled does not count: asking again starts another. The adapter's `alias` points at
    the version once the merge is stored: at once, if it is. AliasReserved, InvalidAliasName."""
    if alias is not None:
        check_alias_name(alias)
    lock_version(session, version)  # of two requests at once the second waits here and then finds the first's
    merge = session.scalar(_live(version, options).options(selectinload(Merge.files)))
    if merge is not None and (alias is None or _promise(session, merge, alias)):
        return merge, False
    job = submit_merge(session, version=version, options=options, placement=placement)
    chosen = options.model_dump() | {"aliases": [alias] if alias else []}
    merge = Merge(tenant_id=version.tenant_id, version_id=version.id, job_id=job.id, files=[], **chosen)
    session.add(merge)
    session.flush()
    return merge, True


def _promise(session: Session, merge: Merge, alias: str) -> bool:
    """Sets the alias if the merge is stored, else leaves it to the publication. False if the merge ended otherwise."""
    job = lock_job(session, merge.job_id)  # after the version, as the publication does
    session.refresh(merge, ["aliases", "live"])
    if job is None or not merge.live:
        return False
    if alias not in merge.aliases:
        merge.aliases = [*merge.aliases, alias]
        session.flush()
    if job.state == JobState.SUCCEEDED:
        point_alias(session, merge.version, alias)
    return True


def get_merge(session: Session, *, tenant_id: uuid.UUID, merge_id: uuid.UUID) -> Merge:
    """This tenant's merge with its files; MergeNotFound, also when its version was deleted."""
    query = select(Merge).join(Version, Merge.version_id == Version.id).where(Merge.tenant_id == tenant_id)
    query = query.where(Merge.id == merge_id, Version.deleted_at.is_(None))
    merge = session.scalar(query.options(selectinload(Merge.files)))
    if merge is None:
        raise MergeNotFound
    return merge


def find_stored(session: Session, *, version: Version, options: MergeOptions) -> Merge | None:
    """The finished merge of a version with these options, with its files."""
    query = _live(version, options).where(Merge.digest.is_not(None))
    return session.scalar(query.options(selectinload(Merge.files)))


def get_merge_file(session: Session, merge: Merge, path: str) -> MergeFile:
    """One file of a merge; MergeNotReady until it has ended, ArtifactNotFound."""
    if merge.job.state not in TERMINAL:
        raise MergeNotReady
    files = session.scalars(select(MergeFile).where(MergeFile.merge_id == merge.id))
    file = next((file for file in files if file.path == path), None)  # `path` may be what Postgres cannot store
    if file is None:
        raise ArtifactNotFound
    return file


def _live(version: Version, options: MergeOptions) -> Select[Merge]:
    query = select(Merge).where(Merge.version_id == version.id, Merge.live, Merge.dtype == options.dtype)
    query = query.where(Merge.scale == options.scale, Merge.start == options.start)
    return query.where(Merge.shard_size.is_not_distinct_from(options.shard_size))
