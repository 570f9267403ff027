import numpy as np
import pytest

from lora_core.batching import epoch_steps, micro_batches
from lora_core.data import IGNORED, tokenize_row, tokenize_rows
from lora_core.errors import DatasetError, NothingToLearn
from tests.tiny import CHAT_TEMPLATE, make_rows, make_tokenizer

CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Héllo?"},
        {"role": "assistant", "content": "Yes, 世界."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "So on.\n"},
    ]
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def learned(tokenizer, example) -> list[str]:
    """The labelled tokens as texts, one per unbroken run."""
    runs: list[list[int]] = [[]]
    for token, label in zip(example.input_ids, example.labels, strict=True):
        if label == IGNORED:
            runs.append([])
        else:
            assert label == token
            runs[-1].append(int(token))
    return [tokenizer.decode(run) for run in runs if run]


def test_every_answer_is_labelled_with_its_end_and_nothing_else(tokenizer):
    example = tokenize_row(tokenizer, CHAT, 500)
    assert learned(tokenizer, example) == ["Yes, 世界.</s>", "So on.\n</s>"]
    assert tokenizer.decode(example.input_ids) == tokenizer.apply_chat_template(CHAT["messages"], tokenize=False)


def test_a_completion_is_labelled_with_end_of_sequence(tokenizer):
    example = tokenize_row(tokenizer, {"prompt": "2 + 2 =", "completion": " 4"}, 500)
    assert learned(tokenizer, example) == [" 4</s>"]
    assert tokenizer.decode(example.input_ids) == "2 + 2 = 4</s>"


def test_an_empty_prompt_teaches_the_whole_completion(tokenizer):
    example = tokenize_row(tokenizer, {"prompt": "", "completion": "abc"}, 500)
    assert learned(tokenizer, example) == ["abc</s>"]


def test_without_a_chat_template_the_plain_one_is_used(tokenizer, tmp_path):
    plain = make_tokenizer(tmp_path, chat_template=None)
    example = tokenize_row(plain, CHAT, 500)
    assert learned(plain, example) == [" Yes, 世界.</s>", " So on.\n</s>"]
    assert plain.decode(example.input_ids).startswith("<s>System: Be brief.\nUser: Héllo?\nAssistant: Yes")


def test_a_template_that_rewrites_earlier_answers_leaves_the_last(tmp_path):
    kept = "(message['content'] if loop.last or message['role'] != 'assistant' else 'cut')"
    tokenizer = make_tokenizer(tmp_path, chat_template=CHAT_TEMPLATE.replace("message['content']", kept))
    assert learned(tokenizer, tokenize_row(tokenizer, CHAT, 500)) == ["So on.\n</s>"]


def test_a_template_in_which_answers_cannot_be_located_is_a_dataset_error(tmp_path):
    with pytest.raises(DatasetError, match="located"):
        tokenize_row(make_tokenizer(tmp_path, chat_template="{{ messages | length }}"), CHAT, 500)


def test_a_template_that_refuses_a_role_is_a_dataset_error(tmp_path):
    template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DatasetError, match="no system role"):
        tokenize_row(make_tokenizer(tmp_path, chat_template=template), CHAT, 500)


def test_long_rows_are_cut_and_rows_without_labels_skipped(tokenizer):
    rows = [*make_rows(2, "prompt"), {"prompt": "x" * 300, "completion": "y"}, {"prompt": "", "completion": "z" * 99}]
    data = tokenize_rows(tokenizer, rows, 60)
    assert (len(data.examples), data.truncated, data.skipped) == (3, 2, 1)
    assert max(len(example.input_ids) for example in data.examples) == 60


def test_nothing_to_learn_at_all_is_a_dataset_error(tokenizer):
    with pytest.raises(NothingToLearn, match="8 tokens"):
        tokenize_rows(tokenizer, [{"prompt": "x" * 300, "completion": "y"}], 8)


LENGTHS = [(7 * i) % 50 + 1 for i in range(203)]


def test_an_epoch_has_every_row_once_in_steps_of_the_batch_size():
    steps = epoch_steps(LENGTHS, seed=1, epoch=0, batch_size=8)
    assert sorted(row for step in steps for row in step) == list(range(203))
    assert sorted(map(len, steps)) == [3] + [8] * 25


def test_order_depends_on_seed_and_epoch_only():
    def order(seed, epoch):
        return epoch_steps(LENGTHS, seed=seed, epoch=epoch, batch_size=8)

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_steps_hold_rows_of_similar_length():
    steps = epoch_steps(LENGTHS, seed=1, epoch=0, batch_size=8)
    padded = sum(max(LENGTHS[row] for row in step) * len(step) for step in steps)
    assert padded < 1.15 * sum(LENGTHS)


def test_micro_batches_keep_the_token_limit():
    pieces = micro_batches(range(203), LENGTHS, max_tokens=120)
    assert sorted(row for piece in pieces for row in piece) == list(range(203))
    assert all(max(LENGTHS[row] for row in piece) * len(piece) <= 120 for piece in pieces)
    assert len(pieces) < 70


def test_a_row_longer_than_the_limit_stands_alone():
    assert micro_batches([0, 1, 2], [5, 500, 5], max_tokens=100) == [[1], [0, 2]]


def test_of_plain_text_every_token_is_learned(tokenizer):
    example = tokenize_row(tokenizer, {"text": "Hello world"}, 64)
    assert np.array_equal(example.labels, example.input_ids)
    assert tokenizer.decode(example.input_ids) == "Hello world</s>"
