"""Request bodies as JSON that means the same to every parser, and that Postgres can hold."""

from collections.abc import Iterator
from typing import Any

from starlette.requests import Request

from api.refusals import InvalidEncoding, InvalidJson, JsonTooDeep, UnsupportedMediaType
from lora_core import strict_json

MAX_DEPTH = 32
_CHARSETS = frozenset({"utf-8", "utf8"})


class JsonRequest(Request):
    """A request whose body FastAPI reads with `read_json`."""

    async def json(self) -> Any:
        return self.state.json


async def read_json(request: Request) -> Any:
    """The body of a request as JSON; None for an empty body."""
    body = await request.body()
    if not body:
        return None
    check_media_type(request.headers.get("content-type", ""))
    return parse(body)


def check_media_type(content_type: str) -> None:
    """UnsupportedMediaType unless the header says JSON in UTF-8."""
    media_type, *parameters = (part.strip().lower() for part in content_type.split(";"))
    if media_type != "application/json" and not (
        media_type.startswith("application/") and media_type.endswith("+json")
    ):
        raise UnsupportedMediaType
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name == "charset" and value.strip('"') not in _CHARSETS:
            raise UnsupportedMediaType("JSON is UTF-8. Send it without another charset.")


def parse(body: bytes) -> Any:
    """JSON from others; InvalidEncoding, InvalidJson or JsonTooDeep."""
    try:
        body.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidEncoding from None
    if body.startswith(b"\xef\xbb\xbf"):
        raise InvalidEncoding("The body starts with a byte order mark. Send UTF-8 without it.")
    try:
        value = strict_json.loads(body)
    except ValueError as error:
        if "nested too deeply" in str(error):
            raise JsonTooDeep from None
        raise InvalidJson(f"The body cannot be read: {error}. Send one JSON object.") from None
    if _depth_exceeds(value, MAX_DEPTH):
        raise JsonTooDeep
    if any("\0" in text for text in strict_json.strings(value)):
        raise InvalidEncoding("A string in the body contains a NUL character (\\u0000). Remove it.")
    return value


def _depth_exceeds(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [child for item in level for child in _children(item)]
    return any(isinstance(item, dict | list) for item in level)


def _children(item: Any) -> Iterator[Any]:
    if isinstance(item, dict):
        yield from item.values()
    elif isinstance(item, list):
        yield from item
