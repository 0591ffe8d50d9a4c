"""Which device works on what, and how the results are combined.

May import `_state`, `_curvature` and `_layers`.
"""
