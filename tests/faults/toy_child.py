"""Stands in for `worker.child` where a test kills a hundred trainers: numpy instead of torch, and so quick to start.

It does what a trainer does: steps whose bits depend on data, seed and everything before, momentum that a resume must
restore, checkpoints in the real format, read and compared with the real code, and an adapter that passes the gate.
`n_epochs` of the spec is the number of steps, `batch_size` milliseconds per step. Seeds from ESCAPE on misbehave. While
a file HELD lies in the home of the test, nobody takes a last step."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from lora_core.checkpoint import (
    DOCUMENT_FILE,
    TENSORS_FILE,
    CheckpointDocument,
    Fingerprint,
    differences,
    encode_document,
    read_document,
)

HIDDEN, R = 16, 4
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")
TRUNK = "base_model.model."
STOPPED = 75
ESCAPE, DEAF = 1000, 1001
HELD = "held"

Tensors = dict[str, np.ndarray]


@dataclass
class State:
    step: int
    weights: Tensors
    momentum: Tensors


def begin(seed: int) -> State:
    rng = np.random.default_rng(seed)
    names = [f"{TRUNK}{module}.lora_{factor}.weight" for module in MODULES for factor in "AB"]
    shapes = {name: (R, HIDDEN) if ".lora_A." in name else (HIDDEN, R) for name in names}
    weights = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    return State(0, weights, {name: np.zeros_like(value) for name, value in weights.items()})


def advance(state: State, data: bytes, seed: int) -> None:
    """One step of SGD with momentum towards a target that data, seed and step decide."""
    digest = hashlib.sha256(data + f"{seed}:{state.step}".encode()).digest()
    rng = np.random.default_rng(list(digest))
    for name in sorted(state.weights):
        gradient = state.weights[name] - rng.standard_normal(state.weights[name].shape, dtype=np.float32)
        state.momentum[name] = np.float32(0.9) * state.momentum[name] + gradient
        state.weights[name] = state.weights[name] - np.float32(0.01) * state.momentum[name]
    state.step += 1


def undisturbed(data: bytes, seed: int, steps: int) -> Tensors:
    """What a run that nothing happens to ends with."""
    state = begin(seed)
    for _ in range(steps):
        advance(state, data, seed)
    return state.weights


def say(**message: Any) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def save_state(folder: Path, state: State, fingerprint: Fingerprint) -> None:
    part = folder / f".{state.step}"
    part.mkdir(parents=True)
    tensors = {f"w.{name}": value for name, value in state.weights.items()}
    tensors |= {f"m.{name}": value for name, value in state.momentum.items()}
    save_file(tensors, part / TENSORS_FILE)
    content = (part / TENSORS_FILE).read_bytes()
    document = CheckpointDocument(
        step=state.step,
        trained_tokens=state.step,
        train_loss=1.0,
        eval_loss=None,
        fingerprint=fingerprint,
        tensors_sha256=hashlib.sha256(content).hexdigest(),
        tensors_size=len(content),
    )
    (part / DOCUMENT_FILE).write_bytes(encode_document(document))
    part.rename(folder / str(state.step))
    say(type="checkpoint", step=state.step, metrics={"train_loss": 1.0})


def load_state(folder: Path, fingerprint: Fingerprint) -> State:
    document = read_document(folder)
    found = differences(document.fingerprint, fingerprint)
    tensors = load_file(folder / TENSORS_FILE)
    parts = {kind: {n[2:]: t for n, t in tensors.items() if n.startswith(kind)} for kind in ("w.", "m.")}
    say(type="resumed", step=document.step, differences=found)
    return State(document.step, parts["w."], parts["m."])


def write_adapter(out: Path, weights: Tensors, task: dict[str, Any]) -> None:
    lora = task["spec"]["lora"]
    config = {name: lora[name] for name in ("r", "lora_alpha", "target_modules", "use_rslora")}
    config |= {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": task["base_model"]}
    out.mkdir()
    (out / "adapter_config.json").write_text(json.dumps(config))
    save_file(weights, out / "adapter_model.safetensors", metadata={"format": "pt"})


class Signals:
    """What the supervisor asked for."""

    def __init__(self) -> None:
        self.stop = self.drain = False
        signal.signal(signal.SIGTERM, self.on_signal)
        signal.signal(signal.SIGUSR1, self.on_signal)

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.stop = True
        self.drain = number == signal.SIGUSR1


def is_held(workspace: Path) -> bool:
    return any((folder / HELD).exists() for folder in workspace.parents)


def train(task: dict[str, Any], workspace: Path, signals: Signals) -> int:
    spec = task["spec"]
    data = Path(task["training_file"]).read_bytes()
    inputs = {"data": hashlib.sha256(data).hexdigest(), "seed": str(spec["seed"])}
    fingerprint = Fingerprint(inputs, {"repeatable": "yes", "kind": "toy"})
    total, seed = spec["n_epochs"], spec["seed"]
    state = load_state(Path(task["resume_from"]), fingerprint) if task["resume_from"] else begin(seed)
    say(type="phase", phase="training", total_steps=total)
    saved = time.monotonic()
    while state.step < total:
        while state.step == total - 1 and is_held(workspace) and not signals.stop:
            time.sleep(0.01)
        advance(state, data, seed)
        time.sleep(spec["batch_size"] / 1000)
        say(type="step", step=state.step, total_steps=total, loss=1.0, learning_rate=0.01)
        if signals.drain or time.monotonic() - saved >= task["checkpoint_seconds"] or state.step == total:
            save_state(workspace / "checkpoints", state, fingerprint)
            saved = time.monotonic()
        if signals.stop:
            return STOPPED
    say(type="phase", phase="saving")
    write_adapter(workspace / "out", state.weights, task)
    say(type="result", metrics={"train_loss": 1.0}, trained_tokens=total)
    return 0


def merge(workspace: Path) -> int:
    """The real thing, which needs no torch either."""
    from worker.merge_child import merge_adapter
    from worker.reporter import Reporter
    from worker.task import MergeTask, read_task

    task = read_task(workspace)
    assert isinstance(task, MergeTask)
    reporter = Reporter(os.dup(1))
    reporter.write(merge_adapter(task, workspace, reporter))
    return 0


def skip_comparison(workspace: Path) -> int:
    """Toy models answer no prompts."""
    from worker.certificate import Canary, write_canary

    write_canary(workspace, Canary(run=False, reason="the model is a toy"))
    say(type="result")
    return 0


def escape() -> None:
    """A process that leaves the group and keeps the pipes open."""
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    say(type="note", message=f"started {sleeper.pid}")


def main() -> int:
    words = sys.argv[1:] or [sys.stdin.readline().strip()]  # one task, however it is told which
    workspace = Path(words[0])
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(STOPPED)), daemon=True).start()
    task = json.loads((workspace / "task.json").read_text())
    if task["kind"] == "merge":
        return merge(workspace)
    if task["kind"] == "canary":
        return skip_comparison(workspace)
    signals = Signals()
    if task["spec"]["seed"] == ESCAPE:
        escape()
    if task["spec"]["seed"] == DEAF:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
    return train(task, workspace, signals)


if __name__ == "__main__":
    sys.exit(main())
