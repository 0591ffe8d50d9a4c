"""What the optimizer remembers: making, reading, checking and saving it.

Imports `_curvature` and `_layers`.
"""
