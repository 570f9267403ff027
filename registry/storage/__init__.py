"""Where bytes live. `registry.storage.open.make_store` picks the store; everything else sees an ObjectStore."""

from registry.storage.base import ObjectStat, ObjectStore

__all__ = ["ObjectStat", "ObjectStore"]
