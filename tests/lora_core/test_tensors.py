"""The numbers of a file, read at once into memory that is used again."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lora_core.errors import NonFinite
from lora_core.header import read_header
from lora_core.tensors import FileTensors


def read(path: Path) -> dict[str, torch.Tensor]:
    file = FileTensors(read_header(path))
    file.read(path)
    return file.tensors


def test_numbers_that_lie_where_their_size_does_not_divide_are_read_each_time(tmp_path):
    path = tmp_path / "odd.safetensors"
    for factor in (1, 2):
        half, single = factor * np.arange(3, dtype=np.float16), factor * np.arange(2, dtype=np.float32)
        header = {
            "half": {"dtype": "F16", "shape": [3], "data_offsets": [0, 6]},
            "single": {"dtype": "F32", "shape": [2], "data_offsets": [6, 14]},
        }
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + half.tobytes() + single.tobytes())
        if factor == 1:
            file = FileTensors(read_header(path))
        file.read(path)
        assert file.tensors["half"].tolist() == half.tolist()
        assert file.tensors["single"].tolist() == single.tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("content", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_is_found_wherever_it_is(tmp_path, dtype, content):
    path = tmp_path / "t.safetensors"
    tensors = {"a": torch.ones(700, 1000, dtype=dtype), "b": torch.full((9, 7), torch.finfo(dtype).max, dtype=dtype)}
    tensors["c"] = torch.full((700, 2000), torch.finfo(dtype).min, dtype=dtype)
    save_file(tensors, path)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in read(path).items())
    for name, tensor in tensors.items():
        before = tensor[-1, -1].item()
        tensor[-1, -1] = content
        save_file(tensors, path)
        with pytest.raises(NonFinite, match=f"^{name} "):
            read(path)
        tensor[-1, -1] = before


def test_memory_of_the_right_size_is_used_again_and_other_memory_is_not(tmp_path):
    for name, rows in (("one", 3), ("same", 3), ("longer", 4)):
        save_file({name: torch.ones(rows, 2)}, tmp_path / name)
    first = FileTensors(read_header(tmp_path / "one"))
    for name, same in (("same", True), ("longer", False)):
        other = FileTensors(read_header(tmp_path / name), first.memory)
        other.read(tmp_path / name)
        assert (other.memory is first.memory) is same
        assert other.tensors[name].sum() == torch.ones_like(other.tensors[name]).sum()
