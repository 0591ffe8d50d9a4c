"""A layer's Fisher block and how far approximations are from it, without forming the block.

F = E_n[vec(G_n) vec(G_n)ᵀ], IO×IO for gradients G_n (I, O) of single examples, vec row by row.
Everything here costs a few passes over the N gradients, however large IO is; numpy, float64.
"""

from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, svds

Array = NDArray[np.float64]


class Block(NamedTuple):
    """The Fisher block of a layer.

    Attributes:
        gradients: G_n, (N, I, O).
        norm: ‖F‖, Frobenius.
        trace: tr F.
    """

    gradients: Array
    norm: float
    trace: float


class Diagonal(NamedTuple):
    """QΘQᵀ + θ⊥(I − QQᵀ) with Q = Q_Φ⊗Q_Ψ, whose columns are orthonormal.

    Attributes:
        q_phi: (I, r).
        q_psi: (O, p).
        theta: Θ, (r, p).
        rest: θ⊥; has no effect if r = I and p = O.
    """

    q_phi: Array
    q_psi: Array
    theta: Array
    rest: float = 0.0


def make_block(gradients: Array) -> Block:
    """The block of gradients (N, I, O): ‖F‖ is the norm of their Gram matrix divided by N."""
    rows = gradients.reshape(len(gradients), -1)
    gram = rows @ rows.T / len(rows)
    return Block(gradients, float(np.linalg.norm(gram)), float(np.trace(gram)))


def relative_error(block: Block, approximation: Diagonal) -> float:
    """‖F − F̂‖ / ‖F‖ for F not zero, from ‖F − F̂‖² = ‖F‖² − 2⟨F, F̂⟩ + ‖F̂‖².

    Of F, ⟨F, F̂⟩ needs only the trace and the diagonal in the basis of F̂. Errors below about 1e-8
    are rounding.
    """
    q_phi, q_psi, theta, rest = approximation
    exact = np.mean((q_phi.T @ block.gradients @ q_psi) ** 2, axis=0)
    _, rows, columns = block.gradients.shape
    inner = np.sum(exact * theta) + rest * (block.trace - np.sum(exact))
    squared = np.sum(theta**2) + rest**2 * (rows * columns - theta.size)
    return _relative(block.norm**2 - 2 * inner + squared, block.norm)


def kronecker_floor(block: Block) -> float:
    """The least ‖F − A⊗B‖ / ‖F‖ over all A (I, I) and B (O, O), for F not zero.

    Van Loan and Pitsianis (1993): F is rearranged so that each product A⊗B becomes the rank-one
    matrix vec(A) vec(B)ᵀ. It is then the operator B ↦ E_n[G_n B G_nᵀ], and the least squared error
    is ‖F‖² minus the square of its largest singular value.
    """
    count, rows, columns = block.gradients.shape
    if min(rows, columns) == 1:
        return 0.0  # F is itself a Kronecker product
    # One copy with each side in front: a product is then two calls of gemm.
    by_row, by_column = (
        np.ascontiguousarray(np.moveaxis(block.gradients, axis, 0)) for axis in (1, 2)
    )

    def sandwich(g: Array, inner: Array) -> Array:
        """E_n[X_n inner X_nᵀ] of X (d, N, e), flat."""
        right = g.reshape(-1, g.shape[2]) @ inner.reshape(g.shape[2], g.shape[2])
        return (right.reshape(len(g), -1) @ g.reshape(len(g), -1).T).ravel() / count

    # The operator maps positive semidefinite matrices to positive semidefinite ones, so its top
    # singular vectors are such matrices too: the identity, where the iteration starts, is never
    # orthogonal to them.
    linear_operator, singular_values = cast(Any, LinearOperator), cast(Any, svds)  # for pyright
    operator = linear_operator(
        (rows**2, columns**2),
        matvec=lambda b: sandwich(by_row, b),
        rmatvec=lambda a: sandwich(by_column, a),
        dtype=np.float64,
    )
    smaller = min(rows, columns)
    (largest,) = singular_values(
        operator, k=1, ncv=min(8, smaller**2 - 1), v0=np.eye(smaller).ravel(), tol=1e-12,
        return_singular_vectors=False,
    )  # fmt: skip
    return _relative(block.norm**2 - largest**2, block.norm)


def _relative(squared: float, norm: float) -> float:
    # Rounding may make the square negative if an approximation is exact.
    return float(np.sqrt(np.maximum(squared, 0.0)) / norm)
