"""The folders of benchmarks/: what lies where, and who may import whom."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"

# From the ground up: what each room may import besides its own modules. The commands, which are
# all other modules at the top, may import everything.
MAY_IMPORT = {
    "errors": set(),
    "data": {"errors"},
    "fisher": {"errors"},
    "optimizers": {"errors"},
    "models": {"errors", "data"},
    "training": {"errors", "data", "models", "optimizers"},
    "problems": {"errors", "data", "models", "optimizers", "training"},
    "reporting": {"errors", "training", "problems"},
    "experiments": {"errors", "training"},
    "examples": {"data"},
}
COMMANDS = {
    "approximation", "healthy", "memory", "paper", "peers", "pipeline", "profile", "report",
    "scaling", "speed", "train", "workloads",
}  # fmt: skip
NOT_PYTHON = {"records"}


def modules():
    return sorted(path.relative_to(BENCHMARKS) for path in BENCHMARKS.rglob("*.py"))


def room(module):
    """The folder of a module, or the module itself where it lies at the top."""
    return module.parts[0].removesuffix(".py")


def imported(module, source):
    """Rooms whose modules a module imports, wherever in it."""
    tree, found = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("benchmarks.")}


def forbidden(module, source):
    """What a module imports and must not."""
    own = room(module)
    if own in COMMANDS:
        return set()
    return imported(module, source) - MAY_IMPORT.get(own, set()) - {own}


def test_every_module_has_its_room():
    rooms = {room(module) for module in modules() if module.name != "__init__.py"}
    assert rooms == set(MAY_IMPORT) | COMMANDS


def test_commands_and_errors_are_alone_at_the_top():
    files = {path.name for path in BENCHMARKS.iterdir() if path.is_file()}
    assert files == {f"{name}.py" for name in COMMANDS | {"errors", "__init__"}}
    folders = {path.name for path in BENCHMARKS.iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders == set(MAY_IMPORT) - {"errors"} | NOT_PYTHON


def test_rooms_stand_on_those_above_them_in_the_table():
    rooms = list(MAY_IMPORT)
    for number, (name, permitted) in enumerate(MAY_IMPORT.items()):
        assert permitted <= set(rooms[:number]), name


@pytest.mark.parametrize("module", modules(), ids=str)
def test_imports_point_down(module):
    if module.parts == ("__init__.py",):
        return
    found = forbidden(module, (BENCHMARKS / module).read_text())
    assert not found, f"{module} must not import {', '.join(sorted(found))}"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("data/sets.py", "from benchmarks.models.convnets import CNN"),
        ("training/loop.py", "from benchmarks import experiments"),
        ("training/loop.py", "import benchmarks.reporting.summary as summary"),
        ("reporting/results.py", "from benchmarks.train import main"),
        ("fisher/errors.py", "def f():\n    from benchmarks import data"),
        ("errors.py", "from benchmarks.data.sets import DATASETS"),
    ],
)
def test_an_import_upward_is_found(module, source):
    assert forbidden(Path(module), source)


@pytest.mark.parametrize("module", sorted(COMMANDS))
def test_a_command_is_one(module):
    source = (BENCHMARKS / f"{module}.py").read_text()
    assert '\nif __name__ == "__main__":\n    main()\n' in source
    assert f"python -m benchmarks.{module}" in (ast.get_docstring(ast.parse(source)) or "")


@pytest.mark.parametrize("module", sorted(COMMANDS))
def test_a_command_explains_itself(module, capsys):
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"benchmarks.{module}").main(["--help"])
    assert end.value.code == 0
    assert f"python -m benchmarks.{module}" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted({"data", "fisher", "models", "optimizers", "problems",
                                         "reporting", "training"}))  # fmt: skip
def test_a_folder_says_what_it_may_import(name):
    tree = ast.parse((BENCHMARKS / name / "__init__.py").read_text())
    assert len(tree.body) == 1  # its docstring: there are no re-exports
    last = (ast.get_docstring(tree) or "").splitlines()[-1]
    assert set(re.findall(r"`(\w+)`", last)) == MAY_IMPORT[name]


def test_other_tests_do_not_import_the_benchmarks():
    """Seen from tests/, pyright takes tests/benchmarks for them, and checks nothing."""
    for path in (ROOT / "tests").rglob("*.py"):
        if "benchmarks" not in path.parts[len(ROOT.parts) :]:
            assert not imported(path.name, path.read_text()), path.name
