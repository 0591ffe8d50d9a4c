"""What the optimizer remembers: making, reading, checking and saving it.

May import `_curvature` and `_layers`.
"""

import importlib


def __getattr__(name: str) -> object:
    """Finds types for old pickles, which name the module that this folder has replaced."""
    moved = {
        "LayerState": "layout.LayerState",
        "Meaning": "layout.StateKind",
        "ScaleByTekfacState": "layout.ScaleByTekfacState",
        "ClipByKlState": "layout.ClipByKlState",
    }
    if name not in moved:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = moved[name].rpartition(".")
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
