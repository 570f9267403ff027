"""Stands in for `worker.child` where a test needs a certain ending and no torch. `spec.seed` of the job chooses it."""

import faulthandler
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import SimpleQueue
from typing import Any

SUCCEED, LONG, DEAF, HOSTILE, CRASH, KILLED, REFUSE, BROKEN, BREED, LOUD, LINK, STUCK, SEGV = range(13)
STAY = -1


def say(**message: Any) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def step(number: int, total: int = 3) -> None:
    say(type="step", step=number, total_steps=total, loss=1.0 / number, learning_rate=0.1)


def finish(adapter: Path, out: Path) -> None:
    shutil.copytree(adapter, out)
    say(type="result", metrics={"train_loss": 0.5}, trained_tokens=7)


def be_hostile() -> None:
    sys.stdout.write("not json\n" + "[" * 50_000 + "\n" + '{"type": "step", "step": "1"}\n')
    sys.stdout.write('{"type": "step", "step": 2, "total_steps": 3, "loss": NaN}\n')
    sys.stdout.write('{"type": "grant", "lease": true}\n{"type": "phase", "phase": "owned"}\n')
    sys.stdout.write('{"type": "note", "message": "' + "x" * 300_000 + '"}\n')
    sys.stdout.buffer.write(b"\xff\xfe\0\n" + b"y" * 3_000_000)
    sys.stdout.write("\n")
    say(type="note", message="a NUL \0 and a control \x1b[31m in a note")
    sys.stdout.flush()


def wait_for_ever() -> None:
    step(1)
    number = 1
    while True:
        time.sleep(0.05)
        number += 1
        step(number, 10**6)


def follow(tasks: "SimpleQueue[str]") -> None:
    text = b""
    while chunk := os.read(0, 4096):
        *whole, text = (text + chunk).split(b"\n")
        for line in whole:
            tasks.put(line.decode())
    os._exit(75)


def main(adapter: Path) -> int:
    tasks: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=follow, args=(tasks,), daemon=True).start()
    while (status := work(adapter, Path(tasks.get()))) == STAY:
        say(type="ready", resident_bytes=1000)
    return status


def work(adapter: Path, workspace: Path) -> int:
    """The exit status, or STAY."""
    task = json.loads((workspace / "task.json").read_text())
    out = workspace / "out"
    mode = task["spec"]["seed"]
    say(type="phase", phase="training", total_steps=3)
    if mode == LONG:
        for request in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(request, lambda *_: os._exit(75))
        wait_for_ever()
    if mode == DEAF:
        for request in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(request, signal.SIG_IGN)
        wait_for_ever()
    if mode == CRASH:
        sys.stderr.write("Traceback: it broke\n")
        return 3
    if mode == KILLED:
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == SEGV:
        os.kill(os.getpid(), signal.SIGSEGV)
    if mode == STUCK:
        faulthandler.register(signal.SIGUSR2)
        step(1)
        threading.Event().wait()
    if mode == REFUSE:
        say(type="error", error_class="user", code="invalid_training_file", message="Line 3 has no answer.")
        return 1
    if mode == HOSTILE:
        be_hostile()
    if mode == BREED:
        sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        say(type="note", message=f"started {sleeper.pid}")
    if mode == LOUD:
        for _ in range(12):
            sys.stderr.write("z" * 2**20)
    for number in (1, 2, 3):
        step(number)
    finish(adapter, out)
    if mode == BROKEN:
        (out / "adapter_model.safetensors").write_bytes(b"nothing")
    if mode == LINK:
        (out / "adapter_model.safetensors").unlink()
        (out / "adapter_model.safetensors").symlink_to("/etc/passwd")
    return STAY if mode == SUCCEED and task.get("stay") else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
