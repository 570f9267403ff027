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
from lora_core.adapter import load_adapter
from lora_core.base import check_base
from lora_core.checkpoint import CHECKPOINT_FILES
from lora_core.errors import BadConfig
from lora_core.gate import CONFIG_FILE, WEIGHTS_FILE, check_adapter
from lora_core.model import load_base
from lora_core.qlora import quantise_base
from lora_core.task import packs
from registry.db import SessionFactory, transaction
from registry.jobs.lora_check import quantised_layers
from registry.jobs.spec import MergeOptions, TrainSpec
from registry.merges import request_merge
from registry.models import Merge, MergeFile, Version, VersionFile
from registry.storage import ObjectStore
from tests.tiny import make_base, make_rows, write_jsonl
from tests.worker.conftest import StartWorker
from tests.worker.depot import BASE_NAME, LORA, Depot, make_depot, metrics_of, wait_until
from tests.worker.test_main_job import download, logits
from tests.worker.test_resume import adapter_digest, finished, saved, told
from worker.adapter_child import goal_of, train_config
from worker.merge_recipe import RECIPE_FILE
from worker.protocol import ResultMessage
from worker.reporter import Reporter
from worker.service import cpu_count
from worker.task import CHECKPOINTS, OUT, TrainTask
from worker.train_child import train_adapter

APP = "worker.app"
EVERY_STEP, NEVER = 1e-9, 3600.0


class Run:
    """A training in this process, as the trainer does it, in a folder of its own."""

    def __init__(
        self,
        base_dir: Path,
        home: Path,
        *,
        rows: int = 8,
        validation: list[dict[str, Any]] | None = None,
        threads: int = 1,
        checkpoint_seconds: float = NEVER,
        resume_from: Path | None = None,
        **settings: Any,
    ) -> None:
        home.mkdir()
        defaults = {"lora": LORA, "n_epochs": 2, "batch_size": 4, "max_length": 64, "learning_rate": 1e-2}
        self.home = home
        self.task = TrainTask(
            base_dir=base_dir,
            base_digest="0" * 64,
            base_model=BASE_NAME,
            revision=None,
            training_file=write_jsonl(home / "train.jsonl", make_rows(rows)),
            validation_file=None if validation is None else write_jsonl(home / "valid.jsonl", validation),
            spec=TrainSpec.model_validate({**defaults, **settings}),
            resume_from=resume_from,
            checkpoint_seconds=checkpoint_seconds,
            threads=threads,
        )

    def train(self) -> ResultMessage:
        return train_adapter(self.task, self.home, Reporter(os.open(self.home / "said", os.O_WRONLY | os.O_CREAT)))

    def adapter(self) -> str:
        """SHA-256 of what comes out."""
        self.train()
        return hashlib.sha256((self.home / OUT / WEIGHTS_FILE).read_bytes()).hexdigest()


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


def test_a_run_that_ends_by_itself_does_not_say_early(base_dir: Path, tmp_path: Path) -> None:
    run = Run(base_dir, tmp_path / "run", validation=make_rows(4), early_stopping_patience=1000)
    metrics = run.train().metrics
    assert metrics["steps"] == metrics["total_steps"] == 4
    assert metrics["best_valid_loss"] <= metrics["valid_loss"]
    assert "early_stopped" not in metrics
    assert b"early" not in (run.home / "said").read_bytes()


def test_what_saves_memory_changes_no_bit(base_dir: Path, tmp_path: Path) -> None:
    plain = Run(base_dir, tmp_path / "plain").adapter()
    assert Run(base_dir, tmp_path / "checkpointing", activation_checkpointing=True).adapter() == plain


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


def test_a_checkpoint_of_adalora_holds_a_plain_lora_that_the_gate_lets_through(base_dir: Path, tmp_path: Path) -> None:
    lora = {**ADALORA, "target_modules": ["q_proj"]}
    Run(base_dir, tmp_path / "run", lora=lora, checkpoint_seconds=EVERY_STEP, n_epochs=4).train()
    folders = sorted((tmp_path / "run" / CHECKPOINTS).iterdir())
    assert len(folders) == 8
    for folder in folders:
        facts = check_adapter(folder)
        assert not isinstance(facts.config, AdaLoraConfig)
        assert {path.name for path in folder.iterdir()} == {*CHECKPOINT_FILES, CONFIG_FILE, WEIGHTS_FILE, RECIPE_FILE}


NF4 = {**LORA, "target_modules": ["q_proj", "v_proj", "down_proj"], "quantization": "nf4"}


@pytest.fixture(scope="session")
def wide_base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose layers can be kept in 4 bits."""
    return make_base(tmp_path_factory.mktemp("wide"), "llama", hidden=64)


def test_a_qlora_is_published_with_what_it_was_trained_on_and_merged_into_that(
    sessions: SessionFactory, store: ObjectStore, start_worker: StartWorker, wide_base_dir: Path, tmp_path: Path
) -> None:
    depot = make_depot(sessions, store, tmp_path, wide_base_dir, name="tiny/wide")
    start_worker(APP)
    succeeded(depot, depot.submit(lora=NF4, n_epochs=4))
    with transaction(depot.sessions) as session:
        version = session.scalars(select(Version)).one()
        files = list(session.scalars(select(VersionFile)))
        options = MergeOptions(dtype="float32", start="nf4")
        merge, _ = request_merge(session, version=version, options=options)
        assert version.manifest["spec"]["lora"]["quantization"] == "nf4"
    succeeded(depot, merge.job_id)
    with transaction(depot.sessions) as session:
        merged_files = list(session.scalars(select(MergeFile)))
        report = session.scalars(select(Merge)).one().report
    model, _ = load_base(wide_base_dir)
    quantise_base(model)
    before = logits(model)
    load_adapter(model, download(depot, files, tmp_path / "adapter"))
    adapted = logits(model)
    assert not torch.allclose(before, adapted, atol=1e-3)
    merged = AutoModelForCausalLM.from_pretrained(download(depot, merged_files, tmp_path / "merged"))
    torch.testing.assert_close(logits(merged), adapted, atol=1e-4, rtol=1e-4)
    assert report is not None
    assert report["canary"]["run"]
    # the file is a plain LoRA, which others put on the base as it is stored
    plain = AutoModelForCausalLM.from_pretrained(wide_base_dir)
    assert not torch.equal(logits(PeftModel.from_pretrained(plain, tmp_path / "adapter")), adapted)


RESUMED: dict[str, dict[str, Any]] = {
    "adalora": {**ADALORA, "adalora": {**ADALORA["adalora"], "deltaT": 3}},
    "qlora": {**NF4, "lora_dropout": 0.1},
    "adalora on a qlora": {**ADALORA, "quantization": "nf4"},
}


@pytest.mark.parametrize("lora", RESUMED.values(), ids=RESUMED)
def test_a_run_that_goes_on_makes_the_bytes_of_one_that_never_stopped(
    wide_base_dir: Path, tmp_path: Path, lora: dict[str, Any]
) -> None:
    straight = Run(wide_base_dir, tmp_path / "a", lora=lora, n_epochs=6, checkpoint_seconds=EVERY_STEP)
    made = straight.adapter()
    for step in (1, 5, 9):
        resume_from = straight.home / CHECKPOINTS / str(step)
        again = Run(wide_base_dir, tmp_path / f"from-{step}", lora=lora, n_epochs=6, resume_from=resume_from)
        assert again.adapter() == made
        assert b'"type":"resumed"' in (again.home / "said").read_bytes()


def test_a_killed_worker_costs_an_adalora_on_four_bits_no_bit(
    sessions: SessionFactory, store: ObjectStore, start_worker: StartWorker, wide_base_dir: Path, tmp_path: Path
) -> None:
    depot = make_depot(sessions, store, tmp_path, wide_base_dir, name="tiny/wide")
    spec = {"lora": RESUMED["adalora on a qlora"], "n_epochs": 60, "max_length": 128, "batch_size": 8}
    job_id = depot.submit(**spec)
    worker = start_worker(APP, checkpoint_seconds=EVERY_STEP)
    wait_until(lambda: saved(depot, job_id), seconds=120, what="a checkpoint")
    worker.kill()
    start_worker(APP)
    finished(depot, job_id)
    (resumed,) = told(depot, job_id, "resumed")
    assert resumed.message.endswith(" (exact).")
    threads = max(1, cpu_count() // 2)  # as a worker of two slots gives each
    straight = Run(wide_base_dir, tmp_path / "straight", rows=16, threads=threads, **spec)
    assert adapter_digest(depot) == straight.adapter()


@pytest.mark.parametrize("family", ["llama", "phi", "opt", "falcon", "mixtral", "qwen2_moe", "gpt_neox"])
def test_submit_and_trainer_agree_on_what_is_kept_in_four_bits(family: str, tmp_path: Path) -> None:
    facts = check_base(make_base(tmp_path, family, hidden=64, layers=1))
    model, _ = load_base(tmp_path)
    every = [path for path, shape in facts.linear_modules.items() if shape[1] % 64]
    if every:  # the trainer refuses, and so does submit
        with pytest.raises(BadConfig):
            quantise_base(model)
    else:
        assert quantise_base(model) == quantised_layers(family, facts.linear_modules)
