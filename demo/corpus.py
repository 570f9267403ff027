"""Real text that every machine with Python has: the language reference and the standard library's docstrings.

A module's docstrings belong to exactly one split, chosen by a hash of its name, so held-out text was never seen:
neither by the base model's pre-training nor by the adapter's."""

import ast
import hashlib
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

Split = Literal["train", "validation", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "validation", "heldout")

# Folders that are tests, vendored or generated rather than documentation.
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages", "encodings"}
QUESTIONS = {
    "module": "What is the module {} for?",
    "class": "What is the class {}?",
    "function": "What does {} do?",
}


@dataclass(frozen=True)
class Doc:
    """One documented object of the standard library."""

    module: str
    name: str
    kind: Literal["module", "class", "function"]
    text: str


def split_of(module: str) -> Split:
    """The split of a top-level module: 8 of 10 train, 1 validation, 1 held-out; the same on every machine."""
    top = module.partition(".")[0]
    bucket = hashlib.sha256(top.encode()).digest()[0] % 10
    return "heldout" if bucket == 0 else "validation" if bucket == 1 else "train"


def sources(root: Path) -> Iterator[tuple[str, Path]]:
    """Public modules under `root` as (dotted name, file), in a fixed order."""
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).parts):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if parts and not any(p in SKIPPED or p.startswith("_") or not p.isidentifier() for p in parts):
            yield ".".join(parts), path


def docs_of(module: str, source: str) -> Iterator[Doc]:
    """Docstrings of the module, its public classes and functions, and their public methods; nothing is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old sources have invalid escapes that a newer Python warns about
        tree = ast.parse(source)
    yield from _documented(tree, module, module, "module")
    yield from _members(tree, module, module)


def _members(parent: ast.Module | ast.ClassDef, module: str, prefix: str) -> Iterator[Doc]:
    for node in parent.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if node.name.startswith("_"):
                continue
            name = f"{prefix}.{node.name}"
            kind: Literal["class", "function"] = "class" if isinstance(node, ast.ClassDef) else "function"
            yield from _documented(node, module, name, kind)
            if isinstance(node, ast.ClassDef):
                yield from _members(node, module, name)


def _documented(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
    module: str,
    name: str,
    kind: Literal["module", "class", "function"],
) -> Iterator[Doc]:
    text = ast.get_docstring(node, clean=True)
    if text and text.isascii():
        yield Doc(module, name, kind, text.strip())


@cache
def collect() -> tuple[Doc, ...]:
    """Every docstring of this Python's standard library, in a fixed order, each text once."""
    seen: set[str] = set()
    docs: list[Doc] = []
    for module, path in sources(Path(sysconfig.get_path("stdlib"))):
        try:
            found = list(docs_of(module, path.read_text(encoding="utf-8")))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue  # templates and deliberately broken files are not text to learn from
        for doc in found:
            if doc.text not in seen:
                seen.add(doc.text)
                docs.append(doc)
    return tuple(docs)


def first_sentence(text: str) -> str:
    """The first sentence of a docstring on one line, without markup; empty when it has no usable one."""
    paragraph = re.sub(r"\s+", " ", text.split("\n\n", 1)[0]).strip()
    paragraph = re.sub(r":[a-z:]+:(?=`)|`", "", paragraph)  # reStructuredText's roles and quotes
    match = re.match(r"(.+?[.!?])(?=\s+[A-Z]|$)", paragraph)
    sentence = match[1] if match else paragraph + "."
    usable = 15 <= len(sentence) <= 160 and sentence[0].isupper() and not re.search(r"->|>>>|[=|<>]{2}", sentence)
    return sentence if usable else ""


def pairs(split: Split) -> list[dict[str, str]]:
    """Question and answer of every documented object in `split`, as `{"prompt", "completion"}` rows. An answer that
    several modules share belongs to the earliest split only."""
    rows: list[dict[str, str]] = []
    earlier = SPLITS[: SPLITS.index(split)]
    taken = {first_sentence(doc.text) for doc in collect() if split_of(doc.module) in earlier}
    for doc in collect():
        answer = first_sentence(doc.text) if split_of(doc.module) == split else ""
        if answer and answer not in taken:
            rows.append({"prompt": QUESTIONS[doc.kind].format(doc.name), "completion": " " + answer})
    return rows


def pretraining_text(limit: int = 2_000_000) -> list[str]:
    """At most `limit` characters of documents: the language reference, then docstrings of the training split."""
    from pydoc_data.topics import topics  # a plain dict of texts, part of every Python

    texts = [inspect.cleandoc(topics[name]) for name in sorted(topics)]
    texts += [f"{doc.name}\n{doc.text}" for doc in collect() if split_of(doc.module) == "train"]
    chosen: list[str] = []
    size = 0
    for text in texts:
        size += len(text)
        if size > limit:
            break
        chosen.append(text)
    return chosen
