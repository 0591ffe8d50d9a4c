"""The release: a wheel that needs no extras, a single version, and no unsafe unpickling."""

import ast
import email
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import tekfac_jax

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tekfac_jax"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED = {"jax", "flax", "optax", "jaxtyping"}


def imported(path):
    """Packages outside the standard library that a file imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_imports_are_dependencies(path):
    extra = {"matplotlib"} if path.stem == "plot" else set()
    assert imported(path) <= NEEDED | {"numpy", "tekfac_jax"} | extra  # jax brings numpy


def requirement(text):
    return re.split(r"[^\w\-]", text)[0]


def test_dependencies_are_imported():
    assert {requirement(text) for text in PROJECT["dependencies"]} == NEEDED


# --- without the extras ----------------------------------------------------------------------

PROGRAM = ROOT / "tests" / "without_extras.py"


def where_it_trains(folder):
    """Runs the program in `folder`, so that the repository is not searched for packages."""
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\n"
    code += f"import runpy; runpy.run_path({str(PROGRAM)!r}, run_name='__main__')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert ended.returncode == 0, ended.stderr
    return Path(ended.stdout.strip())


def test_trains_without_any_extra():
    assert where_it_trains(ROOT).parent == PACKAGE


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built like a release, but with the installed build backend, so without a network."""
    pytest.importorskip("hatchling", reason='needs pip install -e ".[dev]"')
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--quiet", "--disable-pip-version-check", "--wheel-dir", str(folder), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        described = email.message_from_bytes(archive.read(metadata))
    information = metadata.rpartition("/")[0]
    modules = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
    ours = {name for name in names if not name.startswith(f"{information}/")}
    assert ours == modules | {"tekfac_jax/py.typed"}
    assert f"{information}/licenses/LICENSE" in names
    assert described["Version"] == tekfac_jax.__version__
    requires = described.get_all("Requires-Dist") or []
    assert {requirement(text) for text in requires if "extra ==" not in text} == NEEDED
    extras = set(described.get_all("Provides-Extra") or [])
    assert extras == {name.replace("_", "-") for name in PROJECT["optional-dependencies"]}


@pytest.mark.slow
def test_wheel_trains_alone(wheel, tmp_path):
    """The wheel is unpacked elsewhere and no extra can be imported; `.ci/wheel` installs it."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    assert where_it_trains(tmp_path).parent.parent == tmp_path


# --- one version -----------------------------------------------------------------------------


def test_version_stands_in_one_place():
    assert PROJECT["dynamic"] == ["version"]
    assert "version" not in PROJECT
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.?(dev|a|b|rc)\d+)?", tekfac_jax.__version__)
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    for path in [*pages, ROOT / "CITATION.cff", ROOT / "mkdocs.yml"]:
        text = path.read_text()
        assert not re.search(r"^version:", text, flags=re.M), path.name
        assert not re.search(r"tekfac_jax[ =v]+\d+\.\d+", text), path.name


# --- files that are read ---------------------------------------------------------------------


def unpickles(path):
    """Names in a file that can load a pickle."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            found |= {module or alias.name for alias in node.names} & {
                "pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "torch",
            }  # fmt: skip
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            is_off = isinstance(node.value, ast.Constant) and node.value.value is False
            found |= set() if is_off else {"allow_pickle"}
    return found


def test_only_one_module_unpickles():
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    assert len(files) > 50
    found = {
        path.relative_to(ROOT).as_posix(): names for path in files if (names := unpickles(path))
    }
    assert found == {"benchmarks/data/safe_pickle.py": {"pickle"}}


# --- contributors ----------------------------------------------------------------------------


def test_hooks_are_the_linters_of_ci():
    hooks = re.findall(r"entry: (.+)", (ROOT / ".pre-commit-config.yaml").read_text())
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    linters = [line for line in lines if line.startswith(("ruff", "pyright"))]
    assert len(hooks) == len(linters) == 3

    def command(line):
        return [word for word in line.split() if word != "." and not word.startswith("-")]

    assert [command(hook) for hook in hooks] == [command(line) for line in linters]


def test_contributors_get_commands_that_work():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (block,) = re.findall(r"```sh\n(.*?)```", text, flags=re.S)
    install, test, lint = block.splitlines()
    extras = re.findall(r"\w+", install.partition(".[")[2])
    assert set(extras) <= set(PROJECT["optional-dependencies"])
    assert test == "pytest"
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    assert set(lint.split(" && ")) <= set(ci)
