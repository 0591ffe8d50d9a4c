"""Small problems for `benchmarks.workloads`, one module per family, and how one is trained.

Modules here may import `data`, `models`, `optimizers`, `training` and `errors`.
"""
