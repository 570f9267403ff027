import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from lora_core.errors import BadHeader
from lora_core.header import encode_header, header_length, parse_header, read_header

NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "U8": np.uint8, "BOOL": np.bool_}
names = st.text("abcdefgh_.", min_size=1, max_size=8).filter(lambda n: not n.startswith(".") and ".." not in n)
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@given(st.dictionaries(names, st.tuples(st.sampled_from(sorted(NUMPY)), shapes), max_size=6))
def test_encoded_headers_equal_those_of_the_safetensors_library(tensors):
    theirs = save({n: np.zeros(s, NUMPY[d]) for n, (d, s) in tensors.items()}, metadata={"format": "pt"})
    head, header = encode_header([(n, d, s) for n, (d, s) in tensors.items()], {"format": "pt"})
    assert theirs.startswith(head)
    assert header.file_bytes == len(theirs)


@given(st.dictionaries(names, st.tuples(st.sampled_from(sorted(NUMPY)), shapes), max_size=6))
def test_parsing_inverts_encoding(tensors):
    head, header = encode_header([(n, d, s) for n, (d, s) in tensors.items()], {"format": "pt"})
    parsed = parse_header(head, file_bytes=header.file_bytes)
    assert {t.name: t for t in parsed.tensors} == {t.name: t for t in header.tensors}
    assert parsed.metadata == {"format": "pt"}


def file(document, data=b"", *, text=None):
    text = json.dumps(document).encode() if text is None else text
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        file({}, text=b" {}"),
        file({}, text=b"[]"),
        file({"a": entry()}),  # data missing
        file({"a": entry()}, bytes(9)),  # a byte too many
        file({"a": entry(), "b": entry()}, bytes(8)),  # overlap
        file({"a": entry(offsets=(4, 12))}, bytes(12)),  # hole
        file({"a": entry(shape=(3,))}, bytes(8)),
        file({"a": entry(shape=(-2,))}, bytes(8)),
        file({"a": entry(shape=(2.0,))}, bytes(8)),
        file({"a": entry(shape=(True, 2))}, bytes(8)),
        file({"a": entry(shape=(1,) * 9 + (2,))}, bytes(8)),
        file({"a": entry(dtype="F4")}, bytes(8)),
        file({"a": entry(dtype=["F32"])}, bytes(8)),
        file({"a": entry(offsets=(8, 0))}, bytes(8)),
        file({"a": entry() | {"extra": 1}}, bytes(8)),
        file({"a": 1}, bytes(8)),
        file({"../a": entry()}, bytes(8)),
        file({"a..b": entry()}, bytes(8)),
        file({"": entry()}, bytes(8)),
        file({"a\0": entry()}, bytes(8)),
        file({"__metadata__": {"a": 1}}),
        file({"__metadata__": "a"}),
        file({}, text=b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2)),
        file({}, text=b'{"a":' * 50_000),
        file({}, text=b"{\xff}"),
        (2**40).to_bytes(8, "little") + b"{}",
    ],
)
def test_a_malformed_file_is_refused(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadHeader):
        read_header(path)


def test_a_longer_header_than_the_cap_is_refused_before_it_is_read():
    with pytest.raises(BadHeader, match="1048577"):
        header_length((2**20 + 1).to_bytes(8, "little"), max_bytes=2**20)


def test_more_tensors_than_the_cap_are_refused():
    head, header = encode_header([("a", "F32", (1,)), ("b", "F32", (1,))], {})
    with pytest.raises(BadHeader, match="2 tensors"):
        parse_header(head, file_bytes=header.file_bytes, max_tensors=1)


def test_tensors_come_in_the_order_of_their_bytes(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(file({"z": entry(offsets=(0, 8)), "a": entry(offsets=(8, 16))}, bytes(16)))
    assert [tensor.name for tensor in read_header(path).tensors] == ["z", "a"]
