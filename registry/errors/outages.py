"""What does not work now and may work in a moment."""

from registry.errors.families import Unavailable


class MergePreparing(Unavailable):
    """The base model is being checked before its first use here. Ask again in a moment."""

    code = "merge_preparing"


class MergesBusy(Unavailable):
    """As many merged files as this process can serve at a time are being read. Ask again in a moment."""

    code = "merges_busy"


class StorageUnavailable(Unavailable):
    """The object store does not answer."""

    code = "storage_unavailable"


class BlobGone(Unavailable):
    """The uploaded bytes were cleaned up before anything referred to them. Upload them again."""

    code = "blob_gone"
