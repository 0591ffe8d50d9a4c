"""Algorithm 1, the family of four, and the ready optimizers.

May import every folder except `_capture` and `_tracing`. Capture and optimizer meet only in the
data types of `_layers/statistics.py`.
"""
