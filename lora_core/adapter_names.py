"""What the tensors of an adapter file are, told from their names. The names are PEFT's."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from lora_core.errors import BadAdapter, KeyMismatch
from lora_core.floats import FLOATS
from lora_core.header import Header, TensorInfo

PREFIX = "base_model.model."
_ROLES = (
    # LoRA writes .weight, AdaLoRA does not
    (re.compile(r"(?P<path>.+)\.lora_A(\.weight)?"), "lora_A"),
    (re.compile(r"(?P<path>.+)\.lora_B(\.weight)?"), "lora_B"),
    (re.compile(r"(?P<path>.+)\.lora_E"), "lora_E"),
    (re.compile(r"(?P<path>.+)\.lora_B\.bias"), "lora_bias"),
    (re.compile(r"(?P<path>.+)\.lora_embedding_A"), "embedding_A"),
    (re.compile(r"(?P<path>.+)\.lora_embedding_B"), "embedding_B"),
    (re.compile(r"(?P<path>.+)\.lora_magnitude_vector(\.weight)?"), "magnitude"),
    (re.compile(r"(?P<path>.+)\.token_adapter\.trainable_tokens_delta"), "new_rows"),
)
WRAPPER = ".base_layer"
_SAVED = re.compile(r"(?P<path>.+)\.(?P<parameter>[A-Za-z0-9_]+)")


@dataclass(frozen=True)
class AdaptedModule:
    """The tensors of one module. `roles` are those of the method; `saved` are whole parameters, by their name.

    `depth` counts PEFT's wrappers around the module: with several adapted parameters, the first has the most.
    """

    path: str
    depth: int
    roles: dict[str, TensorInfo] = field(default_factory=dict)
    saved: dict[str, TensorInfo] = field(default_factory=dict)
    saved_base: dict[str, TensorInfo] = field(default_factory=dict)  # the base's own, stored with the adapter


def adapted_modules(header: Header) -> list[AdaptedModule]:
    """Every tensor of the file in exactly one module, sorted by path. An unknown name is KeyMismatch."""
    modules: dict[tuple[str, int], AdaptedModule] = {}
    for tensor in header.tensors:
        if tensor.dtype not in FLOATS:
            raise BadAdapter(f"{tensor.name} has the dtype {tensor.dtype}, which is not a float")
        if not tensor.name.startswith(PREFIX):
            raise KeyMismatch(f"{tensor.name} does not begin with {PREFIX}: not a tensor of a PEFT adapter")
        path, place, role = _role(tensor.name.removeprefix(PREFIX))
        depth = 0
        while path.endswith(WRAPPER):
            path, depth = path.removesuffix(WRAPPER), depth + 1
        if place != "roles":
            place, depth = ("saved_base", 0) if depth else ("saved", 0)
        path = path.replace(WRAPPER + ".", ".")
        module = modules.setdefault((path, depth), AdaptedModule(path, depth))
        if getattr(module, place).setdefault(role, tensor) is not tensor:
            raise KeyMismatch(f"{tensor.name} occurs twice under different names")
    if not modules:
        raise BadAdapter("the adapter's file holds no tensor: the adapter is empty")
    return [module for _, module in sorted(modules.items())]


def _role(name: str) -> tuple[str, str, str]:
    for pattern, role in _ROLES:
        if match := pattern.fullmatch(name):
            return match["path"], "roles", role
    match = _SAVED.fullmatch(name)
    if match is None or "lora_" in name:
        raise KeyMismatch(f"{PREFIX}{name} is no tensor of a LoRA that is known here")
    return match["path"], "saved", match["parameter"]


def require(module: AdaptedModule, *roles: str) -> Mapping[str, TensorInfo]:
    """The module's tensors; one that lacks some of `roles` is KeyMismatch."""
    for role in roles:
        if role not in module.roles:
            raise KeyMismatch(f"{module.path} has no {role.replace('embedding', 'lora_embedding')}")
    return module.roles
