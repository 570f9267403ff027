"""The merge recipe of an adapter that was just trained. Made here, where transformers is: merges then need none."""

import traceback
from functools import lru_cache
from pathlib import Path

from lora_core import strict_json
from lora_core.errors import BadBase, LoraError
from lora_core.keymap import Keymap
from lora_core.keymap_torch import build_keymap
from lora_core.plan import plan_merge
from lora_core.shards import open_checkpoint
from worker.merge_recipe import RECIPE_FILE


def write_recipe(base_dir: Path, adapter_dir: Path) -> bool:
    """Write the recipe beside the adapter. False, and the reason in the log, if it cannot be merged: what was trained
    can be used all the same."""
    try:
        recipe = plan_merge(base_dir, adapter_dir, keymap=_keymap(base_dir)).recipe
    except LoraError:
        traceback.print_exc()
        return False
    (adapter_dir / RECIPE_FILE).write_bytes(recipe.to_json())
    return True


@lru_cache(maxsize=1)  # every checkpoint of a run asks for it
def _keymap(base_dir: Path) -> Keymap | None:
    """None for a checkpoint that transformers cannot account for in full: its names may still tell enough."""
    config = strict_json.loads((base_dir / "config.json").read_bytes())
    try:
        return build_keymap(config, open_checkpoint(base_dir).tensors())
    except BadBase:
        traceback.print_exc()
        return None
