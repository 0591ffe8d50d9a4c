"""The scalars of `diagnostics`: every layer has all of them, and they are finite."""

import numpy as np
import pytest

import tekfac_jax as tekfac
from tests.conforming import READY, case, every_transform, make, reference, standard_promotion

pytestmark = standard_promotion


@every_transform
def test_diagnostics(name):
    state = reference(name)[1]
    scalars = {key: np.asarray(value) for key, value in tekfac.diagnostics(state).items()}
    kinds = ("trace", "kept", "damping", "phi_spread", "psi_spread", "phi_residual",
             "psi_residual", "failures", "failed_in_a_row")  # fmt: skip
    expected = {f"{path}/{kind}" for path in case().layers for kind in kinds}
    assert set(scalars) == expected | ({"kl_clip"} if name in READY else set())
    for key, value in scalars.items():
        assert value.shape == ()
        assert np.isfinite(value), key
        assert value > 0 or key.endswith(("failures", "in_a_row", "residual"))
    fresh = tekfac.diagnostics(make(name).init(case().params))
    assert set(fresh) == set(scalars)
    assert all(np.isfinite(value) for value in fresh.values())
    curvature = tekfac.curvature(state)["first"]
    assert np.trace(curvature.phi) == pytest.approx(1, rel=1e-5)
    assert np.trace(curvature.psi) == pytest.approx(1, rel=1e-5)
    assert scalars["first/trace"] == pytest.approx(float(curvature.theta.sum()), rel=1e-5)
