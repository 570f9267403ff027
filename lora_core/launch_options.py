"""What `lora_core.launch` is told on its command line. Needs no torch."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from lora_core.config import LoraConfig
from lora_core.errors import BadConfig
from lora_core.train_config import TrainConfig

C = TypeVar("C", LoraConfig, TrainConfig)


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; the process ends with a usage message if they are not understood."""
    parser = argparse.ArgumentParser(prog="lora_core.launch", description="Train one adapter in all processes.")
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--rows", type=Path, required=True, help="training rows, JSON lines")
    parser.add_argument("--out", type=Path, required=True, help="folder of the adapter; the first process writes it")
    parser.add_argument("--eval-rows", type=Path, help="rows to evaluate on")
    parser.add_argument("--method", choices=("sft", "dpo"), default="sft")
    parser.add_argument("--beta", type=float, default=0.1, help="of dpo")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument(
        "--sharding",
        choices=("none", "full"),
        default="none",
        help="full: each process keeps a part of the base (FSDP2)",
    )
    parser.add_argument("--checkpoints", type=Path, help="folder to save the run in, and to go on from")
    parser.add_argument("--save-steps", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--lora", type=_setting, action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--train", type=_setting, action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args(arguments)
    if options.save_steps < 1:
        parser.error("--save-steps must be at least 1")
    return options


def lora_config(options: argparse.Namespace) -> LoraConfig:
    """Of every `--lora NAME=VALUE`, named after the base's folder unless told otherwise."""
    return _config(LoraConfig, {"base_model_name_or_path": options.base.name, **dict(options.lora)})


def train_config(options: argparse.Namespace) -> TrainConfig:
    """Of every `--train NAME=VALUE`."""
    return _config(TrainConfig, dict(options.train))


def _config(kind: type[C], values: dict[str, Any]) -> C:
    known = {field.name for field in fields(kind)}
    if unknown := sorted(values.keys() - known):
        raise BadConfig(f"there is no setting {unknown[0]}; these are: {', '.join(sorted(known))}")
    return kind(**values)


def _setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE; the value is JSON, or else a text."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, _as_tuples(json.loads(value))
    except json.JSONDecodeError:
        return name, value


def _as_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _as_tuples(item) for name, item in value.items()}
    return tuple(value) if isinstance(value, list) else value
