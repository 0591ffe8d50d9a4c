"""The mathematics of one layer, as pure functions.

May import `_layers`.
"""
