"""The networks of the benchmarks: sizes, what is captured of them, and half precision."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import tekfac_jax as tekfac
from benchmarks.errors import UsageError
from benchmarks.models.convnets import DTYPES, MODELS, VGG, ResNet, make_model
from benchmarks.models.transformers import Transformer, ViT

IMAGE = (32, 32, 3)
# name -> shape of an example
SIZES = {
    "cnn": (8, 8, 1),
    "resnet20": (32, 32, 3),
    "vgg16": (32, 32, 3),
    "vit": (8, 8, 3),
    "transformer": (6,),
    "resnet8": (8, 8, 3),
    "vgg-mini": (8, 8, 3),
}


def inputs(size, count=2):
    rng = np.random.default_rng(0)
    if len(size) == 1:
        return jnp.asarray(rng.integers(10, size=(count, *size)), jnp.int32)
    return jnp.asarray(rng.normal(size=(count, *size)), jnp.float32)


def shapes(model, size):
    return jax.eval_shape(model.init, jax.random.key(0), inputs(size))


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def resnet_parameters(blocks, width):
    """By hand, with 10 classes: kernels, two numbers of BatchNorm a channel, the dense layer."""
    number = 27 * width + 2 * width
    before = width
    for features in (width, 2 * width, 4 * width):
        for _ in range(blocks):
            number += 9 * features * (before + features) + 4 * features
            before = features
    return number + 10 * (4 * width + 1)


def vgg_parameters(channels):
    kernels = sum(9 * a * b for a, b in zip([3, *channels], channels, strict=False))
    return kernels + 2 * sum(channels) + 10 * (channels[-1] + 1)


@pytest.mark.parametrize(
    ("model", "size", "expected"),
    [
        (make_model("cnn", 10), (8, 8, 1), 21_546),
        (make_model("resnet8", 10), IMAGE, resnet_parameters(1, 16)),
        (make_model("resnet8", 10, 6), IMAGE, resnet_parameters(1, 6)),
        (make_model("resnet20", 10, 16), IMAGE, 269_722),
        (make_model("resnet20", 10, 64), IMAGE, 4_286_026),
        (ResNet(depth=32), IMAGE, resnet_parameters(5, 16)),
        (ResNet(depth=14, width=4), IMAGE, resnet_parameters(2, 4)),
        (make_model("vgg16", 10, 64), IMAGE, 14_724_042),
        (make_model("vgg-mini", 10), IMAGE, vgg_parameters([16, 16, 32, 32, 64, 64])),
        (make_model("vgg-mini", 10, 5), IMAGE, vgg_parameters([5, 5, 10, 10, 20, 20])),
        # Configuration A of Simonyan and Zisserman, 11 layers.
        (VGG(width=2, stages=(1, 1, 2, 2, 2)), IMAGE, vgg_parameters([2, 4, 8, 8, 16, 16, 16, 16])),
        (make_model("vit", 10), IMAGE, 207_946),
        (make_model("transformer", 66), (64,), 212_674),
    ],
)
def test_number_of_parameters(model, size, expected):
    assert count(shapes(model, size)["params"]) == expected


def test_affine_free_networks_lose_two_parameters_a_channel():
    for name, channels in (("resnet8", 4 + 2 * 4 + 2 * 8 + 2 * 16), ("vgg-mini", 2 * 4 * 7)):
        with_affine, without = (
            count(shapes(make_model(name, 10, 4, affine=affine), SIZES[name])["params"])
            for affine in (True, False)
        )
        assert with_affine - without == 2 * channels


def mean_logit(model, params, batch_stats, x):
    logits = model.apply({"params": params, "batch_stats": batch_stats}, x, train=False)
    return logits.mean()


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("resnet8", 8),
        ("resnet20", 20),
        ("vgg-mini", 7),
        ("vgg16", 14),
        ("vit", 2 + 4 * 6 + 1),
        ("transformer", 2 + 4 * 6 + 1),
    ],
)
def test_without_affine_every_parameter_is_covered(name, layers, dtype):
    model = make_model(name, 10, 4, affine=False, dtype=dtype)
    variables = shapes(model, SIZES[name])
    args = variables["params"], variables.get("batch_stats", {}), inputs(SIZES[name])
    found = tekfac.find_layers(functools.partial(mean_logit, model), *args)
    assert len(found) == layers
    assert not found.uncovered


@pytest.mark.parametrize("name", ["vgg-mini", "resnet8"])
@pytest.mark.parametrize("size", [(8, 8, 1), (28, 28, 1), (32, 32, 3)])
def test_small_networks_take_every_data_set(name, size):
    model = make_model(name, 7, 2)
    logits = jax.eval_shape(model.apply, shapes(model, size), inputs(size))
    assert logits.shape == (2, 7)


def test_transformer_sees_no_later_character():
    model = Transformer(num_classes=5, width=8, depth=2)
    rng = np.random.default_rng(0)
    x = rng.integers(5, size=(2, 12)).astype(np.int32)
    variables = model.init(jax.random.key(0), x)
    changed = np.where(np.arange(12) < 7, x, (x + 1) % 5)
    logits, other = (np.asarray(model.apply(variables, ids)) for ids in (x, changed))
    assert logits.shape == (2, 12, 5)
    np.testing.assert_allclose(logits[:, :7], other[:, :7], atol=1e-6)
    assert (abs(logits[:, 7:] - other[:, 7:]).max(axis=(0, 2)) > 1e-3).all()


# --- half precision ------------------------------------------------------------------------------


def types_of_products(jaxpr):
    """Types that come out of convolutions and matrix products, in order."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("conv_general_dilated", "dot_general"):
            found.append(equation.outvars[0].aval.dtype)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found += types_of_products(inner)
    return found


def train_logits(model, variables, x):
    mutable = ["batch_stats"] if "batch_stats" in variables else []
    return model.apply(variables, x, train=True, mutable=mutable)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_computes_but_does_not_keep(name):
    model = make_model(name, 10, 4, dtype="bfloat16")
    variables, x = shapes(model, SIZES[name]), inputs(SIZES[name])
    logits, updated = jax.eval_shape(functools.partial(train_logits, model), variables, x)
    assert logits.dtype == jnp.float32
    for leaf in jax.tree.leaves((variables, updated)):
        assert leaf.dtype == jnp.float32
    jaxpr = jax.make_jaxpr(functools.partial(train_logits, model))(variables, x)
    *body, last = types_of_products(jaxpr.jaxpr)
    assert last == jnp.float32
    assert {str(dtype) for dtype in body} == {"bfloat16"}


@pytest.mark.parametrize("name", ["resnet8", "vgg-mini"])
def test_bfloat16_is_near_float32(name):
    x = inputs(SIZES[name], 8)
    single, half = (make_model(name, 10, 4, dtype=dtype) for dtype in DTYPES)
    variables = jax.jit(single.init)(jax.random.key(0), x)
    exact, rounded = (
        np.asarray(jax.jit(functools.partial(train_logits, model))(variables, x)[0])
        for model in (single, half)
    )
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    # Eight bits of mantissa: each of about ten layers rounds by 2^-9 of its values.
    assert 1e-4 < error < 0.05


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [2, 10, 21])
def test_depths_between_are_refused(depth):
    with pytest.raises(UsageError, match=rf"a depth of 6n \+ 2, got {depth}: choose 8, 14, 20"):
        shapes(ResNet(depth=depth), (8, 8, 3))


@pytest.mark.parametrize(
    ("name", "size", "least"), [("vgg-mini", (7, 8, 1), "8x8"), ("vgg16", (28, 28, 1), "32x32")]
)
def test_images_too_small_are_refused(name, size, least):
    found = f"{name} is made for {least} images, these are {size[0]}x{size[1]}: choose larger"
    with pytest.raises(UsageError, match=found):
        shapes(make_model(name, 10, 2), size)


def test_images_that_patches_do_not_divide_are_refused():
    with pytest.raises(UsageError, match="patches of 4x4, these are 32x30: choose"):
        shapes(ViT(), (32, 30, 3))


@pytest.mark.parametrize("dtype", ["float33", "float16", "int32", jnp.int8])
def test_other_types_are_refused(dtype):
    name = dtype if isinstance(dtype, str) else "int8"
    with pytest.raises(UsageError, match=f"unknown dtype '{name}': choose from float32, bfloat16"):
        make_model("resnet8", 10, dtype=dtype)


def test_type_itself_is_as_good_as_its_name():
    assert make_model("vit", 10, dtype=jnp.bfloat16) == make_model("vit", 10, dtype="bfloat16")
