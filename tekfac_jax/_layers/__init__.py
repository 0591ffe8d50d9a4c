"""What a layer is, and the data that capture hands to the optimizer.

Imports no other folder.
"""
