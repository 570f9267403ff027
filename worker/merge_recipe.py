"""The merge recipe that a training child leaves beside its adapter: read with distrust, kept with the version."""

import hashlib
from pathlib import Path

from lora_core.errors import LoraError
from lora_core.gate import read_adapter_header
from lora_core.recipe import Recipe
from worker.errors import JobFailed

RECIPE_FILE = "merge_recipe.json"
_MAX_BYTES = 64 * 2**20


def read_recipe(out: Path) -> str | None:
    """The recipe in `out` as canonical JSON, if there is one; JobFailed unless it uses just the adapter's tensors."""
    path = out / RECIPE_FILE
    if not path.is_symlink() and not path.exists():
        return None
    if path.is_symlink() or not path.is_file() or path.stat().st_size > _MAX_BYTES:
        raise JobFailed("bug", "invalid_output", "The child process left a merge recipe that is not a plain file.")
    try:
        recipe = Recipe.from_json(path.read_bytes())
    except LoraError as error:
        raise JobFailed("bug", "invalid_output", "The child process left a merge recipe that is none.") from error
    used = set().union(*(tensor.adapter_tensors() for tensor in recipe.tensors.values()))
    if used != {tensor.name for tensor in read_adapter_header(out).tensors if 0 not in tensor.shape}:
        raise JobFailed("bug", "invalid_output", "The child process left a merge recipe of another adapter.")
    return recipe.to_json().decode()


def digest_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
