"""The canary task, in the child process: whether the merged model says what base and adapter say together."""

import shutil
import traceback
from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch

from lora_core.base import check_base
from lora_core.canary import PROMPTS, compare
from lora_core.errors import LoraError, NotFaithful
from lora_core.faithful import why_unfaithful
from lora_core.merge import merge
from lora_core.merge_options import Start
from worker.certificate import Canary, write_canary
from worker.memory import available_bytes
from worker.merge_child import dtype_of, read_or_make_recipe
from worker.protocol import ResultMessage, StepMessage
from worker.reporter import Reporter
from worker.task import OUT, CanaryTask

# float32 numbers of one model, and room for a shard and the logits.
_BYTES_PER_PARAMETER = 4 * 1.25


def compare_merge(task: CanaryTask, workspace: Path, reporter: Reporter) -> ResultMessage:
    """Write the comparison, or why there is none. NotFaithful if the merge must not be published."""
    answers = PROMPTS * (4 if task.merge.options.start == "original" else 7)
    reporter.phase("comparing", total_steps=answers)
    answered = count(1)

    def tell() -> None:  # also that this process is at work
        reporter.step(StepMessage(step=next(answered), total_steps=answers))

    write_canary(workspace, _compare(task, workspace, tell))
    return ResultMessage()


def _compare(task: CanaryTask, workspace: Path, on_answer: Callable[[], None]) -> Canary:
    options = task.merge.options
    try:
        if reason := _lacks_memory(task.merge.base_dir):
            return Canary(run=False, reason=reason)
        merged: dict[Start, Path] = {options.start: workspace / OUT}
        if options.start == "nf4":
            merged["original"] = _merge_original(task, workspace / "original")
        found = compare(
            task.merge.base_dir,
            task.merge.adapter_dir,
            merged,
            start=options.start,
            scale=options.scale,
            on_answer=on_answer,
        )
    except NotFaithful:
        raise
    except LoraError as error:  # of the base or the adapter, which a merge can do with and torch here cannot
        traceback.print_exc()
        return Canary(run=False, reason=error.message[:2000])
    except (MemoryError, torch.OutOfMemoryError):
        return Canary(run=False, reason="the model did not fit into memory")
    finally:
        shutil.rmtree(workspace / "original", ignore_errors=True)
    if verdict := why_unfaithful(found, check_base(workspace / OUT).dtype):
        raise NotFaithful(verdict)
    return Canary.of(found)


def _merge_original(task: CanaryTask, out: Path) -> Path:
    """The same merge into the base as it is stored, to state the loss of both."""
    plain = task.merge.model_copy(update={"options": task.merge.options.model_copy(update={"start": "original"})})
    merge(
        plain.base_dir,
        plain.adapter_dir,
        out,
        recipe=read_or_make_recipe(plain),
        dtype=dtype_of(plain.options),
        scale=plain.options.scale,
    )
    return out


def _lacks_memory(base_dir: Path) -> str | None:
    needed = check_base(base_dir).parameter_count * _BYTES_PER_PARAMETER
    free = available_bytes()
    if free is None or needed <= free:
        return None
    return f"it takes about {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB were free"
