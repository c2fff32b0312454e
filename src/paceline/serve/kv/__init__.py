"""Blocks of keys and values: who holds which, and what of them may be used again."""
