"""The mathematics of one layer, as pure functions.

Imports `_layers`.
"""
