"""Singular values of products lora_B · lora_A and of differences of matrices, without ever forming the products.

ΔW = B·A with QR(B) = Q_B·R_B and QR(Aᵀ) = Q_A·R_A has the singular values of the r×r matrix R_B·R_Aᵀ.
"""

import hashlib
from dataclasses import dataclass
from typing import Self

import numpy as np

from lora_core.floats import Array

_OVERSAMPLES = 8
_POWER_ITERATIONS = 3
# Below this many numbers a matrix is decomposed whole, which is exact and quicker than sampling.
_SMALL = 2**16


@dataclass(frozen=True)
class Decomposition:
    """left (out, k) · diag(sigma) · right (k, in), with orthonormal columns and rows; sigma falls.

    `energy` is ‖·‖²_F of the whole matrix: more than Σ sigma² where the last singular values are missing.
    """

    left: Array
    sigma: Array
    right: Array
    energy: float

    def rank_for(self, energy: float) -> int:
        """The smallest rank that keeps the share `energy` of ‖·‖²_F; all that are there if none does."""
        kept = np.cumsum(self.sigma**2)
        return min(int(np.searchsorted(kept, energy * self.energy * (1 - 1e-12))) + 1, len(self.sigma))

    def retained(self, rank: int) -> float:
        """The share of ‖·‖²_F that the first `rank` singular values hold; 1 of a matrix of zeros."""
        return min(float((self.sigma[:rank] ** 2).sum() / self.energy), 1.0) if self.energy else 1.0

    def factors(self, rank: int) -> tuple[Array, Array]:
        """lora_B (out, rank) and lora_A (rank, in) of equal norms: the best product of this rank."""
        roots = np.sqrt(self.sigma[:rank])
        return self.left[:, :rank] * roots, roots[:, None] * self.right[:rank]

    @classmethod
    def of_product(cls, lora_B: Array, lora_A: Array) -> Self:
        """Of lora_B · lora_A, exact to rounding, in O((out + in) · r²)."""
        q_left, r_left = np.linalg.qr(lora_B)
        q_right, r_right = np.linalg.qr(lora_A.T)
        left, sigma, right = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
        return cls(q_left @ left, sigma, right @ q_right.T, float((sigma**2).sum()))

    @classmethod
    def of_matrix(cls, matrix: Array, rank: int, seed: str) -> Self:
        """The first `rank` singular triplets of a matrix, by sampling (arXiv:0909.4061) where that pays.

        Equal seeds give equal results. What is kept is within a hair of the best product of this rank.
        """
        energy = float(np.vecdot(matrix, matrix, dtype=np.float64).sum())
        width = rank + _OVERSAMPLES
        if matrix.size <= _SMALL or 2 * width >= min(matrix.shape):
            left, sigma, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
            return cls(left[:, :rank], sigma[:rank], right[:rank], energy)
        sample = generator(seed).standard_normal((matrix.shape[1], width), dtype=np.float32)
        basis = np.linalg.qr(matrix @ sample)[0]
        for _ in range(_POWER_ITERATIONS):
            basis = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ basis)[0])[0]
        left, sigma, right = np.linalg.svd((basis.T @ matrix).astype(np.float64), full_matrices=False)
        return cls(basis @ left[:, :rank], sigma[:rank], right[:rank], energy)


def subspace_similarity(lora_A: Array, other: Array, i: int, j: int) -> float:
    """φ of section 7.2 of arXiv:2106.09685: how much of the span of the first i right singular vectors of one lora_A
    (r, in) lies in that of the first j of another: 1 if one contains the other, 0 if they are orthogonal."""
    first, second = (np.linalg.svd(factor, full_matrices=False)[2][:n] for factor, n in ((lora_A, i), (other, j)))
    return float(((first @ second.T) ** 2).sum() / min(i, j))


def generator(seed: str) -> np.random.Generator:
    """Random numbers that depend on the text alone."""
    return np.random.Generator(np.random.Philox(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:16], "little")))
