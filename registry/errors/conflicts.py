"""What the state of a thing does not allow."""

from registry.errors.families import Conflict


class CheckpointNotPublishable(Conflict):
    """This checkpoint holds no adapter that could be used: training had not changed anything yet."""

    code = "checkpoint_not_publishable"


class JobTerminal(Conflict):
    """The job has already ended."""

    code = "job_terminal"


class JobCancelling(Conflict):
    """The job is being cancelled; it can neither be paused nor resumed."""

    code = "job_cancelling"


class JobNotEnded(Conflict):
    """The job has not ended yet. Wait for it, or cancel it first."""

    code = "job_not_ended"


class NameTaken(Conflict):
    """This name is already in use. Choose another."""

    code = "name_taken"


class VersionInUse(Conflict):
    """The version is in use. Move its aliases and wait for running jobs, then delete it."""

    code = "version_in_use"


class FileInUse(Conflict):
    """A job that has not ended still needs this file. Cancel the job or wait for it, then delete the file."""

    code = "file_in_use"


class MergeNotReady(Conflict):
    """The merge has not finished yet. Poll `GET /v1/merges/{id}` until its status is `succeeded`."""

    code = "merge_not_ready"


class NotMergeable(Conflict):
    """This version cannot be merged into its base model."""

    code = "not_mergeable"
