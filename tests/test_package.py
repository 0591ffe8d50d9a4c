"""Promises about the package as a whole: its rooms, its public names, their documentation."""

import ast
import inspect
from pathlib import Path

import pytest

import tekfac_jax

PACKAGE = Path(tekfac_jax.__file__).parent

# From the ground up: a module imports only from modules that stand before it.
ROOMS = [
    "_checks", "_layers", "_pytrees", "_fresh", "_marks", "_usage", "_replay", "_record",
    "_flax_layers", "_linen", "_trace", "_judge", "_plan", "_orders", "_chunks", "_stacked",
    "_statistics", "_embedding", "_norms", "_contract", "_reduced",
    "_eigenbasis", "_decomposition", "_devices", "_folding",
    "_state", "_compatibility", "_readers", "_restore", "_damping", "_options",
    "_sharding", "_gather", "_capture", "_steps", "_check", "_fisher", "_batch",
    "_sources", "_schedule", "_refresh", "_transform", "_optimizers", "train_state",
    "__init__", "nnx", "plot",
]  # fmt: skip


def _imports(module: str) -> set[str]:
    """Modules of the package that a module imports."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "tekfac_jax":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tekfac_jax."):
            found.add(node.module.split(".")[1])
    return found


def test_every_module_has_its_room():
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(ROOMS)


@pytest.mark.parametrize("module", ROOMS)
def test_imports_point_down(module):
    assert _imports(module) <= set(ROOMS[: ROOMS.index(module)])


def test_only_capture_knows_linen():
    knowing = {
        path.stem
        for path in PACKAGE.glob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith(("import flax.linen", "from flax.linen"))
    }
    assert knowing == {"_flax_layers", "_linen", "_trace", "nnx"}


@pytest.mark.parametrize("name", tekfac_jax.__all__)
def test_public_names_are_documented(name):
    thing = getattr(tekfac_jax, name)
    assert inspect.getdoc(thing)
    if inspect.isfunction(thing) and "see" not in (thing.__doc__ or "").lower():
        documented = inspect.getdoc(thing) or ""
        for parameter in inspect.signature(thing).parameters.values():
            if parameter.kind is not parameter.VAR_KEYWORD:
                assert parameter.name in documented or "ready to use" in documented, parameter.name


def test_siblings_show_the_same_arguments():
    for family in ("scale_by_{}", "{}"):
        signatures = {
            str(inspect.signature(getattr(tekfac_jax, family.format(name))))
            for name in ("tekfac", "tkfac", "ekfac", "kfac")
        }
        assert len(signatures) == 1
