"""A merge job from claim to published files."""

from pathlib import Path
from typing import Any

from lora_core.base import is_base_file
from lora_core.digest import folder_digest
from lora_core.merge_report import FileReport
from registry.db import transaction
from registry.failpoints import hit
from registry.jobs.inputs import MergeInputs, merge_inputs
from registry.jobs.publish import publish_merge
from registry.jobs.spec import MergeOptions
from registry.models import Job
from worker.attempt import Attempt
from worker.certificate import Canary, read_canary, read_certificate, write_canary
from worker.errors import JobFailed
from worker.heart import Heart
from worker.host import Host
from worker.inputs import fetch_base, fetch_file, read_inputs
from worker.merge_recipe import RECIPE_FILE
from worker.protocol import ResultMessage
from worker.publish import TOKENIZER_FILES, OutputFile, conclude, store_outputs
from worker.run_task import run_task
from worker.task import OUT, CanaryTask, MergeTask


def run_merge(host: Host, attempt: Attempt, heart: Heart, job: Job, workspace: Path) -> None:
    """Fetch base and adapter, merge them in a child process, store and publish the files."""
    inputs = read_inputs(host, attempt, job, merge_inputs)
    attempt.news.phase("fetching")
    base_dir = fetch_base(host, attempt, inputs.version.base)
    adapter_dir = workspace / "adapter"
    adapter_dir.mkdir()
    for file in inputs.version.files:
        fetch_file(host, attempt, file, adapter_dir / file.path)
    recipe_file = None
    if inputs.version.recipe is not None:
        recipe_file = workspace / RECIPE_FILE
        recipe_file.write_text(inputs.version.recipe)
    options = MergeOptions.model_validate(inputs.spec.model_dump(exclude={"version_id"}))
    task = MergeTask(base_dir=base_dir, adapter_dir=adapter_dir, recipe_file=recipe_file, options=options)
    result = run_task(host, attempt, task, workspace, base_digest=inputs.version.base.digest)
    hit("merge.merged")
    compare(host, attempt, task, workspace, base_digest=inputs.version.base.digest)
    _publish(host, attempt, heart, inputs, workspace=workspace, result=result)


def _publish(
    host: Host, attempt: Attempt, heart: Heart, inputs: MergeInputs, *, workspace: Path, result: ResultMessage
) -> None:
    attempt.news.phase("publishing")
    out = workspace / OUT
    certificate, told = read_certificate(workspace)
    canary = read_canary(workspace)
    attempt.news.note(tell(canary), level="info" if canary.run else "warn")
    files = merged_files(out, told)
    blobs = store_outputs(host, attempt, out, files)
    report = make_report(inputs, files, result) | certificate | {"canary": canary.model_dump()}

    def publish() -> None:
        with transaction(host.sessions) as session:
            publish_merge(
                session,
                job_id=attempt.job_id,
                fence=attempt.fence,
                files=blobs,
                digest=folder_digest({file.path: file.sha256 for file in files}),
                report=report,
            )
            hit("merge.before_commit")
        hit("merge.after_commit")

    conclude(attempt, heart, publish)


def compare(host: Host, attempt: Attempt, task: MergeTask, workspace: Path, *, base_digest: str) -> None:
    """Have the merged model compared with what it was made of; a machine that is too small for that says so. If there
    was no comparison while idle training processes held memory, once more without them."""
    if not _is_compared(host, attempt, task, workspace, base_digest) and host.warm.clear():
        _is_compared(host, attempt, task, workspace, base_digest)


def _is_compared(host: Host, attempt: Attempt, task: MergeTask, workspace: Path, base_digest: str) -> bool:
    try:
        run_task(host, attempt, CanaryTask(merge=task), workspace, base_digest=base_digest)
    except JobFailed as failure:
        if failure.error_class not in ("oom", "host_oom"):
            raise
        write_canary(workspace, Canary(run=False, reason="the machine ran out of memory"))
    return read_canary(workspace).run


def tell(canary: Canary) -> str:
    """The comparison in a sentence."""
    if not canary.run:
        return f"The merged model was not compared with base and adapter: {canary.reason}."
    same = f"{len(canary.prompts)} canary prompts"
    return f"On {same} the merged model says what base and adapter say (KL {canary.kl:.2g} nats at the median token)."


def merged_files(out: Path, told: list[FileReport]) -> list[OutputFile]:
    """The files of `out` by name, none other than those that were told of; JobFailed otherwise, and for what does not
    belong into a model. Their digests were taken as they were written, and are compared once more as they are stored.
    """
    found = {} if out.is_symlink() or not out.is_dir() else {path.name: path for path in out.iterdir()}
    files = sorted((OutputFile(file.path, file.size, file.sha256) for file in told), key=lambda file: file.path)
    is_model = all(map(is_base_file, found)) and any(name.endswith(".safetensors") for name in found)
    if not is_model or [file.path for file in files] != sorted(found):
        raise JobFailed("bug", "invalid_output", "The merge left files that are not a model.")
    for file in files:
        path = found[file.path]
        if path.is_symlink() or not path.is_file() or path.stat().st_size != file.size:
            raise JobFailed("bug", "invalid_output", f"The merge did not leave the file {file.path} it told of.")
    return files


def make_report(inputs: MergeInputs, files: list[OutputFile], result: ResultMessage) -> dict[str, Any]:
    """What the merge did, in numbers, and from what."""
    return {
        "adapter": inputs.version.ref,
        "base_model": inputs.version.base.name,
        "base_digest": inputs.version.base.digest,
        "dtype": inputs.spec.dtype,
        "scale": inputs.spec.scale,
        "shard_size": inputs.spec.shard_size,
        "bytes": sum(file.size for file in files),
        "tokenizer": {file.path: file.sha256 for file in files if file.path in TOKENIZER_FILES},
        **result.metrics,
    }
