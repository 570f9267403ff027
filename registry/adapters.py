"""Adapters, their immutable versions, and the aliases that point at them."""

import re
import uuid
from collections.abc import Sequence

from sqlalchemy import Select, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session, selectinload

from registry.blobs import drop_refs
from registry.errors import (
    AdapterNotFound,
    AliasNotFound,
    AliasReserved,
    ArtifactNotFound,
    BaseModelMismatch,
    InvalidAliasName,
    InvalidCursor,
    InvalidName,
    VersionInUse,
    VersionNotFound,
)
from registry.ids import public_id
from registry.jobs.clock import NOW, read_clock
from registry.jobs.states import TERMINAL
from registry.models import Adapter, Alias, BaseModel, Job, Merge, MergeFile, Version, VersionFile
from registry.paging import Page, take_page

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_IN_NAMES = re.compile(r"[a-z0-9._-]*")
_ALIAS = re.compile(r"[a-z][a-z0-9._-]{0,63}")
_RESERVED = re.compile(r"latest|v?[0-9]+")
_NUMBER = re.compile(r"v?([1-9][0-9]{0,8})")  # nine digits always fit the column


# ── adapters ─────────────────────────────────────────────────────────────────────────────────────


def ensure_adapter(session: Session, *, tenant_id: uuid.UUID, name: str, base_model: BaseModel) -> Adapter:
    """The adapter of this name, made if there is none; two makers at once get the same one.

    BaseModelMismatch when it exists on another base."""
    if not _NAME.fullmatch(name):
        raise InvalidName
    session.execute(
        insert(Adapter)
        .values(tenant_id=tenant_id, name=name, base_model_id=base_model.id)
        .on_conflict_do_nothing(index_elements=[Adapter.tenant_id, Adapter.name])
    )
    adapter = get_adapter(session, tenant_id=tenant_id, name=name)
    if adapter.base_model_id != base_model.id:
        raise BaseModelMismatch(base_model=adapter.base_model.name)
    return adapter


def find_adapter(session: Session, *, tenant_id: uuid.UUID, name: str) -> Adapter | None:
    """This tenant's adapter of this name."""
    if not _NAME.fullmatch(name):
        return None  # also keeps what Postgres cannot store, such as NUL, out of the query
    return session.scalar(select(Adapter).where(Adapter.tenant_id == tenant_id, Adapter.name == name))


def get_adapter(session: Session, *, tenant_id: uuid.UUID, name: str) -> Adapter:
    """This tenant's adapter of this name; AdapterNotFound."""
    adapter = find_adapter(session, tenant_id=tenant_id, name=name)
    if adapter is None:
        raise AdapterNotFound
    return adapter


def list_adapters(
    session: Session, *, tenant_id: uuid.UUID, search: str | None = None, after: str | None = None, limit: int
) -> Page[Adapter]:
    """This tenant's adapters by name, those whose name contains `search` in any case; starts behind `after`."""
    if after is not None and find_adapter(session, tenant_id=tenant_id, name=after) is None:
        raise InvalidCursor(param="after")
    query = select(Adapter).where(Adapter.tenant_id == tenant_id)
    if search is not None:
        text = search.lower()
        if not _IN_NAMES.fullmatch(text):
            return Page([], has_more=False)
        query = query.where(Adapter.name.contains(text, autoescape=True))
    if after is not None:
        query = query.where(Adapter.name > after)
    return take_page(session, query.order_by(Adapter.name), limit=limit)


# ── versions ─────────────────────────────────────────────────────────────────────────────────────


def list_versions(session: Session, adapter: Adapter, *, after: int | None = None, limit: int) -> Page[Version]:
    """Versions that are not deleted, newest first; starts behind the number `after`, deleted or not."""
    query = _versions(adapter)
    if after is not None:
        if not 1 <= after < adapter.next_version:
            raise InvalidCursor(param="after")
        query = query.where(Version.version < after)
    return take_page(session, query.order_by(Version.version.desc()), limit=limit)


def resolve_version(session: Session, *, tenant_id: uuid.UUID, name: str, ref: str) -> Version:
    """The version that `ref` names: `7`, `v7`, `latest` or an alias. AdapterNotFound or VersionNotFound."""
    adapter = get_adapter(session, tenant_id=tenant_id, name=name)
    if ref == "latest":
        version = latest_version(session, adapter)
    elif number := _NUMBER.fullmatch(ref):
        version = session.scalar(_versions(adapter).where(Version.version == int(number[1])))
    elif _ALIAS.fullmatch(ref):
        alias = select(Alias.version_id).where(Alias.adapter_id == adapter.id, Alias.name == ref)
        version = session.scalar(_versions(adapter).where(Version.id == alias.scalar_subquery()))
    else:
        version = None
    if version is None:
        raise VersionNotFound
    return version


def latest_version(session: Session, adapter: Adapter) -> Version | None:
    """The version with the highest number that is not deleted."""
    return session.scalar(_versions(adapter).order_by(Version.version.desc()).limit(1))


def latest_numbers(session: Session, adapters: Sequence[Adapter]) -> dict[uuid.UUID, int]:
    """The latest version number of each adapter that has one, by adapter id, in one query."""
    ids = [adapter.id for adapter in adapters]
    alive = select(Version).where(Version.adapter_id.in_(ids), Version.deleted_at.is_(None))
    query = alive.with_only_columns(Version.adapter_id, func.max(Version.version)).group_by(Version.adapter_id)
    return dict(session.execute(query).all())


def get_version_file(session: Session, version: Version, path: str) -> VersionFile:
    """One file of a version; ArtifactNotFound."""
    files = session.scalars(select(VersionFile).where(VersionFile.version_id == version.id))
    file = next((file for file in files if file.path == path), None)  # `path` may be what Postgres cannot store
    if file is None:
        raise ArtifactNotFound
    return file


def delete_version(session: Session, version: Version) -> None:
    """Deletes a version, its files and its merges; the number stays burned and the row stays as a record.

    VersionInUse while an alias points at it or a merge of it has not ended."""
    lock_version(session, version)
    aliases = select(Alias.name).where(Alias.version_id == version.id).order_by(Alias.name)
    if names := list(session.scalars(aliases)):
        raise VersionInUse(aliases=names)
    merged = _remove_merges(session, version)
    files = delete(VersionFile).where(VersionFile.version_id == version.id).returning(VersionFile.blob_id)
    drop_refs(session, [*merged, *session.scalars(files)])
    version.deleted_at = read_clock(session)
    session.flush()


def lock_version(session: Session, version: Version) -> None:
    """Until this transaction ends nobody deletes, merges or aliases the version; VersionNotFound if it is deleted."""
    alive = select(Version.id).where(Version.id == version.id, Version.deleted_at.is_(None))
    if session.scalar(alive.with_for_update()) is None:
        raise VersionNotFound


def _remove_merges(session: Session, version: Version) -> Sequence[uuid.UUID]:
    """Retires every merge of a locked version; the blobs whose references are to be dropped."""
    merges = select(Merge.id).where(Merge.version_id == version.id)
    unfinished = merges.join(Job, Merge.job_id == Job.id).where(Job.state.not_in(TERMINAL)).limit(1)
    if (merge_id := session.scalar(unfinished)) is not None:
        raise VersionInUse(merge=public_id("merge", merge_id))
    session.execute(update(Merge).where(Merge.version_id == version.id).values(live=False))
    files = delete(MergeFile).where(MergeFile.merge_id.in_(merges)).returning(MergeFile.blob_id)
    return session.scalars(files).all()


def _versions(adapter: Adapter) -> Select[Version]:
    query = select(Version).where(Version.adapter_id == adapter.id, Version.deleted_at.is_(None))
    return query.options(selectinload(Version.files))


# ── aliases ──────────────────────────────────────────────────────────────────────────────────────


def list_aliases(session: Session, adapter: Adapter) -> list[Alias]:
    """Every alias of an adapter, by name."""
    return list(session.scalars(select(Alias).where(Alias.adapter_id == adapter.id).order_by(Alias.name)))


def alias_numbers(session: Session, adapters: Sequence[Adapter]) -> dict[uuid.UUID, dict[str, int]]:
    """Alias → version number of each adapter, by adapter id, in one query."""
    found: dict[uuid.UUID, dict[str, int]] = {adapter.id: {} for adapter in adapters}
    query = select(Alias.adapter_id, Alias.name, Version.version).join(Version, Alias.version_id == Version.id)
    for adapter_id, name, number in session.execute(query.where(Alias.adapter_id.in_(found)).order_by(Alias.name)):
        found[adapter_id][name] = number
    return found


def set_alias(session: Session, adapter: Adapter, *, name: str, version: int) -> Alias:
    """Points an alias at a version, in one statement: readers see the old target or the new one.

    AliasReserved, InvalidAliasName or VersionNotFound."""
    check_alias_name(name)
    target = resolve_version(session, tenant_id=adapter.tenant_id, name=adapter.name, ref=str(version))
    return point_alias(session, target, name)


def check_alias_name(name: str) -> None:
    """AliasReserved or InvalidAliasName for what cannot be an alias."""
    if _RESERVED.fullmatch(name):
        raise AliasReserved(param="alias")
    if not _ALIAS.fullmatch(name):
        raise InvalidAliasName(param="alias")


def point_alias(session: Session, version: Version, name: str) -> Alias:
    """Points an alias with a checked name at its adapter's version; VersionNotFound if that is deleted."""
    lock_version(session, version)
    values = {"version_id": version.id, "updated_at": NOW}
    upsert = insert(Alias).values(adapter_id=version.adapter_id, name=name, **values)
    upsert = upsert.on_conflict_do_update(index_elements=[Alias.adapter_id, Alias.name], set_=values)
    session.execute(upsert)
    alias = select(Alias).where(Alias.adapter_id == version.adapter_id, Alias.name == name)
    return session.scalars(alias, execution_options={"populate_existing": True}).one()


def delete_alias(session: Session, adapter: Adapter, *, name: str) -> None:
    """Removes an alias; AliasNotFound."""
    gone = None
    if _ALIAS.fullmatch(name):
        query = delete(Alias).where(Alias.adapter_id == adapter.id, Alias.name == name)
        gone = session.scalar(query.returning(Alias.name))
    if gone is None:
        raise AliasNotFound
