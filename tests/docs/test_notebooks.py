"""The saved notebooks are complete runs from top to bottom, and every cell still runs."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.test_data import binary_files, make_split, write_archive

nbformat: Any = pytest.importorskip("nbformat", reason='needs pip install -e ".[docs]"')

ROOT = Path(__file__).parent.parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
# Absolute paths and hosts, which would identify a machine; those in URLs follow a name.
_MACHINE = re.compile(
    r"(?<![\w.-])/(?:home|Users|root|work|opt|tmp|usr|private|mnt|var|data|content)/"
    r"|\b[A-Z]:\\\\|localhost|127\.0\.0\.1"
)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shows_something(source):
    """Whether a cell prints outside the functions that it defines, or ends in an expression."""
    statements = ast.parse(re.sub(r"^%.*$", "", source, flags=re.M)).body
    run = [node for node in statements if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    calls = (call for node in run for call in ast.walk(node) if isinstance(call, ast.Call))
    return isinstance(statements[-1], ast.Expr) or any(
        ast.unparse(call.func) == "print" for call in calls
    )


@every_notebook
def test_saved_notebook_is_one_whole_run(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert bool(cell.outputs) == shows_something(cell.source), cell.source
        for output in cell.outputs:
            assert output.output_type in {"stream", "display_data", "execute_result"}
            assert output.get("name", "stdout") == "stdout"  # no warnings
    outputs = [output for cell in cells for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2


@every_notebook
def test_saved_notebook_is_of_nobodys_machine(path):
    found = _MACHINE.search(path.read_text())
    assert found is None, found
    assert path.stat().st_size < 700_000  # a page that loads


def test_a_machine_would_be_found():
    for text in ("'/home/me/x'", '"/tmp/x"', "file:///opt/x", r"C:\\Users", "http://localhost:80"):
        assert _MACHINE.search(text), text
    for text in ("https://a.org/data/x", "float64/32", "docs/data/x"):
        assert not _MACHINE.search(text), text


@every_notebook
def test_notebook_is_a_page_with_its_command(path):
    assert f"notebooks/{path.name}\n" in (ROOT / "mkdocs.yml").read_text()
    assert f"jupyter execute --inplace docs/notebooks/{path.name}\n" in "".join(
        cell.source for cell in nbformat.read(path, as_version=4).cells
    )


# --- short mode ------------------------------------------------------------------------------


@pytest.fixture
def cifar_dir(tmp_path):
    """The official archive in its binary version, with few images."""
    train, test = make_split(120, (32, 32, 3), 10), make_split(20, (32, 32, 3), 10)
    write_archive(tmp_path, "cifar10", binary_files("cifar10", train, test))
    return tmp_path


@pytest.mark.slow
@every_notebook
def test_notebook_runs(path, cifar_dir, monkeypatch):
    """Runs every cell with a toy network; if a cell raises, its traceback is shown."""
    nbclient = pytest.importorskip("nbclient", reason='needs pip install -e ".[docs]"')
    monkeypatch.setenv("NOTEBOOK_SHORT", "1")
    monkeypatch.setenv("CIFAR_DIR", str(cifar_dir))
    notebook = nbformat.read(path, as_version=4)
    saved = [bool(cell.outputs) for cell in code_cells(notebook)]
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    nbclient.NotebookClient(notebook, timeout=250, resources={"metadata": {"path": ROOT}}).execute()
    assert [bool(cell.outputs) for cell in code_cells(notebook)] == saved
