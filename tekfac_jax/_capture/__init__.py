"""Flax in, statistics out.

Imports `_tracing`, `_curvature`, `_layers`, `_arguments`, and `_state.check_state` for the
eigenbasis that an optimizer state holds.
"""
