"""Logging of the API: one JSON object per line, with nothing in it that opens a door."""

import json
import logging
import re
import sys

# API keys, download tokens and presigned signatures, wherever they may have got into a message.
_SECRETS = re.compile(r"ld_[0-9A-Za-z]{50}|(?<=/v1/objects/)[^\s\"']+|(?<=X-Amz-Signature=)[0-9a-fA-F]+")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def redact(text: str) -> str:
    """The text without keys and signatures."""
    return _SECRETS.sub("[redacted]", text)


class JsonLines(logging.Formatter):
    """A record as one line of JSON: the standard fields, then what `extra` added."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{name: value for name, value in vars(record).items() if name not in _STANDARD},
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return redact(json.dumps({k: v for k, v in line.items() if v is not None}, default=str))


def configure(level: str) -> None:
    """Sets up logging of the process; an entry point calls it once."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Its lines hold paths and queries, and download links are secrets in the path. `api.requests` replaces it.
    logging.getLogger("uvicorn.access").disabled = True
    # It announces itself whenever `/readyz` asks for the schema's version.
    logging.getLogger("alembic").setLevel(logging.WARNING)
