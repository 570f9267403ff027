"""`torchrun … -m lora_core.launch`: train one adapter in all processes of a group, on one machine or on several.

Every machine has the same base and the same rows; the first process alone reads and writes checkpoints and the adapter.
"""

import argparse
import hashlib
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from lora_core import distributed
from lora_core.adapter import save_adapter
from lora_core.checkpoint import DOCUMENT_FILE, Fingerprint, differences
from lora_core.data import tokenize_rows
from lora_core.digest import folder_digest
from lora_core.dpo import DPO, tokenize_preferences
from lora_core.errors import BadConfig, LoraError
from lora_core.fingerprint import take_fingerprint
from lora_core.gate import check_adapter
from lora_core.inject import inject
from lora_core.launch_options import lora_config, parse_options, train_config
from lora_core.model import load_base
from lora_core.rows import read_rows
from lora_core.sharding import shard_base
from lora_core.state import TrainState, load_checkpoint, save_checkpoint
from lora_core.task import default_task
from lora_core.train import StepReport, TrainResult, train


def main(arguments: Sequence[str] | None = None) -> None:
    """The program. What is wrong with what it was given ends it with a sentence."""
    try:
        run(arguments)
    except LoraError as error:
        sys.exit(f"lora_core.launch: {error.message}")


def run(arguments: Sequence[str] | None = None) -> TrainResult:
    """Join the group that torchrun is starting, if any, and train. LoraError if the options cannot be done."""
    options = parse_options(arguments)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if "RANK" not in os.environ or dist.is_initialized():
        return launch(options, device)
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # https://github.com/pytorch/pytorch/issues/167288: those that start again look for those that are gone
        raise BadConfig("--max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    result = launch(options, device)
    dist.destroy_process_group()  # not after an error: the others may be waiting in the midst of a sum
    return result


def launch(options: argparse.Namespace, device: torch.device) -> TrainResult:
    """Train in this process's place in the group; the first one saves the adapter."""
    lora, config = lora_config(options), train_config(options)
    sharded = options.sharding == "full"
    model, tokenizer = load_base(options.base, options.dtype, device="cpu" if sharded else str(device))
    inject(model, lora, seed=config.seed)
    if sharded:
        shard_base(model, device=device)
    prefers = options.method == "dpo"
    task = DPO(options.beta) if prefers else default_task(model, packing=config.packing)
    read = partial(tokenize_preferences if prefers else tokenize_rows, tokenizer, max_length=options.max_length)
    examples, held_out = (_examples(read, path) for path in (options.rows, options.eval_rows))
    # What fits into memory is not part of what makes it this run.
    identity = replace(config, tokens_per_batch=1)
    fingerprint = take_fingerprint(model, examples, identity, base_digest=_base_digest(options.base), task=task)
    _require_one_run(fingerprint)
    state = distributed.from_first(lambda: _newest(options.checkpoints, fingerprint, config.tokens_per_batch))
    result = train(
        model,
        examples,
        config,
        task=task,
        eval_examples=held_out,
        on_step=_tell,
        resume_from=state,
        on_checkpoint=lambda state: _keep(options.checkpoints, state, fingerprint),
        should_checkpoint=lambda report: options.checkpoints is not None and report.step % options.save_steps == 0,
    )
    if distributed.rank() == 0:
        save_adapter(model, lora, options.out)
        check_adapter(options.out)
    return result


def _examples(read: Any, path: Path | None) -> Any:
    if path is None:
        return None
    with path.open("rb") as lines:
        return read(read_rows(lines)).examples


def _base_digest(base: Path) -> str:
    """Of the base's files. Each machine reads its own once; BadConfig if they differ."""
    mine = None
    if os.environ.get("LOCAL_RANK", "0") == "0":
        files = {path.name: path for path in sorted(base.iterdir()) if path.is_file()}
        mine = folder_digest({name: _sha256(path) for name, path in files.items()})
    digests = {digest for digest in distributed.gathered(mine) if digest is not None}
    if len(digests) > 1:
        raise BadConfig("the machines do not have the same base model")
    return digests.pop()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_one_run(fingerprint: Fingerprint) -> None:
    """BadConfig unless all processes are about to train the same: their sums would mean nothing."""
    inputs = distributed.gathered(dict(fingerprint.inputs))
    if other := sorted({name for found in inputs for name in found if found[name] != inputs[0][name]}):
        raise BadConfig(f"the processes were not given the same run: they differ in {', '.join(other)}")


def _newest(folder: Path | None, fingerprint: Fingerprint, tokens_per_batch: int) -> TrainState | None:
    """What to go on from, with at most `tokens_per_batch` in memory. CheckpointMismatch if it is of another run."""
    steps = _steps(folder)
    if not steps:
        return None
    state, saved = load_checkpoint(steps[-1])
    changed = differences(saved, fingerprint)
    before = state.tokens_per_batch or tokens_per_batch
    if before > tokens_per_batch:
        state = replace(state, tokens_per_batch=tokens_per_batch)
        changed.append(f"tokens_per_batch {before} → {tokens_per_batch}")
    exact = f"with other bits: {'; '.join(changed)}" if changed else "with the same bits"
    _say(f"goes on after step {state.step}, {exact}")
    return state


def _keep(folder: Path, state: TrainState, fingerprint: Fingerprint) -> None:
    """Save it, then remove those before it."""
    folder.mkdir(parents=True, exist_ok=True)
    before = _steps(folder)
    save_checkpoint(folder / str(state.step), state, fingerprint)
    for path in before:
        shutil.rmtree(path)


def _steps(folder: Path | None) -> list[Path]:
    """The checkpoints in `folder`, the newest last."""
    found = [path.parent for path in folder.glob(f"*/{DOCUMENT_FILE}")] if folder else []
    return sorted((path for path in found if path.name.isdecimal()), key=lambda path: int(path.name))


def _tell(report: StepReport) -> None:
    loss = f"loss {report.loss:.4f}" + (f", held out {report.eval_loss:.4f}" if report.eval_loss is not None else "")
    _say(f"step {report.step}/{report.total_steps}: {loss}")


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201  what a program on a command line is for


if __name__ == "__main__":
    main()
