"""Rows → token ids and labels. Only what the assistant says, or the completion, is labelled; of plain text, all."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from jinja2 import TemplateError

from lora_core.errors import DatasetError, NothingToLearn
from lora_core.floats import Array
from lora_core.rows import Row, kind_of

IGNORED = -100

# For tokenizers without a chat template: "User: …", "Assistant: …", one turn per line, end-of-sequence after answers.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] | capitalize + ': ' + message['content'] }}"
    "{{ (eos_token if message['role'] == 'assistant' else '') + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

Span = tuple[int, int]


@dataclass(frozen=True)
class Example:
    """Token ids and labels, (T,) int32 each; a label is the token itself, or IGNORED."""

    input_ids: Array
    labels: Array

    @property
    def targets(self) -> int:
        """How many tokens a causal model learns here: the first has nothing to be predicted from."""
        return int(np.count_nonzero(self.labels[1:] != IGNORED))


ExampleT = TypeVar("ExampleT")


@dataclass(frozen=True)
class Dataset(Generic[ExampleT]):
    """`truncated` rows lost their end; `skipped` rows had nothing left to learn and are not among `examples`."""

    examples: list[ExampleT]
    truncated: int
    skipped: int


def tokenize_rows(tokenizer: Any, rows: Iterable[Row], max_length: int) -> Dataset[Example]:
    """Every row as an Example of at most `max_length` tokens. NothingToLearn if none has a trained token."""
    examples: list[Example] = []
    truncated = skipped = 0
    for row in rows:
        example, cut = _tokenize(tokenizer, row, max_length)
        truncated += cut
        if example.targets:
            examples.append(example)
        else:
            skipped += 1
    if not examples:
        raise NothingToLearn(
            f"no row has anything to learn within {max_length} tokens; shorten prompts or raise the limit"
        )
    return Dataset(examples, truncated, skipped)


def tokenize_row(tokenizer: Any, row: Row, max_length: int) -> Example:
    """One row. Chats go through the tokenizer's chat template, or PLAIN_TEMPLATE if it has none; prompt and
    completion are joined as they are, with end-of-sequence after, as is plain text. Labels include each end."""
    return _tokenize(tokenizer, row, max_length)[0]


def _tokenize(tokenizer: Any, row: Row, max_length: int) -> tuple[Example, bool]:
    kind = kind_of(row)
    chat = kind == "messages"
    if kind == "preference":
        raise DatasetError("these rows compare two answers; they are for preference training (DPO)")
    if chat:
        text, spans = _render(tokenizer, row["messages"])
    elif kind == "text":
        text = row["text"]
        spans = [(0, len(text))]
    else:
        text = row["prompt"] + row["completion"]
        spans = [(len(row["prompt"]), len(text))]
    # A chat template writes the special tokens itself.
    encoded = tokenizer(text, add_special_tokens=not chat, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    labels = [
        token if any(start < end <= stop for start, stop in spans) else IGNORED
        for token, (_, end) in zip(ids, encoded["offset_mapping"], strict=True)
    ]
    if not chat:
        if not ids or ids[-1] != tokenizer.eos_token_id:
            ids.append(tokenizer.eos_token_id)
            labels.append(IGNORED)
        labels[-1] = ids[-1]
    cut = len(ids) > max_length
    return Example(np.array(ids[:max_length], np.int32), np.array(labels[:max_length], np.int32)), cut


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[str, list[Span]]:
    """The conversation as text, and where the answers are in it, their end marks included.

    An answer is what follows the text of the turns before it plus the generation prompt. Templates that rewrite
    earlier turns (dropping their reasoning, say) leave only the last answer in place; then only it is labelled.
    """
    text = _apply(tokenizer, messages, prompt=False)
    spans: list[Span] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _apply(tokenizer, messages[:index], prompt=True)
        through = _apply(tokenizer, messages[: index + 1], prompt=False).rstrip()
        if len(before) < len(through) and text.startswith(before) and text.startswith(through):
            spans.append((len(before), len(through)))
    if not spans or spans[-1][1] != len(text.rstrip()):
        raise DatasetError("the chat template of the base model does not append turns, so answers cannot be located")
    return text, spans


def _apply(tokenizer: Any, messages: list[dict[str, str]], *, prompt: bool) -> str:
    template = tokenizer.chat_template or PLAIN_TEMPLATE
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
            )
        )
    except TemplateError as error:
        raise DatasetError(f"the chat template of the base model refuses a conversation: {error}") from None
