"""`worker.child` that a test can hold: while a file HELD lies above its home, training does not go on after step 50
before it is told to stop, nor a merge after its second shard."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_core.staging import Stage
from worker.child import main
from worker.protocol import StepMessage
from worker.reporter import Reporter

HELD = "held"
STEP, SHARD = 50, 2

tell, finish = Reporter.step, Stage.finish
shards: list[str] = []


def wait(until: Callable[[], bool] = lambda: False) -> None:
    while any((folder / HELD).exists() for folder in Path(os.environ["HOME"]).parents) and not until():
        time.sleep(0.01)


def tell_and_wait(reporter: Reporter, step: StepMessage) -> None:
    tell(reporter, step)
    if step.step >= STEP:
        wait(reporter.is_stopped)


def finish_and_wait(stage: Stage, path: str, facts: dict[str, Any]) -> None:
    finish(stage, path, facts)
    shards.extend([path] * path.startswith("model-"))
    if len(shards) == SHARD:
        wait()


if __name__ == "__main__":
    Reporter.step, Stage.finish = tell_and_wait, finish_and_wait  # type: ignore[method-assign]  # what this is for
    sys.exit(main())
