"""Adapters made of adapters, from folder to folder: scale, combine, truncate. Factors only, one module at a time.

Weights and scalings are folded into the factors of what `combine` and `truncate` write: its scaling is 1.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from lora_core.config import MAX_RANK
from lora_core.errors import BadConfig, DifferentBases, ShapeMismatch
from lora_core.factors import About, FactorFile, Factors, write_factors
from lora_core.floats import Array
from lora_core.header import TensorInfo
from lora_core.lowrank import Decomposition
from lora_core.sparsify import PRUNED, Pruned, joined

Method = Literal["cat", "svd"] | Pruned


@dataclass(frozen=True)
class ModuleReport:
    """One module of the result: its rank, and which share of ‖ΔW‖²_F of the exact sum it keeps; None where the method
    gives something else than a part of that sum."""

    path: str
    rank_before: int
    rank: int
    retained_energy: float | None


def scale(directory: Path, out: Path, factor: float) -> None:
    """Write the adapter with `factor` times the effect: by its lora_alpha, and below 0 by the sign of lora_B."""
    _check_weights([factor])
    with FactorFile(directory) as file:
        modules = {}
        for path in file.paths:
            found = file.read(path)
            sign = math.copysign(1.0, factor)
            modules[path] = replace(found, scaling=found.scaling * abs(factor), lora_B=sign * found.lora_B)
        write_factors(out, modules, file.about, common_copies([file]))


def truncate(directory: Path, out: Path, *, rank: int | None = None, energy: float | None = None) -> list[ModuleReport]:
    """Write the nearest adapter of lower rank: at most `rank` in each module, or the least that keeps the share
    `energy` of ‖ΔW‖²_F. A module that keeps its rank keeps its factors."""
    if (rank is None) == (energy is None):
        raise BadConfig("give a rank or an energy to truncate to, and not both")
    _check_rank(rank)
    if energy is not None and not 0 < energy <= 1:
        raise BadConfig(f"energy must be above 0 and at most 1, not {energy!r}")
    modules, reports = {}, []
    with FactorFile(directory) as file:
        for path in file.paths:
            modules[path], report = _cut(path, file.read(path), rank, energy)
            reports.append(report)
        write_factors(out, modules, file.about, common_copies([file]))
    return reports


def combine(
    directories: Sequence[Path],
    out: Path,
    method: Method,
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    density: float = 1.0,
    seed: int = 0,
    base: str | None = None,
) -> list[ModuleReport]:
    """Write one adapter that does what all do, each by its weight (1 unless told).

    "cat" is the exact sum, of the sum of ranks; "svd" the nearest to it of `rank` (the largest given, unless told).
    "linear" adds lora_A and lora_B each by itself, weights as their roots: an approximation, for equal ranks.
    "magnitude_prune", "ties", "dare_linear" and "dare_ties" do so with the share `density` of each factor's numbers,
    at random by `seed` for the last two. Each is PEFT's `add_weighted_adapter` of that name. A module that some
    adapters lack is made of the others. Adapters of different bases are DifferentBases; where only the names of
    the base differ, say with `base` which one it is.
    """
    weights = [1.0] * len(directories) if weights is None else list(weights)
    _check(directories, weights, method, rank, density)
    modules, reports = {}, []
    with ExitStack() as stack:
        files = [stack.enter_context(FactorFile(directory)) for directory in directories]
        about = _common_about(files, base)
        for path in sorted(set().union(*(file.paths for file in files))):
            present = [(file.read(path), w) for file, w in zip(files, weights, strict=True) if path in file.paths]
            _check_places(path, [found for found, _ in present])
            if method in PRUNED:
                modules[path] = _joined(path, present, method, density, seed)
                r = modules[path].r
                reports.append(ModuleReport(path, r, r, None))
                continue
            whole = _concatenated(present)
            limit = rank or max(found.r for found, _ in present)
            modules[path], report = _cut(path, whole, whole.r if method == "cat" else limit, None)
            reports.append(report)
        write_factors(out, modules, about, common_copies(files))
    return reports


def _concatenated(present: Sequence[tuple[Factors, float]]) -> Factors:
    lora_B = np.concatenate([found.lora_B * (weight * found.scaling) for found, weight in present], axis=1)
    return present[0][0].with_factors(lora_B, np.concatenate([found.lora_A for found, _ in present]))


def _joined(path: str, present: Sequence[tuple[Factors, float]], method: Pruned, density: float, seed: int) -> Factors:
    ranks = sorted({found.r for found, _ in present})
    if len(ranks) > 1:
        raise ShapeMismatch(f"{path} has the ranks {ranks}; {method} needs equal ones, cat and svd do not")
    weights = [weight * found.scaling for found, weight in present]
    # the sign goes to one side only, else it would cancel
    roots = [math.sqrt(abs(weight)) for weight in weights]
    signed = [math.copysign(root, weight) for root, weight in zip(roots, weights, strict=True)]
    lora_A, lora_B = (
        joined(method, factors, given, density=density, seed=f"{seed}:{path}:{name}")
        for name, factors, given in (
            ("lora_A", [found.lora_A for found, _ in present], signed),
            ("lora_B", [found.lora_B for found, _ in present], roots),
        )
    )
    return present[0][0].with_factors(lora_B, lora_A)


def _cut(path: str, found: Factors, rank: int | None, energy: float | None) -> tuple[Factors, ModuleReport]:
    if energy is None and (rank is None or rank >= found.r):
        return found, ModuleReport(path, found.r, found.r, 1.0)
    parts = Decomposition.of_product(found.scaling * found.lora_B, found.lora_A)
    kept = min(rank or parts.rank_for(energy or 1.0), found.r)
    if kept == found.r:
        return found, ModuleReport(path, found.r, found.r, 1.0)
    return found.with_factors(*parts.factors(kept)), ModuleReport(path, found.r, kept, parts.retained(kept))


def common_copies(files: Sequence[FactorFile]) -> dict[str, tuple[TensorInfo, Array]]:
    """The base's own tensors that the files hold; of one name, all must hold the same bytes."""
    copies: dict[str, tuple[TensorInfo, Array]] = {}
    for file in files:
        for name, info in file.copies.items():
            raw = file.read_copy(name)
            first, bytes_ = copies.setdefault(name, (info, raw))
            if (first.dtype, first.shape) != (info.dtype, info.shape) or not np.array_equal(bytes_, raw):
                raise DifferentBases(f"{name}, which belongs to the base, is not the same in all adapters")
    return copies


def _common_about(files: Sequence[FactorFile], base: str | None) -> About:
    abouts = [file.about for file in files]
    for what, values in (
        ("base model", {about.base_model for about in abouts if base is None}),
        ("revision of it", {about.revision for about in abouts if base is None}),
        ("task_type", {about.task_type for about in abouts}),
    ):
        if len(found := sorted(value for value in values if value)) > 1:
            raise DifferentBases(f"the adapters differ in their {what}: {found[0]} and {found[1]}", found=found)
    known = [about.targets for about in abouts]
    return About(
        base_model=base or next((about.base_model for about in abouts if about.base_model), None),
        revision=next((about.revision for about in abouts if about.revision), None),
        task_type=next((about.task_type for about in abouts if about.task_type), None),
        fan_in_fan_out=any(about.fan_in_fan_out for about in abouts),
        targets=None if None in known else frozenset().union(*(targets for targets in known if targets)),
    )


def _check(
    directories: Sequence[Path], weights: Sequence[float], method: str, rank: int | None, density: float
) -> None:
    if not directories or len(weights) != len(directories):
        raise BadConfig(f"{len(directories)} adapters and {len(weights)} weights were given; give one for each")
    _check_weights(weights)
    _check_rank(rank)
    if method not in ("cat", "svd", *PRUNED):
        raise BadConfig(f"{method!r} is no way to combine adapters; these are: cat, svd, {', '.join(PRUNED)}")
    if rank is not None and method != "svd":
        raise BadConfig(f"{method} has no rank to choose; svd has")
    if not 0 < density <= 1 or (density != 1 and method in ("cat", "svd", "linear")):
        raise BadConfig(f"density is for methods that prune, and above 0 and at most 1; not {density!r} for {method}")


def _check_weights(weights: Sequence[float]) -> None:
    for weight in weights:
        if not math.isfinite(weight) or weight == 0:
            raise BadConfig(f"a weight must be a number other than 0, not {weight!r}")


def _check_rank(rank: int | None) -> None:
    if rank is not None and not 1 <= rank <= MAX_RANK:
        raise BadConfig(f"rank must be a whole number from 1 to {MAX_RANK}, not {rank!r}")


def _check_places(path: str, found: Sequence[Factors]) -> None:
    for other in found[1:]:
        if other.place != found[0].place:
            shapes = [[factors.lora_B.shape[0], *factors.inputs] for factors in (found[0], other)]
            raise ShapeMismatch(f"{path} is {shapes[0]} in one adapter and {shapes[1]} in another")
