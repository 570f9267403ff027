"""One side of the training benchmark, as a process of its own: `bench.train` tells it when to take a step.

It loads the model and the adapter, says what memory that took, and then answers every line on its input with the
seconds and the loss of one optimizer step, and what memory that step had at its peak."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

LEARNING_RATE = 2e-3
PROMPT_SHARE = 0.7


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=sorted(SIDES))
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--lengths", type=int, nargs="+", required=True)
    parser.add_argument("--steps", type=int, required=True)
    options = parser.parse_args()
    SIDES[options.side](options)


class Clock:
    """Waits for a line, lets one step happen, and answers."""

    def __init__(self) -> None:
        self._began = self._cpu = 0.0
        self.tell(loaded=memory("VmRSS"))

    def wait(self) -> None:
        if not sys.stdin.readline():
            sys.exit()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
        self._began, self._cpu = time.perf_counter(), time.process_time()

    def pause(self) -> None:
        self._ended, self._ended_cpu = time.perf_counter(), time.process_time()

    def stop(self, loss: float | None) -> None:
        self.tell(seconds=self._ended - self._began, cpu=self._ended_cpu - self._cpu, loss=loss, peak=memory("VmHWM"))

    def tell(self, **said: Any) -> None:
        print("#" + json.dumps(said), flush=True)


def memory(what: str) -> float:
    """MiB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def rows(options: argparse.Namespace, vocab: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids and labels of each row: the first PROMPT_SHARE of it is not learnt."""
    chance = np.random.default_rng(0)
    made = []
    for length in options.lengths:
        ids = chance.integers(3, vocab, length, dtype=np.int32)
        labels = ids.copy()
        labels[: round(PROMPT_SHARE * length)] = -100
        made.append((ids, labels))
    return made


def ours(options: argparse.Namespace) -> None:
    from lora_core.adapter import load_adapter
    from lora_core.data import Example
    from lora_core.model import load_base
    from lora_core.train import StepReport, TrainConfig, train

    model, _ = load_base(options.base, options.dtype)
    load_adapter(model, options.adapter)
    examples = [Example(*row) for row in rows(options, model.config.vocab_size)]
    config = TrainConfig(
        n_epochs=options.steps,
        batch_size=len(examples),
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        tokens_per_batch=2**30,
    )
    clock = Clock()

    def should_stop() -> bool:
        clock.wait()
        return False

    def on_step(report: StepReport) -> None:
        clock.pause()
        clock.stop(report.loss)

    train(model, examples, config, should_stop=should_stop, on_step=on_step)


def trl(options: argparse.Namespace) -> None:
    peer(options, checkpointing=False, autocast=False)


def trl_autocast(options: argparse.Namespace) -> None:
    peer(options, checkpointing=False, autocast=True)


def trl_checkpointing(options: argparse.Namespace) -> None:
    peer(options, checkpointing=True, autocast=False)


def peer(options: argparse.Namespace, *, checkpointing: bool, autocast: bool) -> None:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(options.base)
    base = AutoModelForCausalLM.from_pretrained(options.base, dtype=getattr(torch, options.dtype))
    model = PeftModel.from_pretrained(base, options.adapter, is_trainable=True)
    data = [
        {"input_ids": ids.tolist(), "labels": labels.tolist()} for ids, labels in rows(options, base.config.vocab_size)
    ]
    config = SFTConfig(
        output_dir=str(options.adapter / "out"),
        use_cpu=True,
        bf16=autocast and options.dtype == "bfloat16",
        per_device_train_batch_size=len(data),
        num_train_epochs=options.steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        gradient_checkpointing=checkpointing,
        max_length=None,
        loss_type="nll",
        logging_steps=1,
        logging_strategy="steps",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    clock = Clock()

    class Steps(TrainerCallback):
        """The loss of a step is told where it is logged; the clock stops before that."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.wait()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.pause()

        def on_log(self, *_: Any, **said: Any) -> None:
            if "loss" in said["logs"]:
                clock.stop(float(said["logs"]["loss"]))

    trainer = SFTTrainer(
        model=model, args=config, train_dataset=Dataset.from_list(data), processing_class=tokenizer, callbacks=[Steps()]
    )
    trainer.train()


SIDES: dict[str, Callable[[argparse.Namespace], None]] = {
    "ours": ours,
    "trl": trl,
    "trl_autocast": trl_autocast,
    "trl_checkpointing": trl_checkpointing,
}

if __name__ == "__main__":
    main()
