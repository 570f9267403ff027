"""The tensors of an adapter file for torch: one read, and a view of it for each."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lora_core.errors import NonFinite
from lora_core.header import Header, TensorInfo
from lora_core.shards import ByteReader

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_tensors(path: Path, header: Header, memory: Tensor | None = None) -> dict[str, Tensor]:
    """Name → tensor in the dtype of the file; they share the memory that the file was read into, `memory` if it is of
    the right size. NaN and infinity are NonFinite.
    """
    size = header.file_bytes - header.data_start
    data = torch.empty(size, dtype=torch.uint8) if memory is None or memory.nbytes != size else memory
    with ByteReader(path) as reader:
        reader.read_into(header.data_start, data.numpy())
    tensors = {info.name: _view(data, info) for info in header.tensors}
    # A sum is finite only if all its numbers are; where it is not, it may just be too large.
    with np.errstate(over="ignore", invalid="ignore"):
        if {info.dtype for info in header.tensors} == {"F32"} and np.isfinite(data.numpy().view(np.float32).sum()):
            return tensors
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise NonFinite(f"{name} holds NaN or infinity", tensor=name)
    return tensors


def is_zero(tensor: Tensor) -> bool:
    """Whether all its numbers are. Not torch's own: its threads cost more than the few numbers of a factor."""
    return not tensor.float().numpy().any()


def _view(data: Tensor, info: TensorInfo) -> Tensor:
    part, dtype = data[info.begin : info.end], _DTYPES[info.dtype]
    if info.begin % dtype.itemsize:  # the format does not promise it
        part = part.clone()
    return part.view(dtype).view(info.shape)
