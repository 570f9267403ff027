"""How factors of several adapters become one: sums, with or without pruning and election of signs.

The arithmetic of PEFT's combinations of that name: trimming and signs of arXiv:2306.01708 (TIES), random pruning of
arXiv:2311.03099 (DARE), on lora_A and lora_B each by itself, not on their products.
"""

from typing import Literal

import numpy as np

from lora_core.floats import Array
from lora_core.lowrank import generator

Pruned = Literal["linear", "magnitude_prune", "ties", "dare_linear", "dare_ties"]
PRUNED: tuple[Pruned, ...] = ("linear", "magnitude_prune", "ties", "dare_linear", "dare_ties")


def joined(how: Pruned, factors: list[Array], weights: list[float], *, density: float, seed: str) -> Array:
    """The sum of weights · factors, all of one shape, after each was pruned to the share `density` of its numbers.

    With signs elected, only numbers of the sign of the unweighted sum are averaged. `seed` is for DARE.
    """
    stack = np.stack([_prune(how, factor, density, f"{seed}:{n}") for n, factor in enumerate(factors)])
    weighted = stack * np.reshape(weights, (-1, *(1 for _ in factors[0].shape)))
    if not how.endswith("ties"):
        return weighted.sum(axis=0)
    elected = np.where(stack.sum(axis=0) >= 0, 1, -1)
    agreed = np.sign(stack) == elected
    return (weighted * agreed).sum(axis=0) / np.maximum(agreed.sum(axis=0), 1)


def _prune(how: Pruned, factor: Array, density: float, seed: str) -> Array:
    if how == "linear" or density == 1:
        return factor
    if how.startswith("dare"):
        return np.where(generator(seed).random(factor.shape) < density, factor / density, 0.0)
    kept = np.argsort(-np.abs(factor), axis=None, kind="stable")[: int(density * factor.size)]
    pruned = np.zeros(factor.size)
    pruned[kept] = factor.reshape(-1)[kept]
    return pruned.reshape(factor.shape)
