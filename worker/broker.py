"""Redis as Celery reads it here: what is not one of our messages is dropped with a line in the log.

Kombu takes all that lies in Redis for something that kombu wrote; what it raises over anything else would end the
process. Messages are hints, so that dropping one costs a poll at most."""

import logging
from queue import Empty
from typing import Any

from kombu.transport import TRANSPORT_ALIASES, redis
from redis import RedisError

log = logging.getLogger(__name__)

NOT_ABOUT_A_MESSAGE = (Empty, OSError, RedisError)


class QoS(redis.QoS):
    """Messages that were read and not yet done with, kept in Redis."""

    def restore_by_tag(self, tag: Any, client: Any = None, leftmost: bool = False) -> None:  # noqa: FBT001, FBT002  # as in kombu
        try:
            super().restore_by_tag(tag, client, leftmost)
        except NOT_ABOUT_A_MESSAGE:
            raise
        except Exception as error:
            _tell(error)
            self._remove_from_indices(tag).execute()


class Channel(redis.Channel):
    """Reads queues."""

    QoS = QoS

    def _brpop_read(self, **options: Any) -> Any:
        known = set(self.qos._delivered)
        try:
            return super()._brpop_read(**options)
        except NOT_ABOUT_A_MESSAGE:
            raise
        except Exception as error:
            _tell(error)
            for tag in set(self.qos._delivered) - known:  # it would come again, and count as being worked on
                self.qos.ack(tag)
            return True


class Transport(redis.Transport):
    Channel = Channel


def forgive_strangers() -> None:
    """Have every connection to Redis of this process, made from now on, read so. Sockets, TCP and TLS alike."""
    TRANSPORT_ALIASES.update(dict.fromkeys(("redis", "rediss"), f"{__name__}:Transport"))


def _tell(error: Exception) -> None:
    log.warning("a message in Redis that is none of ours is dropped: %s", f"{type(error).__name__}: {error!s:.200}")
