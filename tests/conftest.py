"""Strict test mode: several CPU devices, checked shapes, strict float64 on request."""

import atexit
import collections
import os
import shutil
import tempfile
import zlib

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Most of the time goes into compiling programs that run only once; they need no optimisation.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Workers share what they compile; they inherit these variables.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="tekfac_jax-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import jaxtyping
import pytest

# The tests enforce the jaxtyping annotations of the pure mathematics.
jaxtyping.install_import_hook(
    "tekfac_jax._curvature",
    "beartype.beartype",
)


EVERY = 12  # the default run takes one in this many cases of a test marked `sampled`


@pytest.hookimpl(tryfirst=True)  # before -m is applied
def pytest_collection_modifyitems(items):
    """Keeps the first of every `EVERY` cases of a `sampled` test; the others become `slow`.

    With ``spread=True`` the test's id determines which case is kept, so that tests over the same
    cases run different ones.
    """
    tests = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("sampled") and not item.get_closest_marker("slow"):
            tests[item.nodeid.split("[")[0]].append(item)
    for test, cases in tests.items():
        spread = cases[0].get_closest_marker("sampled").kwargs.get("spread")
        kept = zlib.crc32(test.encode()) % min(EVERY, len(cases)) if spread else 0
        for number, item in enumerate(cases):
            if number % EVERY != kept:
                item.add_marker(pytest.mark.slow)


@pytest.fixture
def x64():
    """Float64 arithmetic without implicit promotion, for comparisons with an oracle.

    Strict promotion cannot be the default: optax's Adam raises a float to an integer array.
    """
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def standard_promotion():
    """Implicit promotion: optax itself mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def x64_standard(x64):
    """Float64, but with implicit promotion: Flax's normalisations need it."""
    with jax.numpy_dtype_promotion("standard"):
        yield
