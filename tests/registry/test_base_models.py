import hashlib
import json
import random
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from registry import base_models
from registry.base_models import (
    base_files,
    create_base_model,
    find_base_model,
    get_base_model,
    inspect_base,
    list_base_models,
)
from registry.db import SessionFactory, transaction
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
from registry.files import delete_file
from registry.models import BaseModel, Blob, File, Tenant
from registry.storage.base import ObjectStore
from registry.storage.digests import digest_file
from registry.storage.keys import blob_key
from tests.factories import make_base_model, make_file, make_tenant
from tests.registry.race import race
from tests.registry.refs import assert_refs_match_rows
from tests.tiny import make_base


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "llama", "llama")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "qwen3", "qwen3", tie=True, shards=3, dtype="bfloat16")


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """A copy of the small llama that a test may spoil."""
    return Path(shutil.copytree(llama, tmp_path / "llama"))


@pytest.fixture
def tenant(session: Session) -> Tenant:
    return make_tenant(session)


def upload(session: Session, store: ObjectStore, tenant: Tenant, folder: Path) -> dict[str, uuid.UUID]:
    """Every file of `folder`, stored and registered: path → file id."""
    files = {}
    for path in sorted(folder.iterdir()):
        sha256, size = digest_file(path)
        blob = Blob(id=uuid.uuid4(), tenant_id=tenant.id, sha256=sha256, size=size, state="stored", refs=1)
        blob.key = blob_key(sha256, blob.id)
        store.put(blob.key, path, sha256=sha256, size=size)
        session.add(blob)
        session.flush()
        files[path.name] = make_file(session, tenant, blob=blob, purpose="base-model", filename=path.name).id
    return files


def create(
    session: Session, store: ObjectStore, tenant: Tenant, files: Mapping[str, uuid.UUID], **over: Any
) -> BaseModel:
    values = {"name": "org/tiny", "source": "upload", "revision": None, **over}
    return create_base_model(session, store=store, tenant_id=tenant.id, files=files, **values)


def rewrite(path: Path, **fields: Any) -> None:
    """Changes fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


class TestCreate:
    def test_the_row_says_what_the_files_contain(
        self, session: Session, store: ObjectStore, tenant: Tenant, llama: Path
    ) -> None:
        files = upload(session, store, tenant, llama)
        base = create(session, store, tenant, files, source="hub:org/tiny", revision="a" * 40)
        assert (base.name, base.source, base.revision) == ("org/tiny", "hub:org/tiny", "a" * 40)
        assert (base.architecture, base.dtype) == ("llama", "float32")
        assert base.facts["linear_modules"]["model.layers.0.mlp.down_proj"] == [32, 64]
        assert len(base.facts["linear_modules"]) == 2 * 7 + 1
        assert {key: base.facts[key] for key in ("tied", "context_length", "vocab_size", "expert_parameters")} == {
            "tied": False,
            "expert_parameters": {},
            "context_length": 256,
            "vocab_size": 320,
        }
        weights = (llama / "model.safetensors").stat().st_size
        assert 0 <= weights - 4 * base.parameters < 8192
        assert_refs_match_rows(session)

    def test_a_tied_model_in_shards(self, session: Session, store: ObjectStore, tenant: Tenant, sharded: Path) -> None:
        base = create(session, store, tenant, upload(session, store, tenant, sharded))
        assert (base.architecture, base.dtype, base.facts["tied"]) == ("qwen3", "bfloat16", True)
        assert "lm_head" not in base.facts["linear_modules"]
        assert len([file for file in base.files if file.path.endswith(".safetensors")]) > 1

    def test_the_digest_is_that_of_the_sorted_checksum_file(
        self, session: Session, store: ObjectStore, tenant: Tenant, llama: Path
    ) -> None:
        files = upload(session, store, tenant, llama)
        shuffled = random.Random(1).sample(sorted(files.items()), len(files))
        lines = sorted(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in llama.iterdir())
        expected = hashlib.sha256("".join(lines).encode()).hexdigest()
        assert create(session, store, tenant, dict(shuffled)).digest == expected

    def test_the_uploads_may_be_deleted_afterwards(
        self, session: Session, store: ObjectStore, tenant: Tenant, llama: Path
    ) -> None:
        files = upload(session, store, tenant, llama)
        base = create(session, store, tenant, files)
        for file_id in files.values():
            delete_file(session, tenant_id=tenant.id, file_id=file_id)
        assert {file.path: file.blob.refs for file in base_files(session, base.id)} == dict.fromkeys(sorted(files), 1)
        assert_refs_match_rows(session)

    def test_the_same_bytes_again_are_the_same_model(
        self, session: Session, store: ObjectStore, tenant: Tenant, llama: Path
    ) -> None:
        first = create(session, store, tenant, upload(session, store, tenant, llama))
        other = make_tenant(session)
        again = create(session, store, other, upload(session, store, other, llama))
        assert first is again
        assert_refs_match_rows(session)

    def test_other_bytes_under_the_name_are_refused(
        self, session: Session, store: ObjectStore, tenant: Tenant, llama: Path, sharded: Path
    ) -> None:
        create(session, store, tenant, upload(session, store, tenant, llama))
        with pytest.raises(NameTaken):
            create(session, store, tenant, upload(session, store, tenant, sharded))
        assert_refs_match_rows(session)

    def test_the_same_bytes_may_have_two_names(
        self, session: Session, store: ObjectStore, tenant: Tenant, llama: Path
    ) -> None:
        files = upload(session, store, tenant, llama)
        one, two = create(session, store, tenant, files, name="one"), create(session, store, tenant, files, name="two")
        assert one.id != two.id
        assert one.digest == two.digest
        assert_refs_match_rows(session)

    def test_makers_at_once_get_the_same_model(self, sessions: SessionFactory, store: ObjectStore, llama: Path) -> None:
        with transaction(sessions) as session:
            tenant = make_tenant(session)
            files = upload(session, store, tenant, llama)

        def make() -> uuid.UUID:
            with transaction(sessions) as session:
                return create(session, store, tenant, files).id

        assert len(set(race(*[make] * 4))) == 1
        with sessions() as session:
            assert session.scalar(select(func.count()).select_from(BaseModel)) == 1
            assert_refs_match_rows(session)

    def test_of_two_models_at_once_under_one_name_one_is_refused(
        self, sessions: SessionFactory, store: ObjectStore, llama: Path, sharded: Path
    ) -> None:
        with transaction(sessions) as session:
            tenant = make_tenant(session)
            uploads = [upload(session, store, tenant, folder) for folder in (llama, sharded)]

        def make(files: Mapping[str, uuid.UUID]) -> str:
            with transaction(sessions) as session:
                return create(session, store, tenant, files).digest

        results = race(*(lambda files=files: make(files) for files in uploads))
        assert [type(result) for result in results if isinstance(result, Exception)] == [NameTaken]
        with sessions() as session:
            assert_refs_match_rows(session)


class TestRefusals:
    @pytest.mark.parametrize(
        "name",
        ["", "/", "a/", "/a", "a/b/c", "..", "../a", "a/..", ".a", "https://host/x", "file:///etc", "a b", "a@main"],
    )
    def test_paths_and_addresses_are_no_names(
        self, session: Session, store: ObjectStore, tenant: Tenant, name: str
    ) -> None:
        with pytest.raises(InvalidBaseModelName):
            create(session, store, tenant, {}, name=name)

    @pytest.mark.parametrize("name", ["a\n", "a\0", "\uff41", "a\uff0eb", "x" * 97, "-a", "a/-b"])
    def test_characters_outside_the_grammar_are_refused(
        self, session: Session, store: ObjectStore, tenant: Tenant, name: str
    ) -> None:
        with pytest.raises(InvalidBaseModelName):
            create(session, store, tenant, {}, name=name)

    @pytest.mark.parametrize(
        "over", [{"source": "x" * 513}, {"source": "a\0"}, {"source": "a\nb"}, {"revision": "main"}, {"revision": ""}]
    )
    def test_sources_that_are_no_record(
        self, session: Session, store: ObjectStore, tenant: Tenant, over: dict[str, str]
    ) -> None:
        with pytest.raises(InvalidSource) as caught:
            create(session, store, tenant, {}, **over)
        assert caught.value.param in over

    @pytest.mark.parametrize(
        "path",
        ["modeling_tiny.py", "pytorch_model.bin", "../config.json", "a/config.json", "/etc/passwd", "", "a\0", "x.pt"],
    )
    def test_files_that_no_base_model_needs(
        self, session: Session, store: ObjectStore, tenant: Tenant, llama: Path, path: str
    ) -> None:
        files = upload(session, store, tenant, llama)
        with pytest.raises(InvalidBaseModel):
            create(session, store, tenant, files | {path: files["config.json"]})

    def test_files_of_another_tenant_purpose_or_nobody_answer_alike(
        self, session: Session, store: ObjectStore, tenant: Tenant, llama: Path
    ) -> None:
        files = upload(session, store, tenant, llama)
        theirs = upload(session, store, make_tenant(session), llama)["config.json"]
        messages = set()
        for wrong in (theirs, make_file(session, tenant).id, uuid.uuid4()):
            with pytest.raises(UnknownBaseFile) as caught:
                create(session, store, tenant, files | {"config.json": wrong})
            messages.add((caught.value.message, caught.value.param, str(caught.value.details)))
        assert messages == {(UnknownBaseFile().message, "files.config.json", "{}")}

    def test_no_files_at_all(self, session: Session, store: ObjectStore, tenant: Tenant) -> None:
        with pytest.raises(InvalidBaseModel):
            create(session, store, tenant, {})

    def test_too_many_files(self, session: Session, store: ObjectStore, tenant: Tenant) -> None:
        with pytest.raises(InvalidBaseModel, match="1000"):
            create(session, store, tenant, {f"{i}.safetensors": uuid.uuid4() for i in range(1001)})

    @pytest.mark.parametrize(
        ("spoil", "named"),
        [
            (lambda folder: (folder / "config.json").unlink(), "config.json"),
            (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
            (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
            (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
            (lambda folder: (folder / "config.json").write_text("[]"), "config.json"),
            (lambda folder: rewrite(folder / "config.json", auto_map={"AutoModel": "x.Y"}), "auto_map"),
            (lambda folder: rewrite(folder / "config.json", inner={"trust_remote_code": True}), "trust_remote_code"),
            (lambda folder: rewrite(folder / "config.json", model_type="llama\nx"), "model_type"),
            (lambda folder: rewrite(folder / "config.json", vocab_size=321), "embed_tokens"),
            (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "model.safetensors"),
            (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64), "model.safetensors"),
            (lambda folder: (folder / "extra.safetensors").write_bytes(b"x" * 64), "extra.safetensors"),
        ],
    )
    def test_spoiled_models_are_refused_with_the_reason_and_leave_nothing(
        self,
        session: Session,
        store: ObjectStore,
        tenant: Tenant,
        folder: Path,
        spoil: Callable[[Path], object],
        named: str,
    ) -> None:
        spoil(folder)
        with pytest.raises(InvalidBaseModel, match=named):
            create(session, store, tenant, upload(session, store, tenant, folder))
        assert session.scalars(select(BaseModel)).all() == []
        assert_refs_match_rows(session)

    def test_headers_that_are_too_large_together(
        self, session: Session, store: ObjectStore, tenant: Tenant, sharded: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        largest = max(int.from_bytes(path.read_bytes()[:8], "little") for path in sharded.glob("*.safetensors"))
        monkeypatch.setattr(base_models, "_MAX_HEADER_BYTES", largest + 100)
        with pytest.raises(InvalidBaseModel, match="header claims"):
            create(session, store, tenant, upload(session, store, tenant, sharded))

    def test_a_document_that_rotted_in_the_store_is_not_read(
        self, session: Session, store: ObjectStore, tenant: Tenant, llama: Path, tmp_path: Path
    ) -> None:
        files = upload(session, store, tenant, llama)
        blob = session.get_one(File, files["config.json"]).blob
        store.delete(blob.key)
        other = tmp_path / "other.json"
        other.write_text("{}")
        sha256, size = digest_file(other)
        store.put(blob.key, other, sha256=sha256, size=size)
        with pytest.raises(ArtifactCorrupt):
            inspect_base(store, {name: session.get_one(File, file_id).blob for name, file_id in files.items()})


class TestLookup:
    @pytest.mark.parametrize("name", ["absent", "org/absent", "", "a\0", "\ud800", "../x"])
    def test_what_is_not_there_is_not_found(self, session: Session, name: str) -> None:
        assert find_base_model(session, name) is None
        with pytest.raises(BaseModelNotFound):
            get_base_model(session, name)

    def test_files_come_with_the_model(self, session: Session) -> None:
        name = make_base_model(session).name
        session.expunge_all()
        base = get_base_model(session, name)
        assert [(file.path, file.blob.size) for file in base.files] == [("model.safetensors", 3)]
        assert base_files(session, base.id) == base.files

    def test_pages_by_name(self, session: Session) -> None:
        for name in ("org/b", "a", "org/a", "c"):
            make_base_model(session, name=name)
        seen: list[str] = []
        more = True
        while more:
            page = list_base_models(session, after=seen[-1] if seen else None, limit=3)
            seen += [base.name for base in page.items]
            more = page.has_more
            make_base_model(session, name=f"0{len(seen)}")
        assert sorted(seen) == ["a", "c", "org/a", "org/b"]
        with pytest.raises(InvalidCursor):
            list_base_models(session, after="absent", limit=3)
