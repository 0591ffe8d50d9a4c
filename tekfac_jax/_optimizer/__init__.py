"""Algorithm 1, the family of four, and the ready optimizers.

Imports every folder but `_capture` and `_tracing`: both sides meet in `_layers/statistics.py` only.
"""
