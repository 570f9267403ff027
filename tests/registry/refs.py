"""The rule that garbage collection stands on: a blob's count is the number of rows that refer to it."""

from sqlalchemy import func, select, union_all
from sqlalchemy.orm import Session

from registry.models import BaseModelFile, Blob, CheckpointFile, File, MergeFile, VersionFile


def assert_refs_match_rows(session: Session) -> None:
    """Recounts every reference from the tables that hold them."""
    session.flush()
    rows = union_all(
        select(File.blob_id).where(File.deleted_at.is_(None)),
        select(VersionFile.blob_id),
        select(MergeFile.blob_id),
        select(CheckpointFile.blob_id),
        select(BaseModelFile.blob_id),
    ).subquery()
    counted = dict(session.execute(select(rows.c.blob_id, func.count()).group_by(rows.c.blob_id)).all())
    stored = dict(session.execute(select(Blob.id, Blob.refs)).all())
    assert stored == {blob_id: counted.get(blob_id, 0) for blob_id in stored}
