"""The main job as its user sees it: the real stack, the `lora-depot` command and the OpenAI client, nothing else.

One depot for the whole module. Only the last test ends it; whichever comes after that starts it again."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest
import redis
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cli.embedded.valkey import valkey_url
from lora_core.adapter import load_adapter
from lora_core.model import load_base
from tests.cli.depot import clean, wait_for
from tests.e2e.stack import Stack, contents, logits
from tests.tiny import make_base, make_rows, write_jsonl

BASE = "tiny/llama"
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "learning_rate": 1e-2, "max_length": 128}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A home with one base model, and the user's folder around it: `base`, `rows.jsonl`, `many.jsonl`."""
    folder = tmp_path_factory.mktemp("e2e")
    torch.set_num_threads(1)
    make_base(folder / "base", shards=2)
    write_jsonl(folder / "rows.jsonl", make_rows(16))
    write_jsonl(folder / "many.jsonl", make_rows(2000))
    (folder / "bad.jsonl").write_bytes(b'{"prompt": "a", "completion": "b"}\n{"prompt": 3}\n')
    for stack in clean(Stack(folder / "home")):
        stack.up()
        stack.user.types("base", "add", BASE, "--from", "base")
        yield stack


@pytest.fixture
def stack(home: Stack) -> Stack:
    if not home.state():
        home.up()
    return home


@pytest.fixture(scope="module")
def trained(home: Stack) -> Stack:
    """`home` once `support-bot` has version 1, which is `production`, and both downloads are in the folder."""
    user = home.user
    uploaded = user.types("files", "upload", "rows.jsonl").split()[0]
    said = user.types(
        *("jobs", "submit", "--model", BASE, "--data", uploaded, "--adapter", "support-bot", "--watch"),
        *("--r", "4", "--target-modules", "q_proj,v_proj", "--learning-rate", "1e-2", "--max-length", "128"),
        *("--epochs", "4", "--seed", "7"),
    )
    assert "Published support-bot@1." in said
    user.types("alias", "set", "support-bot", "production", "1")
    user.types("download", "support-bot@production", "--out", "adapter")
    user.types("download", "support-bot@1", "--merged", "--out", "merged")
    return home


@pytest.fixture
def folder(trained: Stack) -> Path:
    return trained.user.folder


def test_an_adapter_is_shown_with_its_version_and_alias(trained: Stack, stack: Stack) -> None:
    shown = json.loads(stack.user.types("adapters", "show", "support-bot", "--json"))
    assert shown["base_model"] == BASE
    assert shown["aliases"] == {"production": 1}
    (version,) = shown["versions"]
    assert (version["version"], version["aliases"], version["lora"]["r"]) == (1, ["production"], 4)
    assert version["digest"][:19] in stack.user.types("adapters", "show", "support-bot")


def test_the_adapter_loads_with_peft_and_says_what_ours_says(folder: Path) -> None:
    base, _ = load_base(folder / "base", "float32", device="cpu")
    plain = logits(base)
    load_adapter(base, folder / "adapter")
    ours = logits(base.eval())
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), str(folder / "adapter"))
    assert (ours - plain).abs().max() > 1e-2
    torch.testing.assert_close(logits(peft.eval()), ours, rtol=0, atol=1e-6)


def test_the_merged_model_is_base_plus_adapter_rounded_once(folder: Path) -> None:
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), str(folder / "adapter"))
    torch.testing.assert_close(logits(merged), logits(adapted.eval()), rtol=1e-5, atol=1e-5)
    factors = {
        name: tensor.double() for name, tensor in load_file(folder / "adapter/adapter_model.safetensors").items()
    }
    changed = 0
    for name, weight in base.named_parameters():
        prefix = f"base_model.model.{name.removesuffix('.weight')}."
        exact = weight.detach().double()
        if f"{prefix}lora_A.weight" in factors:
            changed += 1
            exact = exact + 2.0 * factors[f"{prefix}lora_B.weight"] @ factors[f"{prefix}lora_A.weight"]
        assert torch.equal(merged.get_parameter(name).detach(), exact.float()), name
    assert changed == 4


def test_a_merge_made_here_is_the_server_s_merge_byte_for_byte(folder: Path, stack: Stack) -> None:
    stack.user.types("merge", "--base", "base", "--adapter", "adapter", "--out", "merged-here")
    here, there = contents(folder / "merged-here"), contents(folder / "merged")
    assert sorted(here) == sorted(there)
    assert [name for name in here if here[name] != there[name]] == []
    assert any(name.endswith(".safetensors") for name in here)


def test_bad_input_is_refused_with_code_and_message_and_no_traceback(stack: Stack) -> None:
    good = stack.user.types("files", "upload", "rows.jsonl").split()[0]

    def submit(**over: object) -> object:
        body = {"model": BASE, "training_file": good, "suffix": "refused", **over}
        lora = {**LORA, **body.pop("lora", {})}
        return stack.ai().fine_tuning.jobs.create(**body, extra_body={"lora": lora})

    bad_line = ("bad.jsonl", (stack.user.folder / "bad.jsonl").read_bytes())
    refusals = [
        (lambda: stack.ai().files.create(file=bad_line, purpose="fine-tune"), 422, "invalid_training_file", "line 2"),
        (lambda: submit(model="no/such"), 422, "unknown_base_model", "lora-depot base add"),
        (lambda: submit(lora={"target_modules": ["qqq"]}), 422, "unknown_target_modules", "q_proj"),
        (lambda: submit(lora={"r": 0}), 422, "invalid_hyperparameter", "r"),
        (stack.ai(api_key="ld_wrong").models.list, 401, "invalid_api_key", "key"),
        (lambda: submit(training_file=f"file-{'0' * 32}"), 422, "unknown_file", "POST /v1/files"),
        (lambda: stack.ai().files.retrieve(f"file-{'0' * 32}"), 404, "file_not_found", "file"),
    ]
    for attempt, status, code, word in refusals:
        with pytest.raises(openai.APIStatusError) as caught:
            attempt()
        assert (caught.value.status_code, caught.value.code) == (status, code), caught.value
        assert word in caught.value.message
    assert "Traceback" not in stack.logs() + stack.said()


def test_the_command_says_what_was_wrong_and_ends_with_1(stack: Stack) -> None:
    submit = ("jobs", "submit", "--model", BASE, "--adapter", "refused")
    assert "line 2" in stack.user.types("files", "upload", "bad.jsonl", status=1)
    assert "(unknown_target_modules)" in stack.user.types(
        *submit, "--data", "rows.jsonl", "--target-modules", "qqq", status=1
    )
    assert "There is no file absent.jsonl." in stack.user.types(*submit, "--data", "absent.jsonl", status=1)
    assert "(adapter_not_found)" in stack.user.types("download", "refused", status=1)


def versions_of(stack: Stack, adapter: str) -> list[int]:
    return [v["version"] for v in json.loads(stack.user.types("adapters", "show", adapter, "--json"))["versions"]]


def test_kill_9_of_the_worker_mid_training_ends_in_exactly_one_version(stack: Stack) -> None:
    ai = stack.ai()
    # Longer by far than it takes to see it train.
    job_id = stack.user.submits("--model", BASE, "--data", "rows.jsonl", "--adapter", "survivor", "--epochs", "600")
    wait_for(lambda: any(event.type == "metrics" for event in ai.fine_tuning.jobs.list_events(job_id)), "it trains")
    killed = stack.children()["worker"]
    trainers = psutil.Process(killed).children(recursive=True)
    os.kill(killed, signal.SIGKILL)
    assert trainers
    assert psutil.wait_procs(trainers, timeout=90)[1] == []
    assert "Published survivor@1." in stack.user.types("jobs", "watch", job_id)
    job = json.loads(stack.user.types("jobs", "show", job_id, "--json"))
    assert (job["state"], job["attempt"]) == ("succeeded", 2)
    assert stack.children()["worker"] != killed
    assert versions_of(stack, "survivor") == [1]


def test_flushing_redis_while_jobs_are_queued_loses_none(stack: Stack) -> None:
    ai = stack.ai()
    common = ("--model", BASE, "--data", "rows.jsonl")
    # It holds the worker's only slot for as long as the others must stay queued: this would take many minutes.
    holder = stack.user.submits("--model", BASE, "--data", "many.jsonl", "--adapter", "holder", "--epochs", "1000")
    wait_for(lambda: ai.fine_tuning.jobs.retrieve(holder).status == "running", "it trains")
    jobs = [stack.user.submits(*common, "--adapter", "flushed", "--epochs", "1") for _ in range(3)]
    with redis.Redis(unix_socket_path=valkey_url(stack.home.sockets).removeprefix("redis+socket://")) as client:
        assert client.flushall()
    assert {ai.fine_tuning.jobs.retrieve(job_id).status for job_id in jobs} == {"queued"}
    stack.user.types("jobs", "cancel", holder)
    for job_id in jobs:
        assert "Published flushed@" in stack.user.types("jobs", "watch", job_id)
    assert versions_of(stack, "flushed") == [3, 2, 1]


def test_ctrl_c_ends_everything_and_the_logs_hold_no_traceback(stack: Stack) -> None:
    assert stack.children().keys() == {"postgres", "valkey", "api", "worker"}
    assert stack.stop(stack.started[-1], signal.SIGINT) == 0
    assert stack.processes() == []
    assert not stack.home.state.exists()
    assert "Traceback" not in stack.logs() + stack.said()
