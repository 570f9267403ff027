"""What the merging children measured, on its way to the report."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_core.faithful import Comparison, PromptDifference
from lora_core.merge_report import FileReport, MergeReport, TensorReport
from registry.jobs.spec import MergeOptions
from worker import merge_job
from worker.certificate import (
    CANARY_FILE,
    CERTIFICATE_FILE,
    Canary,
    read_canary,
    read_certificate,
    write_canary,
    write_certificate,
)
from worker.errors import JobFailed
from worker.merge_job import merged_files, tell
from worker.task import MergeTask

TENSOR = TensorReport(
    "lm_head.weight", relative_delta=0.1, rounding_loss=0.01, cosine=0.99, changed_share=1.0, measured_share=1.0
)
FILE = FileReport("model.safetensors", 3, "ab" * 32)
PROMPT = PromptDifference("text_1", 12, kl_mean=1e-6, kl_max=1e-5, max_logit_difference=0.1, top1_agreement=1.0)


@pytest.mark.parametrize(("changes", "untied"), [({"tie_word_embeddings": False}, True), ({"vocab_size": 9}, False)])
def test_what_was_written_is_read(tmp_path: Path, changes: dict[str, object], untied: bool) -> None:
    write_certificate(tmp_path, MergeReport("base", [TENSOR], 0, [FILE]), changes)
    expected = {"tensors": [asdict(TENSOR)], "untied": untied, "unmatched_keys": 0}
    assert read_certificate(tmp_path) == (expected, [FILE])


GOOD: dict[str, Any] = {"tensors": [], "untied": False, "files": []}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        json.dumps({"tensors": [], "files": []}),
        json.dumps(GOOD | {"live": True}),
        json.dumps(GOOD | {"files": [{"path": "x", "size": -1, "sha256": "ab" * 32}]}),
        json.dumps(GOOD | {"files": [{"path": "x", "size": 1, "sha256": "AB" * 32}]}),
        json.dumps(GOOD)[:-1] + ', "tensors": [{"name": "x", "relative_delta": NaN, "rounding_loss": 0, "cosine": 0, '
        '"changed_share": 0, "measured_share": 1}]}',
    ],
)
def test_what_is_no_certificate_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / CERTIFICATE_FILE).write_text(text)
    with pytest.raises(JobFailed, match="certificate"):
        read_certificate(tmp_path)


def test_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobFailed, match="no certificate"):
        read_certificate(tmp_path)
    (tmp_path / CERTIFICATE_FILE).symlink_to("/etc/hostname")
    with pytest.raises(JobFailed, match="no certificate"):
        read_certificate(tmp_path)


def test_a_comparison_is_kept_with_every_prompt(tmp_path: Path) -> None:
    found = Comparison((PROMPT,), kl=1e-6, rounding_kl=2e-6, effect_kl=1e-2, losses={"base": 2.5})
    write_canary(tmp_path, Canary.of(found))
    canary = read_canary(tmp_path)
    assert canary.run
    assert (canary.kl, canary.rounding_kl, canary.effect_kl, canary.losses) == (1e-6, 2e-6, 1e-2, {"base": 2.5})
    assert [prompt.model_dump() for prompt in canary.prompts] == [vars(PROMPT)]
    assert "1 canary prompts" in tell(canary)


def test_none_is_told_with_its_reason(tmp_path: Path) -> None:
    write_canary(tmp_path, Canary(run=False, reason="the model did not fit into memory"))
    assert tell(read_canary(tmp_path)).endswith(
        "was not compared with base and adapter: the model did not fit into memory."
    )


class Pool:
    """How often a pool of idle processes was cleared; the first time there were some."""

    cleared = 0

    def clear(self) -> bool:
        self.cleared += 1
        return self.cleared == 1


@pytest.mark.parametrize("error_class", ["oom", "host_oom"])
def test_a_machine_too_small_for_the_comparison_publishes_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_class: Any
) -> None:
    runs: list[int] = []

    def run_out_of_memory(*_: object, **__: object) -> None:
        runs.append(pool.cleared)
        raise JobFailed(error_class, "out_of_memory", "")

    pool = Pool()
    monkeypatch.setattr(merge_job, "run_task", run_out_of_memory)  # the kernel cannot be asked to kill at will
    task = MergeTask(base_dir=tmp_path, adapter_dir=tmp_path, options=MergeOptions())
    merge_job.compare(SimpleNamespace(warm=pool), None, task, tmp_path, base_digest="")  # type: ignore[arg-type]  # enough
    assert read_canary(tmp_path).reason == "the machine ran out of memory"
    assert runs == [0, 1]


def test_a_comparison_that_idle_processes_left_no_memory_for_is_made_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare_if_there_is_room(*_: object, **__: object) -> None:
        write_canary(tmp_path, Canary(run=bool(pool.cleared), reason=None if pool.cleared else "too little memory"))

    pool = Pool()
    monkeypatch.setattr(merge_job, "run_task", compare_if_there_is_room)
    task = MergeTask(base_dir=tmp_path, adapter_dir=tmp_path, options=MergeOptions())
    for _ in range(2):  # and nobody is ended where it was made
        merge_job.compare(SimpleNamespace(warm=pool), None, task, tmp_path, base_digest="")  # type: ignore[arg-type]  # enough
    assert read_canary(tmp_path).run
    assert pool.cleared == 1


def test_a_comparison_of_another_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobFailed, match="no comparison"):
        read_canary(tmp_path)
    (tmp_path / CANARY_FILE).write_text('{"run": true, "kl": NaN}')
    with pytest.raises(JobFailed, match="comparison that cannot be read"):
        read_canary(tmp_path)


class TestFiles:
    def test_their_digests_are_those_of_the_child(self, tmp_path: Path) -> None:
        (tmp_path / FILE.path).write_bytes(b"abc")
        (found,) = merged_files(tmp_path, [FILE])
        assert (found.path, found.size, found.sha256) == (FILE.path, FILE.size, FILE.sha256)

    def test_what_lies_there_is_what_was_told(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        with pytest.raises(JobFailed, match="not a model"):
            merged_files(out, [FILE])
        out.mkdir()
        (out / FILE.path).write_bytes(b"abcd")
        with pytest.raises(JobFailed, match="did not leave the file"):
            merged_files(out, [FILE])
        (out / FILE.path).unlink()
        (out / FILE.path).symlink_to("/etc/hostname")
        with pytest.raises(JobFailed, match="did not leave the file"):
            merged_files(out, [FILE])
        (out / FILE.path).unlink()
        (out / FILE.path).write_bytes(b"abc")
        with pytest.raises(JobFailed, match="not a model"):
            merged_files(out, [])
        (out / "setup.py").write_bytes(b"")
        with pytest.raises(JobFailed, match="not a model"):
            merged_files(out, [FILE, FileReport("setup.py", 0, "ab" * 32)])
