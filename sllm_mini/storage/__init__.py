"""The hierarchy on one machine: shared memory that a store lends to other processes, and what fills and empties it.

Taught in chapters 03 and 05.
"""
