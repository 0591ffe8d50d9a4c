"""The approximation study: its algebra against dense matrices, its errors against brute force."""

import json
from io import StringIO

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from PIL import Image
from rich.console import Console

from benchmarks import approximation
from benchmarks.errors import UsageError
from benchmarks.fisher.blocks import Diagonal, kronecker_floor, make_block, relative_error
from benchmarks.fisher.errors import (
    FLOOR,
    METHODS,
    Errors,
    Point,
    TheoremError,
    check_theorems,
    layer_errors,
    measurer,
)
from tests.oracles import fisher, partial_traces, random_orthogonal, relative

TINY = 1e-10
SHAPES = ((3, 2), (2, 5), (4, 4), (7, 3))


def random_gradients(shape, count=6, seed=0):
    """G_n with correlated entries."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(shape[0] * shape[1],) * 2) * rng.random(shape[0] * shape[1]) ** 3
    return (rng.normal(size=(count, len(mixing))) @ mixing.T).reshape(count, *shape)


def dense(q_phi, q_psi, theta, rest=0.0):
    """QΘQᵀ + θ⊥(I − QQᵀ)."""
    q = np.kron(q_phi, q_psi)
    return (q * theta.ravel()) @ q.T + rest * (np.eye(len(q)) - q @ q.T)


def rearranged(f, rows, columns):
    """Rows for pairs of inputs, columns for pairs of outputs."""
    return f.reshape(rows, columns, rows, columns).swapaxes(1, 2).reshape(rows**2, columns**2)


# --- the algebra -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dropped", [0, 1])
def test_relative_error_is_that_of_the_dense_matrices(shape, dropped):
    gradients = random_gradients(shape)
    q_phi, q_psi = (random_orthogonal(k, d)[:, : d - dropped] for k, d in enumerate(shape))
    theta = np.random.default_rng(1).random((q_phi.shape[1], q_psi.shape[1]))
    f, block = fisher(gradients), make_block(gradients)
    expected = relative(dense(q_phi, q_psi, theta, 0.3), f)
    assert abs(relative_error(block, Diagonal(q_phi, q_psi, theta, 0.3)) - expected) < TINY
    assert abs(block.norm - np.linalg.norm(f)) < TINY * block.norm
    assert abs(block.trace - np.trace(f)) < TINY * block.trace


@pytest.mark.parametrize("shape", SHAPES)
def test_floor_is_the_truncated_svd_of_the_rearranged_matrix(shape):
    gradients = random_gradients(shape)
    values = np.linalg.svd(rearranged(fisher(gradients), *shape), compute_uv=False)
    expected = np.linalg.norm(values[1:]) / np.linalg.norm(values)
    assert abs(kronecker_floor(make_block(gradients)) - expected) < TINY


@pytest.mark.parametrize("shape", [(5, 1), (1, 4)])
def test_floor_of_one_row_or_column_is_zero(shape):
    gradients = random_gradients(shape)
    assert np.linalg.matrix_rank(rearranged(fisher(gradients), *shape)) == 1
    assert kronecker_floor(make_block(gradients)) == 0


# --- the library's approximations --------------------------------------------------------------


class Net(nn.Module):
    """A strided convolution, one in groups, and a dense layer whose inputs are truncated."""

    @nn.compact
    def __call__(self, x, *, train=False):
        del train
        x = nn.Conv(4, (3, 2), strides=2, use_bias=False)(x)
        x = nn.Conv(4, (2, 2), feature_group_count=2)(nn.tanh(x))
        return nn.Dense(3)(nn.tanh(x).reshape(x.shape[0], -1))


MODEL = Net()
LAYERS = {"Conv_0": (12, 4), "Dense_0": (37, 3)}


@pytest.fixture(scope="module")
def measured():
    """Two points of one compiled measurement, with other parameters, and the gradients of each."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 6, 6, 2)), rng.integers(3, size=9)
    with jax.numpy_dtype_promotion("standard"):
        params = [MODEL.init(jax.random.key(k), np.float32(x))["params"] for k in range(2)]
        measure = measurer(MODEL, (params[0], {}), x, y)
        return [(measure(7, (p, {})), gradients_of(p, x, y)) for p in params]


def gradients_of(params, x, y):
    """G_n of each layer by vmap(grad), the bias as last row."""

    def loss(params, x, y):
        logits = MODEL.apply({"params": params}, x[None])[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y)

    with jax.enable_x64(True):
        params = jax.tree.map(np.float64, params)
        grads = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0, 0)))(params, x, y)
        grads = jax.device_get(grads)
    matrices = {}
    for path, (_, columns) in LAYERS.items():
        parts = [grads[path]["kernel"].reshape(len(x), -1, columns)]
        if "bias" in grads[path]:
            parts.append(grads[path]["bias"][:, None])
        matrices[path] = np.concatenate(parts, axis=1)
    return matrices


def in_basis(f, q_phi, q_psi):
    """F's diagonal in a basis that may be truncated, the mean of its trace elsewhere."""
    q = np.kron(q_phi, q_psi)
    theta = np.einsum("ik,ij,jk->k", q, f, q)
    outside = len(q) - q.shape[1]
    rest = (np.trace(f) - theta.sum()) / outside if outside else 0.0
    return dense(q_phi, q_psi, theta, rest)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("path", LAYERS)
def test_trace_restricted_errors_are_those_of_brute_force(measured, index, path):
    point, gradients = measured[index]
    shape = LAYERS[path]
    f = fisher(gradients[path])
    phi, psi = partial_traces(f, *shape)
    q_phi, q_psi = np.linalg.eigh(phi)[1], np.linalg.eigh(psi)[1]
    values = np.linalg.svd(rearranged(f, *shape), compute_uv=False)
    errors = point.layers[path]
    assert abs(errors["TKFAC"] - relative(np.kron(phi, psi) / np.trace(f), f)) < TINY
    assert abs(errors["TEKFAC"] - relative(in_basis(f, q_phi, q_psi), f)) < TINY
    assert abs(errors[FLOOR] - np.linalg.norm(values[1:]) / np.linalg.norm(values)) < TINY


@pytest.mark.parametrize("index", [0, 1])
def test_the_other_errors_of_a_dense_layer_are_those_of_brute_force(measured, index):
    point, gradients = measured[index]
    g, errors = gradients["Dense_0"], point.layers["Dense_0"]
    f = fisher(g)
    u = g[:, -1]  # the input there is 1
    a = np.einsum("nio,no->ni", g, u) / np.sum(u**2, axis=1)[:, None]
    factors = a.T @ a / len(a), u.T @ u / len(u)
    q_phi, q_psi = (np.linalg.eigh(factor)[1] for factor in factors)
    assert abs(errors["KFAC"] - relative(np.kron(*factors), f)) < TINY
    assert abs(errors["EKFAC"] - relative(in_basis(f, q_phi, q_psi), f)) < TINY
    # With one position the two kinds of factors are the same.
    for method in ("TKFAC", "TEKFAC"):
        assert abs(errors[f"{method} location"] - errors[method]) < TINY
    phi, psi = partial_traces(f, *LAYERS["Dense_0"])
    top = np.linalg.eigh(phi)[1][:, -5:]  # "auto" keeps an eighth of 37 inputs, rounded up
    expected = relative(in_basis(f, top, np.linalg.eigh(psi)[1]), f)
    assert abs(errors["TEKFAC low rank"] - expected) < TINY


def test_layers_in_groups_are_left_out_and_whole_bases_have_no_low_rank(measured):
    for point, _ in measured:
        assert set(point.layers) == set(LAYERS)
        assert point.layers["Conv_0"]["TEKFAC low rank"] is None
        assert point.layers["Conv_0"]["TKFAC location"] != point.layers["Conv_0"]["TKFAC"]


def test_a_layer_without_gradients_has_no_errors():
    errors = layer_errors(np.zeros((4, 3, 2)), {})
    assert errors == dict.fromkeys((*METHODS, FLOOR))


def test_too_many_gradients_are_refused():
    params = {"kernel": np.zeros((1000, 1000), np.float32)}
    with pytest.raises(UsageError, match="choose --examples up to 1073"):
        measurer(MODEL, (params, {}), np.zeros((2000, 1)), np.zeros(2000, int))


# --- the theorem -------------------------------------------------------------------------------


def a_point(**changes):
    errors: Errors = dict.fromkeys((*METHODS, FLOOR), 0.5)
    return Point(3, 1.0, {"Conv_0": errors, "Dense_0": errors | changes})


@pytest.mark.parametrize(
    ("changes", "better", "worse"),
    [
        ({"TKFAC": 0.5 - 1e-8}, "TEKFAC", "TKFAC"),
        ({"KFAC": 0.4, FLOOR: 0.3}, "EKFAC", "KFAC"),
        ({"TEKFAC location": 0.6}, "TEKFAC location", "TKFAC location"),
        ({"TEKFAC": float("nan")}, "TEKFAC", "TKFAC"),
    ],
)
def test_a_violated_theorem_is_an_error(changes, better, worse):
    with pytest.raises(TheoremError, match="step 3, layer Dense_0") as caught:
        check_theorems(a_point(**changes))
    assert f"the error of {better} is" in str(caught.value)
    assert f"that of {worse} " in str(caught.value)


def test_what_is_no_theorem_is_counted():
    point = a_point(**{"EKFAC": 0.4, "KFAC": 0.4, "TEKFAC low rank": None, FLOOR: 0.3})
    check_theorems(point)
    lines = approximation.summary([point, a_point()])
    assert "held in all of the 4 cases (2 points, 2 layers)" in lines[0]
    assert lines[1] == "TEKFAC ≤ EKFAC (no theorem): in 3 of 4."


# --- the command -------------------------------------------------------------------------------

SMALL = ["--subset", "96", "--width", "2", "--batch-size", "32", "--epochs", "2"]


@pytest.mark.parametrize(
    ("steps", "points", "expected"), [(220, 3, [0, 55, 220]), (2, 5, [0, 1, 2]), (9, 2, [0, 9])]
)
def test_moments_hold_both_ends(steps, points, expected):
    assert approximation.moments(steps, points) == expected


@pytest.mark.slow
def test_command_writes_what_it_prints(tmp_path, capsys):
    approximation.main([*SMALL, "--points", "2", "--examples", "16", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "approximation.json").read_text())
    assert [point["step"] for point in record["points"]] == [0, 6]
    first, last = (point["layers"] for point in record["points"])
    assert list(first) == ["Conv_0", "Conv_1", "Dense_0", "Dense_1"]
    assert first["Conv_1"]["TEKFAC"] != last["Conv_1"]["TEKFAC"]
    assert record["points"][1]["loss"] < record["points"][0]["loss"]
    assert f"{last['Conv_1']['TEKFAC']:.3f}" in printed
    assert record["settings"]["learning_rate"] == 0.01
    assert str(tmp_path) not in json.dumps(record)
    for line in record["summary"]:
        assert line in printed
    with Image.open(tmp_path / "approximation.png") as image:
        assert image.width > 500


def test_a_narrow_terminal_cuts_nothing():
    console = Console(
        force_terminal=True, width=80, color_system=None, record=True, file=StringIO()
    )
    approximation.show(console, [a_point(**{"TEKFAC low rank": None, "KFAC": 0.6251})])
    text = console.export_text()
    assert "…" not in text
    assert "0.625" in text


def test_command_ends_where_the_theorem_fails(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        approximation, "measurer", lambda *args: lambda step, variables: a_point(TEKFAC=0.7)
    )
    with pytest.raises(SystemExit, match=r"layer Dense_0: the error of TEKFAC is 0\.7") as caught:
        approximation.main(
            [*SMALL, "--optimizer", "sgd", "--examples", "8", "--out", str(tmp_path)]
        )
    assert isinstance(caught.value.code, str)  # which Python prints, and ends with 1
    assert not (tmp_path / "approximation.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "alice"], "unknown dataset 'alice': choose from digits"),
        (["--model", "transformer"], "transformer reads windows"),
        (["--optimizer", "newton"], "unknown optimizer 'newton'"),
        (["--points", "1"], "--points must be 2 or more, got 1"),
        (["--batch-size", "0"], "--batch-size must be 1 or more, got 0"),
        (["--learning-rate", "-1"], "--learning-rate must be positive, got -1"),
        ([*SMALL, "--examples", "97"], "choose --examples from 1 to 96"),
        (["--dataset", "cifar10"], "pass with --data"),
    ],
)
def test_bad_options_are_one_sentence(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        approximation.main([*arguments, "--out", str(tmp_path)])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_divergence_is_one_sentence(monkeypatch, tmp_path, capsys):
    point = a_point()._replace(loss=float("nan"))
    monkeypatch.setattr(approximation, "measurer", lambda *args: lambda step, variables: point)
    with pytest.raises(SystemExit):
        approximation.main(
            [*SMALL, "--optimizer", "sgd", "--examples", "8", "--out", str(tmp_path)]
        )
    assert "diverged by step 0: choose a --learning-rate below 0.1" in capsys.readouterr().err
