import uuid

import pytest
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from registry import lineage
from tests.factories import digest_of, make_adapter, make_base_model, make_file, make_tenant, make_version


def test_a_version_knows_what_it_was_made_from(session: Session) -> None:
    tenant = make_tenant(session)
    base, file = make_base_model(session), make_file(session, tenant)
    version = make_version(session, make_adapter(session, tenant, base))
    child: lineage.Node = ("version", version.id)
    lineage.record(session, child=child, relation="trained_on", parent=("file", file.id), digest=file.blob.sha256)
    lineage.record(session, child=child, relation="based_on", parent=("base_model", base.id), digest=base.digest)
    assert [
        (edge.relation, edge.parent_kind, edge.parent_id, edge.parent_digest)
        for edge in lineage.parents_of(session, child)
    ] == [
        ("based_on", "base_model", base.id, base.digest),
        ("trained_on", "file", file.id, file.blob.sha256),
    ]


def test_the_kind_is_part_of_the_node(session: Session) -> None:
    some_id = uuid.uuid4()
    lineage.record(
        session, child=("version", some_id), relation="trained_on", parent=("file", some_id), digest=digest_of("x")
    )
    assert lineage.parents_of(session, ("merge", some_id)) == []


def test_an_unknown_relation_is_refused_by_the_schema(session: Session) -> None:
    with pytest.raises(IntegrityError):
        lineage.record(
            session,
            child=("version", uuid.uuid4()),
            relation="invented",  # type: ignore[arg-type]  # what the type forbids, the schema must refuse too
            parent=("file", uuid.uuid4()),
            digest=None,
        )


def test_a_page_of_children_gets_each_ones_own_parents(session: Session) -> None:
    parents, children = [uuid.uuid4() for _ in range(3)], [uuid.uuid4() for _ in range(3)]
    for child, parent in [(0, 0), (0, 1), (1, 2)]:
        lineage.record(
            session,
            child=("version", children[child]),
            relation="trained_on",
            parent=("file", parents[parent]),
            digest=None,
        )
    found = lineage.parents_by_child(session, "version", children)
    assert {child: {edge.parent_id for edge in edges} for child, edges in found.items()} == {
        children[0]: {parents[0], parents[1]},
        children[1]: {parents[2]},
        children[2]: set(),
    }
