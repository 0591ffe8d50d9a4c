"""Networks: those that are trained, and large ones that are known by their layer shapes alone.

Modules here may import `data` and `errors`.
"""
