"""Flax in, statistics out.

May import `_tracing`, `_curvature`, `_layers`, `_arguments`, and of `_state` only `check_state`,
which reads the eigenbases from an optimizer's state.
"""
