"""Symmetry groups: operations, and the symbols that stand for them."""
