"""What every kind of resource shares on the wire: strict bodies, listings and errors."""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

T = TypeVar("T", bound=BaseModel)
R = TypeVar("R")


class Body(BaseModel):
    """A request body: unknown fields, near-miss types (`true` for 1), NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


def shown(example: dict[str, Any]) -> ConfigDict:
    """The configuration of a response model with its example."""
    return ConfigDict(json_schema_extra={"example": example})


class Listing(BaseModel, Generic[T]):
    """One page. The next one is asked for with `after=<last_id>` while `has_more`."""

    object: Literal["list"] = "list"
    data: list[T]
    has_more: bool
    first_id: str | None
    last_id: str | None


def listing(model: type[T], items: Sequence[T], *, has_more: bool, cursor: Callable[[T], str]) -> Listing[T]:
    """A page of these items; `cursor` says what `after` takes to continue behind one."""
    return Listing[model](  # type: ignore[valid-type]  # a runtime parameter, so that the response is not validated twice
        data=list(items),
        has_more=has_more,
        first_id=cursor(items[0]) if items else None,
        last_id=cursor(items[-1]) if items else None,
    )


STORED = {
    "path": "adapter_model.safetensors",
    "bytes": 1340000,
    "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
}


class StoredObject(BaseModel):
    """One file of an artifact. Every byte of it is named by its SHA-256."""

    path: str
    bytes: int
    sha256: str


class ErrorInfo(BaseModel):
    message: str
    type: str
    param: str | None
    code: str
    details: dict[str, Any] | None = None


class ErrorBody(BaseModel):
    """How every refusal looks. `code` is stable; `message` says what to do."""

    error: ErrorInfo


def unix(moment: datetime) -> int:
    """Seconds since 1970, as OpenAI's objects tell time."""
    return int(moment.timestamp())


def unix_or_none(moment: datetime | None) -> int | None:
    return unix(moment) if moment is not None else None
