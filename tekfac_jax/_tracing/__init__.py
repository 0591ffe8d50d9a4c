"""Everything that knows Flax modules or jaxprs: it finds the layer calls in a program.

Imports `_layers` and `_arguments`.
"""
