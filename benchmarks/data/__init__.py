"""Data sets: the files, their readers, and what happens to a batch on its way to the device.

Modules here may import `errors`.
"""
