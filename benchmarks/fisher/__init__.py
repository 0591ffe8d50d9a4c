"""Exact Fisher blocks, and the errors of their approximations.

Modules here may import `errors`.
"""
