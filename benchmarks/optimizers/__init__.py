"""The optimizers under comparison, by name, and those that no dependency provides.

Modules here may import `errors`.
"""
