"""From files in a child's `out/` to a published result: check, hash, store, and one fenced transaction."""

import math
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version as library_version
from pathlib import Path
from typing import Any

from lora_core.adalora_config import AdaLoraConfig
from lora_core.config import LoraConfig
from lora_core.config import scaling as scaling_of
from lora_core.errors import LoraError, NonFinite
from lora_core.gate import CONFIG_FILE, WEIGHTS_FILE, AdapterFacts, check_adapter
from registry.blobs import store_file
from registry.db import transaction
from registry.failpoints import hit
from registry.jobs.inputs import BaseInput, TrainInputs
from registry.jobs.publish import publish_version
from registry.jobs.spec import LoraSpec
from registry.storage.digests import digest_file
from worker.attempt import Attempt
from worker.errors import JobFailed
from worker.heart import Heart
from worker.host import Host
from worker.merge_recipe import digest_text, read_recipe
from worker.outages import persist, transfer
from worker.protocol import ResultMessage

ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE)
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
TOKENIZER_FILES = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file the child made, as we found it."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """What may be published of a checkpoint: the manifest of its adapter, and its merge recipe, if it has one."""

    manifest: dict[str, Any]
    merge_recipe: str | None


def publish_adapter(
    host: Host, attempt: Attempt, heart: Heart, inputs: TrainInputs, *, out: Path, result: ResultMessage
) -> None:
    """Publish the adapter in `out` as the next version and end the job."""
    attempt.news.phase("publishing")
    files = [describe(out, name) for name in ADAPTER_FILES]
    hit("pub.hashed")
    check_trained(out, inputs)
    hit("pub.validated")
    recipe = read_recipe(out)
    blobs = store_outputs(host, attempt, out, files)
    manifest = make_manifest(inputs, files, result, recipe)

    def publish() -> None:
        with transaction(host.sessions) as session:
            publish_version(
                session,
                job_id=attempt.job_id,
                fence=attempt.fence,
                files=blobs,
                manifest=manifest,
                metrics=dict(result.metrics),
                trained_tokens=result.trained_tokens,
                merge_recipe=recipe,
            )
            hit("pub.before_commit")
        hit("pub.after_commit")

    conclude(attempt, heart, publish)


def check_trained(out: Path, inputs: TrainInputs) -> None:
    """The gate: a whole, finite adapter of the base and the shape that was asked for; JobFailed otherwise."""
    try:
        facts = check_adapter(out)
    except NonFinite as error:
        raise JobFailed("diverged", "training_diverged", f"{error.message}. Try a lower learning rate.") from error
    except (LoraError, OSError) as error:
        message = "Training ended without a usable adapter; the worker's log has the details."
        raise JobFailed("bug", "invalid_adapter", message) from error
    asked = inputs.spec.lora
    same = facts.config.base_model_name_or_path == inputs.base.name and facts.config.use_rslora == asked.use_rslora
    if not same or not (_has_ranks_left(facts, asked) if asked.adalora else _has_rank(facts.config, asked)):
        raise JobFailed("bug", "invalid_adapter", "Training made another adapter than the one that was asked for.")


def _has_rank(config: LoraConfig, asked: LoraSpec) -> bool:
    """Whether rank and scaling are those that were asked for."""
    ranks = (asked.r, 2 * asked.r) if asked.may_double() else (asked.r,)
    scaling = scaling_of(config.lora_alpha, config.r, use_rslora=config.use_rslora)
    wanted = scaling_of(asked.lora_alpha, asked.r, use_rslora=asked.use_rslora)
    return config.r in ranks and math.isclose(scaling, wanted)


def _has_ranks_left(facts: AdapterFacts, asked: LoraSpec) -> bool:
    """Whether it is a plain LoRA of no more ranks than AdaLoRA began with."""
    plain = not isinstance(facts.config, AdaLoraConfig)
    return plain and all(r <= asked.r for _, r, _ in facts.modules.values())


def describe_adapter(inputs: TrainInputs, folder: Path, metrics: Mapping[str, float]) -> SavedAdapter | None:
    """The adapter that lies beside a checkpoint; None if the gate would not let it pass."""
    try:
        files = [describe(folder, name) for name in ADAPTER_FILES]
        check_trained(folder, inputs)
        recipe = read_recipe(folder)
    except JobFailed:
        return None
    return SavedAdapter(make_manifest(inputs, files, ResultMessage(metrics=dict(metrics)), recipe), recipe)


def describe(out: Path, name: str) -> OutputFile:
    """Size and digest of one plain file directly in `out`. Links, pipes and folders are refused: a child made it."""
    path = out / name
    if out.is_symlink() or path.is_symlink() or not path.is_file():
        raise JobFailed("bug", "invalid_output", f"The child process did not leave a file {name}.")
    sha256, size = digest_file(path)
    return OutputFile(name, size, sha256)


def store_outputs(host: Host, attempt: Attempt, out: Path, files: Sequence[OutputFile]) -> dict[str, uuid.UUID]:
    """Upload the files under keys that only this attempt knows; path → blob. Outages are waited out."""
    blobs = {}
    for file in files:
        attempt.check()
        store = partial(store_output, host, attempt, out, file)
        blobs[file.path] = transfer(store, attempt, f"storing {file.path} of {attempt}")
    return blobs


def store_output(host: Host, attempt: Attempt, out: Path, file: OutputFile) -> uuid.UUID:
    """Upload one file; its blob belongs to this attempt."""
    return store_file(
        host.sessions,
        host.store,
        out / file.path,
        sha256=file.sha256,
        size=file.size,
        tenant_id=attempt.tenant_id,
        job_id=attempt.job_id,
        fence=attempt.fence,
    )


def conclude(attempt: Attempt, heart: Heart, publish: Callable[[], None]) -> None:
    """Deliver the last news and run the transaction that ends the job, through outages.

    A worker that has not been heard for a lease asks who owns the job before it writes: the beat says so cheaply."""
    persist(heart.beat, attempt.wait, f"the last heartbeat of {attempt}")

    def write() -> None:
        if not attempt.is_trusted():
            heart.beat()
        attempt.check()
        heart.conclude(publish)

    persist(write, attempt.wait, f"publishing {attempt}")


def make_manifest(
    inputs: TrainInputs, files: Sequence[OutputFile], result: ResultMessage, recipe: str | None
) -> dict[str, Any]:
    """Everything that decided these bytes, as JSON."""
    return {
        "files": [asdict(file) for file in files],
        "base_model": _base_of(inputs.base),
        "training_data": {"sha256": inputs.training.sha256, "size": inputs.training.size},
        "validation_data": None
        if inputs.validation is None
        else {"sha256": inputs.validation.sha256, "size": inputs.validation.size},
        "spec": inputs.spec.model_dump(mode="json"),
        "seed": inputs.spec.seed,
        "metrics": dict(result.metrics),
        "merge_recipe": recipe and {"sha256": digest_text(recipe)},
        "libraries": {"python": sys.version.split()[0], **{name: library_version(name) for name in LIBRARIES}},
    }


def _base_of(base: BaseInput) -> dict[str, Any]:
    return {
        "name": base.name,
        "revision": base.revision,
        "digest": base.digest,
        "tokenizer": {file.path: file.sha256 for file in base.files if file.path in TOKENIZER_FILES},
    }
