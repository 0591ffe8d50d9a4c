"""Benchmarks: TEKFAC and its siblings against SGD and Adam. Run `python -m benchmarks.train`."""

import importlib.util
import os

# Before numpy and jax are imported: with its default threads OpenBLAS makes the
# eigendecompositions on CPU slower, and their times erratic.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

_missing = [
    package
    for package in ("matplotlib", "PIL", "rich", "sklearn")
    if importlib.util.find_spec(package) is None
]
if _missing:
    raise ImportError(
        f"the benchmarks need {', '.join(_missing)}: pip install 'tekfac_jax[benchmarks]'"
    )
