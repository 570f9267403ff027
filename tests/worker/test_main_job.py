"""The real trainer and the real merge under the real worker: what comes out, others can load."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from sqlalchemy import select
from transformers import AutoModelForCausalLM

from lora_core.merge import merge as fold
from lora_core.plan import plan_merge
from lora_core.recipe import Recipe
from registry.db import transaction
from registry.jobs.lease import claim
from registry.jobs.publish import publish_version
from registry.jobs.spec import MergeOptions
from registry.merges import request_merge
from registry.models import Alias, Merge, MergeFile, Version, VersionFile
from tests.worker.conftest import StartWorker
from tests.worker.depot import BASE_NAME, Depot, metrics_of, upload, wait_until

APP = "worker.app"


def download(depot: Depot, rows: list[Any], folder: Path) -> Path:
    folder.mkdir()
    for row in rows:
        depot.store.fetch(row.blob.key, folder / row.path, sha256=row.blob.sha256, size=row.blob.size)
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 40).unsqueeze(0)).logits


def test_a_job_becomes_an_adapter_and_a_merge_that_others_load(
    depot: Depot, start_worker: StartWorker, base_dir: Path, tmp_path: Path
) -> None:
    start_worker(APP)
    job_id = depot.submit(n_epochs=4)
    wait_until(lambda: depot.job(job_id).state == "succeeded", seconds=120)
    with transaction(depot.sessions) as session:
        version = session.scalars(select(Version)).one()
        files = list(session.scalars(select(VersionFile)))
        recipe = version.merge_recipe
        merge, _ = request_merge(session, version=version, options=MergeOptions())
    assert recipe is not None
    assert version.manifest["merge_recipe"] == {"sha256": hashlib.sha256(recipe.encode()).hexdigest()}
    assert len(Recipe.from_json(recipe.encode()).tensors) == 4
    check_records(depot, version, files)

    base = AutoModelForCausalLM.from_pretrained(base_dir)
    plain = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, download(depot, files, tmp_path / "adapter")))
    assert not torch.allclose(plain, adapted, atol=1e-3)

    wait_until(lambda: depot.job(merge.job_id).state == "succeeded", seconds=120)
    with transaction(depot.sessions) as session:
        merged_files = list(session.scalars(select(MergeFile)))
        done = session.scalars(select(Merge)).one()
    assert done.digest
    assert done.report is not None
    assert done.report["merged_tensors"] == 4
    check_certificate(done.report, {file.path: file.blob.sha256 for file in merged_files})
    merged = AutoModelForCausalLM.from_pretrained(download(depot, merged_files, tmp_path / "merged"))
    torch.testing.assert_close(logits(merged), adapted, atol=1e-5, rtol=1e-5)


def test_an_adapter_of_many_kinds_of_layers_goes_the_same_way(
    depot: Depot, start_worker: StartWorker, base_dir: Path, tmp_path: Path
) -> None:
    start_worker(APP)
    lora = {
        "r": 4,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "exclude_modules": ["layers.0.mlp.down_proj"],
        "rank_pattern": {"v_proj": 2},
        "modules_to_save": ["lm_head"],
        "trainable_token_indices": [40, 41],
        "use_dora": True,
    }
    job_id = depot.submit(lora=lora, loraplus_lr_ratio=4.0)
    wait_until(lambda: depot.job(job_id).state in {"succeeded", "failed"}, seconds=120)
    assert depot.job(job_id).state == "succeeded", depot.job(job_id).error_message
    with transaction(depot.sessions) as session:
        version = session.scalars(select(Version)).one()
        files = list(session.scalars(select(VersionFile)))
        merge, _ = request_merge(session, version=version, options=MergeOptions(dtype="float32"))
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    adapted = logits(PeftModel.from_pretrained(base, download(depot, files, tmp_path / "adapter")))
    wait_until(lambda: depot.job(merge.job_id).state in {"succeeded", "failed"}, seconds=120)
    assert depot.job(merge.job_id).state == "succeeded", depot.job(merge.job_id).error_message
    with transaction(depot.sessions) as session:
        merged_files = list(session.scalars(select(MergeFile)))
        report = session.scalars(select(Merge)).one().report
    merged = AutoModelForCausalLM.from_pretrained(download(depot, merged_files, tmp_path / "merged"))
    torch.testing.assert_close(logits(merged), adapted, atol=1e-4, rtol=1e-4)
    assert report is not None
    assert report["canary"]["run"]


def check_certificate(report: dict[str, Any], digests: dict[str, str]) -> None:
    """Each changed tensor with what rounding left of its change; nothing here is tied; the tokenizer is the base's."""
    assert len(report["tensors"]) == 4
    for tensor in report["tensors"]:
        assert "q_proj" in tensor["name"] or "v_proj" in tensor["name"]
        assert 0 < tensor["relative_delta"] < 1
        assert 0 < tensor["rounding_loss"] < 1e-3
        assert tensor["cosine"] > 0.999
        assert tensor["changed_share"] > 0.9
    assert (report["unmatched_keys"], report["untied"]) == (0, False)
    canary = report["canary"]
    assert (canary["run"], canary["reason"], len(canary["prompts"])) == (True, None, 10)
    assert canary["kl"] < 1e-9 < canary["effect_kl"]
    assert min(prompt["top1_agreement"] for prompt in canary["prompts"]) == 1
    assert canary["losses"]["merged_original"] < canary["losses"]["base"]
    assert report["tokenizer"] == {
        name: sha256 for name, sha256 in digests.items() if "token" in name or "chat" in name
    }


def test_a_merge_has_the_scale_and_the_shards_that_were_asked_for(
    depot: Depot, start_worker: StartWorker, base_dir: Path, tmp_path: Path
) -> None:
    start_worker(APP)
    job_id = depot.submit()
    wait_until(lambda: depot.job(job_id).state == "succeeded", seconds=120)
    with transaction(depot.sessions) as session:
        version = session.scalars(select(Version)).one()
        options = MergeOptions(dtype="float32", scale=0.25, shard_size=2**16)
        merge, _ = request_merge(session, version=version, options=options)
        files = list(session.scalars(select(VersionFile)))
    wait_until(lambda: depot.job(merge.job_id).state == "succeeded", seconds=120)
    with transaction(depot.sessions) as session:
        made = list(session.scalars(select(MergeFile)))
        report = session.scalars(select(Merge)).one().report
    adapter = download(depot, files, tmp_path / "adapter")
    fold(base_dir, adapter, tmp_path / "expected", dtype="float32", scale=0.25, shard_size=2**16)
    expected = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "expected").iterdir()}
    assert {file.path: file.blob.sha256 for file in made} == expected
    assert len([path for path in expected if path.endswith(".safetensors")]) > 1
    assert report is not None
    assert (report["scale"], report["shard_size"]) == (0.25, 2**16)


def test_a_merge_that_is_not_its_adapter_is_not_published(
    depot: Depot, start_worker: StartWorker, base_dir: Path, adapter_dir: Path
) -> None:
    """By a recipe that scales one of the changes twice as much as the adapter's configuration says."""
    recipe = plan_merge(base_dir, adapter_dir).recipe
    name, tensor = next(iter(recipe.tensors.items()))
    doubled = replace(tensor, terms=tuple(replace(term, scaling=2 * term.scaling) for term in tensor.terms))
    wrong = replace(recipe, tensors={**recipe.tensors, name: doubled})
    version = publish(depot, adapter_dir, wrong)
    with transaction(depot.sessions) as session:
        merge, _ = request_merge(session, version=version, options=MergeOptions(dtype="float32"), alias="prod")
    start_worker(APP)
    wait_until(lambda: depot.job(merge.job_id).state == "failed", seconds=120)
    job = depot.job(merge.job_id)
    assert (job.error_class, job.error_code, job.attempt) == ("user", "merge_not_faithful", 1)
    assert "does not say what base and adapter say" in (job.error_message or "")
    with transaction(depot.sessions) as session:
        assert session.scalars(select(MergeFile)).all() == []
        assert session.scalars(select(Merge)).one().report is None
        assert session.scalars(select(Alias)).all() == []


def publish(depot: Depot, adapter: Path, recipe: Recipe) -> Version:
    """The adapter as a version, without any training."""
    job_id = depot.submit()
    with transaction(depot.sessions) as session:
        job = claim(session, queues=["default"], worker="test", lease_seconds=60)
        assert job is not None
        fence = job.fence or 0
    files = {path.name: upload(depot, path, "fine-tune").blob_id for path in sorted(adapter.iterdir())}
    with transaction(depot.sessions) as session:
        publish_version(
            session,
            job_id=job_id,
            fence=fence,
            files=files,
            manifest={},
            metrics=None,
            trained_tokens=None,
            merge_recipe=recipe.to_json().decode(),
        )
    return depot.versions()[0]


def check_records(depot: Depot, version: Version, files: list[VersionFile]) -> None:
    """Version, manifest, events and job tell the same story."""
    assert (version.adapter.name, version.version) == ("support-bot", 1)
    manifest = version.manifest
    assert {file["path"]: file["sha256"] for file in manifest["files"]} == {f.path: f.blob.sha256 for f in files}
    assert manifest["base_model"]["name"] == BASE_NAME
    assert manifest["base_model"]["digest"] == depot.base.digest
    assert manifest["libraries"]["torch"]
    assert depot.job(version.job_id).trained_tokens
    points = metrics_of(depot.events(version.job_id))
    assert [points[0]["step"], points[-1]["step"]] == [1, 8]
    assert points[-1]["train_loss"] < points[0]["train_loss"]
