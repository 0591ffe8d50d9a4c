"""What a layer is, and the data that capture hands to the optimizer.

May import no other folder.
"""

import importlib


def __getattr__(name: str) -> object:
    """Finds types for old pickles, which name the module that this folder has replaced."""
    moved = {
        "Layers": "spec.Layers",
        "LayerSpec": "spec.LayerSpec",
        "Capture": "statistics.Capture",
        "Statistics": "statistics.Statistics",
    }
    if name not in moved:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = moved[name].rpartition(".")
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
