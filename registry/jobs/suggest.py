"""What to change in a request whose job failed, where a rule knows it: a JSON Patch (RFC 6902) on that request."""

from collections.abc import Mapping
from typing import Any

from registry.jobs.spec import TrainSpec
from registry.jobs.states import JobState
from registry.models import Job

Operation = dict[str, Any]
SHORTEST = 128  # tokens; below, rows are cut to nothing


def suggest_patch(job: Job, *, context_length: int | None) -> list[Operation] | None:
    """Half the learning rate after a divergence, a smaller batch or shorter rows after running out of memory, longer
    rows where none had anything left to learn; None when there is nothing that a setting could mend."""
    if job.state != JobState.FAILED:
        return None
    spec = TrainSpec.model_validate(job.spec)
    if job.error_class == "diverged":
        return _setting(job.request, ("lora", "learning_rate"), _rate_asked(job.request) / 2)
    if job.error_class in ("oom", "host_oom"):
        return _less_memory(job.request, spec)
    if job.error_code == "no_trainable_tokens":
        longest = min(context_length or spec.max_length * 4, spec.max_length * 4, 131_072)
        return _setting(job.request, ("lora", "max_length"), longest) if longest > spec.max_length else None
    return None


def learning_rate_multiplier(request: Mapping[str, Any]) -> float:
    """The multiplier of a stored request: the one setting that a spec only holds multiplied."""
    value = (_at(request, _hyperparameters(request)) or {}).get("learning_rate_multiplier")
    return 1.0 if value in (None, "auto") else float(value)


def _rate_asked(request: Mapping[str, Any]) -> float:
    """`lora.learning_rate` as the request means it: before the multiplier."""
    asked = _at(request, ("lora", "learning_rate"))
    return float(TrainSpec.model_fields["learning_rate"].default if asked is None else asked)


def _less_memory(request: Mapping[str, Any], spec: TrainSpec) -> list[Operation] | None:
    if spec.batch_size > 1:
        return _setting(request, (*_hyperparameters(request), "batch_size"), spec.batch_size // 2)
    if spec.max_length // 2 >= SHORTEST:
        return _setting(request, ("lora", "max_length"), spec.max_length // 2)
    return None


def _hyperparameters(request: Mapping[str, Any]) -> tuple[str, ...]:
    """Where this request keeps OpenAI's numbers: in its method, or in the deprecated field."""
    method = ("method", str(_at(request, ("method", "type"))), "hyperparameters")
    return method if _at(request, method) is not None else ("hyperparameters",)


def _at(request: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    found: Any = request
    for step in path:
        found = found.get(step) if isinstance(found, Mapping) else None
    return found


def _setting(request: Mapping[str, Any], path: tuple[str, ...], value: Any) -> list[Operation]:
    """The operation that gives the field at `path` this value, and makes the objects around it if they are absent."""
    depth = next((n for n in range(1, len(path)) if not isinstance(_at(request, path[:n]), Mapping)), len(path))
    for step in reversed(path[depth:]):
        value = {step: value}
    return [{"op": "add", "path": "/" + "/".join(path[:depth]), "value": value}]
