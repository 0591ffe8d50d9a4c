"""Flax in, statistics out.

Imports `_tracing`, `_curvature`, `_layers`, `_arguments`, and `_state.check_state`, which reads the
eigenbases that an optimizer state holds.
"""
