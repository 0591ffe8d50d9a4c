"""The package as a whole: its rooms, its public names, and their documentation."""

import ast
import graphlib
import inspect
from pathlib import Path

import pytest

import tekfac_jax

PACKAGE = Path(tekfac_jax.__file__).parent

# From the bottom up: each room, and the rooms that its modules may import.
ROOMS = {
    "_arguments": set(),
    "_layers": set(),
    "_tracing": {"_layers", "_arguments"},
    "_curvature": {"_layers"},
    "_state": {"_curvature", "_layers"},
    "_devices": {"_state", "_curvature", "_layers"},
    "_capture": {"_tracing", "_curvature", "_layers", "_arguments", "_state"},
    "_optimizer": {"_devices", "_state", "_curvature", "_layers", "_arguments"},
    "train_state": {"_layers"},
    "__init__": {"_capture", "_devices", "_layers", "_optimizer", "_state", "train_state"},
    "nnx": {"__init__", "_capture", "_tracing", "_layers"},
    "plot": {"_state"},
}
# Besides the data types of `_layers`, capture needs of the optimizer only the basis in a state.
READERS_OF_CAPTURE = {"_state.check_state"}
KNOW_FLAX_LINEN = {"_tracing"}

MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    """The folder of a module, or its own name if it is in no folder."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path: Path) -> set[str]:
    """The package's modules that a module imports, as ``room`` or ``room.module``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if module_at(name) else node.module or "" for name in names}
    inside = {name for name in found if name.split(".")[0] == "tekfac_jax"}
    return {name.partition(".")[2] or "__init__" for name in inside}


def module_at(name: str) -> bool:
    """Whether a dotted name is a module of the package, not an attribute of one."""
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def test_every_module_has_its_room():
    assert {room_of(path) for path in MODULES} == set(ROOMS)


def test_the_table_points_down():
    rooms = list(ROOMS)
    for room, below in ROOMS.items():
        assert below <= set(rooms[: rooms.index(room)]), room


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    room = room_of(path)
    found = {name.split(".")[0] for name in imports_of(path)}
    assert found - {room} <= ROOMS[room]


def test_capture_reads_the_state_through_one_module():
    found = {name for path in (PACKAGE / "_capture").glob("*.py") for name in imports_of(path)}
    assert {name for name in found if name.startswith("_state")} == READERS_OF_CAPTURE


@pytest.mark.parametrize("folder", [room for room in ROOMS if (PACKAGE / room).is_dir()])
def test_modules_of_a_folder_import_in_no_circle(folder):
    names = {path.stem for path in (PACKAGE / folder).glob("*.py")}
    own = {
        name: {
            other.split(".")[1]
            for other in imports_of(PACKAGE / folder / f"{name}.py")
            if other.startswith(f"{folder}.")
        }
        for name in names
    }
    tuple(graphlib.TopologicalSorter(own).static_order())  # raises CycleError


def test_a_folder_exports_nothing():
    """Its `__init__` is a docstring; `__getattr__` finds for old pickles what has moved."""
    for path in PACKAGE.glob("*/__init__.py"):
        docstring, *others = ast.parse(path.read_text()).body
        assert isinstance(docstring, ast.Expr), path
        functions = {node.name for node in others if isinstance(node, ast.FunctionDef)}
        imports = {ast.unparse(node) for node in others if isinstance(node, ast.Import)}
        assert len(functions) + len(imports) == len(others), path
        assert functions <= {"__getattr__"}, path
        assert imports <= {"import importlib"}, path


def test_only_tracing_knows_linen():
    knowing = {
        room_of(path)
        for path in MODULES
        for line in path.read_text().splitlines()
        if line.startswith(("import flax.linen", "from flax.linen", "from flax import linen"))
    }
    assert knowing == KNOW_FLAX_LINEN


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
