"""The catalogue of base models, shared by all tenants: uploaded files that were checked and never change again."""

import hashlib
import re
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Select, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session, selectinload

from lora_core import base as lora_base
from lora_core import strict_json
from lora_core.digest import folder_digest
from lora_core.errors import BadBase, BadHeader
from lora_core.header import Header, header_length, parse_header
from registry.blobs import take_refs
from registry.errors import (
    ArtifactCorrupt,
    BaseModelNotFound,
    InvalidBaseModel,
    InvalidBaseModelName,
    InvalidCursor,
    InvalidSource,
    NameTaken,
    UnknownBaseFile,
)
from registry.files import find_file
from registry.models import BaseModel, BaseModelFile, Blob
from registry.paging import Page, take_page
from registry.storage.base import ObjectStore

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_NAME = re.compile(rf"{_PART}(/{_PART})?")
_COMMIT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
_MAX_SOURCE = 512
_MAX_FILES = 1000
# Headers of all shards together; a 400-billion-parameter model has less than one of these MiB.
_MAX_HEADER_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """What the files of a base model contain: columns of its row."""

    architecture: str
    dtype: str
    parameters: int
    facts: dict[str, Any]


def inspect_base(store: ObjectStore, files: Mapping[str, Blob]) -> BaseFacts:
    """Checks a base model in the store by name → blob; reads its small documents and the headers of its shards.

    InvalidBaseModel says what is wrong and with which file."""
    try:
        documents = {name: _read_document(store, name, files[name]) for name in lora_base.DOCUMENTS if name in files}
        shards = lora_base.expected_shards(files, documents)
        found = lora_base.inspect_base(files, documents, _read_headers(store, {name: files[name] for name in shards}))
    except (BadBase, BadHeader) as error:
        raise InvalidBaseModel(
            f"These files are not a base model this service can train: {error.message}.", param="files"
        ) from error
    config = strict_json.loads(documents[lora_base.CONFIG_FILE])
    context = config.get("max_position_embeddings")
    return BaseFacts(
        architecture=found.architecture,
        dtype=found.dtype,
        parameters=found.parameter_count,
        facts={
            "linear_modules": {path: list(shape) for path, shape in found.linear_modules.items()},
            "expert_parameters": {path: list(shape) for path, shape in found.expert_parameters.items()},
            "tied": found.tied,
            "context_length": context if type(context) is int and context > 0 else None,
            "vocab_size": config["vocab_size"],
        },
    )


def create_base_model(
    session: Session,
    *,
    store: ObjectStore,
    tenant_id: uuid.UUID,
    name: str,
    source: str,
    revision: str | None,
    files: Mapping[str, uuid.UUID],
) -> BaseModel:
    """Registers uploaded files (path → file id) as a base model. The same name with the same bytes is the same model.

    NameTaken when the name has other bytes; InvalidBaseModel, UnknownBaseFile. The model takes references of its own:
    the uploads may be deleted afterwards."""
    _check_request(name, source, revision, files)
    blobs = _find_blobs(session, tenant_id, files)
    digest = folder_digest({path: blob.sha256 for path, blob in blobs.items()})
    model = find_base_model(session, name)
    if model is None:
        values = {"name": name, "source": source, "revision": revision, "digest": digest}
        model = _insert(session, values | asdict(inspect_base(store, blobs)), blobs)
    if model.digest != digest:
        raise NameTaken(param="name")
    return model


def find_base_model(session: Session, name: str) -> BaseModel | None:
    """The base model of this name with its files."""
    if not _NAME.fullmatch(name):
        return None  # also keeps what Postgres cannot store, such as NUL, out of the query
    return session.scalar(_with_files().where(BaseModel.name == name))


def get_base_model(session: Session, name: str) -> BaseModel:
    """The base model of this name with its files; BaseModelNotFound."""
    model = find_base_model(session, name)
    if model is None:
        raise BaseModelNotFound
    return model


def list_base_models(session: Session, *, after: str | None = None, limit: int) -> Page[BaseModel]:
    """Every base model by name, with its files; starts behind the name `after`."""
    query = _with_files().order_by(BaseModel.name)
    if after is not None:
        if find_base_model(session, after) is None:
            raise InvalidCursor(param="after")
        query = query.where(BaseModel.name > after)
    return take_page(session, query, limit=limit)


def base_files(session: Session, base_model_id: uuid.UUID) -> list[BaseModelFile]:
    """The files of a base model, by path."""
    query = select(BaseModelFile).where(BaseModelFile.base_model_id == base_model_id)
    return list(session.scalars(query.order_by(BaseModelFile.path)))


def _with_files() -> Select[BaseModel]:
    return select(BaseModel).options(selectinload(BaseModel.files))


def _check_request(name: str, source: str, revision: str | None, files: Mapping[str, uuid.UUID]) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidBaseModelName(param="name")
    if len(source) > _MAX_SOURCE or not source.isprintable():
        raise InvalidSource(param="source")
    if revision is not None and not _COMMIT.fullmatch(revision):
        raise InvalidSource(param="revision")
    if len(files) > _MAX_FILES:
        raise InvalidBaseModel(f"A base model has at most {_MAX_FILES} files.", param="files")
    if strange := [path for path in files if not lora_base.is_base_file(path)]:
        raise InvalidBaseModel(f"{strange[0][:80]!r} does not belong to a base model; leave it out.", param="files")


def _find_blobs(session: Session, tenant_id: uuid.UUID, files: Mapping[str, uuid.UUID]) -> dict[str, Blob]:
    blobs = {}
    for path, file_id in files.items():
        file = find_file(session, tenant_id=tenant_id, file_id=file_id, purpose="base-model")
        if file is None:
            raise UnknownBaseFile(param=f"files.{path}")
        blobs[path] = file.blob
    return blobs


def _insert(session: Session, values: dict[str, Any], blobs: Mapping[str, Blob]) -> BaseModel:
    """The new row; or the row of this name that somebody else committed while the files were inspected."""
    statement = insert(BaseModel).values(values).on_conflict_do_nothing(index_elements=[BaseModel.name])
    model_id = session.scalar(statement.returning(BaseModel.id))
    if model_id is not None:
        take_refs(session, [blob.id for blob in blobs.values()])
        rows = [BaseModelFile(base_model_id=model_id, path=path, blob_id=blob.id) for path, blob in blobs.items()]
        session.add_all(rows)
        session.flush()
    return get_base_model(session, values["name"])


def _read_document(store: ObjectStore, name: str, blob: Blob) -> bytes:
    if blob.size > lora_base.MAX_DOCUMENT_BYTES:
        raise BadBase(f"{name} is larger than {lora_base.MAX_DOCUMENT_BYTES} bytes")
    data = b"".join(store.open(blob.key))
    if hashlib.sha256(data).hexdigest() != blob.sha256:
        raise ArtifactCorrupt(blob_id=str(blob.id))
    return data


def _read_headers(store: ObjectStore, shards: Mapping[str, Blob]) -> dict[str, Header]:
    headers, left = {}, _MAX_HEADER_BYTES
    for name, blob in shards.items():
        try:
            length = header_length(b"".join(store.open(blob.key, end=8)), max_bytes=left)
            data = b"".join(store.open(blob.key, end=8 + length))
            headers[name] = parse_header(data, file_bytes=blob.size)
        except BadHeader as error:
            raise BadHeader(f"{name}: {error.message}") from None
        left -= length
    return headers
