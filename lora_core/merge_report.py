"""What a merge did: its files, and how much of the adapter's change each merged tensor kept through rounding."""

import math
from dataclasses import dataclass, field

from lora_core.floats import Sums


@dataclass(frozen=True)
class TensorReport:
    """One merged tensor. With Δ the exact change and Δ' the one that rounding left: `relative_delta` = ‖Δ‖/‖W‖,
    `rounding_loss` = ‖Δ' − Δ‖/‖Δ‖, `cosine` that between Δ and Δ', and the share of elements that are others. Where
    there is no change, or nothing it would be a change of, nothing is lost: 0, 0, 1 and 0. All four are of
    `measured_share` of the elements: rows spread over a large tensor, always the same ones, or all of a small one."""

    name: str
    relative_delta: float
    rounding_loss: float
    cosine: float
    changed_share: float
    measured_share: float


@dataclass(frozen=True)
class FileReport:
    """One output file; `sha256` is empty unless digests were asked for."""

    path: str
    size: int
    sha256: str


@dataclass
class MergeReport:
    """What a merge did. `copied_tensors` counts those the adapter does not touch."""

    dtype: str
    tensors: list[TensorReport] = field(default_factory=list)
    copied_tensors: int = 0
    files: list[FileReport] = field(default_factory=list)


def tensor_report(name: str, items: int, sums: Sums) -> TensorReport:
    """Of a tensor of `items` numbers, from sums over those that were measured."""
    realised = max(sums.delta + 2 * sums.cross + sums.lost, 0.0)
    product = math.sqrt(sums.delta) * math.sqrt(realised)
    return TensorReport(
        name,
        relative_delta=_root(sums.delta, sums.weight),
        rounding_loss=_root(sums.lost, sums.delta),
        cosine=min((sums.delta + sums.cross) / product, 1.0) if product else float(not sums.delta),
        changed_share=sums.changed / sums.items,
        measured_share=sums.items / items,
    )


def _root(numerator: float, denominator: float) -> float:
    return math.sqrt(numerator / denominator) if denominator else 0.0
