"""A base that stays in memory between jobs: used again when it is sure to be the same, gone when it is not."""

import hashlib
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from registry.errors import CancelRequested
from registry.jobs.spec import TrainSpec
from tests.tiny import make_base, make_rows, write_jsonl
from tests.worker.depot import LORA, ROOT, is_alive, wait_until
from worker.attempt import Attempt, Stop
from worker.child import stays
from worker.errors import JobFailed
from worker.host import Host
from worker.kept_base import KeptBase, bit_sum
from worker.process import Child
from worker.reporter import Reporter
from worker.run_task import run_task
from worker.service import CHILD_ARGV
from worker.task import TrainTask
from worker.train_child import train_adapter
from worker.warm import WarmPool, Warmth

WARMTH = Warmth(uuid.uuid4(), "0" * 64)
SPEC = {
    "lora": {**LORA, "lora_dropout": 0.2},
    "n_epochs": 2,
    "batch_size": 4,
    "max_length": 64,
    "learning_rate": 1e-2,
}


@pytest.fixture
def reporter() -> Reporter:
    return Reporter(os.open(os.devnull, os.O_WRONLY))


@pytest.fixture(scope="session")
def wide_base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose layers can be kept in 4 bits."""
    return make_base(tmp_path_factory.mktemp("wide"), "llama", hidden=64)


@pytest.fixture
def make_task(base_dir: Path, tmp_path: Path) -> Callable[..., TrainTask]:
    def make(*, rows: int = 8, base: Path = base_dir, **spec: object) -> TrainTask:
        return TrainTask(
            base_dir=base,
            base_digest="0" * 64,
            base_model="tiny/llama",
            revision=None,
            training_file=write_jsonl(tmp_path / f"{uuid.uuid4().hex}.jsonl", make_rows(rows)),
            validation_file=None,
            spec=TrainSpec.model_validate({**SPEC, **spec}),
            resume_from=None,
            checkpoint_seconds=3600.0,
            threads=1,
            stay=True,
        )

    return make


def make_attempt(tenant_id: uuid.UUID = WARMTH.tenant_id) -> Attempt:
    return Attempt(job_id=uuid.uuid4(), tenant_id=tenant_id, fence=1)


def adapter_of(workspace: Path) -> str:
    return hashlib.sha256((workspace / "out" / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_a_warm_process_makes_the_bytes_of_a_cold_one(
    host: Host, make_task: Callable[..., TrainTask], reporter: Reporter, tmp_path: Path
) -> None:
    host = replace(host, child_argv=CHILD_ARGV)
    wanted = make_task()
    other = make_task(rows=12, seed=7, lora={**LORA, "r": 8, "target_modules": "all-linear"})
    pids = []
    for name, task in (("first", wanted), ("other", other), ("again", wanted)):
        run_task(host, make_attempt(), task, workspace(tmp_path, name), base_digest="0" * 64)
        pids += [idle.child.pid for idle in host.warm._idle]
    assert len(pids) == 3
    assert len(set(pids)) == 1, "a new process was started"
    train_adapter(wanted, workspace(tmp_path, "cold"), reporter)
    made = {name: adapter_of(tmp_path / name) for name in ("first", "other", "again", "cold")}
    assert made["first"] == made["again"] == made["cold"] != made["other"]


def test_a_base_in_four_bits_and_the_whole_one_never_stand_in_for_each_other(
    host: Host, make_task: Callable[..., TrainTask], wide_base_dir: Path, reporter: Reporter, tmp_path: Path
) -> None:
    host = replace(host, child_argv=CHILD_ARGV)
    whole = make_task(base=wide_base_dir)
    packed = make_task(base=wide_base_dir, lora={**LORA, "quantization": "nf4"})
    kept, pids = KeptBase(), []
    for name, task in (("whole", whole), ("packed", packed), ("packed-again", packed), ("whole-again", whole)):
        run_task(host, make_attempt(), task, workspace(tmp_path, name), base_digest="0" * 64)
        pids.append(host.warm._idle[-1].child.pid)
        # the same within one process, were it given both
        train_adapter(task, workspace(tmp_path, f"one-{name}"), reporter, kept)
        assert kept.offer(reporter)
    assert len({*pids[:2]}) == 2
    assert (pids[2], pids[3]) == (pids[1], pids[0])
    for kind in ("whole", "packed"):
        names = [kind, f"{kind}-again", f"one-{kind}", f"one-{kind}-again"]
        assert len({adapter_of(tmp_path / name) for name in names}) == 1
    assert adapter_of(tmp_path / "whole") != adapter_of(tmp_path / "packed")


@pytest.mark.parametrize("part", ["levels", "maxima", "largest", "offset"])
def test_a_base_in_four_bits_that_changed_is_not_offered(
    make_task: Callable[..., TrainTask], wide_base_dir: Path, reporter: Reporter, tmp_path: Path, part: str
) -> None:
    kept = KeptBase()
    task = make_task(base=wide_base_dir, lora={**LORA, "quantization": "nf4", "use_dora": True}, n_epochs=1)
    train_adapter(task, workspace(tmp_path, "job"), reporter, kept)
    assert kept.offer(reporter)
    assert kept._base
    numbers = getattr(kept._base[0].model.layers[0].mlp.down_proj.weight.packed, part).numpy()  # no version counts this
    numbers.reshape(-1).view("uint8")[-1] ^= 1
    assert not kept.offer(reporter)


def speaking(script: str) -> tuple[str, ...]:
    """A child that reads tasks, and for each runs this line of shell."""
    said = """say() { echo "{\\"type\\": \\"$1\\"$2}"; }; ready() { say ready ', "resident_bytes": 100'; }"""
    return ("sh", "-c", f"{said}; while read task; do {script}; done")


def test_a_job_that_fails_takes_its_process_along(
    host: Host, make_task: Callable[..., TrainTask], tmp_path: Path
) -> None:
    host = replace(host, child_argv=speaking("case $task in *well) say result; ready;; *) ready;; esac"))
    run_task(host, make_attempt(), make_task(), workspace(tmp_path, "well"), base_digest="0" * 64)
    (idle,) = host.warm._idle
    with pytest.raises(JobFailed):
        run_task(host, make_attempt(), make_task(), workspace(tmp_path, "ill"), base_digest="0" * 64)
    assert host.warm._idle == []
    assert not is_alive(idle.child.pid)


def test_memory_that_idle_processes_held_is_not_what_a_job_fails_of(
    host: Host, make_task: Callable[..., TrainTask], tmp_path: Path
) -> None:
    fail = """say error ', "error_class": "oom", "code": "out_of_memory", "message": "x"'; exit 1"""
    host = replace(host, child_argv=speaking(f"case $task in *well) say result; ready;; *) {fail};; esac"))
    run_task(host, make_attempt(), make_task(), workspace(tmp_path, "well"), base_digest="1" * 64)
    (idle,) = host.warm._idle
    for name, error_class in (("ill", "infra"), ("still", "oom")):
        with pytest.raises(JobFailed) as failed:
            run_task(host, make_attempt(), make_task(), workspace(tmp_path, name), base_digest="0" * 64)
        assert failed.value.error_class == error_class
        assert not is_alive(idle.child.pid)


def test_a_process_that_died_while_it_waited_costs_nothing(
    host: Host, make_task: Callable[..., TrainTask], tmp_path: Path
) -> None:
    # It says ready, and is gone when the next task comes: the pool has not noticed.
    host = replace(host, child_argv=speaking("say result; ready; read next; exit 3"))
    for name in ("one", "two", "three"):
        run_task(host, make_attempt(), make_task(), workspace(tmp_path, name), base_digest="0" * 64)


def test_a_stop_that_comes_with_the_result_ends_the_process(
    host: Host, make_task: Callable[..., TrainTask], tmp_path: Path
) -> None:
    attempt = make_attempt()
    host = replace(
        host,
        patience=replace(host.patience, grace_seconds=600.0),
        child_argv=speaking(
            'trap told=yes TERM; say note \', "message": "x"\'; '
            "while test -z $told; do sleep 0.05; done; say result; ready"
        ),
    )
    watcher = threading.Thread(target=lambda: (wait_until(lambda: attempt.news.take()[1]), attempt.stop(Stop.CANCEL)))
    watcher.start()
    with pytest.raises(CancelRequested):
        run_task(host, attempt, make_task(), workspace(tmp_path, "job"), base_digest="0" * 64)
    watcher.join()
    assert host.warm._idle == []


def workspace(tmp_path: Path, name: str) -> Path:
    path = tmp_path / name
    path.mkdir()
    return path


@pytest.fixture
def kept(make_task: Callable[..., TrainTask], reporter: Reporter, tmp_path: Path) -> KeptBase:
    """After one training."""
    kept = KeptBase()
    train_adapter(make_task(), tmp_path, reporter, kept)
    return kept


def test_a_base_that_training_left_alone_is_offered(kept: KeptBase, reporter: Reporter) -> None:
    assert kept.offer(reporter)


KINDS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "biases": {"bias": "all"},
    "whole modules": {"modules_to_save": ["lm_head"]},
    "token rows": {"trainable_token_indices": [3, 5]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_leaves_the_base_as_it_was(
    make_task: Callable[..., TrainTask], reporter: Reporter, tmp_path: Path, kind: str
) -> None:
    kept = KeptBase()
    train_adapter(make_task(lora={**LORA, **KINDS[kind]}), workspace(tmp_path, "before"), reporter, kept)
    assert kept.offer(reporter)
    plain = make_task()
    train_adapter(plain, workspace(tmp_path, "warm"), reporter, kept)
    train_adapter(plain, workspace(tmp_path, "cold"), reporter)
    assert adapter_of(tmp_path / "warm") == adapter_of(tmp_path / "cold")


@pytest.mark.parametrize("change", ["in_place", "past_autograd", "moved", "unfrozen", "hooked", "config", "mode"])
def test_a_base_that_changed_in_any_way_is_not_offered(kept: KeptBase, reporter: Reporter, change: str) -> None:
    assert kept._base
    model = kept._base[0]
    layer = model.model.layers[0].mlp.down_proj
    with torch.no_grad():
        match change:
            case "in_place":
                layer.weight[3, 4] += 1e-3
            case "past_autograd":
                layer.weight.data.numpy()[3, 4] += 1e-3  # no version counts this
            case "moved":
                layer.weight = torch.nn.Parameter(layer.weight.clone(), requires_grad=False)
            case "unfrozen":
                layer.weight.requires_grad_(True)
            case "hooked":
                layer.register_forward_hook(lambda *_: None)
            case "config":
                model.config.use_cache = not model.config.use_cache
            case "mode":
                layer.train()
    assert not kept.offer(reporter)


def test_a_base_that_cannot_be_looked_at_costs_no_result(
    kept: KeptBase, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.child.kept_base", lambda: kept)
    monkeypatch.setattr("worker.child.has_children", lambda: False)  # this process runs the tests' servers
    assert stays(reporter)
    kept.get(("0" * 64, None), lambda: pytest.fail("it is kept"))[0].register_buffer(
        "odd", torch.empty(3, device="meta")
    )
    with pytest.raises(Exception, match="meta"):
        kept.offer(reporter)
    assert not stays(reporter)


def test_nothing_is_offered_after_a_request_to_stop(kept: KeptBase, reporter: Reporter) -> None:
    reporter.stop()
    assert not kept.offer(reporter)


def test_one_bit_changes_the_sum_of_any_kind_of_tensor() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool):
        tensor = torch.zeros(5, 7).to(dtype)
        before = bit_sum(tensor)
        tensor.view(-1)[11] = 1
        assert bit_sum(tensor) != before


def test_the_sum_of_a_tensor_depends_on_its_bits_alone() -> None:
    numbers = torch.arange(200, dtype=torch.uint8)
    assert bit_sum(numbers[3:]) == bit_sum(numbers[3:].clone())
    assert bit_sum(numbers.view(2, 100).T) == bit_sum(numbers.view(2, 100).T.contiguous())


def test_a_sum_takes_no_memory_of_its_own() -> None:
    script = (
        "import resource, torch; from worker.kept_base import bit_sum; torch.set_num_threads(1); "
        "weight = torch.ones(2**25, dtype=torch.bfloat16); bit_sum(weight[:9]); "
        "held = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize(); "
        "resource.setrlimit(resource.RLIMIT_AS, (held + weight.nbytes,) * 2); print(bit_sum(weight) > 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"]


def test_a_process_with_children_says_so() -> None:
    script = (
        "import subprocess; from worker.child import has_children; before = has_children(); "
        "child = subprocess.Popen(['true']); during = has_children(); child.wait(); "
        "print(before, during, has_children())"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "False"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], Child]]:
    """Starts children that offer themselves after every task, and say they hold 100 bytes."""
    started: list[Child] = []

    def start() -> Child:
        home = workspace(tmp_path, f"home-{len(started)}")
        started.append(Child(speaking("ready"), env={"PATH": os.environ["PATH"]}, directory=home))
        return started[-1]

    yield start
    for child in started:
        child.end()


def use(pool: WarmPool, start: Callable[[], Child], tmp_path: Path, *, warmth: Warmth = WARMTH) -> Child:
    with pool.borrow(warmth, start) as child:
        child.assign(tmp_path, lambda _: None)
        assert child.wait(120)
    return child


def other_base(number: int) -> Warmth:
    return replace(WARMTH, base_digest=f"{number:064x}")


def test_bases_that_need_too_much_memory_go_oldest_first(start: Callable[[], Child], tmp_path: Path) -> None:
    pool = WarmPool(slots=10, max_bytes=250, idle_seconds=3600)
    children = [use(pool, start, tmp_path, warmth=other_base(number)) for number in (1, 2, 3)]
    assert [child.ready is not None for child in children] == [False, True, True]


def test_there_are_never_more_processes_than_slots(start: Callable[[], Child], tmp_path: Path) -> None:
    pool = WarmPool(slots=2, max_bytes=10**9, idle_seconds=3600)
    first, second = (use(pool, start, tmp_path, warmth=other_base(number)) for number in (1, 2))
    with pool.borrow(other_base(3), start):
        assert (first.ready, second.ready is not None) == (None, True)


def test_a_process_that_cannot_be_started_takes_no_place(start: Callable[[], Child], tmp_path: Path) -> None:
    pool = WarmPool(slots=1, max_bytes=2**40, idle_seconds=3600)

    def fail() -> Child:
        raise OSError

    with pytest.raises(OSError), pool.borrow(WARMTH, fail):
        pass
    first = use(pool, start, tmp_path)
    assert use(pool, start, tmp_path) is first
    pool.close()


def test_another_tenant_gets_a_process_of_its_own(start: Callable[[], Child], tmp_path: Path) -> None:
    pool = WarmPool(slots=10, max_bytes=10**9, idle_seconds=3600)
    mine = use(pool, start, tmp_path)
    assert use(pool, start, tmp_path, warmth=replace(WARMTH, tenant_id=uuid.uuid4())) is not mine
    assert use(pool, start, tmp_path) is mine


def test_a_process_that_waited_too_long_is_ended_with_its_home(start: Callable[[], Child], tmp_path: Path) -> None:
    pool = WarmPool(slots=2, max_bytes=10**9, idle_seconds=0)
    child = use(pool, start, tmp_path)
    pool.evict()
    assert child.ready is None
    assert not (tmp_path / "home-0").exists()


def test_a_closed_pool_keeps_nothing(start: Callable[[], Child], tmp_path: Path) -> None:
    pool = WarmPool(slots=2, max_bytes=10**9, idle_seconds=3600)
    idle = use(pool, start, tmp_path)
    pool.close()
    assert idle.ready is None
    assert use(pool, start, tmp_path).ready is None


def test_a_pool_without_memory_keeps_nothing(start: Callable[[], Child], tmp_path: Path) -> None:
    assert use(WarmPool(slots=2, max_bytes=0, idle_seconds=3600), start, tmp_path).ready is None
