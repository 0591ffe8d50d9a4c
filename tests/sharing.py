"""Shared by tests on several devices: meshes, and a network that trains on one or on several."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import tekfac_jax as tekfac
from tekfac_jax._layers.spec import LayerSpec
from tests.capturing import EXACT, Net, losses_of, randn, random_params, relative_error

DEVICES = 4
needs_devices = pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs four devices")
limited = pytest.mark.timeout(240)


def layers_of(*dims):
    """Dense layers without bias, of these (in, out) dimensions."""
    return tekfac.Layers(
        tuple(
            LayerSpec(
                path=f"layer_{i}", kind="dense", kernel_shape=shape, contracted=1, use_bias=False,
                dtype="float32", axes=(-1,),
            )
            for i, shape in enumerate(dims)
        )
    )  # fmt: skip


def mesh_of(*shape, names=("data", "model")):
    devices = jax.devices()[: math.prod(shape)]
    auto = (jax.sharding.AxisType.Auto,) * len(shape)
    return jax.make_mesh(shape, names[: len(shape)], devices=devices, axis_types=auto)


def assert_same(actual, expected, tolerance=EXACT):
    errors = jax.tree.map(relative_error, actual, expected)
    assert max(jax.tree.leaves(errors)) <= tolerance, errors


class Network:
    """A small network, and its training steps on one device or on a mesh."""

    def __init__(self, mode="raw", **options):
        def build(x):
            x = jnp.tanh(nn.Conv(3, (2,), name="conv")(x))
            x = jnp.tanh(nn.Dense(4, name="hidden")(x.reshape(len(x), -1)[:, :6]))
            return nn.Dense(2, name="head")(x)

        self.model, self.x = Net(build), randn(16, 3, 2)
        self.params = random_params(self.model, self.x)
        self.layers = tekfac.find_layers(self.loss, self.params, self.x)
        self.mode = mode
        self.options = {
            "factor_interval": 1, "rescaling_interval": 1, "eigenbasis_interval": 2,
            "damping": 0.1, **options,
        }  # fmt: skip

    def loss(self, params, x):
        return losses_of(self.model.apply({"params": params}, x)).mean()

    def transform(self, **options):
        return optax.chain(
            tekfac.scale_by_tekfac(self.layers, **self.options, **options), optax.sgd(0.1)
        )

    def step(self, tx, average=lambda grads: grads):
        def step(params, state, x):
            further = {"opt_state": state} if self.mode == "reduced" else {}
            fn = tekfac.value_grad_and_stats(self.loss, self.layers, mode=self.mode)
            _, grads, stats = fn(params, x, **further)
            updates, state = tx.update(average(grads), state, params, stats=stats)
            return optax.apply_updates(params, updates), state

        return step

    def on_one_device(self, steps=4):
        tx = self.transform()
        params, state = self.params, tx.init(self.params)
        step = jax.jit(self.step(tx))
        for _ in range(steps):
            params, state = step(params, state, self.x)
        return params

    def on_mesh(self, mesh, steps=4, kernels=None, **options):
        """`jit` with NamedSharding: the batch is split, and kernels are placed as given."""
        tx = self.transform(mesh=mesh, **options)
        axis = options.get("mesh_axis", mesh.axis_names[0])
        x = jax.device_put(self.x, NamedSharding(mesh, P(axis)))

        def placed(leaf):
            fits = kernels and leaf.ndim == len(kernels) and not any(d % 2 for d in leaf.shape)
            return jax.device_put(leaf, NamedSharding(mesh, kernels if fits else P()))

        params = jax.tree.map(placed, self.params)
        step, state = jax.jit(self.step(tx)), tx.init(params)
        for _ in range(steps):
            params, state = step(params, state, x)
        return params
