"""The documentation: its Python runs, every name in it exists, and the site builds cleanly."""

import ast
import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

import tekfac_jax
import tekfac_jax.nnx
import tekfac_jax.plot
from tekfac_jax._optimizer import schedule
from tests import snippets
from tests.capturing import simple_case

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))


def page(name: str) -> str:
    return (DOCS / name).read_text()


def section(name: str, heading: str) -> str:
    """The text under a heading."""
    return page(name).split(f"\n## {heading}\n")[1].split("\n## ")[0]


# --- Python ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_quick_start_trains(capsys):
    text = page("quickstart.md")
    namespace = snippets.run(text, "quickstart.md")
    printed = capsys.readouterr().out
    (table,) = snippets.blocks(text, "text")
    assert printed.startswith(table)
    assert namespace["accuracy"] > 0.95  # as the page promises
    logged = tekfac_jax.diagnostics(namespace["state"].opt_state)
    explained = re.findall(r"`(\w+)`", section("quickstart.md", "7. Is it healthy?"))
    assert {name.rpartition("/")[2] for name in logged} <= set(explained)


@pytest.mark.slow
def test_migration_trains():
    namespace = snippets.run(page("migration.md"), "migration.md")
    assert namespace["tekfac_loss"] < namespace["adam_loss"] < 1


@pytest.mark.slow
def test_questions_run():
    namespace = snippets.run(page("faq.md"), "faq.md")
    assert namespace["state"].step == 1
    assert not set(namespace["layers"]) & {"BatchNorm_0"}


def test_the_method_by_hand(capsys):
    """NumPy, the dense solve and the library give the same step, which the page prints."""
    text = page("method.md")
    names = snippets.run(text, "method.md")
    assert capsys.readouterr().out == "".join(snippets.blocks(text, "text"))
    np.testing.assert_allclose(names["solved"], names["step"], rtol=1e-12)
    np.testing.assert_allclose(names["library"], names["step"], rtol=1e-4)


def test_costs_in_the_method_are_those_of_the_schedule():
    """The formulas for one position, for G_n formed, and in the printed example."""
    examples, i, o = schedule._EXAMPLES, 5, 3

    def costs(t, i, o):
        spec = tekfac_jax.LayerSpec(
            path="", kind="dense", kernel_shape=(i, o), contracted=1, use_bias=False,
            dtype="float32", axes=(-1,), positions=t,
        )  # fmt: skip
        return schedule._costs(spec)

    factors, eigenbasis, rescaling = costs(1, i, o)
    assert factors == 2 * examples * (i**2 + o**2)
    assert eigenbasis == 9 * (i**3 + o**3)
    assert rescaling == 2 * examples * (i**2 + o**2 + i * o)
    factors, _, rescaling = costs(1000, i, o)
    assert factors == rescaling == 2 * examples * (1000 * i * o + i * o * (i + o))

    cost = section("method.md", "Why refreshes are rare, and what they cost")
    names = snippets.run(cost, "method.md")
    refreshes = names["refreshes"]
    factors, eigenbasis, rescaling = costs(names["t"], names["i"], names["o"])
    assert refreshes["factors"] * examples == factors * names["n"]
    assert refreshes["eigenbasis"] == eigenbasis
    assert refreshes["Θ"] * examples == rescaling * names["n"]


@pytest.mark.filterwarnings("ignore")  # from orbax
def test_checkpoints_are_restored():
    namespace = snippets.run(page("checkpoints.md"), "checkpoints.md")
    sentence = tekfac_jax.check_state(namespace["opt_state"], namespace["layers"])
    assert sentence == ""  # before the first statistics, so nothing is missing


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # from tensorboardX
def test_tensorboard_is_given_every_scalar(tmp_path, monkeypatch):
    """Runs the page's fragment, and reads the files as TensorBoard would."""
    (fragment,) = snippets.blocks(section("diagnostics.md", "TensorBoard, and other loggers"), "py")
    loss, params, x, layers = simple_case()
    state = tekfac_jax.TrainState.create(
        apply_fn=loss, params=params, tx=tekfac_jax.tekfac(0.1, layers)
    )
    grad_fn = tekfac_jax.value_grad_and_stats(loss, layers)

    @jax.jit
    def train_step(state, x, y):
        del y
        _, grads, stats = grad_fn(state.params, x)
        state = state.apply_gradients(grads=grads, stats=stats)
        return state, tekfac_jax.diagnostics(state.opt_state)

    monkeypatch.chdir(tmp_path)
    names = {"jax": jax, "jnp": jnp, "tekfac": tekfac_jax}
    namespace = {**names, "train_step": train_step, "state": state, "x": x, "y": None}
    exec(compile(fragment, "diagnostics.md", "exec"), namespace)
    scalars = {}
    for _ in range(51):
        state, scalars = train_step(state, x, None)

    (path,) = (tmp_path / "logs").glob("events.*")
    events = [Event.FromString(record) for record in tfrecords(path.read_bytes())]
    values = {value.tag: value for event in events for value in event.summary.value}
    for name, expected in scalars.items():
        assert values[name].simple_value == pytest.approx(float(expected))
    for layer in layers:
        assert (
            values[f"{layer}/log10_theta"].histo.num == layers[layer].in_dim * layers[layer].out_dim
        )
    assert {event.step for event in events if event.summary.value} == {0, 50}


def tfrecords(content: bytes) -> list[bytes]:
    """The records of a TFRecord file: each has its length, content, and a checksum of both."""
    found = []
    while content:
        length = int.from_bytes(content[:8], "little")
        found.append(content[12 : 12 + length])
        content = content[16 + length :]
    return found


@pytest.mark.parametrize("name", PAGES)
def test_other_python_parses(name):
    """Fragments that need surrounding code are marked ``py``."""
    for block in snippets.blocks(page(name), "py"):
        ast.parse(block)


# --- names -----------------------------------------------------------------------------------


def _tests_in(module: str) -> set[str]:
    """Tests of a file, wherever below tests/ it is."""
    (path,) = (ROOT / "tests").rglob(f"{module}.py")
    tree = ast.parse(path.read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


_NAMES = sorted(
    {found for name in PAGES for found in re.findall(r"`(_\w+\.\w+)\.(\w+)`", page(name))}
)
_TESTS = sorted(
    {found for name in PAGES for found in re.findall(r"`(test_\w+)\.(test_\w+)`", page(name))}
)


def test_functions_that_are_named_exist():
    assert len(_NAMES) > 40
    for module, name in _NAMES:
        assert hasattr(importlib.import_module(f"tekfac_jax.{module}"), name), f"{module}.{name}"


def test_tests_that_are_named_exist():
    assert len(_TESTS) > 10
    for module, name in _TESTS:
        assert name in _tests_in(module), f"{module}.{name}"


def test_every_equation_of_the_paper_has_its_function():
    rows = re.findall(r"^\| ([\d., ]+) \|.*\| (.*) \|$", page("method.md"), flags=re.M)
    found = {number for numbers, code in rows if code for number in numbers.split(", ")}
    sections = {2: 10, 3: 9}
    assert {f"{s}.{n}" for s, last in sections.items() for n in range(1, last + 1)} <= found


def test_every_erratum_says_what_checks_it():
    rows = [
        [cell.strip() for cell in row.strip("|").split("|")]
        for row in section("method.md", "Errata of the paper").splitlines()
        if row.startswith("| ") and not row.startswith("| where")
    ]
    assert len(rows) > 20
    for *wrong, checked in rows:
        assert len(wrong) == 3
        assert all(wrong)
        assert checked == "wording only" or checked.startswith("`test_"), checked


def test_reference_lists_every_public_name():
    listed = re.findall(r"^::: (\S+)$", page("api.md"), flags=re.M)
    expected = [f"tekfac_jax.{name}" for name in tekfac_jax.__all__]
    expected += [f"tekfac_jax.nnx.{name}" for name in tekfac_jax.nnx.__all__]
    expected += [f"tekfac_jax.plot.{name}" for name in tekfac_jax.plot.__all__]
    assert sorted(listed) == sorted(expected)


# Keywords in the pages that belong to other libraries.
_FOREIGN = {
    "jax": {"check_vma"},
    "flax": {"transpose_kernel"},
    "optax": {"mask"},
    "kfac_jax": {
        "batch", "curvature_ema", "curvature_update_period", "estimation_mode",
        "inverse_update_period", "l2_reg", "multi_device", "norm_constraint", "num_burnin_steps",
        "use_exact_inverses", "weight",
    },
}  # fmt: skip


def test_options_that_are_named_exist():
    """Every ``name=`` in code is an argument of a public function of ours, or listed above."""
    known = {"stats", "when", "opt_state", "key", "batch_size"}  # of the functions that ours return
    for module in (tekfac_jax, tekfac_jax.nnx, tekfac_jax.plot):
        for thing in (getattr(module, name) for name in module.__all__):
            known |= set(inspect.signature(thing).parameters) if callable(thing) else set()
    known |= {"grads"}.union(*_FOREIGN.values())
    for name in PAGES:
        for code in re.findall(r"`([^`\n]+)`", page(name)):
            for keyword in re.findall(r"(?<![\w.\"])([a-z]\w*)=(?!=)", code):
                assert keyword in known, f"{name}: {code}"


# --- the site --------------------------------------------------------------------------------


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert all(f": {name}\n" in navigation for name in PAGES)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    if importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip('needs pip install -e ".[docs]"')
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    built = subprocess.run(
        [*command, "--site-dir", tmp_path / "site"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    assert not built.stderr
    reference = (tmp_path / "site" / "api" / "index.html").read_text()
    for name in tekfac_jax.__all__:
        assert f'id="tekfac_jax.{name}"' in reference, name
    for name in ("tekfac", "kfac", "scale_by_tekfac", "scale_by_kfac"):
        signature = reference.split(f'id="tekfac_jax.{name}"')[1].split("doc-contents")[0]
        assert "stagger" in signature, name  # some have it only in `__signature__`
    assert "&gt;&gt;&gt;" in reference  # examples are code
    assert "<blockquote>" not in reference  # not quotations
    assert "<em>" not in reference  # the stars of shapes are stars
