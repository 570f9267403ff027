"""More than a tenant may have, or than the service takes."""

from registry.errors.families import LimitReached, TooLarge


class QuotaExceeded(LimitReached):
    """Too many jobs are queued for this tenant; wait for some to end."""

    code = "quota_exceeded"


class WebhookLimit(LimitReached):
    """There are as many webhook endpoints as a tenant may have. Delete one first."""

    code = "webhook_limit"


class FileTooLarge(TooLarge):
    """The file is larger than this service accepts."""

    code = "file_too_large"
