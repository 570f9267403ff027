"""The tensors of an adapter file for torch: one read, and a view of it for each."""

from pathlib import Path

import torch
from torch import Tensor

from lora_core.errors import NonFinite
from lora_core.floats import are_finite
from lora_core.header import Header, TensorInfo
from lora_core.shards import ByteReader

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK = 2**22  # bytes, looked at while they are in the cache


class FileTensors:
    """Room for the numbers of a file: `tensors`, by name and in the dtypes of the file, share its one `memory`, which
    is the given one where that has the right size."""

    def __init__(self, header: Header, memory: Tensor | None = None) -> None:
        size = header.file_bytes - header.data_start
        self.header = header
        self.memory = torch.empty(size, dtype=torch.uint8) if memory is None or memory.nbytes != size else memory
        self.tensors = {info.name: _view(self.memory, info) for info in header.tensors}

    def read(self, path: Path) -> None:
        """Fill it with what the file at `path` holds behind such a header. NaN and infinity are NonFinite."""
        dtypes = {info.dtype for info in self.header.tensors}
        finite = len(dtypes) == 1
        data = self.memory.numpy()
        with ByteReader(path) as reader:
            for begin in range(0, len(data), _CHUNK):
                chunk = data[begin : begin + _CHUNK]
                reader.read_into(self.header.data_start + begin, chunk)
                finite = finite and are_finite(chunk, *dtypes)
        if not finite:  # or numbers of several kinds
            self._check_each()

    def _check_each(self) -> None:
        for info in self.header.tensors:
            name, tensor = info.name, self.tensors[info.name]
            if not _is_aligned(info):
                tensor.view(-1).view(torch.uint8).copy_(self.memory[info.begin : info.end])
            if not torch.isfinite(tensor).all():
                raise NonFinite(f"{name} holds NaN or infinity", tensor=name)


def is_zero(tensor: Tensor) -> bool:
    """Whether all its numbers are. Not torch's own: its threads cost more than the few numbers of a factor."""
    return not tensor.float().numpy().any()


def _view(data: Tensor, info: TensorInfo) -> Tensor:
    if not _is_aligned(info):
        return torch.empty(info.shape, dtype=_DTYPES[info.dtype])
    return data[info.begin : info.end].view(_DTYPES[info.dtype]).view(info.shape)


def _is_aligned(info: TensorInfo) -> bool:
    """Whether it lies where numbers of its size may lie. The format does not promise it for files of several dtypes."""
    return info.begin % _DTYPES[info.dtype].itemsize == 0
