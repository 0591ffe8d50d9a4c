"""Plots show the numbers they are given, and report what they cannot draw."""

import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tekfac_jax as tekfac
from tekfac_jax import plot
from tests import snippets

DOCS = Path(__file__).parent.parent / "docs"


def held(theta, rest=0.0):
    """A `Curvature` in which only Θ matters."""
    theta, one = jnp.asarray(theta), jnp.ones((1, 1))
    return tekfac.Curvature(jnp.sum(theta), one, one, one, one, theta, jnp.asarray(rest))


def layer_records(paths, number=5):
    return [
        {f"{path}/damping": jnp.float32((i + 1) * 10**step) for i, path in enumerate(paths)}
        for step in range(number)
    ]


def panel(figure, title):
    (axes,) = (axes for axes in figure.axes if axes.get_title() == title)
    return axes


def test_lines_are_the_numbers():
    records = layer_records(["a", "b/c"])
    figure = plot.history(records, steps=range(0, 50, 10))
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    for i, line in enumerate(axes.get_lines()):
        np.testing.assert_array_equal(line.get_xdata(), range(0, 50, 10))
        np.testing.assert_allclose(line.get_ydata(), [(i + 1) * 10**step for step in range(5)])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b/c"]
    figure.canvas.draw()


@pytest.mark.slow
def test_everything_that_diagnostics_returns_has_a_panel(state):
    scalars = tekfac.diagnostics(state)
    figure = plot.history([scalars, scalars])
    assert len(figure.axes) == len({key.rpartition("/")[2] for key in scalars})
    figure.canvas.draw()  # damping and traces of zero, which have no logarithm


@pytest.fixture(scope="module")
def state():
    """A state before its first step."""
    model, x = nn.Dense(3), jnp.ones((8, 5))
    params = model.init(jax.random.key(0), x)
    layers = tekfac.find_layers(lambda p, x: model.apply(p, x).sum(), params, x)
    return tekfac.tekfac(0.1, layers).init(params)


def test_what_was_logged_rarely_is_joined_and_what_is_not_finite_is_a_gap():
    records = [{"loss": 3.0}, {"kl_clip": 0.5}, {"loss": np.nan}, {"loss": 1.0}, {"loss": np.inf}]
    axes = panel(plot.history(records, quantities=["loss", "kl_clip"]), "loss")
    (line,) = axes.get_lines()
    np.testing.assert_array_equal(line.get_xdata(), [0, 2, 3, 4])
    np.testing.assert_array_equal(line.get_ydata(), [3, np.nan, 1, np.nan])


def test_many_layers_are_coloured_by_depth():
    paths = [f"block_{i}" for i in range(24)]
    figure = plot.history(layer_records(paths, 2))
    colors = {tuple(line.get_color()) for line in figure.axes[0].get_lines()}
    assert len(colors) == 24
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["block_0", "block_23"]  # not 9


def test_spectrum_is_sorted_and_crossed_by_the_damping():
    theta = np.array([[1e-3, 10.0, 0.0], [0.1, 1.0, 1e-30]])
    figure = plot.spectra({"a": held(theta, rest=0.05)}, damping={"a/damping": 0.02})
    (axes,) = figure.axes
    spectrum, damping, rest = axes.get_lines()
    np.testing.assert_allclose(spectrum.get_ydata(), [10, 1, 0.1, 1e-3, 1e-30])
    np.testing.assert_array_equal(spectrum.get_xdata(), range(1, 6))
    assert set(damping.get_ydata()) == {0.02}
    np.testing.assert_allclose(rest.get_ydata(), 0.05, rtol=1e-6)
    assert axes.get_ylim()[0] > 1e-10  # rounding errors do not fill the picture
    figure.canvas.draw()


def test_a_large_spectrum_is_thinned_and_keeps_its_ends():
    theta = np.arange(1.0, 200_001).reshape(400, 500)
    (line,) = plot.spectra({"a": held(theta)}).axes[0].get_lines()
    x, y = line.get_data()
    assert len(x) <= 500
    np.testing.assert_allclose(y, 200_001 - x, rtol=1e-6)  # each value is drawn at its own rank
    assert (x[0], x[-1]) == (1, 200_000)


def test_no_curvature_is_said(state):
    figure = plot.spectra(tekfac.curvature(state))
    assert [text.get_text() for text in figure.axes[0].texts] == ["no curvature"]
    figure.canvas.draw()


def test_health_has_both_and_the_last_damping():
    figure = plot.health(layer_records(["a"]), {"a": held(np.ones((2, 2)))})
    damping, spectrum = figure.axes
    assert damping.get_title() == "damping λ"
    assert set(spectrum.get_lines()[1].get_ydata()) == {1e4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"records": []}, "no records; append"),
        ({"records": [{"a/damping": jnp.ones(2)}]}, r"'a/damping' has shape \(2,\)"),
        ({"records": [{"loss": 1.0}]}, "any quantity of tekfac.diagnostics; .* loss"),
        ({"records": [{"loss": 1.0}], "quantities": ["los"]}, "no record has 'los'; .* loss"),
        ({"records": [{"kl_clip": 1.0}], "steps": [1, 2]}, "2 steps and 1 records"),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        plot.history(**arguments)


def test_spectra_of_nothing():
    with pytest.raises(ValueError, match="no layer to draw"):
        plot.spectra({})


def test_without_matplotlib_one_sentence():
    code = "import sys; sys.modules['matplotlib'] = None\nimport tekfac_jax\nimport tekfac_jax.plot"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stderr.splitlines()[-1] == (
        "ImportError: tekfac_jax.plot needs Matplotlib: pip install matplotlib"
    )


# --- the page --------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_page_runs_and_its_picture_is_small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = snippets.run((DOCS / "diagnostics.md").read_text(), "diagnostics.md")
    assert (tmp_path / "run.png").exists()
    records = namespace["records"]
    assert records[-1]["loss"] < records[0]["loss"] / 2
    assert {"Dense_0/angle", "Dense_0/update_ratio", "Dense_0/damping"} <= set(records[0])
    assert (DOCS / "images" / "healthy.png").stat().st_size < 150_000
