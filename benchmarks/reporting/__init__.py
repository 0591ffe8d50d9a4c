"""Tables, curves and JSON files of finished runs, and reading them back.

Modules here may import `training`, `problems` and `errors`.
"""
