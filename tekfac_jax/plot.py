"""Pictures of a run: the values of `diagnostics` over the steps, and each layer's eigenvalues.

`tekfac_jax` itself does not import this module. It needs Matplotlib: ``pip install matplotlib``.
Nothing here touches Matplotlib's global state. Each function returns a figure: save it with
``figure.savefig("run.png")``, or let a notebook show it as the value of a cell (after
``%matplotlib inline``).
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, SupportsFloat

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
    from matplotlib.typing import ColorType
except ImportError as _error:
    raise ImportError("tekfac_jax.plot needs Matplotlib: pip install matplotlib") from _error

__all__ = ["health", "history", "spectra"]
_DIGITS = re.compile(r"(\d+)")
_COLUMNS = 4
_COLORS = 10  # in Matplotlib's cycle; more layers than that are coloured by depth
_POINTS = 500  # drawn of each spectrum
_PANEL = (3.2, 2.3)  # inches
_FLOOR = 1e-10  # relative to the largest eigenvalue: anything below is rounding


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

    path: str  # "" for a quantity that belongs to no layer
    records: list[int]  # indices of the records that have it
    values: NDArray[np.float64]


def history(
    records: Sequence[Mapping[str, SupportsFloat]],
    *,
    steps: Sequence[float] | None = None,
    quantities: Sequence[str] | None = None,
    figure: Figure | SubFigure | None = None,
) -> Figure | SubFigure:
    """Draws the logged values over the steps: a panel for each quantity, a line for each layer.

    Args:
        records: one flat dict of scalars for each logged step, from `tekfac.diagnostics`,
            `tekfac.step_diagnostics`, or both merged. Records may have different names.
        steps: position of each record on the x axis; None: 0, 1, 2, and so on.
        quantities: what to draw, in this order: ``"damping"`` draws each ``"{path}/damping"``; your
            own scalars (``"loss"``) may be among them. None: every quantity of this library that
            the records have.
        figure: where to draw; None: a new figure.

    Returns:
        The figure. Layers are sorted by name (block_2 before block_10), and values that are not
        finite are gaps.

    Raises:
        ValueError: there are no records; `steps` has another length than `records`; a value is not
            a scalar; or a quantity is in no record.

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
        raise ValueError(f"no record has {what}; pass quantities= from {', '.join(sorted(found))}")
    figure, panels = _panels(len(quantities), figure)
    colors = _colors(line.path for name in quantities for line in found[name])
    for axes, name in zip(panels, quantities, strict=True):
        _draw_lines(axes, name, steps, found[name], colors)
    _draw_legend(figure, colors)
    return figure


def spectra(
    curvatures: Mapping[str, Curvature],
    *,
    damping: Mapping[str, SupportsFloat] | None = None,
    figure: Figure | SubFigure | None = None,
) -> Figure | SubFigure:
    """Draws the eigenvalues Θ of each layer in descending order, and λ as a horizontal line.

    To the left of the point where λ crosses the curve, the curvature sets the length of a step. To
    the right the damping does, and the step is a scaled gradient step.

    Args:
        curvatures: from `tekfac.curvature`, for all layers or some of them.
        damping: λ of each layer, as ``"{path}/damping"``, which `tekfac.diagnostics` returns; None:
            no line.
        figure: where to draw; None: a new figure.

    Returns:
        The figure, with a panel for each layer. Stacked layers, and the groups of one layer, share
        a panel. Eigenvalues that are zero or below 1e-10 of the largest are not shown. A dotted
        line shows θ⊥ where a layer keeps only some of its eigenvectors (`basis_rank`, `max_dim`).

    Raises:
        ValueError: `curvatures` is empty.

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
    records: Sequence[Mapping[str, SupportsFloat]],
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
    (above,), (below,) = figure.subfigures(2, 1, squeeze=False, height_ratios=rows)
    history(records, steps=steps, quantities=quantities, figure=above)
    spectra(curvatures, damping=records[-1], figure=below)
    return figure


# --- data ------------------------------------------------------------------------------------


def _lines(records: Sequence[Mapping[str, SupportsFloat]]) -> dict[str, list[_Line]]:
    """The values in the records by quantity, one line for each layer, sorted by name."""
    if not records:
        raise ValueError("there are no records; append tekfac.diagnostics(opt_state) to a list")
    fetched: list[Mapping[str, SupportsFloat]] = jax.device_get(
        list(records)
    )  # in a single transfer
    keys = sorted({key for record in fetched for key in record}, key=_by_name)
    found: dict[str, list[_Line]] = {}
    for key in keys:
        path, _, name = key.rpartition("/")
        where = [number for number, record in enumerate(fetched) if key in record]
        values = np.array([_scalar(key, fetched[number][key]) for number in where])
        found.setdefault(name, []).append(_Line(path, where, values))
    return found


def _by_name(path: str) -> list[tuple[int, str]]:
    """A sort key that puts block_2 before block_10: `jax.jit` does not keep the order of dicts."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in _DIGITS.split(path)]


def _scalar(key: str, value: SupportsFloat) -> float:
    shape = np.asarray(value).shape
    if shape:
        raise ValueError(
            f"{key!r} has shape {shape}; a record must be a flat dict of scalars, like "
            "that of tekfac.diagnostics"
        )
    return float(value)


def _thinned(descending: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(ranks from 1, values) of at most `_POINTS` values, evenly spread on a logarithmic axis."""
    ranks = np.unique(np.geomspace(1, len(descending), _POINTS).round().astype(int))
    return ranks, descending[ranks - 1]


def _chosen(quantities: Sequence[str] | None, found: Mapping[str, list[_Line]]) -> Sequence[str]:
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


def _colors(paths: Iterable[str]) -> Mapping[str, ColorType]:
    """A colour for each layer, and black for quantities that belong to no layer."""
    layers = [path for path in dict.fromkeys(paths) if path]
    if len(layers) <= _COLORS:
        return {"": "black"} | {path: f"C{number}" for number, path in enumerate(layers)}
    depths = np.linspace(0, 0.9, len(layers))  # the end of the map is too pale on white
    shades = [(r, g, b, a) for r, g, b, a in colormaps["viridis"](depths)]
    return {"": "black"} | dict(zip(layers, shades, strict=True))


def _draw_lines(
    axes: Axes,
    name: str,
    steps: Sequence[float],
    lines: list[_Line],
    colors: Mapping[str, ColorType],
) -> None:
    style = _KNOWN.get(name, _Quantity(name))
    x = np.asarray(steps, float)
    any_positive = False
    for line in lines:
        values = np.where(np.isfinite(line.values), line.values, math.nan)
        any_positive |= bool(np.any(values > 0))
        marker = "." if len(values) == 1 else ""  # a single point has no line
        axes.plot(x[line.records], values, color=colors[line.path], marker=marker, linewidth=1)
    # Matplotlib warns about a logarithmic axis without positive values.
    if style.is_log and any_positive:
        axes.set_yscale("log")
    if style.is_count:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        top = max(1, axes.get_ylim()[1])
        axes.set_ylim(-0.05 * top, top)  # a line at zero stays visible
    _label(axes, style.label, "step")


def _draw_legend(figure: Figure | SubFigure, colors: Mapping[str, ColorType]) -> None:
    """Names the layers below the panels; if there are many, only the first and the last."""
    layers = [path for path in colors if path]
    if len(layers) > _COLORS:
        layers = [layers[0], layers[-1]]
    if layers:
        handles = [Line2D([], [], color=colors[path]) for path in layers]
        figure.legend(
            handles, layers, loc="outside lower center", ncols=min(len(layers), 5),
            fontsize="x-small",
        )  # fmt: skip


def _draw_spectrum(axes: Axes, path: str, held: Curvature, damping: SupportsFloat | None) -> None:
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
