"""Telling that memory ran out from everything else that may go wrong."""

import gc

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is an allocation that was refused, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def release() -> None:
    """Give back what the failed step held, for the next try."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
