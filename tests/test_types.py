"""What a type checker says about a user's program in strict mode, and the public types."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent

PROGRAM = """
from typing import Any
import jax
from flax import nnx
import tekfac_jax as tekfac
from tekfac_jax import nnx as tekfac_nnx
from tekfac_jax import plot

def loss_fn(params: Any, x: jax.Array) -> jax.Array: ...

def train(params: Any, x: jax.Array) -> None:
    layers = tekfac.find_layers(loss_fn, params, x, norm="unitwise")
    tx = tekfac.tekfac(0.1, layers, momentum=0.9, kl_clip=None, factor_interval=10)
    bare = tekfac.scale_by_kfac(layers, damping="trace", factors="location", basis_rank=4)
    state = tekfac.TrainState.create(apply_fn=None, params=params, tx=tx)
    grad_fn = tekfac.value_grad_and_stats(loss_fn, layers, mode="reduced")
    stats_fn = tekfac.fisher_stats(loss_fn, layers, likelihood=tekfac.Gaussian(variance=2.0))
    stepped = state.apply_gradients(grads=grad_fn(params, x)[1], stats=stats_fn(params, x))
    found: dict[str, tekfac.Curvature] = tekfac.curvature(stepped)
    theta: jax.Array = found["a"].theta
    scalars: dict[str, jax.Array] = tekfac.diagnostics(bare.init(params))
    worst: float = max(tekfac.check_capture(loss_fn, layers, params, x).values())
    balance: float = tekfac.device_plan(layers, 8).balance
    clipped = tekfac.clip_by_kl(bare, 0.1, 1e-3)
    small = tekfac.without_factors(tx.init(params))
    restored = tekfac.restore_state(small, tx.init(params), factors=False)
    sentence: str = tekfac.check_state(restored, layers, tx.init(params))
    step: dict[str, jax.Array] = tekfac.step_diagnostics(layers, params, params, params)
    number: int = sum(sum(kinds.values()) for kinds in tekfac.memory_usage(stepped).values())
    slots = tekfac.make_slots(loss_fn, layers, params, x)
    tapped = tekfac.tap(loss_fn, layers)
    print(theta, scalars, worst, balance, tekfac.stats_due(stepped), layers["a"].in_dim)
    print(clipped, sentence, step, number, slots, tapped)
    mesh = jax.make_mesh((8,), ("data",))
    divided = tekfac.kfac(0.1, layers, mesh=mesh, shard_state=True)
    lies = tekfac.opt_state_sharding(layers, mesh, divided.init(params), mesh_axis="data")
    plot.health([scalars], found, steps=[1]).savefig("health.png")
    print(lies, plot.history([scalars]), plot.spectra(found, damping=scalars))

def nnx_loss(model: nnx.Module, x: jax.Array) -> jax.Array: ...

def train_nnx(model: nnx.Module, x: jax.Array) -> None:
    layers = tekfac_nnx.find_layers(nnx_loss, model, x, skip="head")
    grad_fn = tekfac_nnx.value_grad_and_stats(nnx_loss, layers, reduction="sum")
    stats_fn = tekfac_nnx.fisher_stats(nnx_loss, layers, likelihood=tekfac.Bernoulli())
    print(grad_fn(model, x), stats_fn(model, x, key=jax.random.key(0)))
"""
MISTAKES = """
tekfac.scale_by_tekfac(layers, factors="Exact")
tekfac.scale_by_tkfac(layers, dampin=0.1)
tekfac.value_grad_and_stats(loss_fn, layers, mode="reduce")
tekfac.find_layers(loss_fn, params, x, norm="all")
tekfac.curvature(state)["a"].thetas
tekfac.device_plan(layers, "8")
tekfac.scale_by_tekfac(layers, 50)
plot.spectra([1, 2])
tekfac_nnx.find_layers(params, loss_fn, x, norm=1)
"""


@pytest.fixture(scope="module")
def complaints(tmp_path_factory):
    """The lines of the two programs in which pyright reports an error."""
    folder = tmp_path_factory.mktemp("program")
    body = "".join(f"    {line}\n" for line in MISTAKES.strip().splitlines())
    wrong = (
        PROGRAM + f"\ndef wrong(layers: tekfac.Layers, state: Any, params: Any, x: Any):\n{body}"
    )
    (folder / "right.py").write_text(PROGRAM)
    (folder / "wrong.py").write_text(wrong)
    options = {"strict": ["*.py"], "extraPaths": [str(ROOT)], "pythonVersion": "3.11"}
    (folder / "pyrightconfig.json").write_text(json.dumps(options))
    pyright = pathlib.Path(sys.executable).with_name("pyright")
    command = [str(pyright), "--pythonpath", sys.executable, "--outputjson"]
    output = subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout
    found = {"right.py": set(), "wrong.py": set()}
    for diagnostic in json.loads(output)["generalDiagnostics"]:
        path = pathlib.Path(diagnostic["file"])
        line = path.read_text().splitlines()[diagnostic["range"]["start"]["line"]].strip()
        found[path.name].add(line)
    return found


def test_a_right_program(complaints):
    """Errors that remain come from other libraries, which are only partly typed."""
    assert not {line for line in complaints["right.py"] if "tekfac" in line}


def test_a_wrong_program(complaints):
    assert set(MISTAKES.strip().splitlines()) <= complaints["wrong.py"]


def test_every_public_type_is_known():
    """All public parameters and results are typed, as `py.typed` promises."""
    tools = pathlib.Path(sys.executable).parent
    command = [str(tools / "pyright"), "--verifytypes", "tekfac_jax", "--ignoreexternal"]
    # Pyright looks for the package with the first interpreter on the path, despite --pythonpath.
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    ended = subprocess.run(
        [*command, "--outputjson"], env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    found = json.loads(ended.stdout)["typeCompleteness"]
    public = [symbol for symbol in found["symbols"] if symbol["isExported"]]
    assert len(public) > 50
    assert [symbol["name"] for symbol in public if not symbol["isTypeKnown"]] == []
    assert found["completenessScore"] == 1
