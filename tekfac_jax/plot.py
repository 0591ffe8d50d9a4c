"""Pictures of a run: what `diagnostics` says over the steps, and the eigenvalues of each layer.

Not imported by `tekfac_jax` itself; needs Matplotlib: ``pip install matplotlib``. Nothing
here touches Matplotlib's global state: each function returns a figure, to be written with
``figure.savefig("run.png")``, or shown by a notebook as the value of a cell, which needs
``%matplotlib inline`` once before.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from tekfac_jax._state.read import Curvature

try:
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator
except ImportError as _error:
    raise ImportError("tekfac_jax.plot needs Matplotlib: pip install matplotlib") from _error

__all__ = ["health", "history", "spectra"]
_DIGITS = re.compile(r"(\d+)")
_COLUMNS = 4
_COLORS = 10  # of Matplotlib's cycle; more layers are coloured by their depth
_POINTS = 500  # of a spectrum that are drawn
_PANEL = (3.2, 2.3)  # inches
_FLOOR = 1e-10  # of the largest eigenvalue: what is below is rounding


class _Quantity(NamedTuple):
    """How a quantity is drawn."""

    label: str
    is_log: bool = False
    is_count: bool = False


_KNOWN = {
    "trace": _Quantity("trace of the curvature", is_log=True),
    "damping": _Quantity("damping λ", is_log=True),
    "update_ratio": _Quantity("update / weight", is_log=True),
    "angle": _Quantity("angle of update to −gradient (degrees)"),
    "kl_clip": _Quantity("step multiplied by (KL clip)"),
    "failures": _Quantity("failures so far", is_count=True),
    "failed_in_a_row": _Quantity("failures in a row", is_count=True),
    "kept": _Quantity("share of the trace kept"),
    "phi_residual": _Quantity("age of the basis, Φ: ‖ΦQ − QΛ‖ / ‖Φ‖", is_log=True),
    "psi_residual": _Quantity("age of the basis, Ψ: ‖ΨQ − QΛ‖ / ‖Ψ‖", is_log=True),
    "phi_spread": _Quantity("largest / mean eigenvalue of Φ", is_log=True),
    "psi_spread": _Quantity("largest / mean eigenvalue of Ψ", is_log=True),
}


class _Line(NamedTuple):
    """One quantity of one layer."""

    path: str  # "" for what belongs to no layer
    records: list[int]  # in which records it is
    values: NDArray[np.float64]


def history(
    records: Sequence[Mapping[str, Any]],
    *,
    steps: Sequence[float] | None = None,
    quantities: Sequence[str] | None = None,
    figure: Figure | SubFigure | None = None,
) -> Figure | SubFigure:
    """Draws what was logged over the steps: a panel for each quantity, a line for each layer.

    Args:
        records: one flat dict of scalars for each logged step, of `tekfac.diagnostics`, of
            `tekfac.step_diagnostics`, or both merged. A name need not be in all of them.
        steps: where each record stands on the x axis; None: 0, 1, 2, and so on.
        quantities: what to draw, in that order: ``"damping"`` draws each ``"{path}/damping"``, and
            any scalar of your own (``"loss"``) may be among them. None: all that this library knows
            and the records have.
        figure: where to draw; None: a new figure.

    Returns:
        The figure. Layers stand in the order of their names (block_2 before block_10), and values
        that are not finite are gaps.

    Raises:
        ValueError: no records, as many `steps` as records are not given, a value is no scalar, or
            a quantity is in no record.

    Example:
        >>> from tekfac_jax import plot
        >>> records = [{"Dense_0/damping": 0.1 / step, "loss": 1 / step} for step in range(1, 9)]
        >>> figure = plot.history(records, steps=range(0, 80, 10), quantities=["damping", "loss"])
        >>> [axes.get_title() for axes in figure.axes]
        ['damping λ', 'loss']
    """
    found = _lines(records)
    if steps is None:
        steps = range(len(records))
    if len(steps) != len(records):
        raise ValueError(
            f"there are {len(steps)} steps and {len(records)} records; give one step for each"
        )
    quantities = _chosen(quantities, found)
    missing = [name for name in quantities if name not in found]
    if missing or not quantities:
        what = repr(missing[0]) if missing else "any quantity of tekfac.diagnostics"
        raise ValueError(f"no record has {what}; pass quantities= of {', '.join(sorted(found))}")
    figure, panels = _panels(len(quantities), figure)
    colors = _colors(line.path for name in quantities for line in found[name])
    for axes, name in zip(panels, quantities, strict=True):
        _draw_lines(axes, name, steps, found[name], colors)
    _draw_legend(figure, colors)
    return figure


def spectra(
    curvatures: Mapping[str, Curvature],
    *,
    damping: Mapping[str, Any] | None = None,
    figure: Figure | SubFigure | None = None,
) -> Figure | SubFigure:
    """Draws the eigenvalues of each layer, the largest first: Θ, and λ as a line across.

    Left of where λ crosses the curve the curvature decides how long a step is; right of it
    the damping does, and the step is a scaled gradient step.

    Args:
        curvatures: from `tekfac.curvature`; a part of it draws these layers.
        damping: λ of each layer, as ``"{path}/damping"``: what `tekfac.diagnostics` returns; None:
            no line.
        figure: where to draw; None: a new figure.

    Returns:
        The figure, a panel for each layer. Stacked layers and groups of one are drawn together.
        Eigenvalues that are zero, or below 1e-10 of the largest, are not shown. A dotted line is
        θ⊥, where a layer keeps only some of its eigenvectors (`basis_rank`, `max_dim`).

    Raises:
        ValueError: there is no layer.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, tekfac_jax as tekfac
        >>> from tekfac_jax import plot
        >>> model, x = nn.Dense(3), jnp.ones((8, 5))
        >>> params = model.init(jax.random.key(0), x)
        >>> layers = tekfac.find_layers(lambda p, x: model.apply(p, x).sum(), params, x)
        >>> opt_state = tekfac.tekfac(0.1, layers).init(params)
        >>> figure = plot.spectra(tekfac.curvature(opt_state))
        >>> [axes.get_title() for axes in figure.axes]
        ['params']
    """
    if not curvatures:
        raise ValueError("there is no layer to draw; pass what tekfac.curvature(opt_state) returns")
    figure, panels = _panels(len(curvatures), figure)
    for axes, path in zip(panels, sorted(curvatures, key=_by_name), strict=True):
        level = None if damping is None else damping.get(f"{path}/damping")
        _draw_spectrum(axes, path, curvatures[path], level)
    if panels[0].lines:
        panels[0].legend(fontsize="x-small", loc="lower left")
    return figure


def health(
    records: Sequence[Mapping[str, Any]],
    curvatures: Mapping[str, Curvature],
    *,
    steps: Sequence[float] | None = None,
    quantities: Sequence[str] | None = None,
) -> Figure:
    """One picture of a run: `history` above, `spectra` with the last record's λ below.

    Args:
        records: as for `history`.
        curvatures: as for `spectra`, at the end of the run.
        steps: as for `history`.
        quantities: as for `history`.

    Returns:
        The figure.

    Raises:
        ValueError: as `history` and `spectra` do.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, tekfac_jax as tekfac
        >>> from tekfac_jax import plot
        >>> model, x = nn.Dense(3), jnp.ones((8, 5))
        >>> params = model.init(jax.random.key(0), x)
        >>> layers = tekfac.find_layers(lambda p, x: model.apply(p, x).sum(), params, x)
        >>> opt_state = tekfac.tekfac(0.1, layers).init(params)
        >>> records = [tekfac.diagnostics(opt_state)]
        >>> figure = plot.health(records, tekfac.curvature(opt_state), quantities=["failures"])
        >>> [axes.get_title() for axes in figure.axes]
        ['failures so far', 'params']
    """
    found = _lines(records)
    count = len(_chosen(quantities, found))
    rows = [max(1, math.ceil(number / _COLUMNS)) for number in (count, len(curvatures))]
    figure = Figure(figsize=(_COLUMNS * _PANEL[0], sum(rows) * _PANEL[1]), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=rows)
    above, below = parts
    history(records, steps=steps, quantities=quantities, figure=above)
    spectra(curvatures, damping=records[-1], figure=below)
    return figure


# --- data ------------------------------------------------------------------------------------


def _lines(records: Sequence[Mapping[str, Any]]) -> dict[str, list[_Line]]:
    """What the records hold, by quantity; layers in the order of their names."""
    if not records:
        raise ValueError("there are no records; append tekfac.diagnostics(opt_state) to a list")
    fetched: Any = jax.device_get(list(records))  # all at once, not one transfer for each
    keys = sorted({key for record in fetched for key in record}, key=_by_name)
    found: dict[str, list[_Line]] = {}
    for key in keys:
        path, _, name = key.rpartition("/")
        where = [number for number, record in enumerate(fetched) if key in record]
        values = np.array([_scalar(key, fetched[number][key]) for number in where])
        found.setdefault(name, []).append(_Line(path, where, values))
    return found


def _by_name(path: str) -> list[tuple[int, str]]:
    """Sorts block_2 before block_10: dicts that come out of `jax.jit` forget their own order."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in _DIGITS.split(path)]


def _scalar(key: str, value: Any) -> float:
    if np.ndim(value):
        raise ValueError(
            f"{key!r} has shape {np.shape(value)}; a record is a flat dict of scalars, such as "
            "tekfac.diagnostics returns"
        )
    return float(value)


def _thinned(descending: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """(ranks from 1, values) of at most `_POINTS` values, evenly spread on a logarithmic axis."""
    ranks = np.unique(np.geomspace(1, len(descending), _POINTS).round().astype(int))
    return ranks, descending[ranks - 1]


def _chosen(quantities: Sequence[str] | None, found: Mapping[str, Any]) -> Sequence[str]:
    if quantities is None:
        return [name for name in _KNOWN if name in found]
    return [quantities] if isinstance(quantities, str) else quantities


# --- drawing ---------------------------------------------------------------------------------


def _panels(count: int, figure: Figure | SubFigure | None) -> tuple[Figure | SubFigure, list[Axes]]:
    """A grid with that many panels."""
    columns = min(count, _COLUMNS)
    rows = math.ceil(count / columns)
    if figure is None:
        size = (columns * _PANEL[0], rows * _PANEL[1])
        figure = Figure(figsize=size, layout="constrained")
    return figure, [figure.add_subplot(rows, columns, place + 1) for place in range(count)]


def _colors(paths: Iterable[str]) -> dict[str, Any]:
    """A colour for each layer, black for what belongs to none."""
    layers = [path for path in dict.fromkeys(paths) if path]
    if len(layers) <= _COLORS:
        return {"": "black"} | {path: f"C{number}" for number, path in enumerate(layers)}
    depths = np.linspace(0, 0.9, len(layers))  # the end of the map is too pale on white
    return {"": "black"} | dict(zip(layers, colormaps["viridis"](depths), strict=True))


def _draw_lines(
    axes: Axes, name: str, steps: Sequence[float], lines: list[_Line], colors: Mapping[str, Any]
) -> None:
    style = _KNOWN.get(name, _Quantity(name))
    x = np.asarray(steps, float)
    any_positive = False
    for line in lines:
        values = np.where(np.isfinite(line.values), line.values, math.nan)
        any_positive |= bool(np.any(values > 0))
        marker = "." if len(values) == 1 else ""  # a single point has no line
        axes.plot(x[line.records], values, color=colors[line.path], marker=marker, linewidth=1)
    if style.is_log and any_positive:  # Matplotlib warns of a logarithmic axis without a value
        axes.set_yscale("log")
    if style.is_count:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        top = max(1, axes.get_ylim()[1])
        axes.set_ylim(-0.05 * top, top)  # a line at zero stays visible
    _label(axes, style.label, "step")


def _draw_legend(figure: Figure | SubFigure, colors: Mapping[str, Any]) -> None:
    """The names of the layers below the panels; of many only the first and the last."""
    layers = [path for path in colors if path]
    if len(layers) > _COLORS:
        layers = [layers[0], layers[-1]]
    if layers:
        handles = [Line2D([], [], color=colors[path]) for path in layers]
        figure.legend(
            handles, layers, loc="outside lower center", ncols=min(len(layers), 5),
            fontsize="x-small",
        )  # fmt: skip


def _draw_spectrum(axes: Axes, path: str, held: Curvature, damping: Any) -> None:
    theta = np.asarray(held.theta, np.float64).ravel()
    theta = np.sort(theta[np.isfinite(theta) & (theta > 0)])[::-1]
    if len(theta):
        axes.plot(*_thinned(theta), color="C0", label="eigenvalues Θ")
        bottom = max(theta[-1], _FLOOR * theta[0])
        axes.set(xscale="log", yscale="log", ylim=(bottom / 2, theta[0] * 2))
    else:
        axes.text(0.5, 0.5, "no curvature", ha="center", va="center", transform=axes.transAxes)
    rest = np.max(np.asarray(held.theta_rest))
    for level, style, label in ((damping, "--", "damping λ"), (rest, ":", "θ⊥ of the rest")):
        if level is not None and 0 < float(level) < math.inf:
            axes.axhline(float(level), linestyle=style, color="C3", linewidth=1, label=label)
    _label(axes, path, "rank of the eigenvalue")


def _label(axes: Axes, title: str, x: str) -> None:
    axes.set_title(title, fontsize="small")
    axes.set_xlabel(x, fontsize="x-small")
    axes.tick_params(which="both", labelsize="x-small")
    axes.grid(alpha=0.3)
