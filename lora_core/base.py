"""The check a base model passes before it is stored or loaded: files, config and headers, without torch."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

from lora_core import strict_json
from lora_core.architectures import ARCHITECTURES, Architecture, Kind
from lora_core.errors import BadBase
from lora_core.floats import DTYPE_NAMES
from lora_core.header import Header, TensorInfo, read_header
from lora_core.keymap import is_conv1d
from lora_core.shards import COMPANION_FILES, INDEX_FILE, SINGLE_FILE, index_shards, shard_names
from lora_core.targets import OUTPUT_LAYER

CONFIG_FILE = "config.json"
# Small JSON files that a loader acts on; `inspect_base` wants those that exist.
DOCUMENTS = (CONFIG_FILE, "generation_config.json", "tokenizer_config.json", INDEX_FILE)
MAX_DOCUMENT_BYTES = 32 * 2**20
LANGUAGE_MODELS: Final[tuple[Kind, ...]] = ("decoder",)

_WEIGHTS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")
# Names through which a configuration makes a loader fetch or run code, or read weights in another format.
_FORBIDDEN = frozenset({"auto_map", "custom_generate", "custom_pipelines", "quantization_config", "trust_remote_code"})
# No slash: it would name a repository or a path, such as an attention kernel to download.
_CONFIG_TEXT = re.compile(r"[A-Za-z0-9_.,:+|\- ]{0,200}")
_EXPERT_PARAMETERS = {
    **dict.fromkeys(("w1", "w3", "gate_proj", "up_proj"), "gate_up_proj"),
    **dict.fromkeys(("w2", "down_proj"), "down_proj"),
}
_EXPERT = re.compile(
    rf"(?P<layer>.+\.\d+)\.(?:mlp|block_sparse_moe)\.experts\.(?P<expert>\d+)\.(?P<name>{'|'.join(_EXPERT_PARAMETERS)})\.weight"
)
_FREE_TEXT = frozenset({"_name_or_path"})


@dataclass(frozen=True)
class BaseFacts:
    """`linear_modules`: path → (out, in); `expert_parameters`: path → (experts, out, in), as the model stacks them.

    `tied`: the output layer shares the matrix of the input embedding."""

    architecture: str
    dtype: str
    linear_modules: Mapping[str, tuple[int, int]]
    expert_parameters: Mapping[str, tuple[int, int, int]]
    parameter_count: int
    tied: bool


def is_base_file(name: str) -> bool:
    """Whether a base model may contain a file of this name."""
    return name in (*DOCUMENTS, *COMPANION_FILES) or _WEIGHTS.fullmatch(name) is not None


def check_base(directory: Path, kinds: Collection[Kind] = LANGUAGE_MODELS) -> BaseFacts:
    """Check the base model in `directory`. BadBase or BadHeader say what is wrong with it."""
    names = sorted(path.name for path in directory.iterdir())
    documents = {}
    for name in DOCUMENTS:
        if (directory / name).is_file():
            if (directory / name).stat().st_size > MAX_DOCUMENT_BYTES:
                raise BadBase(f"{name} is larger than {MAX_DOCUMENT_BYTES} bytes")
            documents[name] = (directory / name).read_bytes()
    weights = expected_shards(names, documents)
    return inspect_base(names, documents, {name: read_header(directory / name) for name in weights}, kinds)


def expected_shards(names: Iterable[str], documents: Mapping[str, bytes]) -> list[str]:
    """The safetensors files of the checkpoint, all of them among `names` and no other beside them."""
    present = {name for name in names if _WEIGHTS.fullmatch(name)}
    expected = set(shard_names(documents[INDEX_FILE])) if INDEX_FILE in documents else {SINGLE_FILE}
    if missing := sorted(expected - present):
        raise BadBase(f"the base model lacks {missing[0]}")
    if surplus := sorted(present - expected):
        raise BadBase(f"{surplus[0]} is not part of the checkpoint; remove it")
    return sorted(expected)


def inspect_base(
    names: Iterable[str],
    documents: Mapping[str, bytes],
    headers: Mapping[str, Header],
    kinds: Collection[Kind] = LANGUAGE_MODELS,
) -> BaseFacts:
    """The same check for files that lie elsewhere: all names, the DOCUMENTS among them, and all shard headers."""
    names = sorted(names)
    if strange := [name for name in names if not is_base_file(name)]:
        raise BadBase(f"{strange[0][:80]!r} does not belong into a base model; remove it")
    for needed in (CONFIG_FILE, "tokenizer.json", "tokenizer_config.json"):
        if needed not in names:
            raise BadBase(f"the base model lacks {needed}")
    expected_shards(names, documents)
    parsed = {name: _document(name, data) for name, data in documents.items()}
    config = parsed[CONFIG_FILE]
    family = _family(config, kinds)
    index = index_shards(headers, documents.get(INDEX_FILE))
    architecture = ARCHITECTURES[family]
    tensors = index.tensors()
    _check_embedding(architecture, config, tensors)
    modules = _linear_modules(family, tensors.values())
    return BaseFacts(
        architecture=family,
        dtype=_dtype(headers),
        linear_modules=modules,
        expert_parameters=_expert_parameters(tensors.values()),
        parameter_count=sum(prod(tensor.shape) for tensor in tensors.values()),
        tied=OUTPUT_LAYER not in modules or config.get("tie_word_embeddings") is True,
    )


def _check_embedding(architecture: Architecture, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    shape = (config.get("vocab_size"), config.get(architecture.width))
    name = f"{architecture.embedding}.weight"
    found = [tensor for path, tensor in tensors.items() if f".{path}".endswith(f".{name}")]
    if len(found) != 1 or found[0].shape != shape:
        raise BadBase(f"{name} is missing or does not have the config's shape")


def _linear_modules(family: str, tensors: Iterable[TensorInfo]) -> dict[str, tuple[int, int]]:
    """Path in the model → (out, in) of every linear layer, sorted. Experts are no layers: the model stacks them."""
    architecture = ARCHITECTURES[family]
    found = {}
    for tensor in tensors:
        path = architecture.module_path(tensor.name)
        last = path.rpartition(".")[2]
        if not tensor.name.endswith(".weight") or len(tensor.shape) != 2 or ".experts." in path:
            continue
        if last == architecture.embedding or last in architecture.not_linear:
            continue
        columns, rows = tensor.shape if is_conv1d(family, last) else tensor.shape[::-1]
        found[path] = (rows, columns)
    return dict(sorted(found.items()))


def _expert_parameters(tensors: Iterable[TensorInfo]) -> dict[str, tuple[int, int, int]]:
    """What the model makes of the matrices of single experts: one parameter for all, whose gates lie above the rest."""
    experts: dict[str, set[str]] = {}
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for tensor in tensors:
        if found := _EXPERT.fullmatch(tensor.name):
            path = f"{found['layer']}.mlp.experts.{_EXPERT_PARAMETERS[found['name']]}"
            experts.setdefault(path, set()).add(found["expert"])
            parts.setdefault(path, {})[found["name"]] = tensor.shape
    stacked = {path: [*shapes.values()] for path, shapes in sorted(parts.items())}
    return {
        path: (len(experts[path]), sum(shape[0] for shape in shapes), shapes[0][1])
        for path, shapes in stacked.items()
        if all(len(shape) == 2 for shape in shapes)
    }


def _family(config: Mapping[str, Any], kinds: Collection[Kind]) -> str:
    family = config.get("model_type")
    supported = [name for name, architecture in ARCHITECTURES.items() if architecture.kind in kinds]
    if not isinstance(family, str) or family not in supported:
        raise BadBase(f"model_type {str(family)[:40]!r} is not supported; these are: {', '.join(supported)}")
    if config.get("architectures") != [ARCHITECTURES[family].class_name]:
        raise BadBase(f'architectures must be ["{ARCHITECTURES[family].class_name}"]')
    return family


def _dtype(headers: Mapping[str, Header]) -> str:
    sizes: dict[str, int] = {}
    for header in headers.values():
        for tensor in header.tensors:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.end - tensor.begin
    names = {short: name for name, short in DTYPE_NAMES.items()}
    if strange := sorted(sizes.keys() - names.keys()):
        raise BadBase(f"the weights hold {strange[0]}; only {', '.join(names)} are accepted (no quantised weights)")
    return names[max(sizes, key=lambda dtype: sizes[dtype])]


def _document(name: str, data: bytes) -> dict[str, Any]:
    if len(data) > MAX_DOCUMENT_BYTES:
        raise BadBase(f"{name} is larger than {MAX_DOCUMENT_BYTES} bytes")
    try:
        document = strict_json.loads(data)
    except ValueError as error:
        raise BadBase(f"{name} is {error}") from None
    if not isinstance(document, dict):
        raise BadBase(f"{name} must hold one object")
    # The index names tensors and files only; they are checked against the headers.
    for key, value in _fields(document) if name != INDEX_FILE else ():
        if key in _FORBIDDEN and value:
            raise BadBase(f"{name} sets {key}, which is refused: no code and no other weight format is loaded")
        if (
            name == CONFIG_FILE
            and key not in _FREE_TEXT
            and isinstance(value, str)
            and not _CONFIG_TEXT.fullmatch(value)
        ):
            raise BadBase(f"{name} sets {key[:80]} to text with unexpected characters")
    return document


def _fields(value: Any, key: str = "") -> Iterable[tuple[str, Any]]:
    """Every (name, value) in nested JSON; items of a list go by the list's name."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield name, item
            yield from _fields(item, name)
    elif isinstance(value, list):
        for item in value:
            if not isinstance(item, (dict, list)):
                yield key, item
            yield from _fields(item, key)
