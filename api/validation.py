"""From pydantic's findings to one error that names the field, says what is wrong and how to mend it."""

from collections.abc import Iterable, Sequence
from typing import Any, get_args

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from pydantic_core import ErrorDetails
from starlette.requests import Request

from api.refusals import InvalidLimit, InvalidType, InvalidValue, MissingField, UnknownField
from registry.errors import Invalid

_KINDS: dict[str, str] = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "int_parsing": "an integer",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "none_required": "null",
    "dict_attributes_type": "an object",
}
_MOST_ERRORS = 20


def explain(request: Request, error: RequestValidationError) -> Invalid:
    """The first fault as an error; all of them (up to 20) in its details when there are several."""
    route = request.scope.get("route")
    field = getattr(route, "body_field", None)
    model = field.field_info.annotation if field is not None else None
    return explain_findings(error.errors(), body=error.body, model=model)


def explain_findings(findings: Iterable[ErrorDetails], *, body: Any, model: Any) -> Invalid:
    """The same for findings that were made elsewhere; `body` is what was sent, `model` what it should have been."""
    places: dict[str, list[ErrorDetails]] = {}
    for finding in findings:
        places.setdefault(_path(finding, body), []).append(finding)
    faults = [_fault(path, found, model) for path, found in places.items()][:_MOST_ERRORS]
    first = faults[0]
    if len(faults) > 1:
        first.details["errors"] = [{"param": f.param, "code": f.code, "message": f.message} for f in faults]
    return first


def _path(finding: ErrorDetails, body: Any) -> str:
    """Where the fault is, in the words of the request: pydantic also lists the branches of unions it tried."""
    source, *rest = finding["loc"]
    if source != "body":
        return str(rest[0]) if rest else str(source)
    steps, value = [], body
    for step in rest:
        if _holds(value, step):
            value = value[step]
        elif not (finding["type"] == "missing" and isinstance(value, dict)):
            continue  # the name of a branch
        steps.append(str(step)[:80])
    return ".".join(steps)


def _holds(value: Any, step: int | str) -> bool:
    if isinstance(value, list):
        return isinstance(step, int) and step < len(value)
    return isinstance(value, dict) and step in value


def _fault(path: str, found: Sequence[ErrorDetails], model: Any) -> Invalid:
    kind = found[0]["type"]
    name = f"`{path}`" if path else "The body"
    if kind == "missing":
        return MissingField(f"Add the field {name}." if path else "Send a JSON object as body.", param=path or None)
    if kind == "extra_forbidden":
        allowed = ", ".join(_allowed(model, path))
        return UnknownField(f"{name} is not a field here. Allowed: {allowed}.", param=path)
    ends = list(dict.fromkeys(filter(None, map(wanted, found))))
    message = f"{name} must be {' or '.join(ends)}." if ends else f"{name} is not valid: {found[0]['msg']}."
    if path == "limit" and model is None:
        return InvalidLimit(message, param=path)
    only_types = all(finding["type"] in _KINDS for finding in found)
    return (InvalidType if only_types else InvalidValue)(message, param=path or None)


def wanted(finding: ErrorDetails) -> str | None:
    """What would be right there, as the end of "must be …"."""
    kind, context = finding["type"], finding.get("ctx", {})
    bounds = {
        "greater_than": "greater than {gt}",
        "greater_than_equal": "at least {ge}",
        "less_than": "less than {lt}",
        "less_than_equal": "at most {le}",
        "string_too_short": "at least {min_length} characters long",
        "string_too_long": "at most {max_length} characters long",
        "too_short": "at least {min_length} entries long",
        "too_long": "at most {max_length} entries long",
        "literal_error": "{expected}",
        "finite_number": "a finite number",
        "value_error": "{error}",
        "string_pattern_mismatch": "text of the form `{pattern}`",
    }
    return _KINDS.get(kind) or (bounds[kind].format(**context) if kind in bounds else None)


def _allowed(model: Any, path: str) -> list[str]:
    """The fields that may stand beside the one at `path`."""
    for step in path.split(".")[:-1]:
        if (inner := _model_in(model)) is None:
            return []
        field = inner.model_fields.get(step)
        model = field.annotation if field is not None else None
    found = _model_in(model)
    return sorted(found.model_fields) if found is not None else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model in `Model`, `Model | None` and the like."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part)) is not None), None)
