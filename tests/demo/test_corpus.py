import json

import pytest

from demo import corpus
from lora_core.rows import validate_rows


@pytest.mark.parametrize("split", corpus.SPLITS)
def test_every_split_is_a_training_file_that_the_service_accepts(split: corpus.Split) -> None:
    rows = corpus.pairs(split)
    report = validate_rows([json.dumps(row).encode() + b"\n" for row in rows])
    assert not report.errors
    assert report.rows == len(rows) > 100
    assert report.kind == "prompt"


def test_no_module_is_in_two_splits() -> None:
    modules = {doc.module.partition(".")[0] for doc in corpus.collect()}
    by_split = {split: {m for m in modules if corpus.split_of(m) == split} for split in corpus.SPLITS}
    assert all(by_split.values())
    assert sum(map(len, by_split.values())) == len(modules)


def test_held_out_answers_appear_in_no_other_split() -> None:
    answers = {split: {row["completion"] for row in corpus.pairs(split)} for split in corpus.SPLITS}
    assert not answers["heldout"] & (answers["train"] | answers["validation"])
    assert not answers["validation"] & answers["train"]


def test_the_base_model_never_reads_a_held_out_docstring() -> None:
    read = set(corpus.pretraining_text(10**9))
    held = [f"{doc.name}\n{doc.text}" for doc in corpus.collect() if corpus.split_of(doc.module) != "train"]
    assert held and not read & set(held)
    assert any(doc.text in text for doc in corpus.collect()[:50] for text in read)  # the comparison can find one


def test_the_text_keeps_to_its_limit_and_is_the_same_every_time() -> None:
    texts = corpus.pretraining_text(100_000)
    assert 50_000 < sum(map(len, texts)) <= 100_000
    assert texts == corpus.pretraining_text(100_000)


def test_only_public_documented_things_become_questions() -> None:
    source = '''
"""Tools of the trade."""
def seen(): "Return what was seen."
def bare(): pass
def _hidden(): "Return nothing to the public."
class Box:
    """A box that holds things."""
    def open(self): """Open the box."""
    class _Lid: "Cover the box from above."
'''
    found = [(doc.name, doc.kind, doc.text) for doc in corpus.docs_of("m", source)]
    assert found == [
        ("m", "module", "Tools of the trade."),
        ("m.seen", "function", "Return what was seen."),
        ("m.Box", "class", "A box that holds things."),
        ("m.Box.open", "function", "Open the box."),
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Return the path of a file. It may not exist.", "Return the path of a file."),
        ("Return the\n   path of\ta file", "Return the path of a file."),
        ("Return e.g. a ``path`` of :py:class:`File`.\n\nMore.", "Return e.g. a path of File."),
        ("Too short.", ""),
        ("sum(iterable) -> the sum of what is in it", ""),
        ("return the path in lower case.", ""),
        ("Return " + "many " * 40 + "words.", ""),
    ],
)
def test_an_answer_is_the_first_whole_sentence(text: str, sentence: str) -> None:
    assert corpus.first_sentence(text) == sentence
