"""The commands against the real API: what a person types, and what then is in the depot."""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.client import Client
from cli.connection import Connection
from cli.main import app
from registry.jobs.events import NewEvent
from tests.cli.conftest import Run
from tests.cli.live import Depot

BIG = os.urandom(3_000_000)
FILES = {"adapter_config.json": b'{"r": 4}', "adapter_model.safetensors": BIG}


def submit(run: Run, rows: str, *more: str) -> str:
    """A queued job; its id."""
    said = run("jobs", "submit", "--model", "tiny", "--data", rows, *more).output
    return re.search(r"ftjob-[0-9a-f]{32}", said)[0]  # type: ignore[index]  # the test fails if it is None


@pytest.fixture
def published(depot: Depot, run: Run, rows: str) -> str:
    """An adapter "bot" with version 1."""
    job = submit(run, rows, "--adapter", "bot")
    depot.publish(job, depot.claim(job), FILES)
    return "bot"


# ── errors ───────────────────────────────────────────────────────────────────────────────────────


def test_a_depot_that_does_not_answer_is_a_sentence(depot: Depot, run: Run) -> None:
    with socket.socket() as deaf:  # it has the port and does not listen
        deaf.bind(("127.0.0.1", 0))
        port = deaf.getsockname()[1]
        said = run("adapters", "list", status=1, DEPOT_URL=f"http://127.0.0.1:{port}").stderr
    assert "lora-depot up" in said and f":{port}" in said and "(not_connected)" in said
    assert said.count("\n") == 1


def test_no_depot_at_all_is_a_sentence(run: Run) -> None:
    assert "lora-depot up" in run("jobs", "list", status=1, DEPOT_URL="").stderr


def test_a_wrong_key_is_the_servers_sentence(run: Run) -> None:
    assert "(invalid_api_key)" in run("jobs", "list", status=1, DEPOT_API_KEY="ld_wrong").stderr


def test_the_key_of_a_home_is_sent_to_no_other_address(depot: Depot, run: Run, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "client.json").write_text(json.dumps({"url": depot.url, "api_key": depot.key}))
    elsewhere = {"DEPOT_HOME": str(home), "DEPOT_API_KEY": ""}
    assert run("adapters", "list", **elsewhere, DEPOT_URL="").exit_code == 0
    depot.wire.seen.clear()
    said = run("adapters", "list", status=1, **elsewhere, DEPOT_URL=depot.url.replace("127.0.0.1", "localhost")).stderr
    assert "DEPOT_API_KEY" in said and not depot.wire.seen


@pytest.mark.parametrize("name", ["..", "a/../../files", "ftjob-%2e%2e"])
def test_a_name_reaches_no_other_address(depot: Depot, run: Run, name: str) -> None:
    run("adapters", "show", name, status=1)
    assert all(line.startswith(b"GET /v1/adapters/") and b"/files" not in line for line in depot.wire.seen)


def test_status_tells_what_there_is(depot: Depot, run: Run) -> None:
    said = run("status").output
    assert depot.url in said
    assert re.search(r"database\s+ok", said) and re.search(r"base models\s+1", said)


# ── base models ──────────────────────────────────────────────────────────────────────────────────


def test_a_folder_becomes_a_base_model(run: Run, tiny: Path) -> None:
    (tiny / "README.md").write_text("about")
    said = run("base", "add", "org/real", "--from", str(tiny)).output
    assert "README.md" in said
    found = {base["name"]: base for base in json.loads(run("base", "list", "--json").output)}["org/real"]
    assert found["architecture"] == "llama"
    stored = {file["path"]: file["sha256"] for file in found["files"]}
    assert "README.md" not in stored and sum(name.endswith(".safetensors") for name in stored) > 1
    assert stored == {name: hashlib.sha256((tiny / name).read_bytes()).hexdigest() for name in stored}
    assert "org/real" in run("base", "list").output


def test_adding_a_base_model_again_uploads_nothing(depot: Depot, run: Run, tiny: Path) -> None:
    run("base", "add", "one", "--from", str(tiny))
    sent = depot.wire.count(b"POST /v1/files ")
    run("base", "add", "one", "--from", str(tiny))
    run("base", "add", "two", "--from", str(tiny))
    assert depot.wire.count(b"POST /v1/files ") == sent > 0


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_an_incomplete_folder_is_refused_before_anything_is_sent(
    depot: Depot, run: Run, tiny: Path, tmp_path: Path, missing: str
) -> None:
    copy = shutil.copytree(tiny, tmp_path / "copy")
    (copy / missing).unlink()
    said = run("base", "add", "x", "--from", str(copy), status=1).stderr
    assert missing in said or "model.safetensors" in said
    assert "(invalid_base_model)" in said
    assert depot.wire.count(b"POST") == 0


def test_weights_that_are_not_part_of_the_checkpoint_stay_where_they_are(run: Run, tiny: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny, tmp_path / "copy")
    shutil.copy(next(copy.glob("model-*.safetensors")), copy / "consolidated.safetensors")
    assert "consolidated.safetensors" in run("base", "add", "x", "--from", str(copy)).output


def test_a_folder_that_is_not_there_is_a_sentence(run: Run) -> None:
    assert "not a folder" in run("base", "add", "x", "--from", "/no/such/folder", status=1).stderr


# ── files and jobs ───────────────────────────────────────────────────────────────────────────────


def test_a_training_file_is_uploaded_and_listed(run: Run, rows: str) -> None:
    said = run("files", "upload", rows).output
    assert "8 rows" in said
    listed = json.loads(run("files", "list", "--json").output)
    assert [file["id"] for file in listed] == [said.split()[0]]
    assert said.split()[0] in run("files", "list").output


def test_a_bad_line_is_named(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 3}\n')
    said = run("files", "upload", str(path), status=1).stderr
    assert "line 2" in said and "(invalid_training_file)" in said


def test_a_job_carries_every_setting_that_was_given(run: Run, rows: str) -> None:
    more = ["--r", "4", "--lora-alpha", "12", "--target-modules", "q_proj, v_proj", "--epochs", "5"]
    more += ["--batch-size", "2", "--learning-rate", "0.01", "--seed", "7", "--use-rslora", "--scheduler", "cosine"]
    job_id = submit(run, rows, *more)
    (job,) = json.loads(run("jobs", "list", "--json").output)
    assert job == json.loads(run("jobs", "show", job_id, "--json").output)
    assert job["lora"].items() >= {"r": 4, "lora_alpha": 12.0, "use_rslora": True}.items()
    assert job["lora"]["target_modules"] == ["q_proj", "v_proj"]
    assert job["hyperparameters"].items() >= {"n_epochs": 5, "batch_size": 2}.items()
    assert job["seed"] == 7
    assert job["adapter"] == "support-bot"  # from the file's name
    assert job_id in run("jobs", "list").output and "q_proj" in run("jobs", "show", job_id).output


def test_fields_of_lora_without_an_option_are_given_by_name(run: Run, rows: str) -> None:
    more = ["--lora", "bias=all", "--lora", 'rank_pattern={"v_proj": 2}', "--lora", "use_dora=true", "--r", "4"]
    lora = json.loads(run("jobs", "show", submit(run, rows, *more, "--target-modules", "paper"), "--json").output)[
        "lora"
    ]
    assert lora.items() >= {"bias": "all", "rank_pattern": {"v_proj": 2}, "use_dora": True, "r": 4}.items()
    assert lora["target_modules"] == "paper"
    more = [
        "--lora",
        'adalora={"init_r": 4, "target_r": 2}',
        "--lora",
        "packing=false",
        "--lora",
        "tokens_per_batch=64",
    ]
    lora = json.loads(run("jobs", "show", submit(run, rows, *more), "--json").output)["lora"]
    assert (lora["adalora"]["target_r"], lora["packing"], lora["tokens_per_batch"]) == (2, False, 64)
    said = run("jobs", "submit", "--model", "tiny", "--data", rows, "--lora", "quantization=int8", status=1).stderr
    assert "lora.quantization" in said
    said = run("jobs", "submit", "--model", "tiny", "--data", rows, "--lora", "bias", status=1).stderr
    assert "NAME=VALUE" in said


def test_an_uploaded_file_is_not_uploaded_again(depot: Depot, run: Run, rows: str) -> None:
    file_id = run("files", "upload", rows).output.split()[0]
    sent = depot.wire.count(b"POST /v1/files ")
    submit(run, file_id, "--validation", file_id)
    assert depot.wire.count(b"POST /v1/files ") == sent


def test_an_unknown_base_model_is_the_servers_sentence(run: Run, rows: str) -> None:
    said = run("jobs", "submit", "--model", "nope", "--data", rows, status=1).stderr
    assert "lora-depot base add" in said and "(unknown_base_model)" in said


def test_a_lost_answer_to_a_submit_makes_no_second_job(depot: Depot, run: Run, rows: str) -> None:
    depot.wire.cut(b"POST /v1/fine_tuning/jobs ", after=0)
    submit(run, rows)
    assert depot.wire.count(b"POST /v1/fine_tuning/jobs ") == 2
    assert len(json.loads(run("jobs", "list", "--json").output)) == 1


def test_a_lost_answer_to_an_upload_is_not_repeated_in_secret(depot: Depot, run: Run, rows: str) -> None:
    depot.wire.cut(b"POST /v1/files ", after=0)
    assert "Try again" in run("files", "upload", rows, status=1).stderr
    assert depot.wire.count(b"POST /v1/files ") == 1


def test_lists_are_read_to_their_last_page(depot: Depot, run: Run, rows: str) -> None:
    ids = [submit(run, rows) for _ in range(3)]
    with Client(Connection(depot.url, depot.key)) as client:
        paged = [job["id"] for job in client._pages("/v1/fine_tuning/jobs", {"limit": 1})]
    assert paged == ids[::-1]
    assert len(json.loads(run("jobs", "list", "--limit", "2", "--json").output)) == 2


def test_a_queued_job_is_cancelled(depot: Depot, run: Run, rows: str) -> None:
    job = submit(run, rows)
    assert "cancelled" in run("jobs", "cancel", job).output
    assert depot.job(job).state == "cancelled"


def test_a_waiting_job_says_why(depot: Depot, run: Run, rows: str) -> None:
    job_id = submit(run, rows, "--priority", "7")
    said = run("jobs", "queue", job_id).output
    assert "No worker has served the queue" in said and re.search(r"priority\s+7", said)


def test_an_ended_job_is_queued_again(depot: Depot, run: Run, rows: str) -> None:
    job_id = submit(run, rows)
    assert "not ended" in run("jobs", "retry", job_id, status=1).output
    depot.fail(job_id, depot.claim(job_id), "The rows are empty.")
    assert "no rule knows" in run("jobs", "retry", job_id, "--suggested", status=1).output.replace("\n", " ")
    said = run("jobs", "retry", job_id).output
    assert f"repeats {job_id}" in said.replace("\n", " ")
    assert len(json.loads(run("jobs", "list", "--json").output)) == 2


def test_a_job_is_paused_and_resumed(depot: Depot, run: Run, rows: str) -> None:
    job_id = submit(run, rows)
    assert "is paused" in run("jobs", "pause", job_id).stdout
    assert "is queued" in run("jobs", "resume", job_id).stdout


def test_a_job_that_has_ended_is_not_cancelled(depot: Depot, run: Run, rows: str) -> None:
    job = submit(run, rows)
    depot.publish(job, depot.claim(job), FILES)
    assert "(job_terminal)" in run("jobs", "cancel", job, status=1).stderr


# ── watching ─────────────────────────────────────────────────────────────────────────────────────


def metrics(step: int, loss: float, total: int = 20) -> NewEvent:
    data = {"step": step, "total_steps": total, "train_loss": loss}
    return NewEvent("metrics", "info", f"Loss {loss} at step {step}", data)


def test_watching_tells_every_message_once_and_draws_the_loss(depot: Depot, run: Run, rows: str) -> None:
    job = submit(run, rows, "--adapter", "bot")

    def work() -> None:
        fence = depot.claim(job)
        depot.tell(job, fence, NewEvent("message", "info", "8 training rows.", None))
        for step in range(1, 21):
            depot.tell(job, fence, metrics(step, 5 - step / 10))
            time.sleep(0.1)
        depot.publish(job, fence, FILES)

    worker = threading.Thread(target=work)
    worker.start()
    said = run("jobs", "watch", job).output
    worker.join()
    assert said.count("8 training rows.") == 1
    top, bottom = re.findall(r"([0-9.]+) ┤", said)
    assert top == "4.900" and 3 < float(bottom) < 4  # a moving average: it starts at the first point and follows
    assert f"step 20 of 20 · smoothed loss {bottom}" in said
    assert "bot@1" in said


def test_a_retried_job_draws_its_last_attempt(depot: Depot, run: Run, rows: str) -> None:
    job = submit(run, rows)
    fence = depot.claim(job)
    lost, kept = [metrics(step, 9.0) for step in range(1, 11)], [metrics(step, 2.0 + step) for step in range(1, 4)]
    depot.tell(job, fence, *lost, *kept)
    depot.publish(job, fence, FILES)
    said = run("jobs", "watch", job).output
    assert re.findall(r"([0-9.]+) ┤", said)[1] == "3.000"
    assert "step 3 of 20" in said and "9.000 ┤" not in said


def test_watching_a_job_that_fails_ends_with_its_reason(depot: Depot, run: Run, rows: str) -> None:
    job = submit(run, rows)
    depot.fail(job, depot.claim(job), "The rows cannot be learned.")
    result = run("jobs", "watch", job, status=1)
    assert "The rows cannot be learned." in result.stderr and "(bad)" in result.stderr


def test_ctrl_c_stops_watching_and_not_the_job(depot: Depot, run: Run, rows: str) -> None:
    job = submit(run, rows)
    # Where the tests run in the background SIGINT may be ignored, and a child inherits that; a terminal's is not.
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from cli.main import app; app()"
    command = [sys.executable, "-c", start, "jobs", "watch", job]
    process = subprocess.Popen(
        command, env={**os.environ, **depot.env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    assert "queued" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    said = process.stdout.read()
    assert process.wait() == 130, said
    assert "the job goes on" in said and "Traceback" not in said
    assert depot.job(job).state == "queued"


# ── adapters and downloads ───────────────────────────────────────────────────────────────────────


def test_adapters_are_listed_searched_and_shown(run: Run, published: str) -> None:
    assert [a["name"] for a in json.loads(run("adapters", "list", "--search", "BO", "--json").output)] == [published]
    assert json.loads(run("adapters", "list", "--search", "zz", "--json").output) == []
    assert published in run("adapters", "list").output
    assert "1.2500" in run("adapters", "show", published).output
    shown = json.loads(run("adapters", "show", published, "--json").output)
    assert [version["ref"] for version in shown["versions"]] == ["bot@1"]


def test_an_alias_is_set_and_downloads(run: Run, published: str, tmp_path: Path) -> None:
    assert "version 1" in run("alias", "set", published, "production", "1").output
    run("download", f"{published}@production", "--out", str(tmp_path / "out"))
    assert (tmp_path / "out/adapter_config.json").read_bytes() == FILES["adapter_config.json"]
    assert "(version_not_found)" in run("download", f"{published}@9", "--out", "x", status=1).stderr


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_broken_download_continues_behind_what_has_arrived(
    depot: Depot, run: Run, published: str, tmp_path: Path
) -> None:
    depot.wire.cut(b"GET /v1/objects/", after=10)  # not even the headers
    depot.wire.cut(b"GET /v1/objects/", after=10**9)  # the small file in peace
    depot.wire.cut(b"GET /v1/objects/", after=1_000_000)
    run("download", published, "--out", str(tmp_path / "out"))
    assert content(tmp_path / "out") == FILES
    *_, first, second = [head for head in depot.wire.seen if head.startswith(b"GET /v1/objects/")]
    assert b"range:" not in first.lower()
    (start,) = re.findall(rb"range: bytes=([0-9]+)-", second.lower())
    assert 900_000 < int(start) < 1_000_000
    assert not (tmp_path / "out.partial").exists()


def test_an_interrupted_download_leaves_no_folder_and_is_continued(
    depot: Depot, run: Run, published: str, tmp_path: Path
) -> None:
    for _ in range(6):
        depot.wire.cut(b"GET /v1/objects/", after=10)
    assert "continue" in run("download", published, "--out", str(tmp_path / "out"), status=1).stderr
    assert not (tmp_path / "out").exists()
    depot.wire.cuts.clear()
    run("download", published, "--out", str(tmp_path / "out"))
    assert content(tmp_path / "out") == FILES


def test_what_another_version_left_behind_does_not_survive(run: Run, published: str, tmp_path: Path) -> None:
    stage = tmp_path / "out.partial"
    stage.mkdir()
    (stage / "adapter_model.safetensors.part").write_bytes(b"another start")
    (stage / "adapter_config.json").write_bytes(b"another file")
    (stage / "stray").write_bytes(b"")
    run("download", published, "--out", str(tmp_path / "out"))
    assert content(tmp_path / "out") == FILES


def test_bytes_that_rot_in_the_store_are_never_handed_over(
    depot: Depot, run: Run, published: str, tmp_path: Path
) -> None:
    for path in (tmp_path / "objects").rglob("*"):
        if path.is_file() and path.stat().st_size == len(BIG):
            path.chmod(0o600)
            path.write_bytes(BIG[:-1] + bytes([BIG[-1] ^ 1]))
    run("download", published, "--out", str(tmp_path / "out"), status=1)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_left_alone(depot: Depot, run: Run, published: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("precious")
    assert "(exists)" in run("download", published, "--out", str(tmp_path / "out"), status=1).stderr
    assert content(tmp_path / "out") == {"mine": b"precious"}


def test_the_key_never_travels_to_the_store(depot: Depot, run: Run, published: str, tmp_path: Path) -> None:
    run("download", published, "--out", str(tmp_path / "out"))
    objects = [head for head in depot.wire.seen if head.startswith(b"GET /v1/objects/")]
    assert objects and not any(b"authorization" in head.lower() for head in objects)
    assert any(b"authorization" in head.lower() for head in depot.wire.seen)


# ── merging here ─────────────────────────────────────────────────────────────────────────────────


def test_a_local_merge_needs_no_server(tiny: Path, tmp_path: Path) -> None:
    from tests.lora_core.adapters import make_peft_adapter

    adapter = make_peft_adapter(tiny, tmp_path / "adapter", r=4, target_modules=["q_proj"])
    out = tmp_path / "deep" / "merged"
    arguments = ["merge", "--base", str(tiny), "--adapter", str(adapter), "--out", str(out), "--dtype", "bfloat16"]
    nowhere = {"DEPOT_URL": "http://127.0.0.1:9", "DEPOT_API_KEY": "x"}
    done = CliRunner().invoke(app, arguments, env=nowhere)
    assert done.exit_code == 0, done.output
    assert "2 tensors were changed" in done.output
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    again = CliRunner().invoke(app, arguments, env=nowhere)
    assert again.exit_code == 1 and "(exists)" in again.stderr


def test_a_local_merge_of_a_bad_adapter_is_a_sentence(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    arguments = ["merge", "--base", str(tiny), "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1 and "Error:" in done.stderr and "Traceback" not in done.output
    assert not (tmp_path / "out").exists()
