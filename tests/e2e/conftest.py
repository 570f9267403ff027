"""The S3 server of the storage tests, here too."""

from tests.registry.storage.conftest import rclone

__all__ = ["rclone"]
