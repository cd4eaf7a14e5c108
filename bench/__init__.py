"""Microbenchmarks: ``python -m bench`` prints every op beside its rivals."""
