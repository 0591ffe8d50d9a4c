"""A program that needs none of the package's extras: it imports all modules and trains.

It prints the location of the package.
"""

import importlib
import pkgutil
import sys

# The import names of what the extras install, except what jax and flax need themselves.
OPTIONAL = ["matplotlib", "PIL", "sklearn", "beartype", "chex", "hypothesis", "pytest", "mkdocs"]


def main() -> None:
    """Fails if an extra is needed, or if a step does not lower the loss."""
    sys.modules |= dict.fromkeys(OPTIONAL)  # importing such a name fails

    import tekfac_jax as tekfac

    for module in pkgutil.iter_modules(tekfac.__path__):
        if module.name != "plot":
            importlib.import_module(f"tekfac_jax.{module.name}")

    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import optax

    model, x = nn.Dense(3), jnp.eye(4)
    params = model.init(jax.random.key(0), x)

    def loss_fn(params, x):
        return jnp.square(model.apply(params, x)).mean()

    layers = tekfac.find_layers(loss_fn, params, x)
    tx = tekfac.tekfac(0.1, layers)
    loss, grads, stats = tekfac.value_grad_and_stats(loss_fn, layers)(params, x)
    updates, _ = tx.update(grads, tx.init(params), params, stats=stats)
    assert loss_fn(optax.apply_updates(params, updates), x) < loss
    print(tekfac.__file__)


if __name__ == "__main__":
    main()
