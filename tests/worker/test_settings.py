"""Settings of jobs that change how training goes, from submit to what others load, under the real worker."""

import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from sqlalchemy import select
from transformers import AutoModelForCausalLM

from lora_core.adalora_config import AdaLoraConfig
from lora_core.checkpoint import CHECKPOINT_FILES
from lora_core.gate import CONFIG_FILE, WEIGHTS_FILE, check_adapter
from lora_core.model import load_base
from lora_core.task import packs
from registry.db import SessionFactory, transaction
from registry.jobs.checkpoints import newest_checkpoints
from registry.jobs.spec import MergeOptions, TrainSpec
from registry.merges import request_merge
from registry.models import Merge, MergeFile, Version, VersionFile
from registry.storage import ObjectStore
from tests.tiny import make_base, make_rows, write_jsonl
from tests.worker.conftest import StartWorker
from tests.worker.depot import BASE_NAME, LORA, Depot, make_depot, metrics_of, wait_until
from tests.worker.test_main_job import download, logits
from worker.adapter_child import goal_of, train_config
from worker.merge_recipe import RECIPE_FILE
from worker.reporter import Reporter
from worker.service import cpu_count
from worker.task import CHECKPOINTS, OUT, TrainTask
from worker.train_child import train_adapter

APP = "worker.app"


def trained(
    base_dir: Path, home: Path, *, rows: int = 8, threads: int = 1, checkpoint_seconds: float = 3600.0, **settings: Any
) -> str:
    """SHA-256 of the adapter that these settings make when nothing happens."""
    defaults = {"lora": LORA, "n_epochs": 2, "batch_size": 4, "max_length": 64, "learning_rate": 1e-2}
    home.mkdir()
    task = TrainTask(
        base_dir=base_dir,
        base_digest="0" * 64,
        base_model=BASE_NAME,
        revision=None,
        training_file=write_jsonl(home / "train.jsonl", make_rows(rows)),
        validation_file=None,
        spec=TrainSpec.model_validate({**defaults, **settings}),
        resume_from=None,
        checkpoint_seconds=checkpoint_seconds,
        threads=threads,
    )
    train_adapter(task, home, Reporter(os.open(os.devnull, os.O_WRONLY)))
    return hashlib.sha256((home / OUT / WEIGHTS_FILE).read_bytes()).hexdigest()


def succeeded(depot: Depot, job_id: uuid.UUID) -> None:
    wait_until(lambda: depot.job(job_id).state in {"succeeded", "failed"}, seconds=120)
    assert depot.job(job_id).state == "succeeded", depot.job(job_id).error_message


def merged_as_peft_says(depot: Depot, base_dir: Path, folder: Path) -> dict[str, Any]:
    """The configuration of the one adapter there is, once its stored merge says what PEFT makes of base and adapter."""
    with transaction(depot.sessions) as session:
        version = session.scalars(select(Version)).one()
        files = list(session.scalars(select(VersionFile)))
        merge, _ = request_merge(session, version=version, options=MergeOptions(dtype="float32"))
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    before = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, download(depot, files, folder / "adapter")))
    assert not torch.allclose(before, adapted, atol=1e-3)
    succeeded(depot, merge.job_id)
    with transaction(depot.sessions) as session:
        merged_files = list(session.scalars(select(MergeFile)))
        report = session.scalars(select(Merge)).one().report
    merged = AutoModelForCausalLM.from_pretrained(download(depot, merged_files, folder / "merged"))
    torch.testing.assert_close(logits(merged), adapted, atol=1e-4, rtol=1e-4)
    assert report is not None
    assert report["canary"]["run"]
    return json.loads((folder / "adapter" / CONFIG_FILE).read_bytes())


def test_a_run_that_no_longer_learns_ends_early_and_says_so(depot: Depot, start_worker: StartWorker) -> None:
    start_worker(APP)
    # the answers of one file are what the other unlearns
    rows = [{"prompt": f"Is {i} even?", "completion": " never" if i % 2 else " always"} for i in range(8)]
    turned = [{**row, "completion": " jumps over"} for row in rows]
    job_id = depot.submit(
        rows=rows, validation=turned, n_epochs=200, eval_steps=1, early_stopping_patience=2, learning_rate=0.03
    )
    succeeded(depot, job_id)
    with depot.sessions() as session:
        metrics = session.scalars(select(Version.metrics)).one()
    assert metrics is not None
    steps = int(metrics["steps"])
    assert (metrics["total_steps"], metrics["early_stopped"]) == (200, 1)
    assert 3 <= steps < 200
    assert metrics["best_valid_loss"] < metrics["valid_loss"]
    said = [event.message for event in depot.events(job_id) if event.type == "message"]
    (why,) = [message for message in said if "early" in message]
    assert why.startswith(f"Training ended early, after step {steps} of 200: 2 evaluations in a row")
    assert why.endswith(f"The adapter is that of step {steps}.")
    assert all("valid_loss" in point for point in metrics_of(depot.events(job_id)))


def test_a_run_that_ends_by_itself_does_not_say_early(depot: Depot, start_worker: StartWorker) -> None:
    start_worker(APP)
    job_id = depot.submit(validation=make_rows(4), early_stopping_patience=1000, activation_checkpointing=True)
    succeeded(depot, job_id)
    with depot.sessions() as session:
        metrics = session.scalars(select(Version.metrics)).one()
    assert metrics is not None
    assert metrics["steps"] == metrics["total_steps"] == 4
    assert "early_stopped" not in metrics


def test_what_saves_memory_changes_no_bit(base_dir: Path, tmp_path: Path) -> None:
    plain = trained(base_dir, tmp_path / "plain")
    assert trained(base_dir, tmp_path / "checkpointing", activation_checkpointing=True) == plain


def test_rows_share_a_row_only_where_that_is_asked_for(base_dir: Path) -> None:
    model, _ = load_base(base_dir)
    asked = [TrainSpec(), TrainSpec(packing=False), TrainSpec(method="dpo")]
    assert [packs(goal_of(spec, model)) for spec in asked] == [True, False, False]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eval_steps", 7),
        ("early_stopping_patience", 3),
        ("tokens_per_batch", 99),
        ("packing", False),
        ("activation_checkpointing", True),
    ],
)
def test_the_trainer_gets_what_the_job_says(name: str, value: Any) -> None:
    assert getattr(train_config(TrainSpec.model_validate({name: value})), name) == value


def test_experts_are_trained_published_and_merged(
    sessions: SessionFactory, store: ObjectStore, start_worker: StartWorker, tmp_path: Path
) -> None:
    base_dir = make_base(tmp_path / "mixtral", "mixtral")
    depot = make_depot(sessions, store, tmp_path, base_dir, name="tiny/mixtral")
    start_worker(APP)
    names = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    lora = {"r": 2, "target_modules": ["q_proj"], "target_parameters": names}
    succeeded(depot, depot.submit(lora=lora))
    config = merged_as_peft_says(depot, base_dir, tmp_path)
    assert (config["target_modules"], config["target_parameters"]) == (["q_proj"], names)


ADALORA = {"adalora": {"init_r": 6, "target_r": 2, "tinit": 2, "tfinal": 4}, "target_modules": ["q_proj", "v_proj"]}


def test_adalora_is_published_as_a_plain_lora_and_merged(
    depot: Depot, start_worker: StartWorker, base_dir: Path, tmp_path: Path
) -> None:
    start_worker(APP)
    succeeded(depot, depot.submit(lora=ADALORA, n_epochs=6))
    config = merged_as_peft_says(depot, base_dir, tmp_path)
    assert (config["peft_type"], config["use_rslora"]) == ("LORA", False)
    facts = check_adapter(tmp_path / "adapter")
    ranks = [r for _, r, _ in facts.modules.values()]
    # as many as the budget left, four modules with two each: those pruned away are not in the file
    assert sum(ranks) == 8
    assert max(ranks) <= 6


def test_an_interrupted_adalora_prunes_what_an_undisturbed_one_prunes(
    depot: Depot, start_worker: StartWorker, base_dir: Path, tmp_path: Path
) -> None:
    steps = 600
    lora = {**ADALORA, "adalora": {**ADALORA["adalora"], "tfinal": 10, "deltaT": 3}}
    spec = {"lora": lora, "n_epochs": steps // 2, "learning_rate": 1e-3, "max_length": 128, "batch_size": 8}
    job_id = depot.submit(**spec)
    worker = start_worker(APP)
    wait_until(lambda: (depot.job(job_id).progress or {}).get("step"), seconds=120)
    assert worker.terminate() == 0  # it saves first
    with depot.sessions() as session:
        (checkpoint,) = newest_checkpoints(session, job_id)
    assert 0 < checkpoint.step < steps
    start_worker(APP)
    succeeded(depot, job_id)
    said = [event.message for event in depot.events(job_id)]
    assert f"Resumed at step {checkpoint.step} (exact)." in said
    with depot.sessions() as session:
        (made,) = session.scalars(select(VersionFile).where(VersionFile.path == WEIGHTS_FILE))
        digest = made.blob.sha256
    undisturbed = trained(base_dir, tmp_path / "undisturbed", rows=16, threads=max(1, cpu_count() // 2), **spec)
    assert digest == undisturbed


def test_a_checkpoint_of_adalora_holds_a_plain_lora_that_the_gate_lets_through(base_dir: Path, tmp_path: Path) -> None:
    lora = {**ADALORA, "target_modules": ["q_proj"]}
    trained(base_dir, tmp_path / "run", lora=lora, checkpoint_seconds=1e-9, n_epochs=4)
    folders = sorted((tmp_path / "run" / CHECKPOINTS).iterdir())
    assert len(folders) == 8
    for folder in folders:
        facts = check_adapter(folder)
        assert not isinstance(facts.config, AdaLoraConfig)
        assert {path.name for path in folder.iterdir()} == {*CHECKPOINT_FILES, CONFIG_FILE, WEIGHTS_FILE, RECIPE_FILE}
