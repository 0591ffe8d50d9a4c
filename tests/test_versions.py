"""The supported versions in pyproject.toml are those of CI and of the pages."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def oldest(*extras, folder=ROOT):
    command = [sys.executable, folder / ".ci" / "oldest.py", *extras]
    return subprocess.run(command, capture_output=True, text=True)


def bounds(requirements):
    return [line.replace(">=", "==") for line in requirements]


def test_oldest_are_the_lower_bounds():
    pytest.importorskip("packaging")
    assert oldest().stdout.splitlines() == bounds(PROJECT["dependencies"])
    both = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["plot"]
    assert oldest("plot").stdout.splitlines() == bounds(both)


def test_a_missing_bound_is_said(tmp_path):
    pytest.importorskip("packaging")
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "oldest.py").write_text((ROOT / ".ci" / "oldest.py").read_text())
    text = (ROOT / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(re.sub(r'"optax>=[\d.]+"', '"optax"', text))
    ended = oldest(folder=tmp_path)
    assert ended.returncode == 1
    assert ended.stderr == "pyproject.toml: optax needs one lower bound, such as >=1.0\n"


def test_an_extra_within_an_extra_has_the_same_bound():
    extras = PROJECT["optional-dependencies"]
    assert set(extras["plot"]) <= set(extras["benchmarks"])


def test_ci_runs_every_interpreter_that_is_promised():
    promised = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    checked = re.findall(r"^check (3\.\d+)", (ROOT / ".ci" / "versions").read_text(), flags=re.M)
    assert promised == checked
    assert PROJECT["requires-python"] == f">={promised[0]}"
    assert ".ci/versions" in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/index.md"])
def test_pages_say_the_same(page):
    text = (ROOT / page).read_text()
    found = re.findall(r"(Python|jax) (\d+(?:\.\d+)+) or newer", text)
    needed = {"Python": PROJECT["requires-python"].removeprefix(">=")}
    needed["jax"] = next(x for x in PROJECT["dependencies"] if x.startswith("jax>")).partition(
        ">="
    )[2]
    assert found
    assert {name: version for name, version in found} == {name: needed[name] for name, _ in found}
