"""What a checkpoint is good for beside going on from it: its adapter can be downloaded, or published as a version."""

import uuid

from fastapi import Response

from api.context import DepotDep, PrincipalDep, SessionDep
from api.depot.links import REDIRECT, redirect_to
from api.depot.objects_out import version_objects
from api.depot.schemas import VersionObject
from api.openai.jobs import parse_job_id
from api.routing import Permission, Router
from registry import errors
from registry.ids import parse_id
from registry.jobs.promote import adapter_files, get_checkpoint, promote_checkpoint
from registry.jobs.queries import get_job

router = Router("Fine-tuning")
_CHECKPOINT = "/fine_tuning/jobs/{job_id}/checkpoints/{checkpoint}"
_ABSENT = (errors.JobNotFound, errors.CheckpointNotFound, errors.CheckpointNotPublishable)


@router.declare(
    "POST",
    _CHECKPOINT + "/publish",
    permission=Permission.ADAPTERS_WRITE,
    summary="Publish a checkpoint as a version",
    returns=VersionObject,
    raises=(*_ABSENT, errors.VersionNotFound, errors.BlobGone),
)
def publish(job_id: str, checkpoint: str, session: SessionDep, principal: PrincipalDep) -> VersionObject:
    """Makes the next version of the job's adapter from this checkpoint, whatever became of the job. A checkpoint is
    published once: sending this again answers with the same version."""
    promoted = promote_checkpoint(
        session,
        tenant_id=principal.tenant_id,
        job_id=parse_job_id(job_id),
        checkpoint_id=parse_checkpoint_id(checkpoint),
    )
    version = promoted.version
    session.refresh(version, ["files"])
    return version_objects(session, version.adapter, [version])[0]


@router.declare(
    "GET",
    _CHECKPOINT + "/files/{file}",
    permission=Permission.ADAPTERS_READ,
    summary="Download a file of a checkpoint's adapter",
    raises=(*_ABSENT, errors.ArtifactNotFound),
    status=302,
    response_class=Response,
    responses=REDIRECT,
)
def checkpoint_file(
    *, job_id: str, checkpoint: str, file: str, session: SessionDep, depot: DepotDep, principal: PrincipalDep
) -> Response:
    """Redirects to the bytes: `adapter_config.json` or `adapter_model.safetensors`."""
    job = get_job(session, tenant_id=principal.tenant_id, job_id=parse_job_id(job_id))
    found = get_checkpoint(session, job=job, checkpoint_id=parse_checkpoint_id(checkpoint))
    for stored in adapter_files(found):
        if stored.path == file:
            return redirect_to(depot, stored.blob, stored.path)
    raise errors.ArtifactNotFound


def parse_checkpoint_id(text: str) -> uuid.UUID:
    """CheckpointNotFound for anything that is no checkpoint's id."""
    found = parse_id("ftckpt", text)
    if found is None:
        raise errors.CheckpointNotFound
    return found
