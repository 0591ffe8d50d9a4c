"""The plan assigns each decomposition once and balances the loads."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tekfac_jax as tekfac
from tekfac_jax._layers.spec import LayerSpec
from tests.sharing import layers_of


@settings(deadline=None, max_examples=60)
@given(
    dims=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=20),
    devices=st.integers(1, 12),
)
def test_the_plan_does_everything_once_and_is_balanced(dims, devices):
    plan = tekfac.device_plan(layers_of(*dims), devices)
    done = sorted((share.path, share.side, share.dim) for share in plan.assignments)
    sides = [(f"layer_{i}", side, d[k]) for i, d in enumerate(dims)
             for k, side in enumerate(("phi", "psi")) if d[k] > 2]  # fmt: skip
    assert done == sorted(sides)
    assert sum(plan.loads) == sum(dim**3 for _, _, dim in sides)
    assert all(0 <= share.device < devices for share in plan.assignments)
    if plan.assignments:
        # No plan can beat the mean load, the largest cube, or two that must share a device.
        cubes = sorted((share.dim**3 for share in plan.assignments), reverse=True)
        together = cubes[devices - 1] + cubes[devices] if len(cubes) > devices else 0
        best = max(sum(cubes) / devices, cubes[0], together)
        assert max(plan.loads) <= (4 / 3) * best + 1e-6 or max(plan.loads) <= (
            sum(cubes) / devices + cubes[-1]
        )
        assert 1 <= plan.bound <= plan.balance + 1e-9 <= devices + 1e-6


def test_stacked_layers_and_groups_are_shared_one_by_one():
    spec = LayerSpec(
        path="blocks", kind="dense", kernel_shape=(6, 4), contracted=1, use_bias=True,
        dtype="float32", axes=(-1,), stack=(3,), kernel_stack=(0,), bias_stack=(0,),
    )  # fmt: skip
    plan = tekfac.device_plan(tekfac.Layers((spec,)), 3)
    assert sorted(plan.owners("blocks", "phi")) == [0, 1, 2]
    assert sorted(plan.owners("blocks", "psi")) == [0, 1, 2]
    assert plan.balance == pytest.approx(1)
    assert "3×7" not in repr(plan)
    assert repr(plan).count("1×7, 1×4") == 3


def test_an_embedding_has_one_side_only():
    spec = LayerSpec(
        path="words", kind="embed", kernel_shape=(1000, 8), contracted=1, use_bias=False,
        dtype="float32",
    )  # fmt: skip
    plan = tekfac.device_plan(tekfac.Layers((spec,)), 2)
    assert [share.dim for share in plan.assignments] == [8]


@pytest.mark.parametrize("devices", [0, -1, 1.5, True, "two"])
def test_number_of_devices_out_of_range(devices):
    with pytest.raises(ValueError, match=r"devices must be an integer, 1 or more, got"):
        tekfac.device_plan(layers_of((3, 3)), devices)
