"""Where things came from: edges from a child to what it was made from."""

import uuid
from collections.abc import Sequence
from typing import Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.models import LineageEdge

Kind = Literal["version", "merge", "file", "base_model"]
Relation = Literal["trained_on", "validated_on", "based_on", "merged_from"]
Node = tuple[Kind, uuid.UUID]


def record(session: Session, *, child: Node, relation: Relation, parent: Node, digest: str | None) -> LineageEdge:
    """Remembers that `child` was made from `parent`, whose bytes had this SHA-256 at the time."""
    edge = LineageEdge(
        child_kind=child[0],
        child_id=child[1],
        relation=relation,
        parent_kind=parent[0],
        parent_id=parent[1],
        parent_digest=digest,
    )
    session.add(edge)
    session.flush()
    return edge


def parents_of(session: Session, child: Node) -> list[LineageEdge]:
    """What `child` was made from. The caller has already shown that the child is its own."""
    kind, child_id = child
    return parents_by_child(session, kind, [child_id])[child_id]


def parents_by_child(session: Session, kind: Kind, ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, list[LineageEdge]]:
    """`parents_of` for a page of children of one kind, by child id, in one query."""
    found: dict[uuid.UUID, list[LineageEdge]] = {child_id: [] for child_id in ids}
    edges = select(LineageEdge).where(LineageEdge.child_kind == kind, LineageEdge.child_id.in_(found))
    for edge in session.scalars(edges.order_by(LineageEdge.relation, LineageEdge.parent_id)):
        found[edge.child_id].append(edge)
    return found
