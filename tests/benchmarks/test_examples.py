"""The examples on several devices and in several processes: the numbers of one device."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import tekfac_jax as tekfac
from benchmarks import scaling
from benchmarks.examples import pmap, shard_map, sharded_jit
from benchmarks.examples.processes import LOST

ROOT = Path(__file__).parents[2]
CLOSE = 1e-4  # relative, float32 after ten steps
STEPS = 10


@pytest.fixture(scope="module")
def expected():
    """Parameters after some steps on one device."""
    with jax.numpy_dtype_promotion("standard"):
        state, _ = sharded_jit.train(STEPS, devices=1)
    return jax.tree.leaves(state.params)


def assert_close(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        difference = np.linalg.norm(np.asarray(one) - np.asarray(other))
        assert difference <= CLOSE * np.linalg.norm(other)


WAYS = {
    "sharded_jit": sharded_jit.train,
    "shard_map": shard_map.train,
    "shard_map without check_vma": lambda *args: shard_map.train(*args, check_vma=False),
    "pmap": pmap.train,
}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
@pytest.mark.filterwarnings("ignore:.*pmap:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*jax_utils:DeprecationWarning")
@pytest.mark.parametrize("way", WAYS)
def test_four_devices_are_one(way, expected):
    state, loss = WAYS[way](STEPS, 4)
    assert_close(jax.tree.leaves(state.params), expected)
    assert np.isfinite(loss)


# --- the scaling benchmark -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
def test_scaling_counts_what_travels():
    """In every step the gradient, at the intervals triangles of factors, Θ, and the bases."""
    with jax.enable_x64(True):
        problem = scaling.Problem()
        expected = problem.on_one_device()
        params, program = problem.by_jit(4, shard_state=False)
        found = scaling.traffic(program)
    assert scaling.difference(params, expected) <= 1e-10
    gradient = 8 * sum(p.size for p in jax.tree.leaves(params))
    assert found.every_step == gradient
    at_least = at_most = 0
    for spec in problem.layers.values():
        i, o = spec.in_dim, spec.out_dim
        triangles, bases = (i * (i + 1) + o * (o + 1)) // 2, i**2 + o**2
        at_least += triangles + i * o + bases
        at_most += triangles + i + o + i * o + bases
    assert 8 * at_least <= found.where_due <= 8 * at_most


@pytest.mark.parametrize("name", scaling.NETWORKS)
def test_large_networks_are_shared_out_evenly(name):
    for devices in (2, 4, 8, 16, 32, 64):
        plan = tekfac.device_plan(scaling.NETWORKS[name], devices)
        assert plan.balance <= 1.15 * plan.bound


def test_layer_lists_of_the_large_networks():
    """Parameters as published: 25.5 million, 86 and 304 (kernels and their biases)."""
    sizes = {
        name: sum(spec.in_dim * spec.out_dim for spec in layers.values()) / 1e6
        for name, layers in scaling.NETWORKS.items()
    }
    assert sizes["ResNet-50"] == pytest.approx(25.5, abs=0.1)
    assert sizes["ViT-B"] == pytest.approx(86.4, abs=0.4)
    assert sizes["ViT-L"] == pytest.approx(304, abs=1)


def test_arithmetic_of_a_large_network():
    """Multiply-adds of ResNet-50 as published (3.8 billion; 4.1 with the stride where it is)."""
    layers = scaling.NETWORKS["ResNet-50"]
    multiply_adds = sum(s.positions * s.in_dim * s.out_dim for s in layers.values()) / 1e9
    assert multiply_adds == pytest.approx(4.1, abs=0.1)
    one, many = (scaling.on_paper(layers, n) for n in (1, 64))
    assert one.gradients == one.curvature == 0
    assert one.forward_backward == pytest.approx(many.forward_backward)
    assert many.decompositions < one.decompositions / 4


# --- processes -------------------------------------------------------------------------------


class Job:
    """So many processes of `benchmarks.examples.processes`, on this machine."""

    def __init__(self, processes, directory, steps, timeout=60, save_every=3):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        # One CPU device each, whatever the tests themselves run on.
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        self.logs = [directory / f"log_{processes}_{i}.txt" for i in range(processes)]
        self.running = []
        for i, log in enumerate(self.logs):
            command = [
                sys.executable, "-m", "benchmarks.examples.processes",
                "--processes", processes, "--process", i, "--coordinator", f"localhost:{port}",
                "--directory", directory / "checkpoints", "--steps", steps,
                "--save-every", save_every, "--timeout", timeout,
            ]  # fmt: skip
            with log.open("w") as output:
                self.running.append(
                    subprocess.Popen(
                        list(map(str, command)), cwd=ROOT, env=environment, stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )  # fmt: skip

    def wait(self, seconds):
        """The exit codes; kills and fails whatever runs longer."""
        end = time.monotonic() + seconds
        try:
            return [p.wait(max(0.1, end - time.monotonic())) for p in self.running]
        finally:
            for process in self.running:
                process.kill()

    def log(self, i):
        return self.logs[i].read_text()


def parameters(directory):
    with np.load(directory / "checkpoints" / "parameters.npz") as saved:
        return [saved[name] for name in saved.files]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_are_one(processes, expected, tmp_path):
    job = Job(processes, tmp_path, STEPS)
    assert job.wait(300) == [0] * processes, job.log(0)
    assert_close(parameters(tmp_path), expected)


def started(job, step, i=1):
    """Waits until a process has come to a step."""
    end = time.monotonic() + 200
    while f"step {step}:" not in job.log(i) and time.monotonic() < end:
        time.sleep(0.2)
    return job


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_without_the_coordinator_jax_ends_the_others(tmp_path):
    """The first process holds the job together; what is left ends at once, with JAX's message."""
    job = started(Job(2, tmp_path, 100_000, timeout=30, save_every=100_000), 5)
    job.running[0].send_signal(signal.SIGKILL)
    codes = job.wait(90)
    assert codes[0] == -signal.SIGKILL
    assert codes[1] != 0
    assert "process" in job.log(1) or "coordination" in job.log(1).lower()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_lost_process_ends_the_job_which_another_number_continues(expected, tmp_path):
    """The one that is left ends with a sentence within the time limit, and nothing is lost."""
    assert Job(2, tmp_path, 6).wait(200) == [0, 0]
    job = started(Job(2, tmp_path, 100_000, timeout=30, save_every=100_000), 12)
    job.running[1].send_signal(signal.SIGKILL)
    codes = job.wait(90)
    assert codes == [LOST, -signal.SIGKILL], job.log(0)
    assert "another process was lost" in job.log(0)
    assert "continues from the last checkpoint" in job.log(0)
    single = Job(1, tmp_path, STEPS)
    assert single.wait(200) == [0], single.log(0)
    assert "step 6:" not in single.log(0)  # continued, not started again
    assert_close(parameters(tmp_path), expected)
