"""Θ in a new eigenbasis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tekfac_jax._curvature.eigenbasis import transport
from tests import oracles
from tests.capturing import x64
from tests.oracles import every_case, relative

EXACT = 1e-12


@pytest.mark.sampled(spread=True)
@x64
@every_case
def test_transport_is_the_diagonal_of_the_old_operator_in_the_new_basis(name):
    c = oracles.curvature_of(name)
    new = tuple(oracles.random_orthogonal(s, len(q)) for s, q in enumerate((c.q_phi, c.q_psi)))
    old = jax.tree.map(jnp.asarray, c)
    theta, _ = transport(
        old.theta, jnp.float64(0), (old.q_phi, old.q_psi), tuple(map(jnp.array, new))
    )
    q = np.kron(*new)
    assert relative(theta.ravel(), np.diag(q.T @ oracles.operator(c) @ q)) <= EXACT
    assert float(theta.sum()) == pytest.approx(c.theta.sum(), rel=EXACT)
