"""Which device works on what, and how the parts come together.

Imports `_state`, `_curvature` and `_layers`.
"""
