"""What a model is set to while it trains or is evaluated, and set back from afterwards."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from lora_core.fusing import fused_modules
from lora_core.packing import documents_apart
from lora_core.train_config import TrainConfig


@contextmanager
def training(model: Any, config: TrainConfig, *, packed: bool) -> Iterator[Callable[[], None]]:
    """In training mode within, in evaluation mode afterwards. What it gives is to be called after a failed pass."""
    with ExitStack() as stack:
        stack.callback(model.eval)
        model.train()
        if packed:
            stack.enter_context(documents_apart(model))
        forget = stack.enter_context(fused_modules(model))
        if config.activation_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            stack.callback(model.activation_checkpointing_disable)
        yield forget


@contextmanager
def evaluating(model: Any, *, packed: bool) -> Iterator[None]:
    """In evaluation mode within, in the mode it had afterwards."""
    was_training = model.training
    with ExitStack() as stack:
        stack.callback(model.train, was_training)
        model.eval()
        if packed:
            stack.enter_context(documents_apart(model))
        yield
