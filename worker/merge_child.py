"""The merge task, in the child process. No torch: lora_core.merge works on numpy."""

import time
from pathlib import Path

from lora_core import strict_json
from lora_core.base import CONFIG_FILE
from lora_core.merge import Dtype, merge
from lora_core.merge_report import MergeReport
from lora_core.plan import from_nf4, plan_merge
from lora_core.recipe import Recipe
from lora_core.shards import open_checkpoint
from registry.jobs.spec import MergeOptions
from worker.certificate import write_certificate
from worker.protocol import ResultMessage, StepMessage
from worker.reporter import Reporter
from worker.task import OUT, MergeTask

REPORT_EVERY_SECONDS = 0.5


def merge_adapter(task: MergeTask, workspace: Path, reporter: Reporter) -> ResultMessage:
    """Write the merged model to `out/`. Steps are bytes."""
    reporter.phase("merging")
    last = time.monotonic()

    def on_progress(done: int, total: int) -> None:
        nonlocal last
        reporter.check()
        if time.monotonic() - last >= REPORT_EVERY_SECONDS or done == total:
            last = time.monotonic()
            reporter.step(StepMessage(step=done, total_steps=total))

    options = task.options
    recipe = read_or_make_recipe(task)
    report = merge(
        task.base_dir,
        task.adapter_dir,
        workspace / OUT,
        recipe=recipe,
        dtype=dtype_of(options),
        scale=options.scale,
        shard_size=options.shard_size,
        digests=True,
        on_progress=on_progress,
    )
    write_certificate(workspace, report, recipe.config_changes)
    return ResultMessage(metrics=summarize(report))


def dtype_of(options: MergeOptions) -> Dtype | None:
    """lora_core's word for it."""
    return None if options.dtype == "base" else options.dtype


def read_or_make_recipe(task: MergeTask) -> Recipe:
    """The version's own, or one by names; from the start that was asked for."""
    if task.recipe_file is None:
        recipe = plan_merge(task.base_dir, task.adapter_dir).recipe
    else:
        recipe = Recipe.from_json(task.recipe_file.read_bytes())
    if task.options.start == "original":
        return recipe
    config = strict_json.loads((task.base_dir / CONFIG_FILE).read_bytes())
    return from_nf4(recipe, open_checkpoint(task.base_dir).tensors(), config)


def summarize(report: MergeReport) -> dict[str, float]:
    """The report as numbers: how much the adapter changed, and how much of that rounding lost."""
    tensors = report.tensors
    return {
        "merged_tensors": len(tensors),
        "copied_tensors": report.copied_tensors,
        "max_relative_delta": max((tensor.relative_delta for tensor in tensors), default=0.0),
        "max_rounding_loss": max((tensor.rounding_loss for tensor in tensors), default=0.0),
    }
