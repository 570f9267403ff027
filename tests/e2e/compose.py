"""docker-compose.yml and Dockerfile as data: what each service runs, and with which environment."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent.parent
_REFERENCE = re.compile(r"\$\{(?P<name>\w+)(?P<kind>:-|:\?)(?P<rest>[^}]*)\}")


def dot_env(**given: str) -> dict[str, str]:
    """.env as its user writes it: a copy of .env.example where every empty value is filled in from `given`."""
    lines = (ROOT / ".env.example").read_text().splitlines()
    found = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert {name for name, value in found.items() if not value} <= given.keys()
    return {**found, **{name: value for name, value in given.items() if name in found}}


def service(name: str, variables: Mapping[str, str]) -> dict[str, Any]:
    """One service, with `variables` in place of `${…}`."""
    found: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"][name]
    given = {name: variables.get(name) if value is None else value for name, value in found["environment"].items()}
    return {**found, "environment": {k: _filled(str(v), variables) for k, v in given.items() if v is not None}}


def _filled(text: str, variables: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        known = variables.get(match["name"])
        if not known and match["kind"] == ":?":
            raise AssertionError(f"{match['name']} is required and .env.example does not name it")
        return known or match["rest"]

    assert text.count("${") == len(_REFERENCE.findall(text)), f"a form of reference that is not known here: {text}"
    return _REFERENCE.sub(value, text)


def dockerfile(target: str) -> dict[str, list[str]]:
    """Instruction → its arguments, one per time it stands in the stage `target`."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    stage, found = "", dict[str, list[str]]()
    for line in text.splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            stage = rest.rpartition(" AS ")[2]
        elif stage == target and word.isupper():
            found.setdefault(word, []).append(rest.strip())
    return found


def command(target: str) -> list[str]:
    """What the image runs."""
    (text,) = dockerfile(target)["CMD"]
    words: list[str] = json.loads(text)
    return words


def health_check(target: str) -> list[str]:
    """What the image asks to know whether it works."""
    (text,) = dockerfile(target)["HEALTHCHECK"]
    words: list[str] = json.loads(text.partition(" CMD ")[2])
    return words
