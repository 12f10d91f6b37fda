"""Lanczos' method on a symmetric matrix of which only products are known, and quadrature with it. Pure NumPy.

Golub and Meurant, Matrices, Moments and Quadrature (2010), chapters 3, 6 and 7: the tridiagonal matrix T of m steps
from z gives z' f(B) z by Gauss' rule, and Gauss-Radau's with a node at 0 errs to the other side where the derivatives
of f have constant signs, as those of 1 / (1 + s) have: the two hold the true number between them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]
ENDED = 1e-12  # of the largest number so far: no new direction is left


@dataclass(frozen=True)
class Krylov:
    """basis: (m, N), orthonormal rows. diagonal: (m,), beside: (m - 1,) of T. length: of the start. rest: the number
    beside T's last row, 0 where the directions came to an end and everything is exact."""

    basis: Matrix
    diagonal: Vector
    beside: Vector
    length: float
    rest: float

    def values(self) -> tuple[Vector, Matrix]:
        """Eigenvalues (m,) of T, none below 0, and its vectors (m, m)."""
        values, vectors = np.linalg.eigh(self._tridiagonal(self.diagonal, self.beside))
        return np.maximum(values, 0.0), vectors

    def times(self, function: Callable[[Vector], Vector]) -> Vector:
        """f(B) z, (N,)."""
        values, vectors = self.values()
        return np.asarray(self.length * (vectors * function(values)) @ vectors[0] @ self.basis, np.float64)

    def gauss(self, function: Callable[[Vector], Vector]) -> float:
        """z' f(B) z."""
        values, vectors = self.values()
        return float(self.length**2 * vectors[0] ** 2 @ function(values))

    def radau(self, function: Callable[[Vector], Vector]) -> float:
        """z' f(B) z by the rule with a node just below the smallest eigenvalue B can have, 0."""
        if self.rest == 0.0:
            return self.gauss(function)
        node = -1e-9 - 4.0 * np.finfo(np.float64).eps * float(self.diagonal.max())
        shifted = self._tridiagonal(self.diagonal - node, self.beside)
        last = np.zeros(len(self.diagonal))
        last[-1] = self.rest**2
        closing = node + float(np.linalg.solve(shifted, last)[-1])
        wider = self._tridiagonal(np.append(self.diagonal, closing), np.append(self.beside, self.rest))
        values, vectors = np.linalg.eigh(wider)
        return float(self.length**2 * vectors[0] ** 2 @ function(np.maximum(values, 0.0)))

    @staticmethod
    def _tridiagonal(diagonal: Vector, beside: Vector) -> Matrix:
        return np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)


def lanczos(apply: Callable[[Vector], Vector], start: Vector, steps: int) -> Krylov:
    """At most so many steps from start (N,), each vector made orthogonal to all before, twice.

    apply: B times a vector, B symmetric and without negative eigenvalues. Memory: steps x N numbers.
    """
    length = float(np.linalg.norm(start))
    basis = [start / length]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        following = apply(basis[-1])
        diagonal.append(float(basis[-1] @ following))
        rows = np.array(basis)
        for _ in range(2):
            following = following - rows.T @ (rows @ following)
        rest = float(np.linalg.norm(following))
        ended = rest <= ENDED * max(max(diagonal), *beside, 0.0) or len(basis) == len(start)
        if ended or len(basis) == steps:
            return Krylov(rows, np.array(diagonal), np.array(beside), length, 0.0 if ended else rest)
        beside.append(rest)
        basis.append(following / rest)
