"""Everything that knows Flax modules or jaxprs. It finds the layer calls in a program.

May import `_layers` and `_arguments`.
"""
