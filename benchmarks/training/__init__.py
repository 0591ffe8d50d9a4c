"""Training, timing and tuning: steps and runs, the search for settings, and the command line.

Modules here may import `data`, `models`, `optimizers` and `errors`.
"""
